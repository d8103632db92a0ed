"""The finished sample in Hugging Face format, with a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyspec.modalities.speech.codec import SpeechCodec

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-speech
language: en
tags: [sample]
---
# {name}

A very small English text-to-speech model with one voice. It exists so that polyspec runs, is tested and is measured without
a download.

| part | what | parameters |
|---|---|---|
| language model (here) | `LlamaForCausalLM`, {layers} layers × {width}: phonemes, timed, and codes in turn | {lm:.2f}M |
| codec (`codec/`) | two residual codebooks of {codes} on a log-mel, {rate} codes a second; a vocoder | {codec:.2f}M |

A sequence is `<s> # phonemes # <speak>`, then every phoneme with its duration, followed by as many codes, then
`</s>`. Only the first codebook is in it; the second is predicted from the first and the phonemes. Weights are bfloat16.

```python
import polyspec

pipe = polyspec.pipeline("speech", target="{name}")
audio = pipe("Good morning.").outputs[0]
```

## Data

{sentences} English sentences, spoken by the PyPI package hibari-tts (Apache-2.0), voice "heart", which also gave phonemes
and their durations; {held_out} sentences at the end of the file were held out.

## Training

`polyspec task=train modality=speech train.data.path=sentences.txt` (defaults of `conf/train/speech.yaml` but for the minutes).

| stage | steps | minutes | at the end |
|---|---|---|---|
{stages}
"""


def export_sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    codec: SpeechCodec,
    figures: Mapping[str, Mapping[str, float]],
    data: Mapping[str, Any],
    folder: Path,
) -> dict[str, float]:
    """Write model, tokenizer, codec and card to `folder`; returns the figures at the end of each stage, by stage."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.4,
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[call-overload]
    tokenizer.save_pretrained(folder)
    codec.to(torch.bfloat16).save_pretrained(folder / "codec")  # type: ignore[call-overload]
    stages = []
    for stage, found in figures.items():
        rest = ", ".join(f"{k} {v:.3g}" for k, v in found.items() if k not in ("steps", "seconds"))
        stages.append(f"| {stage} | {found['steps']:.0f} | {found['seconds'] / 60:.0f} | {rest} |")
    card = CARD.format(
        name=folder.name,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        lm=model.num_parameters() / 1e6,
        codes=codec.config.codes,
        rate=codec.config.sample_rate // codec.samples_per_code,
        codec=sum(p.numel() for p in codec.parameters()) / 1e6,
        sentences="All" if data["sentences"] is None else data["sentences"],
        held_out=data["held_out"],
        stages="\n".join(stages),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return {f"{stage} {key}": value for stage, found in figures.items() for key, value in found.items()}
