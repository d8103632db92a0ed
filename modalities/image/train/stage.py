"""What the stages share: when to stop, which rows come next, an optimiser's step, checkpoints to continue from."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from polyspec.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Budget:
    """A stage ends at `steps` steps or after `minutes` of training, whichever comes first; None lifts a limit.

    The learning rate falls along a cosine of the share spent, so an interrupted stage goes on where it was.
    """

    steps: int | None = None
    minutes: float | None = None

    def spent(self, step: int, seconds: float) -> float:
        """Share of the budget spent, in [0, 1]."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.minutes is not None:
            shares.append(seconds / (60.0 * self.minutes))
        if len(shares) == 1:
            raise ConfigError("a training budget needs steps or minutes")
        return min(1.0, max(shares))


def learning_rate(peak: float, step: int, spent: float, warmup: int = 100) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to 1 % of it at spent = 1."""
    cosine = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * spent))
    return peak * cosine * min(1.0, (step + 1) / warmup)


def batch_indices(step: int, size: int, batch: int, seed: int) -> Tensor:
    """Row numbers [batch] of training step `step`; every epoch is a permutation made from seed and epoch alone."""
    epoch, k = divmod(step, size // batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + 7919 * epoch))
    return order[k * batch : (k + 1) * batch]


def step_generator(step: int, seed: int) -> torch.Generator:
    """The random numbers of one training step, the same after a restart."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step down the gradient of `loss` at learning rate `rate`; the gradient is clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where a stage's checkpoint lies, how many minutes lie between two, and what is noted in each."""

    path: Path
    minutes: float
    notes: Mapping[str, int]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write atomically: a kill while writing leaves the checkpoint before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({**self.notes, **state}, partial)
        os.replace(partial, self.path)


def run_stage(
    name: str,
    budget: Budget,
    checkpoints: Checkpoints,
    state: Mapping[str, Any],
    train_step: Callable[[int, float], dict[str, float]],
    on_checkpoint: Callable[[], dict[str, float]],
) -> int:
    """Run `train_step(step, spent) -> logged numbers` until the budget is spent; returns the number of steps done.

    `state` maps names to objects with state_dict/load_state_dict; if a checkpoint exists, training continues from it.
    `on_checkpoint` measures what is logged with each checkpoint.
    """
    step, seconds = 0, 0.0
    if checkpoints.path.exists():
        saved = torch.load(checkpoints.path, weights_only=True)
        step, seconds = saved["step"], saved["seconds"]
        for key, part in state.items():
            part.load_state_dict(saved[key])
        logger.info("%s: resumed at step %d after %.1f minutes", name, step, seconds / 60)

    def save() -> None:
        parts = {key: part.state_dict() for key, part in state.items()}
        checkpoints.save({"step": step, "seconds": seconds, **parts})

    average: dict[str, float] = {}
    last_save = time.monotonic()
    layout = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=100, desc=name, mininterval=5, bar_format=layout) as bar:
        while (spent := budget.spent(step, seconds)) < 1.0:
            started = time.monotonic()
            for key, value in train_step(step, spent).items():
                average[key] = value if key not in average else 0.98 * average[key] + 0.02 * value
            step += 1
            seconds += time.monotonic() - started
            bar.set_postfix({"step": step, **{k: f"{v:.4g}" for k, v in average.items()}}, refresh=False)
            bar.update(round(100 * budget.spent(step, seconds), 2) - bar.n)
            if time.monotonic() - last_save > 60 * checkpoints.minutes:
                save()
                numbers = {**average, **on_checkpoint()}
                text = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items())
                tqdm.write(f"{name} step {step}, {seconds / 60:.1f} min: {text}")
                last_save = time.monotonic()
    save()
    return step
