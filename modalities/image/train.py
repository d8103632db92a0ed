"""Training the image sample: a small `transformers` Janus model that draws 64x64 emoji from a short caption.

Three stages, each resumable from the checkpoint it writes every few minutes:

1. `train_vq`       the image tokenizer, a `JanusVQVAE`: 64x64 pixels <-> 16x16 tokens from a codebook of 512;
2. `train_lm`       the language model over caption and image tokens, in exactly the format that
                    `JanusForConditionalGeneration.generate(generation_mode="image")` presents when sampling;
3. `train_decoder`  the tokenizer's decoder alone, on the pictures that are drawn.

`train` runs all and exports the sample; `polyspec task=train modality=image` calls it.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.modeling_janus import JanusVQVAE

from polyspec.errors import ConfigError
from polyspec.modalities.image.evaluate import psnr

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64  # pixels a side
GRID = 16  # tokens a side
CODEBOOK = 512
HIDDEN = 256  # width of the language model
NO_GUIDANCE = 1.000001  # Janus' own loop fails unless the guidance scale is above 1; this is 1 to six digits


# ---------------------------------------------------------------------------------------------------------------------
# data


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which pictures are learnt.

    `path` is a parquet file with the columns `image{bytes}, caption, style, group, subgroup, split`; `groups` and
    `subgroups` (of other groups) are what is kept; captions in `keep_in_train` are trained on whatever their split.
    """

    path: str | None = None
    groups: tuple[str, ...] = (
        "activities",
        "animals-nature",
        "food-drink",
        "objects",
        "smileys-emotion",
        "travel-places",
    )
    subgroups: tuple[str, ...] = ("geometric",)
    keep_in_train: tuple[str, ...] = ("red heart",)
    aliases: Mapping[str, str] = field(default_factory=lambda: {"automobile": "red car", "sun with face": "sun face"})


@dataclass(frozen=True, slots=True)
class Pictures:
    """pixels [N,3,64,64] uint8; captions and styles, N strings each; test [N] bool."""

    pixels: Tensor
    captions: tuple[str, ...]
    styles: tuple[str, ...]
    test: Tensor


def read_pictures(data: DataConfig) -> Pictures:
    """The chosen pictures of the parquet file, in file order. Needs pandas, pyarrow and Pillow."""
    import io

    import numpy as np
    import pandas as pd
    from PIL import Image

    if data.path is None:
        raise ConfigError("train.data.path is not set: name the parquet file with the pictures")
    table = pd.read_parquet(data.path)
    table = table[table["group"].isin(data.groups) | table["subgroup"].isin(data.subgroups)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["image"]])
    test = (table["split"] == "test") & ~table["caption"].isin(data.keep_in_train)
    return Pictures(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        captions=tuple(table["caption"]),
        styles=tuple(table["style"]),
        test=torch.from_numpy(test.to_numpy(copy=True)),
    )


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 pixels to float in [-1, 1], the range `JanusImageProcessor` uses with mean and deviation 0.5."""
    return pixels.float() / 127.5 - 1.0


# ---------------------------------------------------------------------------------------------------------------------
# what both stages share: when to stop, what to draw next, checkpoints


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


# ---------------------------------------------------------------------------------------------------------------------
# stage 1: the image tokenizer


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


def vq_model_config() -> JanusVQVAEConfig:
    """A 1.9M-parameter `JanusVQVAE`: 32/64/96 channels at 64/32/16 pixels a side, 512 codes of dimension 8."""
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODEBOOK,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 2, 3],
        num_res_blocks=1,
        num_patches=GRID,
        projection_dim=HIDDEN,
        image_token_embed_dim=HIDDEN,
    )


def new_vq_model() -> JanusVQVAE:
    """A fresh tokenizer; convolutions start from torch's initialisation, scaled to their width, not from N(0, 0.02)."""
    model = JanusVQVAE(vq_model_config())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model


class SphericalCodebook(nn.Module):
    """Codes of unit length, moving averages of the encodings assigned to them (VQ-VAE, 1711.00937, appendix A).

    Unit length because `JanusVQVAE` normalises a code when it decodes a token but not when it looks one up: only on
    the sphere do both agree. Dead codes restart from the worst-quantised encodings of the batch: random ones would
    mostly be white background.
    """

    def __init__(self, weight: nn.Parameter, decay: float, dead_below: float) -> None:
        super().__init__()
        self.decay, self.dead_below = decay, dead_below
        self.codes = weight.requires_grad_(False)  # [K,d], the quantiser's own embedding
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
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.learning_rate, step, spent)
        optimizer.step()
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


