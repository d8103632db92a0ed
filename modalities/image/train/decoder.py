"""Stage 3, the tokenizer's decoder alone: sharper pictures from the same codes."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers.models.janus.modeling_janus import JanusVQVAE

from polyspec.modalities.image.evaluate import psnr
from polyspec.modalities.image.train.data import DataConfig, read_pictures, to_model_range
from polyspec.modalities.image.train.language_model import LMConfig, lm_rows
from polyspec.modalities.image.train.model import new_vq_model
from polyspec.modalities.image.train.stage import Budget, Checkpoints, batch_indices, learning_rate, run_stage, update
from polyspec.modalities.image.train.tokenizer import decode_pictures, picture_codes, reconstruction_loss


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Further training of the tokenizer's decoder alone, on what the language model draws."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=8))
    batch: int = 12
    learning_rate: float = 1e-3
    l1: float = 1.0
    gradient: float = 0.5
    checkpoint_minutes: float = 2.0
    seed: int = 0


def train_decoder(data: DataConfig, config: DecoderConfig, lm: LMConfig, output: Path) -> JanusVQVAE:
    """Train the decoder of `output/vq.pt`, or continue from `output/decoder.pt`: no code changes, only how it looks.

    What the language model has learnt stays valid, so this may run before, beside or after `train_lm`.
    """
    pictures = read_pictures(data)
    model = new_vq_model()
    model.load_state_dict(torch.load(output / "vq.pt", weights_only=True)["model"])
    codes = picture_codes(model, pictures.pixels)
    train_rows, test = lm_rows(pictures, lm.styles, lm.names)
    decoding = nn.ModuleDict({"post_quant_conv": model.post_quant_conv, "decoder": model.decoder})
    optimizer = torch.optim.AdamW(decoding.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def train_step(step: int, spent: float) -> dict[str, float]:
        rows = train_rows[batch_indices(step, len(train_rows), config.batch, config.seed)]
        x = to_model_range(pictures.pixels[rows])
        with torch.autocast(x.device.type, torch.bfloat16):
            y = decode_pictures(model, codes[rows])
        y = y.float()
        loss = reconstruction_loss(x, y, config.l1, config.gradient)
        update(optimizer, loss, learning_rate(config.learning_rate, step, spent))
        return {"loss": loss.item(), "psnr": psnr(x, y.detach())}

    @torch.no_grad()
    def test_numbers() -> dict[str, float]:
        return {"test psnr": psnr(to_model_range(pictures.pixels[test]), decode_pictures(model, codes[test]))}

    state = {"model": decoding, "optimizer": optimizer}
    checkpoints = Checkpoints(output / "decoder.pt", config.checkpoint_minutes, {"batch": config.batch})
    run_stage("decoder", config.budget, checkpoints, state, train_step, test_numbers)
    return model.eval()
