"""What drafting continuous tokens costs beside plain decoding and how many drafts stand, measured once a machine and pair of
models.

Found prices are kept in a file of the cache folder, since choices made from them decide what a seed gives: the same seed
gives the same picture in the next process too.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from polyspec.decoding.chains import Chains, denoise
from polyspec.denoising import Ahead, gaussian_noise
from polyspec.errors import InputError
from polyspec.files import cache_root, whole_file
from polyspec.metrics import LatentStats
from polyspec.paying import Prices, given_prices

if TYPE_CHECKING:
    from polyspec.drafting.continuous import LatentContext

FILE = "prices.json"
PASSES = 3  # interleaved, the fastest counts
STEPS = 8  # head calls timed together
MANY = 3  # tokens of the longer draft timed
KNOWN: dict[str, Prices] = {}


def prices_of(loop: Any, context: LatentContext, drafter: Any) -> Prices:
    """The prices for this machine, models and number of rows: known, read, or measured behind the prompt. loop: a
    `polyspec.decoding.continuous.Continuous`."""
    key = key_of(loop, context, drafter)
    if key not in KNOWN:
        stored = read()
        KNOWN[key] = given_prices(stored[key]) if key in stored else measure(loop, context, drafter)
        if key not in stored:
            write(stored | {key: asdict(KNOWN[key])})
    return KNOWN[key]


def key_of(loop: Any, context: LatentContext, drafter: Any) -> str:
    target = context.target
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else target.device.type
    models = (weights_mark(getattr(target, "model", None)), weights_mark(getattr(drafter, "model", None)))
    parts = (platform.node(), device, torch.get_num_threads(), torch.__version__, type(target).__name__, target.size)
    shape = (len(target.sampler), target.dim, context.sequences.batch, context.guidance != 1, loop.window)
    rule = getattr(loop.rule, "func", loop.rule)
    return " ".join(str(x) for x in (*parts, *models, *shape, rule.__name__, *getattr(drafter, "marks", ())))


def weights_mark(model: Any) -> str:
    """What tells the weights of one model from another's of its size, whose drafts stand more or less often."""
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    return f"{float(parameters[-1].detach().double().sum()):.9g}" if parameters else ""


def measure(loop: Any, context: LatentContext, drafter: Any) -> Prices:
    """Time each part of a round on throw-away drafts; nothing of it is left in target, drafter or random numbers."""
    target, sequences = context.target, context.sequences
    device, rows, total = target.device, sequences.batch, len(target.sampler)
    scratch = replace(context, generator=torch.Generator(device).manual_seed(0), stats=LatentStats())
    ahead, width = Ahead(target.sampler, loop.window), min(STEPS, total)
    tail, every = sequences.tail(), torch.arange(total, device=device)
    noise = gaussian_noise(context.seeds, every.expand(rows, -1), target.dim)
    drafting = hasattr(drafter, "propose_latents")
    chances: list[torch.Tensor] = []  # of each draft, [B, N, T]

    def alone() -> float:
        conditions = target.forward(tail)
        target.rollback([0] * rows)
        return 1 + 0 * float(conditions.sum())

    def chain(window: Ahead | None) -> Callable[[], float]:
        def run() -> float:
            chains = Chains(condition, noise[:, 0], [total - width] * rows, noise)
            calls = denoise(scratch, chains, window)
            return calls + 0 * float(chains.x.sum())

        return run

    def drafted(count: int) -> Callable[[], float]:
        def run() -> float:
            draft = drafter.propose_latents(count)
            conditions = target.forward(torch.cat([tail, draft.tokens], dim=1))
            verdict = loop.judge(scratch, conditions[:, :-1], draft)
            chances.append(verdict.chance)
            target.rollback([0] * rows)
            drafter.observe_latents()
            return 1 + 0 * float(verdict.start.sum())

        return run

    condition = target.forward(tail)[:, 0]
    target.rollback([0] * rows)
    parts: dict[str, Callable[[], float]] = {"alone": alone, "step": chain(None)}
    if loop.window > 1:
        parts["ahead"] = chain(ahead)
    if drafting:
        drafter.begin(scratch)
        parts |= {"first": drafted(1), "many": drafted(MANY)}
    # on a CPU the thread's own time: what other processes take is not the model's
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds, calls = dict.fromkeys(parts, float("inf")), dict.fromkeys(parts, 1.0)
    for _ in range(PASSES):
        for name, part in parts.items():
            start = clock()
            made = part()
            spent = clock() - start
            if spent / made < seconds[name] / calls[name]:
                seconds[name], calls[name] = spent, made
    step = seconds["step"] / calls["step"]
    first = seconds.get("first", 0.0) / step
    more = max(0.0, seconds.get("many", 0.0) / step - first) / (MANY - 1)
    one_by_one = "ahead" not in parts or calls["ahead"] <= 1
    window = 1.0 if one_by_one else max(0.0, seconds["ahead"] - step) / (calls["ahead"] - 1) / step
    return Prices(seconds["alone"] / step, first, more, window, kept=share_kept(chances))


def share_kept(chances: Sequence[torch.Tensor]) -> float:
    """The share of drafted tokens that stand, of those that nothing rejected stood before; chances: `[B, N, T]` each, a
    denoising step's. 1 where nothing was drafted."""
    stands = [c.double().prod(-1).cumprod(1) for c in chances]
    tried = sum(float(s[:, :-1].sum()) + len(s) for s in stands)
    return sum(float(s.sum()) for s in stands) / tried if tried else 1.0


def read() -> dict[str, Any]:
    """What is stored; nothing where the file is missing or damaged."""
    try:
        found = json.loads((cache_root() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(prices: dict[str, Any]) -> None:
    """Store; a folder that cannot be written costs a measurement in the next process."""
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        with whole_file(cache_root() / FILE) as path:
            path.write_text(json.dumps(prices, indent=1), encoding="utf-8")
    except (OSError, InputError):
        return
