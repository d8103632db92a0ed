"""The recommendation service: answers, refusals with a message, changes while it runs, an end without losses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from beam_search import catalogue
from fastapi.testclient import TestClient
from tiny_models import noisy_copy, target

import polyspec
from polyspec.modalities.recommendation.items import Items
from polyspec.modalities.recommendation.serve import application

IDS = [3 * i + 1 for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommender as `task=train` leaves it, untrained."""
    path = tmp_path_factory.mktemp("recommender")
    target("llama").save_pretrained(path)
    noisy_copy(target("llama"), 0.2).save_pretrained(path / "draft")
    Items(IDS, catalogue(), [f"item {i}" for i in IDS], prefix=[2]).save(path)
    (path / "users.json").write_text(json.dumps({"7": [1, 4, 10], "ann": [1000000, 4]}))
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(application(target=str(folder), dtype="float32", users=str(folder / "users.json"))) as found:
        yield found


def ask(client: Any, **body: Any) -> Any:
    return client.post("/v1/recommendations", json=body)


def test_lists_are_those_of_the_pipeline_whatever_they_are_batched_with(client: TestClient, folder: Path) -> None:
    pipe = polyspec.pipeline("recommendation", target=str(folder), dtype="float32")
    histories = [[1], [4, 7, 10], [13, 16, 19, 22], [178]] * 4
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: ask(client, history=histories[n], k=1 + n, deny=[7]).json(), range(16)))
    for n, answer in enumerate(answers):
        expected = pipe(histories[n], k=1 + n, deny=[7]).outputs[0]
        assert [i["item_id"] for i in answer["items"]] == [r.item_id for r in expected]
        assert answer["recipe"] == "atspeed_s" and answer["guarantee"] == "exact" and not answer["short"]
    for recipe in ("autoregressive", "atspeed_r"):
        assert ask(client, history=[1], k=3, recipe=recipe).json()["recipe"] == recipe
    drawn = [ask(client, history=[1], k=5, do_sample=True, seed=3).json()["items"] for _ in range(2)]
    assert drawn[0] == drawn[1]
    metrics = client.get("/metrics").text
    assert 'polyspec_request_seconds_count{path="/v1/recommendations",status="200"}' in metrics
    for name in ("polyspec_tokens_per_call", "polyspec_acceptance_rate", "polyspec_queue_depth 0.0"):
        assert name in metrics


def test_known_users_and_filters_that_leave_few(client: TestClient) -> None:
    named, given = ask(client, user=7, k=4), ask(client, history=[1, 4, 10], k=4)
    assert [i["item_id"] for i in named.json()["items"]] == [i["item_id"] for i in given.json()["items"]]
    assert ask(client, user="ann", k=2).status_code == 200  # an item that is gone is passed over
    short = ask(client, history=[1], k=5, allow=[4, 7]).json()
    assert short["short"] and {i["item_id"] for i in short["items"]} == {4, 7}


@pytest.mark.parametrize(
    ("body", "status", "fragment"),
    [
        ({"history": [1], "k": 0}, 422, "greater than or equal to 1"),
        ({"history": [1], "k": 10**9}, 422, "less than or equal to 1000"),
        ({"history": [1], "k": 61}, 422, "60 items there are"),
        ({"history": [1], "k": 1.5}, 422, "valid integer"),
        ({"history": []}, 422, "history is empty"),
        ({"history": [2]}, 422, "not known: 2"),
        ({"history": ["1"]}, 422, "valid integer"),
        ({"history": [1], "deny": [99999]}, 422, "99999"),
        ({"history": [1], "deny": IDS}, 422, "leave no item"),
        ({"history": [1], "allow": []}, 422, "leave no item"),
        ({"history": [1], "user": 7}, 422, "one of them"),
        ({}, 422, "one of them"),
        ({"user": "bob"}, 404, "not known"),
        ({"history": [1], "recipe": "atsped_s"}, 422, "atspeed_s"),
        ({"history": [1], "top": 3}, 422, "Extra inputs"),
        ({"history": [1], "seed": -1}, 422, "greater than or equal to 0"),
        ({"history": [1] * 100_001}, 422, "at most 100000"),
    ],
)
def test_bad_requests_get_a_message(client: TestClient, body: dict[str, Any], status: int, fragment: str) -> None:
    answer = ask(client, **body)
    assert answer.status_code == status
    assert fragment in answer.text


