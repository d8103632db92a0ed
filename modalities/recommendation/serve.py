"""`polyspec task=serve modality=recommendation`: lists of items over HTTP."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import Body, FastAPI, HTTPException
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from polyspec.errors import CheckpointError, InputError, PolyspecError, unknown
from polyspec.modalities.recommendation.evaluate import bench_prompts
from polyspec.modalities.recommendation.items import FILE, Items
from polyspec.modalities.recommendation.pipeline import PLAIN, Pipeline
from polyspec.modalities.recommendation.sample import existing_sample
from polyspec.serving.app import Metrics, base_app
from polyspec.serving.batching import Batcher

LONGEST = 100_000  # item ids in a history or a filter

Ids = Annotated[list[StrictInt], Field(max_length=LONGEST)]


class Ask(BaseModel):
    """Whom to recommend what: a history or a known user."""

    model_config = ConfigDict(extra="forbid")
    history: Ids | None = Field(None, description="item ids, oldest first")
    user: StrictInt | str | None = Field(
        None, description="a user whose history the service knows, instead of a history"
    )
    k: StrictInt = Field(10, ge=1, le=1000, description="how many items")
    allow: Ids | None = Field(None, description="item ids to choose among")
    deny: Ids | None = Field(None, description="item ids to leave out")
    recipe: str | None = Field(None, description="how to decode; by default what the service was started with")
    do_sample: bool = Field(False, description="draw the list without replacement instead of searching the likeliest")
    seed: StrictInt | None = Field(None, ge=0, lt=2**62, description="fixes a drawn list")
    deadline_ms: float | None = Field(None, gt=0, description="give up after so long")


class Item(BaseModel):
    item_id: int
    title: str | None
    score: float


class Answer(BaseModel):
    items: list[Item]
    recipe: str
    guarantee: str
    short: bool = Field(description="whether fewer than k items were left to recommend")


class NewItem(BaseModel):
    model_config = ConfigDict(extra="forbid")
    item_id: StrictInt
    tokens: Annotated[list[StrictInt], Field(min_length=1, max_length=64)]
    title: str | None = None


class SharedItems:
    """A catalogue in a folder, for several processes that serve it: what one changes the others find with their next
    request, and processes that start later start with it."""

    def __init__(self, folder: str, items: Items):
        self.folder, self.seen = Path(folder), (0, 0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep the catalogue in {folder}: {error.strerror or error}") from error
        self.lock = FileLock(self.folder / "items.lock")
        with self.lock:
            if not (self.folder / FILE).exists():
                items.save(self.folder)

    def version(self) -> tuple[int, int]:
        found = (self.folder / FILE).stat()
        return found.st_mtime_ns, found.st_ino

    def stale(self) -> bool:
        """Whether there is another version than the one last loaded or saved here."""
        return self.version() != self.seen

    def load(self) -> Items:
        self.seen = self.version()  # before reading: what is replaced meanwhile is read again
        return Items.load(self.folder)

    def save(self, items: Items) -> None:
        items.save(self.folder)
        self.seen = self.version()


class Recommender:
    """Pipelines of one model, a recipe each, that share a catalogue; and the users' histories, if known."""

    def __init__(
        self, target: Any, recipe: str | None, device: Any, dtype: Any, users: str | None, catalogue: str | None = None
    ):
        first = Pipeline(target=target, recipe=recipe, device=device, dtype=dtype)
        self.default = first.method.recipe.name
        self.pipes = {self.default: first}
        for name in (PLAIN, *(() if first.draft is None else ("atspeed_s", "atspeed_r"))):
            if name not in self.pipes:
                self.pipes[name] = Pipeline(target=first.loaded, recipe=name)
        self.users = read_users(users)
        self.metrics: Metrics | None = None
        self.shared = None if catalogue is None else SharedItems(catalogue, first.items)
        self.refresh()

    @property
    def items(self) -> Any:
        return self.pipes[self.default].items

    def change_items(self, items: Any) -> None:
        """Recommend from another catalogue from the next batch on."""
        for pipe in self.pipes.values():
            pipe.items = items

    def stale(self) -> bool:
        """Whether another process has changed the catalogue."""
        return self.shared is not None and self.shared.stale()

    def refresh(self) -> None:
        """Take over what another process has changed."""
        if self.shared is not None and self.shared.stale():
            self.change_items(self.shared.load())

    def edit(self, change: Callable[[Items], Items]) -> None:
        """Recommend from `change(items)` from the next batch on, and so do the processes that share the catalogue."""
        with nullcontext() if self.shared is None else self.shared.lock:
            self.refresh()
            items = change(self.items)
            self.change_items(items)
            if self.shared is not None:
                self.shared.save(items)

    def warm_up(self) -> None:
        for pipe in self.pipes.values():
            pipe(self.items.ids[:1], k=1)

    def check(self, ask: Ask) -> None:
        """InputError, or 404, for what can be told before a request waits."""
        if (ask.history is None) == (ask.user is None):
            raise InputError("give a history or a user, one of them")
        if ask.user is not None and str(ask.user) not in self.users:
            raise HTTPException(404, f"user {ask.user!r} is not known; give a history")
        if ask.recipe is not None and ask.recipe not in self.pipes:
            raise unknown("recipe", ask.recipe, self.pipes)
        if ask.k > len(self.items):
            raise InputError(f"k = {ask.k} is more than the {len(self.items)} items there are; ask for fewer")
        self.items.prompt(self.history(ask), 1 << 30)
        self.items.allowed(ask.allow, ask.deny)

    def history(self, ask: Ask) -> list[int]:
        if ask.history is not None:
            return ask.history
        known = self.items.index  # a user may have had items that were removed since
        return [i for i in self.users[str(ask.user)] if i in known]

    def work(self, asked: Sequence[Ask]) -> list[Answer | Exception]:
        """Answers to a batch: one search for all requests of a recipe."""
        answers: list[Answer | Exception] = [InputError("not answered")] * len(asked)
        kinds: dict[tuple[str, bool], list[int]] = {}
        for n, ask in enumerate(asked):
            kinds.setdefault((ask.recipe or self.default, ask.do_sample), []).append(n)
        for (recipe, do_sample), numbers in kinds.items():
            try:
                found = self.search(recipe, do_sample, [asked[n] for n in numbers])
            except PolyspecError as error:  # one request's fault, and which one shows when each is alone
                found = [error] if len(numbers) == 1 else [self.work([asked[n]])[0] for n in numbers]
            for n, answer in zip(numbers, found, strict=True):
                answers[n] = answer
        return answers

    def search(self, recipe: str, do_sample: bool, asked: Sequence[Ask]) -> Sequence[Answer | Exception]:
        pipe = self.pipes[recipe]
        fresh = torch.randint(0, 2**62, (len(asked),)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a list that is short says so in the answer
            result = pipe(
                [self.history(a) for a in asked],
                k=[a.k for a in asked],
                allow=[a.allow for a in asked],
                deny=[a.deny for a in asked],
                seed=[f if a.seed is None else a.seed for a, f in zip(asked, fresh, strict=True)],
                do_sample=do_sample,
            )
        if self.metrics is not None:
            self.metrics.record(len(asked), result.stats)
        guarantee = pipe.method.recipe.guarantee
        return [
            Answer(items=[Item(**asdict(r)) for r in row], recipe=recipe, guarantee=guarantee, short=len(row) < a.k)
            for a, row in zip(asked, result.outputs, strict=True)
        ]


def read_users(path: str | None) -> dict[str, list[int]]:
    """{user: item ids} of a JSON file; CheckpointError if it is none."""
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(user): [int(i) for i in items] for user, items in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot read users from {path} ({error}); give JSON like {{'7': [1, 50]}}") from error


def application(
    *,
    target: Any,
    recipe: str | None = None,
    device: Any = None,
    dtype: Any = None,
    users: str | None = None,
    batch: int = 16,
    wait_ms: float = 2.0,
    queue: int = 64,
    deadline_s: float = 10.0,
    max_body: int = 1 << 20,
    catalogue: str | None = None,
) -> FastAPI:
    """The service as an ASGI application. target, recipe, device, dtype: as for the pipeline; users: a JSON file of
    {user: item ids}; catalogue: a folder that keeps what is added and removed, for all processes that are given it (None:
    changes are this process's own and end with it); the rest: see `Batcher` and `base_app`."""
    service = Recommender(target, recipe, device, dtype, users, catalogue)
    batcher = Batcher[Ask, Answer](service.work, batch=batch, wait_ms=wait_ms, queue=queue)
    service.metrics = Metrics(lambda: batcher.depth)
    changing = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.warm_up)
        batcher.start()
        app.state.ready = True
        yield
        app.state.ready = False
        await batcher.close()

    app = base_app("polyspec recommendations", lifespan, service.metrics, max_body)

    async def current() -> None:
        if service.stale():
            async with changing:
                await asyncio.to_thread(service.refresh)

    async def edit(change: Callable[[Items], Items]) -> dict[str, int]:
        async with changing:
            await asyncio.to_thread(service.edit, change)
        return {"items": len(service.items)}

    @app.post("/v1/recommendations", tags=["recommendations"])
    async def recommend(ask: Ask) -> Answer:
        """The k best items for a history."""
        await current()
        service.check(ask)
        limit = deadline_s if ask.deadline_ms is None else min(deadline_s, ask.deadline_ms / 1000)
        return await batcher.submit(ask, limit)

    @app.get("/v1/items", tags=["items"])
    async def count() -> dict[str, int]:
        """How many items there are."""
        await current()
        return {"items": len(service.items)}

    @app.post("/v1/items", status_code=201, tags=["items"])
    async def add(new: Annotated[list[NewItem], Body(min_length=1, max_length=10_000)]) -> dict[str, int]:
        """Add items whose tokens are known; they can be recommended from the next batch on."""
        ids, titles = [i.item_id for i in new], [i.title or "" for i in new]
        if len({len(i.tokens) for i in new}) > 1:
            raise InputError("all items need equally many tokens")
        tokens = np.array([i.tokens for i in new])
        return await edit(lambda items: items.with_items(ids, tokens, titles))

    @app.delete("/v1/items/{item_id}", tags=["items"])
    async def remove(item_id: int) -> dict[str, int]:
        """Remove an item; it is not recommended from the next batch on, and histories may no longer hold it."""
        return await edit(lambda items: items.without([item_id]))

    return app


def example_requests(config: Any, settings: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Where the load generator asks, and what: the bench's histories, or random ones of the target's own items."""
    items, k = Items.load(config.target or existing_sample()), settings["arguments"].get("k", 10)
    if settings["prompts"] is None:
        draw = np.random.default_rng(config.seed)
        histories = [draw.choice(items.ids, size=draw.integers(1, 30)).tolist() for _ in range(256)]
    else:
        known = items.index
        histories = [[i for i in h if i in known] for h in bench_prompts(settings["prompts"])[: settings["count"]]]
    return "/v1/recommendations", [{"history": h, "k": k} for h in histories if h]
