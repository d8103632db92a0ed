"""Concurrent requests gathered into batches for one worker: a bounded queue in, an answer or an error each out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from polyspec.errors import PolyspecError
from polyspec.lengths import positive

Q = TypeVar("Q")
A = TypeVar("A")


class Overloaded(PolyspecError):
    """The queue is full, or the service is shutting down; `retry_after` seconds are likely to suffice."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(PolyspecError):
    """A request was not answered in time."""


class Batcher(Generic[Q, A]):
    """Hands requests to `work` (list of requests -> an answer or an exception each), in a thread of its own.

    A batch is what is waiting, at most `batch`, once the first of it has waited `wait_ms`. `queue` requests may wait; more
    are refused with Overloaded. A request whose deadline passes is answered with DeadlineExceeded, and not worked on if it
    was still waiting. `close` refuses new requests and returns when all accepted ones are answered.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Q]], Sequence[A | Exception]],
        *,
        batch: int = 16,
        wait_ms: float = 2.0,
        queue: int = 64,
    ):
        self.work, self.batch, self.wait = work, positive("batch", batch), wait_ms / 1000
        self.limit = positive("queue", queue)
        self.waiting: asyncio.Queue[tuple[Q, asyncio.Future[A]]] = asyncio.Queue()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="polyspec")
        self.seconds = 0.1  # a batch's, lately
        self.closing = False
        self.loop: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return self.waiting.qsize()

    @property
    def retry_after(self) -> int:
        """Whole seconds until the queue as it is will have been worked off."""
        return max(1, math.ceil((1 + self.depth / self.batch) * self.seconds))

    def start(self) -> None:
        """Begin to work; called inside the event loop."""
        self.loop = asyncio.create_task(self.run())

    async def submit(self, request: Q, deadline: float | None = None) -> A:
        """The answer to `request`, at most `deadline` seconds later. Raises Overloaded, DeadlineExceeded, or what `work`
        answered."""
        if self.closing:
            raise Overloaded("the service is shutting down", self.retry_after)
        if self.depth >= self.limit:
            raise Overloaded(f"{self.depth} requests are waiting; try again later", self.retry_after)
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((request, answer))
        try:
            return await asyncio.wait_for(answer, deadline)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {deadline:g} s") from error

    async def run(self) -> None:
        while True:
            gathered = [await self.waiting.get()]
            if self.wait and self.depth + 1 < self.batch:
                await asyncio.sleep(self.wait)
            while len(gathered) < self.batch and not self.waiting.empty():
                gathered.append(self.waiting.get_nowait())
            await self.answer([(q, a) for q, a in gathered if not a.done()])
            for _ in gathered:
                self.waiting.task_done()

    async def answer(self, gathered: list[tuple[Q, asyncio.Future[A]]]) -> None:
        if not gathered:
            return
        start = time.monotonic()
        requests = [q for q, _ in gathered]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self.worker, self.work, requests)
        except Exception as error:  # a fault of the work, not of one request: all of them have to hear of it
            answers = [error] * len(gathered)
        self.seconds += 0.2 * (time.monotonic() - start - self.seconds)
        for (_, future), found in zip(gathered, answers, strict=True):
            if future.done():  # its deadline passed meanwhile
                continue
            if isinstance(found, Exception):
                future.set_exception(found)
            else:
                future.set_result(found)

    async def close(self) -> None:
        """Refuse new requests, answer the accepted ones, stop."""
        self.closing = True
        await self.waiting.join()
        if self.loop is not None:
            self.loop.cancel()
        self.worker.shutdown()
