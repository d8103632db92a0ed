"""Stage 1, the image tokenizer: 64x64 pixels <-> 16x16 tokens from a codebook of 512."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.janus.modeling_janus import JanusVQVAE

from polyspec.modalities.image.evaluate import psnr
from polyspec.modalities.image.train.data import DataConfig, read_pictures, to_model_range
from polyspec.modalities.image.train.model import CODEBOOK, GRID, IMAGE_SIZE, new_vq_model
from polyspec.modalities.image.train.stage import (
    Budget,
    Checkpoints,
    batch_indices,
    learning_rate,
    run_stage,
    step_generator,
    update,
)


@dataclass(frozen=True, slots=True)
class VQConfig:
    """The tokenizer's training; its size is `vq_model_config`."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=18))
    batch: int = 24
    learning_rate: float = 1e-3
    commitment: float = 0.25
    codebook_decay: float = 0.99
    dead_below: float = 0.5  # a code is dead when the moving average of its uses in a batch is below this
    l1: float = 0.2
    gradient: float = 0.2
    checkpoint_minutes: float = 3.0
    seed: int = 0


class SphericalCodebook(nn.Module):
    """Codes of unit length, moving averages of the encodings assigned to them (VQ-VAE, 1711.00937, appendix A).

    Unit length because `JanusVQVAE` normalises a code when it decodes a token but not when it looks one up: only on
    the sphere do both agree. Dead codes restart from the worst-quantised encodings of the batch: random ones would
    mostly be white background.
    """

    def __init__(self, weight: Tensor, decay: float, dead_below: float) -> None:
        super().__init__()
        self.decay, self.dead_below = decay, dead_below
        self.codes = weight.requires_grad_(False)  # [K,d], the quantiser's own parameter
        self.uses: Tensor
        self.sums: Tensor
        self.register_buffer("uses", torch.zeros(weight.shape[0]))
        self.register_buffer("sums", torch.zeros_like(weight))

    def lookup(self, z: Tensor) -> Tensor:
        """Nearest code of each unit vector: z [n,d] -> [n] long."""
        return (z @ self.codes.T).argmax(-1)

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor, generator: torch.Generator) -> int:
        """Move the codes towards the encodings z [n,d] assigned to them by index [n]; returns how many restarted."""
        counts = torch.bincount(index, minlength=len(self.codes)).to(z.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, index, z)
        first = not bool(self.uses.any())
        self.uses.lerp_(counts, 1.0 if first else 1.0 - self.decay)
        self.sums.lerp_(sums, 1.0 if first else 1.0 - self.decay)
        dead = (self.uses < self.dead_below).nonzero().flatten()
        if len(dead):
            error = 1.0 - (z * self.codes[index]).sum(-1)
            worst = error.topk(min(len(z), 8 * len(dead))).indices
            chosen = z[worst[torch.randperm(len(worst), generator=generator)[: len(dead)]]]
            dead = dead[: len(chosen)]
            self.uses[dead] = 2.0 * self.dead_below
            self.sums[dead] = 2.0 * self.dead_below * chosen
        self.codes.copy_(F.normalize(self.sums, dim=-1))
        return len(dead)


def reconstruction_loss(x: Tensor, y: Tensor, l1: float, gradient: float) -> Tensor:
    """Squared error + l1 * absolute error + gradient * absolute error of the finite differences; x, y [B,3,H,W]."""
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.square().mean() + l1 * error.abs().mean() + gradient * edges