def test_malformed_and_oversized_bodies_are_refused(client: TestClient) -> None:
    def post(content: Any) -> Any:
        return client.post("/v1/recommendations", content=content, headers={"content-type": "application/json"})

    assert post(b"{").status_code == 422
    assert post(b"[1]").status_code == 422
    assert post(b"\xff\xfe").status_code in (400, 422)
    assert post(b" " * 10_000_000).status_code == 413
    assert post(iter([b" " * 700_000] * 2)).status_code == 413  # chunked: no length is said
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True}
    assert "/v1/recommendations" in client.get("/openapi.json").json()["paths"]


def test_items_come_and_go_while_it_serves(client: TestClient) -> None:
    best = ask(client, history=[1], k=1).json()["items"][0]["item_id"]
    assert client.delete(f"/v1/items/{best}").json() == {"items": 59}
    assert ask(client, history=[1], k=1).json()["items"][0]["item_id"] != best
    assert client.delete(f"/v1/items/{best}").status_code == 422
    tokens = catalogue()[IDS.index(best)].tolist()
    back = client.post("/v1/items", json=[{"item_id": best, "tokens": tokens, "title": "back"}])
    assert back.status_code == 201 and back.json() == client.get("/v1/items").json() == {"items": 60}
    assert ask(client, history=[1], k=1).json()["items"][0] | {"score": 0} == {"item_id": best, "title": "back", "score": 0}
    for wrong, fragment in (
        ([{"item_id": best, "tokens": tokens}], "more than once"),
        ([{"item_id": 5000, "tokens": tokens[:-1]}], "tokens each"),
        ([{"item_id": 5000, "tokens": [10**6] * len(tokens)}], "the model knows"),
        ([{"item_id": 5000, "tokens": tokens}, {"item_id": 5001, "tokens": [1]}], "equally many"),
    ):
        answer = client.post("/v1/items", json=wrong)
        assert answer.status_code == 422 and fragment in answer.text
    assert client.get("/v1/items").json() == {"items": 60}


def test_a_missed_deadline_and_a_full_queue_are_said(folder: Path) -> None:
    app = application(target=str(folder), dtype="float32", batch=1, wait_ms=0, queue=1)
    with TestClient(app) as client, ThreadPoolExecutor(12) as pool:
        assert ask(client, history=[1], deadline_ms=0.01).status_code == 504
        found = list(pool.map(lambda _: ask(client, history=[1], k=20), range(24)))
        assert {r.status_code for r in found} == {200, 503}
        assert all(int(r.headers["retry-after"]) >= 1 for r in found if r.status_code == 503)
        assert ask(client, history=[1]).status_code == 200


def test_the_command_serves_and_ends_without_losing_what_it_accepted(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "polyspec", "task=serve", "modality=recommendation", f"target={folder}"]
    process = subprocess.Popen(
        [*command, f"serve.port={port}", "dtype=float32"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)

        def one(n: int) -> int | str:
            try:
                return httpx.post(f"{url}/v1/recommendations", json={"history": [1, 4], "k": 20}, timeout=30).status_code
            except (httpx.ConnectError, httpx.RemoteProtocolError):
                return "refused"  # the connection was closed before the request was read

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(one, n) for n in range(64)]
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGTERM)
            found = [r.result() for r in running]
        assert process.wait(30) == 0 or process.returncode == -signal.SIGTERM
        assert set(found) <= {200, 503, "refused"} and 200 in found
    finally:
        process.kill()


def test_the_bench_loads_a_service(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "polyspec", "task=bench", "serve=local", "modality=recommendation", "dtype=float32"]
    more = [f"target={folder}", "bench.prompts=[[1,4],[7]]", "bench.load.seconds=1", "bench.load.clients=4"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    full, part = json.loads((tmp_path / "bench-recommendation" / "load.json").read_text())["phases"]
    assert full["errors"] == part["errors"] == 0
    assert full["answered_per_second"] > part["answered_per_second"] > 0
    assert 0 < part["p50_ms"] <= part["p95_ms"] <= part["p99_ms"]
    assert "at capacity" in done.stdout and "80% of it" in done.stdout


def test_the_bench_compares_lists(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "polyspec", "task=bench", "modality=recommendation", "dtype=float32"]
    more = [f"target={folder}", "bench.prompts=[[1,4],[7]]", "bench.arguments.k=5"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench-recommendation" / "results.json").read_text())["results"]
    assert [r["label"] for r in rows] == ["transformers", "plain loop", "atspeed_s"]
    assert rows[2]["same_as_plain_loop"] == 1.0
