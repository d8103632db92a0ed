"""Drafts what texts of the same group of users or items most often went on with.

A Decoding Acceleration Framework for Industrial Deployable LLM-based Recommender Systems (DARE), 2408.05676: a customised
retrieval pool a group (`polyspec.drafting.pools`). The longest suffixes of a row that occur in its group's pool are looked
up, and the paths that most often followed are drafted as one tree of certain nodes, the more frequent first. Prompts and
outputs enter the pool as they come, so that a service that answers like requests drafts better the longer it runs. Exact
under walks that follow the target's own draws; DARE's own rule is `polyspec.verification.walk_topk_threshold`. Runs on the
host, on tokens that the loop has brought there anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from polyspec.drafting.base import Context, Draft
from polyspec.drafting.pools import LIMIT, PERIOD, Drafted, Pool, Pools
from polyspec.drafting.rest import side_by_side
from polyspec.errors import ConfigError, InputError
from polyspec.lengths import positive
from polyspec.target import Target


class RetrievalPool:
    """Retrieval from `pools`: Pools, which runs share and add to; outputs as token lists by group ({}: none yet); or a file,
    read if it is there and written after every run that learns.

    group: the rows' group, or a list of one a row. learn: whether what is seen stays for later runs; otherwise pools are only
    read (a file has to be there), and a run draws on its own text beside them. nodes: the size of the tree that is drafted.
    longest, shortest: how many tokens of context are matched. prompt_weight: what an occurrence in a prompt counts, beside
    one in an output. limit, period: of pools that are made here, see `Pool`. Where no row has a match nothing is drafted.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(
        self,
        pools: Pools | str | PathLike[str] | Mapping[str, Sequence[Sequence[int]]],
        group: str | Sequence[str] = "default",
        learn: bool = True,
        nodes: int = 64,
        longest: int = 8,
        shortest: int = 1,
        prompt_weight: float = 0.5,
        limit: int = LIMIT,
        period: int = PERIOD,
    ):
        self.group, self.learn = group, learn
        self.nodes = positive("nodes", nodes)
        self.longest, self.shortest = positive("longest", longest), positive("shortest", shortest)
        if self.shortest > self.longest:
            raise ConfigError(f"need shortest ≤ longest, got {shortest} and {longest}")
        if isinstance(prompt_weight, bool) or not isinstance(prompt_weight, int | float) or prompt_weight < 0:
            raise ConfigError(f"prompt_weight must be a number ≥ 0, got {prompt_weight!r}")
        self.prompt_weight, self.pools = prompt_weight, Pools(limit, period)
        self.file: Path | None = None
        if isinstance(pools, str | PathLike):
            self.file = Path(pools)
            if self.file.exists() or not learn:
                self.pools = Pools.load(self.file, limit=limit, period=period)
        elif isinstance(pools, Mapping):
            self.pools = Pools.from_tokens(pools, limit=limit, period=period)
        elif isinstance(pools, Pools):
            self.pools = pools
        else:
            raise InputError(f"pools must be Pools, a file or token lists by group, got {type(pools).__name__}")

    def check(self, target: Target) -> None:
        """InputError if the pools hold tokens that the target does not have."""
        if self.pools.highest >= target.vocab_size:
            raise InputError(
                f"the pools hold token {self.pools.highest}, the target has {target.vocab_size}: they were made with "
                "another tokenizer; start new ones"
            )

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        s = self.sequences = context.sequences
        named = isinstance(self.group, str)
        groups = [str(self.group)] * s.batch if named else [str(g) for g in self.group]
        if len(groups) != s.batch:
            raise InputError(f"group has {len(groups)} entries for a batch of {s.batch} rows; give one a row or one for all")
        own = self.pools if self.learn else Pools(self.pools.limit, self.pools.period)
        self.learning = [own[g] for g in groups]
        beside = {} if self.learn else self.pools.groups
        self.reading = {id(own[g]): [own[g], *([beside[g]] if g in beside else [])] for g in set(groups)}
        prompts = Counter((g, tuple(h)) for g, h in zip(groups, s.history, strict=True))
        for (group, prompt), times in prompts.items():
            own[group].begin(prompt, times)
        self.read = [len(h) for h in s.history]

    def propose(self, count: int) -> Draft:
        s = self.sequences
        keys = [
            (id(pool), tuple(h[-self.longest :]) if running else ())
            for pool, h, running in zip(self.learning, s.history, s.running, strict=True)
        ]
        # rows of one prompt have much in common
        trees = {key: self.tree(self.reading[key[0]], key[1], count) for key in dict.fromkeys(keys)}
        return side_by_side([trees[key] for key in keys], s)

    def tree(self, pools: Sequence[Pool], context: tuple[int, ...], depth: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the most frequent continuations: behind the longest suffix first, then behind shorter ones."""
        drafted = Drafted()
        for length in range(min(self.longest, len(context)), self.shortest - 1, -1):
            for pool in pools:
                if (below := pool.find(context[len(context) - length :])) is not None:
                    drafted.grow(below, self.nodes, depth, self.prompt_weight)
        return drafted.tokens, drafted.parents

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        s = self.sequences
        for row, (pool, history) in enumerate(zip(self.learning, s.history, strict=True)):
            pool.extend(history, len(history) - self.read[row], "output")
            self.read[row] = len(history)
        if s.finished and self.learn and self.file is not None:
            self.pools.save(self.file)
