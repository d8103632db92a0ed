"""Bad input gives one error of the library, which names what to change, before the model runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, build, llama, target
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

import polyspec
from polyspec import CheckpointError, ConfigError, InputError, PolyspecError, UnsupportedModelError
from polyspec.cache import RaggedCache
from polyspec.drafting.medusa import MedusaModel
from polyspec.verification import block_verification, check_inputs, speculative_sampling

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


class Count:
    """How often a model's forward is called."""

    def __init__(self, model: PreTrainedModel):
        self.calls = 0
        self.handle = model.register_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        self.calls += 1


def generate(
    recipe: str = "autoregressive", *, model: Any = None, ids: Any = IDS, knobs: Any = None, **options: Any
) -> Any:
    """`model.generate(ids, custom_generate=<recipe>)`; the model must not have run when it raises."""
    model = target("llama") if model is None else model
    count = Count(model)
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    if ids is not None:
        options["input_ids"] = ids
    try:
        return model.generate(**options, custom_generate=polyspec.custom_generate(recipe, **(knobs or {})))
    except PolyspecError:
        assert count.calls == 0, "the model ran before the input was refused"
        raise
    finally:
        count.handle.remove()


def drafted(draft_model: Any, **kwargs: Any) -> Any:
    return generate("speculative_sampling", knobs={"draft_model": draft_model}, **kwargs)


@cache
def other_tokenizer() -> PreTrainedModel:
    return llama(vocab=VOCAB + 5000)


@cache
def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, conv_kernel=2)
    return MambaForCausalLM(config).eval()


@cache
def flash() -> PreTrainedModel:
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def filled(rows: int = 2) -> DynamicCache:
    past = DynamicCache()
    with torch.no_grad():
        target("llama")(IDS[:1, :2].expand(rows, -1), past_key_values=past)
    return past


def sliding_past() -> DynamicCache:
    model = target("mistral")
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :2], past_key_values=past)
    return past


P = torch.full((1, 3, 5), 0.2)
X = torch.tensor([[1, 2]])

KNOBS: dict[str, tuple[Callable[[], Any], type[PolyspecError], str]] = {
    # -- names, with the nearest valid ones
    "an unknown recipe": (
        lambda: polyspec.custom_generate("speculative_samplng"),
        ConfigError,
        "'speculative_sampling'",
    ),
    "no recipe like it": (lambda: polyspec.custom_generate("zzzzzz"), ConfigError, "choose one of: "),
    "an unknown knob": (lambda: polyspec.custom_generate("sjd", windw=3), ConfigError, "'window'"),
    "a knob of another recipe": (
        lambda: polyspec.custom_generate("sjd", max_ngram=3),
        ConfigError,
        "knob of recipe sjd",
    ),
    "an unknown modality": (lambda: polyspec.recipes("imagee"), ConfigError, "'image'"),
    "a pipeline of an unknown modality": (lambda: polyspec.pipeline("txt"), ConfigError, "'text'"),
    "an unknown length policy": (
        lambda: polyspec.custom_generate("prompt_lookup", length="auot"),
        ConfigError,
        "'auto'",
    ),
    "an unknown initialisation": (lambda: polyspec.custom_generate("sjd", init="lefft"), ConfigError, "'left'"),
    "positions to redraw below zero": (lambda: polyspec.custom_generate("sjd", refresh=-1), ConfigError, "refresh"),
    "a recipe of another modality": (
        lambda: polyspec.pipeline("image", recipe="lookahead"),
        ConfigError,
        "is not for modality 'image'",
    ),
    "medusa heads to start a window": (
        lambda: generate("sjd", knobs={"init": "drafter", "heads": MedusaModel.for_target(target("llama"))}),
        ConfigError,
        "'polyspec_medusa' heads",
    ),
    # -- knobs out of range
    "length 0": (lambda: polyspec.custom_generate("prompt_lookup", length=0), ConfigError, "must be a whole number"),
    "length -1": (lambda: polyspec.custom_generate("prompt_lookup", length=-1), ConfigError, "must be a whole number"),
    "length 1.5": (
        lambda: polyspec.custom_generate("prompt_lookup", length=1.5),
        ConfigError,
        "must be a whole number",
    ),
    "length True": (
        lambda: polyspec.custom_generate("prompt_lookup", length=True),
        ConfigError,
        "must be a whole number",
    ),
    "length x": (
        lambda: polyspec.custom_generate("prompt_lookup", length="x"),
        ConfigError,
        "unknown length policy 'x'",
    ),
    "length None": (
        lambda: polyspec.custom_generate("prompt_lookup", length=None),
        ConfigError,
        "must be a whole number",
    ),
    "window 0": (lambda: polyspec.custom_generate("sjd", window=0), ConfigError, "window must be"),
    "max_ngram 0": (lambda: polyspec.custom_generate("prompt_lookup", max_ngram=0), ConfigError, "max_ngram"),
    "a threshold out of range": (
        lambda: polyspec.custom_generate(
            "prompt_lookup", length={"_target_": "polyspec.lengths.Confidence", "threshold": 1.5, "length": 4}
        ),
        ConfigError,
        "threshold",
    ),
    "a minimum above the maximum": (
        lambda: polyspec.custom_generate(
            "prompt_lookup", length={"_target_": "polyspec.lengths.Adaptive", "length": 4, "minimum": 9, "maximum": 5}
        ),
        ConfigError,
        "minimum",
    ),
    # -- what a recipe needs
    "a missing draft model": (
        lambda: polyspec.custom_generate("speculative_sampling"),
        ConfigError,
        "needs draft_model=",
    ),
    "a draft model that is no model": (
        lambda: polyspec.custom_generate("speculative_sampling", draft_model=42),
        ConfigError,
        "draft_model must be a transformers model",
    ),
    "a path that does not exist": (
        lambda: polyspec.custom_generate("speculative_sampling", draft_model="/no/such/folder"),
        CheckpointError,
        "/no/such/folder",
    ),
    "a draft model with a recurrent state": (
        lambda: polyspec.custom_generate("speculative_sampling", draft_model=mamba()),
        UnsupportedModelError,
        "cannot be rolled back",
    ),
    "missing heads": (lambda: polyspec.custom_generate("medusa"), ConfigError, "needs heads="),
}

