"""The finished sample: the newest checkpoints in Hugging Face format, measured as they load, with a card."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from polyspec.modalities.image.evaluate import psnr
from polyspec.modalities.image.train.data import DataConfig, Pictures, read_pictures, to_model_range
from polyspec.modalities.image.train.language_model import (
    Captions,
    ImageObjective,
    LMConfig,
    known_captions,
    lm_rows,
    pad_prompts,
)
from polyspec.modalities.image.train.model import CODEBOOK, new_model, new_processor
from polyspec.modalities.image.train.tokenizer import decode_pictures, picture_codes

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [janus, sample]
---
# janus-emoji

A very small `JanusForConditionalGeneration` that draws 64x64 emoji from a short English caption: 256 image tokens
(16x16) from a codebook of 512. It exists so that polyspec runs, is tested and is measured without a download.

| part | size |
|---|---|
| language model | Llama, 6 layers x 256, 8 heads, {lm_params:.2f}M parameters |
| image tokenizer | `JanusVQVAE`, 32/64/96 channels, 4x down-sampling, {vq_params:.2f}M parameters |
| vision tower, text head | present because the class requires them; **never trained**, so it cannot describe images |

Weights are bfloat16.

```python
from transformers import AutoProcessor, JanusForConditionalGeneration

model = JanusForConditionalGeneration.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(text="red heart", generation_mode="image", return_tensors="pt")
tokens = model.generate(**inputs, generation_mode="image")
pixels = model.decode_image_tokens(tokens).permute(0, 3, 1, 2).float()
image = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"][0]
```

## Prompts

{drawn_names} names of emoji ("red heart", "rocket", "tiger face"), optionally followed by the style, {drawn}. Words are
lower-cased, punctuation is dropped, unknown words become `<unk>`. Prompt format: `<s> words <boi>`; for guidance, every
word becomes `<pad>`. Defaults: temperature {temperature}, guidance scale {guidance} (1.000001 means none: Janus' loop
fails at 1).

## Data

{pictures} pictures, {names} emoji in two styles; people, flags, letters and signs are left out,
{test} pictures are held out. The image tokenizer learnt from both styles, the language model from {drawn_names}
pictures in the style {drawn}.

- Noto Emoji, (c) Google, Apache-2.0.
- Twemoji, (c) Twitter, Inc. and other contributors, graphics under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/),
  rendered to 64x64 on white. What this model draws in that style derives from them: keep the attribution.
- Names from the metadata of OpenMoji.

## Training

`polyspec task=train modality=image train.data.path=emoji64.parquet` (defaults of `conf/train/image.yaml`) on two CPU
cores.

| stage | steps | minutes | epochs |
|---|---|---|---|
| image tokenizer | {vq_steps} | {vq_minutes:.0f} | {vq_epochs:.1f} |
| its decoder alone, {drawn} | {decoder_steps} | {decoder_minutes:.0f} | |
| language model | {lm_steps} | {lm_minutes:.0f} | {lm_epochs:.1f} |

Minutes are of a machine shared with other work.

## Measured

| what | value |
|---|---|
| tokenizer, PSNR on the test split | {psnr:.1f} dB ({drawn} alone: {drawn_psnr:.1f} dB) |
| codes in use, entropy | {codes} of 512, {bits:.1f} of 9 bits |
| language model, pictures it was trained on, nats a token | {train_loss:.2f} |
| language model, test pictures (names never seen), nats a token | {test_loss:.2f} |

{remarks}
"""


@torch.no_grad()
def export_sample(data: DataConfig, lm: LMConfig, output: Path, folder: Path, remarks: str = "") -> dict[str, float]:
    """Write the newest checkpoints of `output` to `folder` in Hugging Face format, with a card; returns its figures.

    `remarks` is Markdown put at the end of the card: what a person saw in the pictures.
    """
    pictures = read_pictures(data)
    processor = new_processor(known_captions(data, pictures))
    model = new_model(processor)
    vq_state = torch.load(output / "vq.pt", weights_only=True)
    lm_state = torch.load(output / "lm.pt", weights_only=True)
    model.load_state_dict(lm_state["model"])
    decoder_state = {"step": 0, "seconds": 0.0}
    if (output / "decoder.pt").exists():
        decoder_state = torch.load(output / "decoder.pt", weights_only=True)
        model.model.vqmodel.load_state_dict(decoder_state["model"], strict=False)
    tokens = picture_codes(model.model.vqmodel, pictures.pixels)  # before rounding: what the language model learnt
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)

    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)  # measured as it will be loaded
    figures = measured(model, processor, pictures, tokens, data, lm)
    rows = len(lm_rows(pictures, lm.styles, lm.names)[0])
    seen = int((~pictures.test).sum())
    card = CARD.format(
        **figures,
        remarks=remarks,
        pictures=len(pictures.captions),
        names=len(set(pictures.captions)),
        test=int(pictures.test.sum()),
        drawn=" and ".join(lm.styles),
        drawn_names=rows,
        lm_params=sum(p.numel() for p in model.model.language_model.parameters()) / 1e6,
        vq_params=sum(p.numel() for p in model.model.vqmodel.parameters()) / 1e6,
        vq_steps=vq_state["step"],
        vq_minutes=vq_state["seconds"] / 60,
        vq_epochs=vq_state["step"] * vq_state["batch"] / seen,
        decoder_steps=decoder_state["step"],
        decoder_minutes=decoder_state["seconds"] / 60,
        lm_steps=lm_state["step"],
        lm_minutes=lm_state["seconds"] / 60,
        lm_epochs=lm_state["step"] * lm_state["batch"] / rows,
        temperature=model.generation_config.temperature,
        guidance=model.generation_config.guidance_scale,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return figures


def measured(
    model: JanusForConditionalGeneration,
    processor: Any,
    pictures: Pictures,
    tokens: Tensor,
    data: DataConfig,
    lm: LMConfig,
) -> dict[str, float]:
    """The figures of the card; `tokens [N, 256]` are the pictures' codes."""
    vq = model.model.vqmodel
    use = torch.bincount(tokens.flatten(), minlength=CODEBOOK) / tokens.numel()
    train, test = lm_rows(pictures, lm.styles, lm.names)
    held_out = pictures.pixels[pictures.test]
    captions = Captions.of(pictures, processor.tokenizer, data.aliases)

    def loss(rows: Tensor) -> float:
        prompts = [list(captions.ids[row][1]) for row in rows.tolist()]
        return ImageObjective(model)(*pad_prompts(prompts), tokens[rows], tokens[rows]).mean().item()

    drawn = torch.tensor([style in lm.styles for style in pictures.styles])[pictures.test]
    decoded = decode_pictures(vq, tokens[pictures.test])
    return {
        "psnr": psnr(to_model_range(held_out), decoded),
        "drawn_psnr": psnr(to_model_range(held_out[drawn]), decoded[drawn]),
        "codes": int((use > 0).sum()),
        "bits": -(use * use.clamp(min=1e-9).log2()).sum().item(),
        "train_loss": loss(train[:: max(1, len(train) // len(test))]),
        "test_loss": loss(test),
    }