# ---------------------------------------------------------------------------------------------------------------------
# the model and its processor


def new_processor(captions: Iterable[str]) -> JanusProcessor:
    """A `JanusProcessor` whose tokenizer knows the words of `captions`, lower-cased and without punctuation.

    A prompt becomes `<s> word word … <boi>` with `generation_mode="image"`; words never seen become `<unk>`.
    """
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("['’]"), ""),
            normalizers.Replace(Regex("[^a-z0-9]+"), " "),
        ]
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<boi>", "<eoi>", "<image>"]
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        boi_token="<boi>",
        eoi_token="<eoi>",
        image_token="<image>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(image_processor, tokenizer, num_image_tokens=GRID * GRID)


def new_model(processor: JanusProcessor) -> JanusForConditionalGeneration:
    """A fresh model of the sample's size: 5M-parameter Llama, the tokenizer, and a vision tower that is there for form.

    Only `generation_mode="image"` is trained; the vision tower and the text head stay as initialised.
    """
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # no pad token in the text model: its embedding is what an unconditional row is made of, and must be learnt
        "pad_token_id": None,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        **special,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // GRID,
        mlp_ratio=1.0,
        projection_dim=HIDDEN,
        depth=1,
        num_image_tokens=GRID * GRID,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq_model_config(),
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(tokenizer.boi_token)},
        do_sample=True,
        temperature=0.5,
        top_k=0,
        guidance_scale=NO_GUIDANCE,
    )
    return model


# ---------------------------------------------------------------------------------------------------------------------
# stage 2: the language model


DRAWN = (  # what people ask for by name
    *("red heart", "orange heart", "yellow heart", "green heart", "blue heart", "purple heart", "black heart"),
    *("broken heart", "rainbow", "sun", "sun with face", "crescent moon", "full moon", "star", "glowing star", "cloud"),
    *("sun behind cloud", "cloud with rain", "snowflake", "snowman", "fire", "droplet", "umbrella", "high voltage"),
    *("hamburger", "french fries", "hot dog", "taco", "popcorn", "doughnut", "cookie", "birthday cake", "cupcake"),
    *("ice cream", "lollipop", "candy", "bread", "cheese wedge", "croissant", "pretzel", "pancakes", "sushi"),
    *("red apple", "green apple", "pear", "lemon", "banana", "watermelon", "grapes", "strawberry", "cherries", "peach"),
    *("pineapple", "avocado", "tomato", "carrot", "broccoli", "ear of corn", "mushroom", "teapot", "beer mug"),
    *(
        "wine glass",
        "tiger face",
        "cat face",
        "dog face",
        "cow face",
        "pig face",
        "mouse",
        "rabbit face",
        "fox",
        "bear",
    ),
    *("panda", "koala", "lion", "frog", "monkey face", "chicken", "baby chick", "bird", "duck", "owl", "unicorn"),
    *("honeybee", "butterfly", "snail", "bug", "spider", "turtle", "octopus", "crab", "fish", "tropical fish", "whale"),
    *("dolphin", "elephant", "horse", "sunflower", "rose", "tulip", "cherry blossom", "cactus", "palm tree"),
    *("evergreen tree", "Christmas tree", "four leaf clover", "rocket", "airplane", "automobile", "bus", "taxi"),
    *(
        "police car",
        "fire engine",
        "ambulance",
        "tractor",
        "locomotive",
        "bicycle",
        "sailboat",
        "ship",
        "flying saucer",
    ),
    *("helicopter", "anchor", "soccer ball", "basketball", "trophy", "guitar", "drum", "key", "candle", "light bulb"),
    *("open book", "camera", "crown", "bell", "house", "volcano", "balloon", "wrapped gift", "jack-o-lantern", "robot"),
    *(
        "alien",
        "ghost",
        "grinning face",
        "smiling face with heart-eyes",
        "smiling face with sunglasses",
        "winking face",
    ),
    *("red circle", "blue circle", "green circle", "yellow circle", "red square", "blue square", "green square"),
)