RUNS: dict[str, tuple[Callable[[], Any], type[PolyspecError], str]] = {
    # -- prompts
    "an empty prompt": (lambda: generate(ids=torch.empty(1, 0, dtype=torch.long)), InputError, "the prompt is empty"),
    "no rows": (lambda: generate(ids=torch.empty(0, 3, dtype=torch.long)), InputError, "the prompt is empty"),
    "a token id too large": (lambda: generate(ids=IDS + VOCAB), InputError, f"the model knows 0 … {VOCAB - 1}"),
    "a negative token id": (lambda: generate(ids=IDS - 6), InputError, "token id -1"),
    "a window that starts from a drafter without heads": (
        lambda: generate("sjd", knobs={"init": "drafter"}),
        ConfigError,
        "init='drafter' needs heads=",
    ),
    "a rule that needs a codebook on a text model": (
        lambda: generate("gsd"),
        UnsupportedModelError,
        "needs the target's codebook",
    ),
    "a row that is all padding": (
        lambda: generate(attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])),
        InputError,
        "row 1 of the batch has an empty prompt",
    ),
    "padding on the right": (
        lambda: generate(attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])),
        InputError,
        "pad prompts on the left",
    ),
    "a mask with a gap": (
        lambda: generate(attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])),
        InputError,
        "pad prompts on the left",
    ),
    "a mask of another length": (
        lambda: generate(attention_mask=torch.tensor([[1, 1], [0, 1]])),
        InputError,
        "the attention mask covers 2 tokens",
    ),
    "new tokens only behind a cache": (
        lambda: generate(ids=IDS[:, :1], past_key_values=filled(), attention_mask=torch.ones(2, 3, dtype=torch.long)),
        InputError,
        "also what past_key_values holds",
    ),
    "embeddings for a prompt": (
        lambda: generate(ids=None, inputs_embeds=torch.zeros(2, 3, 32)),
        InputError,
        "pass input_ids",
    ),
    "a prompt that fills max_length": (
        lambda: generate(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=2)])),
        InputError,
        "max_length=2 leaves no room",
    ),
    # -- options of generate that a recipe cannot honour
    "beams": (lambda: generate(num_beams=3), ConfigError, "num_beams=1"),
    "no cache": (lambda: generate(use_cache=False), ConfigError, "use_cache"),
    "scores to be returned": (
        lambda: generate(return_dict_in_generate=True, output_scores=True),
        ConfigError,
        "leave output_scores out",
    ),
    "guidance of an encoder-decoder": (
        lambda: generate(model=target("t5"), guidance_scale=1.5),
        ConfigError,
        "leave it out",
    ),
    "negative prompts for other rows": (
        lambda: generate(guidance_scale=1.5, negative_prompt_ids=IDS[:1]),
        InputError,
        "1 negative prompts for 2 prompts",
    ),
    "a cache under guidance": (
        lambda: generate(guidance_scale=1.5, past_key_values=filled()),
        InputError,
        "past_key_values",
    ),
    "a cache of other rows": (lambda: generate(past_key_values=filled(3)), InputError, "past_key_values has 3 rows"),
    "a cache with sliding windows": (
        lambda: generate(model=target("mistral"), past_key_values=sliding_past()),
        UnsupportedModelError,
        "leave past_key_values out",
    ),
    # -- seeds
    "a seed a row too few": (lambda: generate(do_sample=True, knobs={"seed": [1]}), ConfigError, "seed has 1 entries"),
    "a fractional seed": (lambda: generate(do_sample=True, knobs={"seed": 1.5}), ConfigError, "seed must be"),
    "a seed beyond 64 bits": (lambda: generate(do_sample=True, knobs={"seed": 2**64}), ConfigError, "seed must be"),
    # -- models
    "a recurrent model": (lambda: generate(model=mamba()), UnsupportedModelError, "cannot be rolled back"),
    "flash attention": (lambda: generate(model=flash()), UnsupportedModelError, "attn_implementation='sdpa'"),
    "a drafter with another tokenizer": (lambda: drafted(other_tokenizer()), InputError, "must share one tokenizer"),
    "an encoder-decoder drafter without an encoder": (lambda: drafted(target("t5")), InputError, "target's encoder"),
    "an image window on a text model": (
        lambda: generate("sjd", knobs={"init": "above"}),
        ConfigError,
        "use 'left' or 'random'",
    ),
}