def train_vq(data: DataConfig, config: VQConfig, output: Path) -> JanusVQVAE:
    """Train the tokenizer, or continue from `output/vq.pt`; returns it ready for use."""
    torch.manual_seed(config.seed)
    pictures = read_pictures(data)
    train, test = pictures.pixels[~pictures.test], pictures.pixels[pictures.test]
    model = new_vq_model()
    codebook = SphericalCodebook(model.quantize.embedding.weight, config.codebook_decay, config.dead_below)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def train_step(step: int, spent: float) -> dict[str, float]:
        generator = step_generator(step, config.seed)
        x = to_model_range(train[batch_indices(step, len(train), config.batch, config.seed)])
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        with torch.autocast(x.device.type, torch.bfloat16):
            z = model.quant_conv(model.encoder(x))
        z = F.normalize(z.float(), dim=1)  # [B,d,16,16]
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        index = codebook.lookup(flat.detach())
        restarted = codebook.update(flat.detach(), index, generator)
        code = codebook.codes[codebook.lookup(flat.detach())].view(*z.shape[:1], GRID, GRID, -1).permute(0, 3, 1, 2)
        commitment = (z - code).square().mean()
        with torch.autocast(x.device.type, torch.bfloat16):
            y = model.decoder(model.post_quant_conv(z + (code - z).detach()))
        y = y.float()
        loss = reconstruction_loss(x, y, config.l1, config.gradient) + config.commitment * commitment
        update(optimizer, loss, learning_rate(config.learning_rate, step, spent))
        use = torch.bincount(index, minlength=CODEBOOK) / len(index)
        return {
            "loss": loss.item(),
            "psnr": -10 * math.log10((y.detach().clamp(-1, 1) - x).square().mean().item() / 4),
            "bits": -(use * use.clamp(min=1e-9).log2()).sum().item(),
            "restarted": float(restarted),
        }

    @torch.no_grad()
    def test_numbers() -> dict[str, float]:
        x = to_model_range(test)
        return {"test psnr": psnr(x, model(x).decoded_pixel_values)}

    state = {"model": model, "codebook": codebook, "optimizer": optimizer}
    checkpoints = Checkpoints(output / "vq.pt", config.checkpoint_minutes, {"batch": config.batch})
    run_stage("vq", config.budget, checkpoints, state, train_step, test_numbers)
    return model.eval()


@torch.no_grad()
def encode_pictures(model: JanusVQVAE, pixels: Tensor, batch: int = 64) -> Tensor:
    """uint8 pixels [N,3,64,64] to tokens [N,256] in row order."""
    encodings = (model.quant_conv(model.encoder(to_model_range(part))) for part in pixels.split(batch))
    return torch.cat([model.quantize(z)[2].view(len(z), -1) for z in encodings])


def decode_pictures(model: JanusVQVAE, tokens: Tensor) -> Tensor:
    """Tokens [N,256] to pixels [N,3,64,64] in about [-1, 1]."""
    return model.decode(tokens)  # pyright: ignore[reportArgumentType]  # annotated as the legacy class torch.LongTensor


def picture_codes(model: JanusVQVAE, pixels: Tensor) -> Tensor:
    """The codes [N,256] the language model learns: those of the encoder, but every flat colour always the same code.

    The encoder writes plain white in dozens of codes, depending on what is near. That says nothing about the picture and
    is hard to predict, so a patch of one colour gets the code that patches of its colour have most often. White in the
    first column gets one of 16 further codes of white, which tells the row: image tokens carry no positions in Janus.
    """
    codes = encode_pictures(model, pixels)
    side = IMAGE_SIZE // GRID
    patches = F.unfold(pixels.float(), side, stride=side).view(len(pixels), 3, side * side, -1)  # [N,3,16,256]
    flat = (patches.amax(2) - patches.amin(2)).amax(1) <= 8  # [N,256]
    red, green, blue = (patches.mean(2) / 16).long().clamp(max=15).unbind(1)
    colour = (red * 16 + green) * 16 + blue
    counts = torch.bincount((colour * CODEBOOK + codes)[flat], minlength=16**3 * CODEBOOK).view(16**3, CODEBOOK)
    codes = torch.where(flat, counts.argmax(1)[colour], codes)
    white = (flat & (colour == 16**3 - 1))[:, ::GRID]  # [N,16], the first column
    codes[:, ::GRID] = torch.where(white, counts[-1].topk(GRID + 1).indices[1:], codes[:, ::GRID])
    return codes
