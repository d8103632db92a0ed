"""transformers' Trainer for draft heads: a wall-clock budget, checkpoints by the minute, frozen target layers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from polyspec.drafting.heads import TokenLayers
from polyspec.errors import ConfigError
from polyspec.pipelines import load
from polyspec.target import Target
from polyspec.training.data import Corpus
from polyspec.training.features import Features, JoinedFeatures
from polyspec.training.objectives import Objective

ENDLESS = 10**9  # steps, where the clock decides
CLOCK = "clock.json"


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: until `minutes` or `steps` (None: no limit, one of them must be given) are spent,
    interruptions not counted; AdamW at `learning_rate`, warmed up over `warmup` steps, then falling to a twentieth
    along half a cosine. A checkpoint every `checkpoint_minutes`."""

    minutes: float | None = None
    steps: int | None = None
    batch: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 50
    checkpoint_minutes: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ConfigError("training needs an end: give minutes or steps")
        for name in ("minutes", "steps", "batch", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be > 0, got {value}")

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget used up, 0 … 1."""
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_clock, step / self.steps if self.steps else 0.0))

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate as a share of its maximum."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.spent(step, seconds)))
        return min(1.0, (step + 1) / max(self.warmup, 1)) * (0.05 + 0.95 * cosine)


class Rows(Dataset[dict[str, Any]]):
    """The corpus, row by row, with the target's hidden states."""

    def __init__(self, corpus: Corpus, features: Features | JoinedFeatures):
        self.corpus, self.features = corpus, features
        # a row needs a generated token with another behind it
        self.index = [i for i in range(len(corpus)) if corpus.starts[i + 1] - corpus.starts[i] - corpus.prompts[i] >= 2]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Any]:
        i = self.index[item]
        return {"tokens": self.corpus.row(i), "prompt": int(self.corpus.prompts[i]), "hidden": self.features.row(i)}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [int(self.corpus.starts[i + 1] - self.corpus.starts[i]) for i in self.index]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows padded on the right: see polyspec.training.objectives for the batch's fields."""
    layers = zip(*(r["hidden"] for r in rows), strict=True)
    return {
        "tokens": pad_sequence([r["tokens"] for r in rows], batch_first=True),
        "lengths": torch.tensor([len(r["tokens"]) for r in rows]),
        "prompts": torch.tensor([r["prompt"] for r in rows]),
        "hidden": tuple(pad_sequence(list(h), batch_first=True) for h in layers),
    }


class Clock(TrainerCallback):
    """Counts the seconds of training over all its runs, stops at the end of the budget, shows progress."""

    def __init__(self, schedule: Schedule, label: str):
        self.schedule, self.label, self.before, self.start = schedule, label, 0.0, time.monotonic()
        self.averages: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.saved = time.monotonic()
        self.bar = tqdm(desc=self.label, total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = self.schedule.spent(state.global_step, self.seconds)
        self.bar.update(int(100 * spent) - self.bar.n)
        control.should_training_stop |= spent >= 1
        if spent >= 1 or time.monotonic() - self.saved > 60 * self.schedule.checkpoint_minutes:
            control.should_save, self.saved = True, time.monotonic()

    def note(self, values: Mapping[str, Tensor], step: int) -> None:
        """Show running averages, without synchronising at every step."""
        if step % 10:
            return
        for key, value in values.items():
            self.averages[key] = 0.8 * self.averages.get(key, float(value)) + 0.2 * float(value)
        self.bar.set_postfix({"step": step, **{k: f"{v:.3g}" for k, v in self.averages.items()}}, refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / CLOCK).write_text(json.dumps({"seconds": self.seconds, "averages": self.averages}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def resume(self, checkpoint: str) -> None:
        note = json.loads((Path(checkpoint) / CLOCK).read_text())
        self.before, self.averages = note["seconds"], note["averages"]


class ObjectiveTrainer(Trainer):
    """Minimises `objective(model, batch)["loss"]`, in mixed precision unless `low` is float32."""

    def __init__(
        self, model: nn.Module, objective: Callable[..., dict[str, Tensor]], clock: Clock, low: torch.dtype, **kwargs: Any
    ):
        super().__init__(model=model, callbacks=[clock], **kwargs)
        self.objective, self.clock, self.low = objective, clock, low
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        # around all of the objective: Trainer's own autocast covers the model's forward alone
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.low != torch.float32):
            found = self.objective(model, inputs)
        self.clock.note({k: v.detach() for k, v in found.items()}, self.state.global_step)
        return found["loss"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)  # rows of a batch need little padding

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate assumes one main input of token ids

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        schedule, clock = self.clock.schedule, self.clock
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(optimizer, lambda step: schedule.rate(step, clock.seconds))
        return self.lr_scheduler


def train_head(
    model: PreTrainedModel,
    target: Target,
    corpus: Corpus,
    features: Features | JoinedFeatures,
    objective: Objective,
    schedule: Schedule,
    output: str | Path,
) -> dict[str, float]:
    """Train `model` to draft for `target`, or continue from the last checkpoint in `output`/checkpoints; save it to
    `output` in the target's dtype. Returns the running averages of losses and accuracies at the end."""
    target.model.requires_grad_(False)
    low = target.model.dtype

    def begin(model: PreTrainedModel) -> Callable[..., dict[str, Tensor]]:
        even = getattr(model.config, "even_embeddings", False)
        layers = TokenLayers(target, getattr(model, "vocab_map", None), even)

        def losses(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            batch["hidden"] = tuple(h.to(layers.dtype) for h in batch["hidden"])
            return objective(model, layers, batch)

        return losses

    return fit(model, begin, Rows(corpus, features), collate, schedule, output, target.device, low)


def fit(
    model: PreTrainedModel,
    begin: Callable[[PreTrainedModel], Callable[..., dict[str, Tensor]]],
    data: Dataset[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    schedule: Schedule,
    output: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
) -> dict[str, float]:
    """Train `model` on `data`, or continue from the last checkpoint in `output`/checkpoints; save it to `output`.

    data with `lengths`, one a row, is drawn in batches of rows about as long. dtype: of the arithmetic, and, unless `stored`
    says another, of what is saved. begin: asked once the weights are as training starts with them, for `losses(model, batch)`.
    Returns the running averages of losses and accuracies at the end, steps and seconds."""
    output = Path(output)
    checkpoints = output / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    clock = Clock(schedule, type(model).__name__)
    if last is not None:
        clock.resume(last)
    on_cpu = torch.device(device).type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=schedule.batch,
        max_steps=schedule.steps or ENDLESS,
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        adam_beta2=0.95,
        seed=schedule.seed,
        use_cpu=on_cpu,
        save_strategy="no",  # the clock saves
        save_total_limit=1,
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=not on_cpu,
    )
    if last is not None:  # before anything is derived from the head: what it predicts is stored with it
        load(lambda file: load_model(model, str(file), strict=False), Path(last) / SAFE_WEIGHTS_NAME)
    losses = begin(model)
    trainer = ObjectiveTrainer(
        model.float().train(), losses, clock, dtype, args=arguments, train_dataset=data, data_collator=collate
    )
    trainer.remove_callback(PrinterCallback)
    done = 0 if last is None else int(last.rpartition("-")[2])
    if last is None or schedule.spent(done, clock.before) < 1:
        trainer.train(resume_from_checkpoint=last)
        done = trainer.state.global_step
    model.to(stored or dtype).eval().save_pretrained(output)  # type: ignore[call-overload]
    summary = {**clock.averages, "steps": float(done), "seconds": clock.seconds}
    (output / "training.json").write_text(json.dumps(summary, indent=1))
    return summary
