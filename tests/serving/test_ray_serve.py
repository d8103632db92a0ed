"""The service on Ray Serve: two replicas, one of them killed under load. Needs polyspec[ray]."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from beam_search import catalogue
from tiny_models import noisy_copy, target

from polyspec.modalities.recommendation.items import Items

IDS = [3 * i + 1 for i in range(60)]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs polyspec[ray]")


def save_recommender(path: Path) -> Path:
    target("llama").save_pretrained(path)
    noisy_copy(target("llama"), 0.2).save_pretrained(path / "draft")
    Items(IDS, catalogue(), [f"item {i}" for i in IDS], prefix=[2]).save(path)
    return path


def command(folder: Path, port: int) -> list[str]:
    given = ["task=serve", "serve=ray", "modality=recommendation", f"target={folder}", "dtype=float32", "serve.cpus=0.5"]
    return [sys.executable, "-m", "polyspec", *given, f"serve.port={port}"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is there")
def test_without_ray_one_line_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, 1), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install 'polyspec[ray]'" in done.stderr


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, str]]:
    where = tmp_path_factory.mktemp("ray")
    port = free_port()
    errors = where / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(command(save_recommender(where / "model"), port), cwd=where, stderr=stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or ready(url), 180)
        assert process.poll() is None, errors.read_text()[-3000:]
        yield psutil.Process(process.pid), url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.3)


def replicas(process: psutil.Process) -> set[int]:
    found = set()
    for child in process.children(recursive=True):
        try:
            if "ServeReplica" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
        except psutil.Error:
            continue
    return found


def ask(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/recommendations", json={"history": [1, 4], "k": 5, **body}, timeout=60)


@needs_ray
@pytest.mark.slow
def test_replicas_answer_refuse_and_share_a_catalogue(service: tuple[psutil.Process, str]) -> None:
    process, url = service
    assert len(replicas(process)) == 2
    best = ask(url).json()["items"][0]["item_id"]
    for body in ({"k": 0}, {"k": 10**9}, {"history": [2]}, {"deny": IDS}, {"deadline_ms": -1}):
        assert ask(url, **body).status_code == 422
    content = {"content-type": "application/json"}
    assert httpx.post(f"{url}/v1/recommendations", content=b"{", headers=content).status_code == 422
    assert httpx.post(f"{url}/v1/recommendations", content=b" " * 10**7, headers=content).status_code == 413
    assert httpx.delete(f"{url}/v1/items/{best}").json() == {"items": 59}
    for _ in range(30):  # whichever replica answers
        assert best not in [i["item_id"] for i in ask(url).json()["items"]]
        assert httpx.get(f"{url}/v1/items").json() == {"items": 59}
    tokens = catalogue()[IDS.index(best)].tolist()
    assert httpx.post(f"{url}/v1/items", json=[{"item_id": best, "tokens": tokens}]).status_code == 201
    for _ in range(30):
        assert ask(url).json()["items"][0]["item_id"] == best


@needs_ray
@pytest.mark.slow
def test_a_replica_killed_under_load_is_replaced_and_only_what_it_was_doing_fails(
    service: tuple[psutil.Process, str],
) -> None:
    process, url = service
    stop, clients, found, failed_at = threading.Event(), 6, Counter[str](), []

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            while not stop.is_set():
                try:
                    status = str(http.post(f"{url}/v1/recommendations", json={"history": [1, 4], "k": 20}).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                found[status] += 1
                if status != "200":
                    failed_at.append(time.monotonic())

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(3)
        before = replicas(process)
        victim = min(before)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(replicas(process) - {victim}) == 2, 90)
        time.sleep(5)
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    assert found["200"] > 20
    assert sum(found.values()) - found["200"] <= clients, found
    assert all(killed - 0.1 < at < killed + 10 for at in failed_at)
    assert len(replicas(process) - before) == 1
    assert ask(url).status_code == 200


@needs_ray
@pytest.mark.slow
def test_sigterm_under_load_finishes_what_was_accepted(service: tuple[psutil.Process, str]) -> None:
    """The last test here: the service ends with it."""
    process, url = service
    found: list[int | str] = []

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            while True:
                try:
                    found.append(http.post(f"{url}/v1/recommendations", json={"history": [1, 4], "k": 20}).status_code)
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError) as error:
                    found.append(type(error).__name__)
                    return
                if found[-1] != 200:  # refused: the routes are gone
                    return

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(90)
    process.wait(90)
    assert 200 in found
    assert not {500, 504} & set(found), Counter(found)
