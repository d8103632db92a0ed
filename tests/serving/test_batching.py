"""Requests are gathered, bounded, answered each for itself, and none that was accepted is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from polyspec.errors import ConfigError, InputError
from polyspec.serving.batching import Batcher, DeadlineExceeded, Overloaded


def doubled(requests: Sequence[int]) -> list[int | Exception]:
    return [InputError(f"{r} is odd") if r % 2 else 2 * r for r in requests]


def test_concurrent_requests_share_a_batch_and_each_gets_its_own_answer() -> None:
    sizes = []

    def work(requests: Sequence[int]) -> list[int | Exception]:
        sizes.append(len(requests))
        return doubled(requests)

    async def main() -> list[Any]:
        batcher = Batcher[int, int](work, batch=4, wait_ms=20)
        batcher.start()
        found = await asyncio.gather(*(batcher.submit(i) for i in range(10)), return_exceptions=True)
        await batcher.close()
        return found

    found = asyncio.run(main())
    assert [str(x) for x in found] == [f"{i} is odd" if i % 2 else str(2 * i) for i in range(10)]
    assert sizes == [4, 4, 2]


def test_a_full_queue_refuses_and_recovers() -> None:
    gate = threading.Event()

    def work(requests: Sequence[int]) -> list[int | Exception]:
        gate.wait(5)
        return doubled(requests)

    async def main() -> None:
        batcher = Batcher[int, int](work, batch=1, wait_ms=0, queue=2)
        batcher.start()
        accepted = []
        for i in (0, 2, 4):
            accepted.append(asyncio.create_task(batcher.submit(i)))
            await asyncio.sleep(0.02)  # the first is being worked on, two wait
        with pytest.raises(Overloaded) as refused:
            await batcher.submit(6)
        assert refused.value.retry_after >= 1
        gate.set()
        assert await asyncio.gather(*accepted) == [0, 4, 8]
        assert await batcher.submit(6) == 12
        await batcher.close()

    asyncio.run(main())


def test_a_deadline_is_kept_and_what_has_given_up_is_not_worked_on() -> None:
    worked: list[int] = []

    def work(requests: Sequence[int]) -> list[int | Exception]:
        worked.extend(requests)
        time.sleep(0.1)
        return doubled(requests)

    async def main() -> None:
        batcher = Batcher[int, int](work, batch=1, wait_ms=0)
        batcher.start()
        first = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.02)
        with pytest.raises(DeadlineExceeded, match=r"0\.03 s"):
            await batcher.submit(4, deadline=0.03)
        assert await first == 4
        assert await batcher.submit(6, deadline=5) == 12
        await batcher.close()

    asyncio.run(main())
    assert worked == [2, 6]


def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    def work(requests: Sequence[int]) -> list[int | Exception]:
        time.sleep(0.02)
        return doubled(requests)

    async def main() -> None:
        batcher = Batcher[int, int](work, batch=2, wait_ms=0)
        batcher.start()
        accepted = [asyncio.create_task(batcher.submit(2 * i)) for i in range(9)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="shutting down"):
            await batcher.submit(0)
        assert await asyncio.gather(*accepted) == [4 * i for i in range(9)]
        await closing

    asyncio.run(main())


def test_a_fault_of_the_work_reaches_everyone_and_the_next_batch_runs() -> None:
    def work(requests: Sequence[int]) -> list[int | Exception]:
        if 13 in requests:
            raise RuntimeError("broken")
        return doubled(requests)

    async def main() -> None:
        batcher = Batcher[int, int](work, batch=2, wait_ms=5)
        batcher.start()
        found = await asyncio.gather(batcher.submit(13), batcher.submit(2), return_exceptions=True)
        assert [str(x) for x in found] == ["broken", "broken"]
        assert await batcher.submit(2) == 4
        await batcher.close()

    asyncio.run(main())


@pytest.mark.parametrize("knobs", [{"batch": 0}, {"queue": -1}])
def test_sizes_below_one_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Batcher(doubled, **knobs)