@dataclass(frozen=True, slots=True)
class LMConfig:
    """The language model's training; its size is `new_model`."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=66))
    styles: tuple[str, ...] = ("twemoji",)  # what it draws: flat colours are learnt soonest
    names: tuple[str, ...] | None = DRAWN  # None: all the tokenizer was trained on
    batch: int = 6
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    null_captions: float = 0.1  # share of rows in the unconditional format
    style_dropout: float = 0.5  # share of captions without the word for the style
    alias_share: float = 0.3  # share of captions that use the alias, where there is one
    unknown_words: float = 0.05  # share of captions with one unknown word put in
    clean_contexts: float = 0.4  # share of rows whose context is not corrupted
    corruption: float = 0.6  # highest share of corrupted tokens in a row
    checkpoint_minutes: float = 3.0
    seed: int = 0


def corrupt(tokens: Tensor, clean: float, highest: float, generator: torch.Generator) -> Tensor:
    """Image tokens [B,256] as a context with mistakes in it.

    A `clean` share of the rows stays. Half of the others begin as the picture of another row, up to a random place, so
    that the caption is trusted over a start that went wrong. In the rest a share drawn from U(0, highest) is replaced by
    a random code or by the token to the left or above, which is what parallel drafting starts from.
    """
    batch, length = tokens.shape
    row = torch.rand(batch, 1, generator=generator)
    rate = highest * torch.rand(batch, 1, generator=generator)
    grid = tokens.view(batch, GRID, GRID)
    left, above = grid.roll(1, dims=2).reshape(batch, length), grid.roll(1, dims=1).reshape(batch, length)
    code = torch.randint(CODEBOOK, tokens.shape, generator=generator)
    kind = torch.randint(3, tokens.shape, generator=generator)
    wrong = torch.where(kind == 0, code, torch.where(kind == 1, left, above))
    noisy = torch.where(torch.rand(tokens.shape, generator=generator) < rate, wrong, tokens)
    start = torch.arange(length) < length * torch.rand(batch, 1, generator=generator)
    swapped = torch.where(start, tokens.roll(1, dims=0), tokens)
    return torch.where(row < clean, tokens, torch.where(row < (1 + clean) / 2, swapped, noisy))


class ImageObjective(nn.Module):
    """Cross-entropy in nats of image tokens given prompts and (possibly corrupted) earlier image tokens.

    A row is `prompt tokens, image tokens, filling`, filled at the right: no attention mask is needed then.
    """

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompts: Tensor, lengths: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """prompts [B,P], their lengths [B], image tokens context and targets [B,256] -> loss [B,256], float32."""
        time = torch.arange(prompts.shape[1] + context.shape[1] - 1)
        in_prompt = time < lengths[:, None]  # [B,T]
        text = F.pad(prompts, (0, context.shape[1] - 1))
        image = context.gather(1, (time - lengths[:, None]).clamp(0, context.shape[1] - 1))
        embeds = torch.where(
            in_prompt[..., None],
            self.model.get_input_embeddings()(text),
            self.model.prepare_embeddings_for_image_generation(image),
        )
        hidden = self.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # [B,T,C]
        predicting = lengths[:, None] - 1 + torch.arange(targets.shape[1])  # where image token j is predicted
        hidden = hidden.gather(1, predicting[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.model.generation_head(hidden).float()
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


@torch.no_grad()
def encode_pictures(model: JanusVQVAE, pixels: Tensor, batch: int = 64) -> Tensor:
    """uint8 pixels [N,3,64,64] to tokens [N,256] in row order."""
    tokens = [model.encode(to_model_range(part)).image_tokens.view(len(part), -1) for part in pixels.split(batch)]
    return torch.cat(tokens)


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


@dataclass(frozen=True, slots=True)
class Captions:
    """Draws the prompts of training rows: token ids [N][variant] of every picture, with and without the style word."""

    tokenizer: PreTrainedTokenizerFast
    ids: tuple[tuple[tuple[int, ...], ...], ...]  # picture -> (name, name + style[, alias, alias + style])

    @classmethod
    def of(cls, pictures: Pictures, tokenizer: PreTrainedTokenizerFast, aliases: Mapping[str, str]) -> "Captions":
        ids = []
        for caption, style in zip(pictures.captions, pictures.styles, strict=True):
            names = [caption, aliases[caption]] if caption in aliases else [caption]
            texts = [text for name in names for text in (name, f"{name} {style}")]
            ids.append(tuple(tuple(tokenizer(text + tokenizer.boi_token).input_ids) for text in texts))
        return cls(tokenizer, tuple(ids))

    def prompts(self, rows: Iterable[int], config: LMConfig, generator: torch.Generator) -> list[list[int]]:
        """One randomly varied prompt for each picture of `rows`."""
        keep = {self.tokenizer.bos_token_id, self.tokenizer.convert_tokens_to_ids(self.tokenizer.boi_token)}
        prompts = []
        for row in rows:
            style, alias, null, unknown, place = torch.rand(5, generator=generator).tolist()
            variants = self.ids[row]
            k = 2 if len(variants) > 2 and alias < config.alias_share else 0
            prompt = list(variants[k + (style >= config.style_dropout)])
            if unknown < config.unknown_words:
                prompt.insert(1 + int(place * (len(prompt) - 1)), self.tokenizer.unk_token_id)
            if null < config.null_captions:
                prompt = [token if token in keep else self.tokenizer.pad_token_id for token in prompt]
            prompts.append(prompt)
        return prompts


def pad_prompts(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as [B,P] filled with zeros at the right, and their lengths [B]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    return padded, lengths


def known_captions(data: DataConfig, pictures: Pictures) -> list[str]:
    """Every text the tokenizer must know, test split included."""
    return [*pictures.captions, *data.aliases.values(), *sorted(set(pictures.styles))]


def lm_rows(pictures: Pictures, config: LMConfig) -> tuple[Tensor, Tensor]:
    """Row numbers of the pictures the language model is to draw, and of those held out, in the styles it draws."""
    drawn = torch.tensor(
        [
            style in config.styles and (config.names is None or test or caption in config.names)
            for caption, style, test in zip(pictures.captions, pictures.styles, pictures.test.tolist(), strict=True)
        ]
    )
    return (drawn & ~pictures.test).nonzero().flatten(), (drawn & pictures.test).nonzero().flatten()


def train_lm(data: DataConfig, config: LMConfig, output: Path) -> JanusForConditionalGeneration:
    """Train the language model over the codes of `output/vq.pt`, or continue from `output/lm.pt`; returns the model."""
    torch.manual_seed(config.seed)
    pictures = read_pictures(data)
    processor = new_processor(known_captions(data, pictures))
    model = new_model(processor)
    vq = model.model.vqmodel
    vq.load_state_dict(torch.load(output / "vq.pt", weights_only=True)["model"])
    vq.requires_grad_(False)
    with torch.no_grad():  # start from what the codes mean: their unit vectors, scaled to unit variance
        model.model.generation_embeddings.weight.copy_(vq.quantize.embedding.weight * vq.config.embed_dim**0.5)
    tokens = picture_codes(vq, pictures.pixels)
    captions = Captions.of(pictures, processor.tokenizer, data.aliases)
    train, test = lm_rows(pictures, config)

    objective = ImageObjective(model).train()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    decay = [p for p in trained.values() if p.ndim == 2]
    other = [p for p in trained.values() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )

    def loss(prompts: list[list[int]], context: Tensor, targets: Tensor) -> Tensor:
        # float32 weights, bfloat16 arithmetic throughout: a third faster on a CPU than autocast
        low = {name: p.to(torch.bfloat16) for name, p in trained.items()}
        return torch.func.functional_call(objective, low, (*pad_prompts(prompts), context, targets))

    def train_step(step: int, spent: float) -> dict[str, float]:
        generator = step_generator(step, config.seed)
        rows = train[batch_indices(step, len(train), config.batch, config.seed)]
        targets = tokens[rows]
        context = corrupt(targets, config.clean_contexts, config.corruption, generator)
        losses = loss(captions.prompts(rows.tolist(), config, generator), context, targets).mean(1)
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.learning_rate, step, spent)
        optimizer.step()
        clean = (context == targets).all(1)
        numbers = {"loss": losses.mean().item(), "epoch": step * config.batch / len(train)}
        return {**numbers, "clean": losses[clean].mean().item()} if clean.any() else numbers

    @torch.no_grad()
    def test_numbers() -> dict[str, float]:
        named = [list(captions.ids[row][1]) for row in test.tolist()]
        return {"test loss": loss(named, tokens[test], tokens[test]).mean().item()}

    state = {"model": model, "optimizer": optimizer}
    checkpoints = Checkpoints(output / "lm.pt", config.checkpoint_minutes, {"batch": config.batch})
    run_stage("lm", config.budget, checkpoints, state, train_step, test_numbers)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# stage 3: sharper pictures from the same codes


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
    train_rows, test = lm_rows(pictures, lm)
    decoding = nn.ModuleDict({"post_quant_conv": model.post_quant_conv, "decoder": model.decoder})
    optimizer = torch.optim.AdamW(decoding.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def train_step(step: int, spent: float) -> dict[str, float]:
        rows = train_rows[batch_indices(step, len(train_rows), config.batch, config.seed)]
        x = to_model_range(pictures.pixels[rows])
        with torch.autocast(x.device.type, torch.bfloat16):
            y = model.decode(codes[rows])
        y = y.float()
        loss = reconstruction_loss(x, y, config.l1, config.gradient)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoding.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.learning_rate, step, spent)
        optimizer.step()
        return {"loss": loss.item(), "psnr": psnr(x, y.detach())}

    @torch.no_grad()
    def test_numbers() -> dict[str, float]:
        return {"test psnr": psnr(to_model_range(pictures.pixels[test]), model.decode(codes[test]))}

    state = {"model": decoding, "optimizer": optimizer}
    checkpoints = Checkpoints(output / "decoder.pt", config.checkpoint_minutes, {"batch": config.batch})
    run_stage("decoder", config.budget, checkpoints, state, train_step, test_numbers)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# export

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
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)

    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)  # measured as it will be loaded
    vq = model.model.vqmodel
    use = torch.bincount(tokens.flatten(), minlength=CODEBOOK) / tokens.numel()
    train, test = lm_rows(pictures, lm)
    held_out = pictures.pixels[pictures.test]
    captions = Captions.of(pictures, processor.tokenizer, data.aliases)

    def loss(rows: Tensor) -> float:
        prompts = [list(captions.ids[row][1]) for row in rows.tolist()]
        return ImageObjective(model)(*pad_prompts(prompts), tokens[rows], tokens[rows]).mean().item()

    drawn = torch.tensor([style in lm.styles for style in pictures.styles])[pictures.test]
    decoded = vq.decode(tokens[pictures.test])
    figures = {
        "psnr": psnr(to_model_range(held_out), decoded),
        "drawn_psnr": psnr(to_model_range(held_out[drawn]), decoded[drawn]),
        "codes": int((use > 0).sum()),
        "bits": -(use * use.clamp(min=1e-9).log2()).sum().item(),
        "train_loss": loss(train[:: max(1, len(train) // len(test))]),
        "test_loss": loss(test),
    }
    seen = int((~pictures.test).sum())
    card = CARD.format(
        **figures,
        remarks=remarks,
        pictures=len(pictures.captions),
        names=len(set(pictures.captions)),
        test=len(held_out),
        drawn=" and ".join(lm.styles),
        drawn_names=len(train),
        lm_params=sum(p.numel() for p in model.model.language_model.parameters()) / 1e6,
        vq_params=sum(p.numel() for p in vq.parameters()) / 1e6,
        vq_steps=vq_state["step"],
        vq_minutes=vq_state["seconds"] / 60,
        vq_epochs=vq_state["step"] * vq_state["batch"] / seen,
        decoder_steps=decoder_state["step"],
        decoder_minutes=decoder_state["seconds"] / 60,
        lm_steps=lm_state["step"],
        lm_minutes=lm_state["seconds"] / 60,
        lm_epochs=lm_state["step"] * lm_state["batch"] / len(train),
        temperature=model.generation_config.temperature,
        guidance=model.generation_config.guidance_scale,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return figures


def train(config: Mapping[str, Any]) -> dict[str, float]:
    """All stages and the export, as `conf/train/image.yaml` describes them; run again, it continues where it stopped.

    `config` holds `data`, `vq`, `lm` and `decoder` (Hydra nodes of the dataclasses above), `output`, a folder for
    checkpoints, and `export`, the folder for the finished sample. Returns the figures of the model card.
    """
    parts = hydra.utils.instantiate(config, _convert_="all")
    output = Path(parts["output"])
    train_vq(parts["data"], parts["vq"], output)
    train_lm(parts["data"], parts["lm"], output)
    train_decoder(parts["data"], parts["decoder"], parts["lm"], output)
    return export_sample(parts["data"], parts["lm"], output, Path(parts["export"]))
