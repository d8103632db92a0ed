"""The recommendation service under load: changing catalogues, more than it can do, and an end while it works."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from beam_search import catalogue
from fastapi.testclient import TestClient
from tiny_models import noisy_copy, target

from polyspec.bench.load import Phase, closed, opened
from polyspec.modalities.recommendation.items import Items
from polyspec.modalities.recommendation.serve import Recommender, application
from polyspec.serving import server

IDS = [3 * i + 1 for i in range(60)]
TOKENS = {item: row.tolist() for item, row in zip(IDS, np.asarray(catalogue()), strict=True)}
PATH = "/v1/recommendations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recommender")
    target("llama").save_pretrained(path)
    noisy_copy(target("llama"), 0.2).save_pretrained(path / "draft")
    Items(IDS, catalogue(), [f"item {i}" for i in IDS], prefix=[2]).save(path)
    return path


class Counted:
    """An ASGI application that writes down which requests it was given and which answers it has sent whole."""

    def __init__(self, app: Any):
        self.app, self.state, self.accepted, self.answered = app, app.state, 0, Counter[int]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self.app(scope, receive, send)
            return
        self.accepted += 1
        status = 0

        async def watched(message: Any) -> None:
            nonlocal status
            await send(message)
            status = message.get("status", status)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.answered[status] += 1

        await self.app(scope, receive, watched)


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[tuple[Any, Counted, str]]:
    """The service behind uvicorn, as `task=serve` runs it, in a thread."""
    app = Counted(application(target=str(folder), dtype="float32", **settings))
    served = server(app, "127.0.0.1", 0, 30)
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        while not served.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield served, app, f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}"
    finally:
        served.should_exit = True
        thread.join(60)


def test_removed_items_never_come_back_and_added_ones_do_while_requests_run(folder: Path) -> None:
    with TestClient(application(target=str(folder), dtype="float32", queue=500)) as client:
        before = [i["item_id"] for i in client.post(PATH, json={"history": [1], "k": 20}).json()["items"]]
        stop, answers = threading.Event(), []

        def asking() -> None:
            while not stop.is_set():
                asked = time.monotonic()
                answer = client.post(PATH, json={"history": [1], "k": 20})
                answers.append((asked, time.monotonic(), answer))

        def answered_since(moment: float) -> int:
            return sum(asked > moment for asked, _, _ in list(answers))

        changes: list[tuple[float, int, bool, float]] = []  # (begun, item, there afterwards, done)
        with ThreadPoolExecutor(3) as pool:
            workers = [pool.submit(asking) for _ in range(3)]
            try:
                for item in (*before[:6], *before[:2]):
                    for there in (False, True):
                        begun = time.monotonic()
                        if there:
                            done = client.post("/v1/items", json=[{"item_id": item, "tokens": TOKENS[item]}])
                        else:
                            done = client.delete(f"/v1/items/{item}")
                        assert done.status_code == (201 if there else 200)
                        changes.append((begun, item, there, time.monotonic()))
                        end = time.monotonic() + 30
                        while answered_since(changes[-1][-1]) < 2:  # at least two whole answers under every catalogue
                            assert time.monotonic() < end
                            time.sleep(0.005)
            finally:
                stop.set()
            assert [w.result() for w in workers] == [None] * 3
    assert len(answers) > 20
    for asked, ended, answer in answers:
        assert answer.status_code == 200
        found = [i["item_id"] for i in answer.json()["items"]]
        assert len(found) == 20 and set(found) <= set(IDS)
        for (_, item, there, done), later in pairwise(changes):
            if not there and done < asked and ended < later[0]:
                assert item not in found, "it was removed before the question and came back after the answer"
    last = [[i["item_id"] for i in a.json()["items"]] for asked, _, a in answers if asked > changes[-1][-1]]
    assert last and all(found == before for found in last), "all are back"


def test_a_search_of_an_old_catalogue_fails_the_test_above(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, old = Recommender.search, {}

    def late(self: Recommender, *given: Any) -> Any:
        if not old:
            old["recommender"] = copy(self)
            old["recommender"].pipes = {name: copy(pipe) for name, pipe in self.pipes.items()}
        return search(old["recommender"], *given)

    monkeypatch.setattr(Recommender, "search", late)
    with pytest.raises(AssertionError, match="removed before the question"):
        test_removed_items_never_come_back_and_added_ones_do_while_requests_run(folder)


def test_what_one_process_changes_the_others_recommend_from(folder: Path, tmp_path: Path) -> None:
    settings = {"target": str(folder), "dtype": "float32", "catalogue": str(tmp_path / "items")}
    with TestClient(application(**settings)) as one, TestClient(application(**settings)) as other:

        def best(client: TestClient) -> int:
            return client.post(PATH, json={"history": [1], "k": 1}).json()["items"][0]["item_id"]

        first = best(one)
        assert one.delete(f"/v1/items/{first}").json() == {"items": 59}
        assert best(other) == best(one) != first
        assert other.get("/v1/items").json() == {"items": 59}
        assert other.delete(f"/v1/items/{first}").status_code == 422
        with ThreadPoolExecutor(2) as pool:  # changes at the same time are both kept
            gone = [i for i in IDS[1:] if i != first][:2]
            assert [r.status_code for r in pool.map(lambda c, i: c.delete(f"/v1/items/{i}"), (one, other), gone)] == [200, 200]
        assert one.get("/v1/items").json() == other.get("/v1/items").json() == {"items": 57}
        too_high = [{"item_id": 5000, "tokens": [10**6] * len(TOKENS[1])}]
        assert one.post("/v1/items", json=too_high).status_code == 422
        assert other.post("/v1/items", json=[{"item_id": first, "tokens": TOKENS[first]}]).status_code == 201
        assert best(one) == first
        with TestClient(application(**settings)) as late:
            assert late.get("/v1/items").json() == {"items": 58}
    with TestClient(application(target=str(folder), dtype="float32")) as alone:
        assert alone.get("/v1/items").json() == {"items": 60}, "the model's own catalogue stays as it is"


def test_three_times_what_it_can_do_is_shed_with_503_and_then_it_recovers(folder: Path) -> None:
    choose = random.Random(0)
    with running(folder, batch=2, queue=4) as (_, app, url):

        async def phases() -> list[Phase]:
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

                async def ask(phase: Phase) -> None:
                    answer = await client.post(PATH, json={"history": [1, 4], "k": 20})
                    phase.statuses[str(answer.status_code)] += 1
                    if answer.status_code == 503:
                        assert int(answer.headers["retry-after"]) >= 1

                full = await closed(ask, Phase("capacity"), 3, 1.0)
                rate = full.statuses["200"] / full.seconds
                much = await opened(ask, Phase("3x", 3 * rate), 1.5, choose)
                return [full, much, await closed(ask, Phase("after"), 1, 0.5)]

        full, much, after = asyncio.run(phases())
    assert set(full.statuses) == {"200"}
    assert set(much.statuses) == {"200", "503"}
    assert much.statuses["503"] > 0.2 * sum(much.statuses.values())
    assert set(after.statuses) == {"200"}, "it recovers"
    assert app.accepted == sum(app.answered.values())


def test_an_end_under_load_answers_every_request_that_was_accepted(folder: Path) -> None:
    received = Counter[str]()
    with running(folder, batch=2, queue=64) as (served, app, url):

        def client(_: int) -> None:
            with httpx.Client(timeout=60) as http:
                while True:
                    try:
                        received[str(http.post(url + PATH, json={"history": [1, 4], "k": 20}).status_code)] += 1
                    except httpx.TransportError as error:
                        received[type(error).__name__] += 1
                        return

        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(client, n) for n in range(12)]
            end = time.monotonic() + 30
            while (app.answered[200] < 12 or app.accepted - sum(app.answered.values()) < 3) and time.monotonic() < end:
                time.sleep(0.001)  # until requests are being worked on and others wait
            waiting = app.accepted - sum(app.answered.values())
            served.should_exit = True  # what SIGTERM does
            for one in asked:
                one.result(60)
    assert waiting > 0, "requests were being worked on"
    assert app.accepted == sum(app.answered.values()), "every accepted request was answered"
    assert set(app.answered) <= {200, 503} and app.answered[200] > 0
    assert {int(s): n for s, n in received.items() if s.isdigit()} == dict(app.answered), "and every answer arrived"


def test_a_service_that_is_told_to_stop_lets_go_of_kept_connections(folder: Path) -> None:
    with running(folder) as (_, app, url), httpx.Client(base_url=url) as http:
        assert "connection" not in http.post(PATH, json={"history": [1]}).headers
        app.state.closing = True
        for body, status in (({"history": [1]}, 200), ({"history": []}, 422)):
            answer = http.post(PATH, json=body)
            assert (answer.status_code, answer.headers["connection"]) == (status, "close")