RULES: dict[str, tuple[Callable[[], Any], type[PolyspecError], str]] = {
    "p of the wrong length": (
        lambda: speculative_sampling(X, None, P[:, :2]),
        InputError,
        "target_probs must be [B, N+1, V]",
    ),
    "q of the wrong shape": (lambda: speculative_sampling(X, P, P), InputError, "draft_probs must be [1, 2, 5]"),
    "p of whole numbers": (lambda: block_verification(X, None, P.long()), InputError, "must be floating point"),
    "tokens that are no integers": (lambda: speculative_sampling(X.float(), None, P), InputError, "must be torch.long"),
    "tokens without rows": (lambda: speculative_sampling(X[0], None, P), InputError, "must have 2 dimensions"),
    "p that does not sum to one": (lambda: check_inputs(X, None, P * 0.9), InputError, "must sum to one"),
    "p with NaN": (lambda: check_inputs(X, None, P * float("nan")), InputError, "NaN"),
    "a negative q": (lambda: check_inputs(X, -P[:, :2], P), InputError, "negative"),
    "a token outside the vocabulary": (lambda: check_inputs(X + 4, None, P), InputError, "must be in [0, 5)"),
}

TABLE = {**KNOBS, **RUNS, **RULES}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_gives_one_error_that_names_what_to_change(case: str) -> None:
    call, kind, fragment = TABLE[case]
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind
    assert fragment in str(raised.value)
    assert len(str(raised.value)) < 400, "an error is read, not scrolled"


def test_every_error_is_also_what_python_would_raise() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(InputError, ValueError)
    assert issubclass(CheckpointError, OSError)
    assert issubclass(UnsupportedModelError, TypeError)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    llama(layers=1).save_pretrained(folder)
    return folder


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:5000]
    ),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a configuration that is no JSON": lambda folder: (folder / "config.json").write_text("{'"),
    "an unknown architecture": lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "zzz"})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_draft_model_is_refused_by_name_before_anything_runs(
    damage: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError) as raised:
        polyspec.custom_generate("speculative_sampling", draft_model=folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_draft_model_can_be_a_folder(checkpoint: Path) -> None:
    for source in (checkpoint, str(checkpoint)):
        fast = polyspec.custom_generate("speculative_sampling", draft_model=source, length=3)
        expected = target("llama").generate(IDS, do_sample=False, max_new_tokens=8)
        assert torch.equal(
            target("llama").generate(IDS, do_sample=False, max_new_tokens=8, custom_generate=fast), expected
        )
        assert fast.stats.draft_calls > 0


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("recipe", ["autoregressive", "prompt_lookup", "sjd", "scd_mc", "jacobi"])
def test_weights_that_give_nan_are_reported(recipe: str, do_sample: bool) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    knobs = {"length": 3} if recipe == "prompt_lookup" else {}
    fast = polyspec.custom_generate(recipe, seed=0, **knobs)
    with pytest.raises(InputError, match="check the weights"):
        model.generate(IDS, do_sample=do_sample, max_new_tokens=8, custom_generate=fast)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("recipe", ["speculative_sampling", "block_verification", "gumbel_coupled"])
def test_a_draft_model_that_gives_nan_never_harms_the_output(recipe: str, do_sample: bool) -> None:
    drafter = build("llama", seed=3)
    with torch.no_grad():
        drafter.lm_head.weight[3] = float("nan")
    fast = polyspec.custom_generate(recipe, seed=0, draft_model=drafter, length=3)
    options = {"do_sample": do_sample, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    try:
        output = target("llama").generate(IDS, **options, custom_generate=fast)
    except InputError as error:
        assert "check the weights" in str(error)
    else:
        assert output.shape == (2, 11)
        assert bool(((output >= 0) & (output < VOCAB)).all())


def test_processors_that_rule_out_every_token_are_reported() -> None:
    def nothing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, float("-inf"))

    for recipe in ("autoregressive", "sjd"):
        with pytest.raises(InputError, match="logits processors"):
            target("llama").generate(
                IDS,
                max_new_tokens=4,
                logits_processor=[nothing],
                custom_generate=polyspec.custom_generate(recipe, seed=0),
            )


def test_the_generator_of_a_failed_call_can_be_used_again() -> None:
    fast = polyspec.custom_generate("sjd", seed=0)
    with pytest.raises(InputError):
        generate(ids=IDS + VOCAB)
    with pytest.raises(InputError):
        target("llama").generate(IDS + VOCAB, max_new_tokens=4, custom_generate=fast)
    assert target("llama").generate(IDS, max_new_tokens=4, custom_generate=fast).shape == (2, 7)
    assert RaggedCache(1, 4).lengths == [0]
