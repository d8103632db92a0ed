"""Stage 2, the language model: image tokens given a caption, and given earlier image tokens with mistakes in them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from polyspec.modalities.image.train.data import DataConfig, Pictures, read_pictures
from polyspec.modalities.image.train.model import CODEBOOK, DRAW, GRID, PAD, START, UNKNOWN, new_model, new_processor
from polyspec.modalities.image.train.stage import (
    Budget,
    Checkpoints,
    batch_indices,
    learning_rate,
    run_stage,
    step_generator,
    update,
)
from polyspec.modalities.image.train.tokenizer import picture_codes

DRAWN = (  # what people ask for by name
    *("red heart", "orange heart", "yellow heart", "green heart", "blue heart", "purple heart", "black heart"),
    *("broken heart", "rainbow", "sun", "sun with face", "crescent moon", "full moon", "star", "glowing star", "cloud"),
    *("sun behind cloud", "cloud with rain", "snowflake", "snowman", "fire", "droplet", "umbrella", "high voltage"),
    *("hamburger", "french fries", "hot dog", "taco", "popcorn", "doughnut", "cookie", "birthday cake", "cupcake"),
    *("ice cream", "lollipop", "candy", "bread", "cheese wedge", "croissant", "pretzel", "pancakes", "sushi"),
    *("red apple", "green apple", "pear", "lemon", "banana", "watermelon", "grapes", "strawberry", "cherries", "peach"),
    *("pineapple", "avocado", "tomato", "carrot", "broccoli", "ear of corn", "mushroom", "teapot", "beer mug"),
    *("wine glass", "tiger face", "cat face", "dog face", "cow face", "pig face", "mouse", "rabbit face", "fox"),
    *("bear", "panda", "koala", "lion", "frog", "monkey face", "chicken", "baby chick", "bird", "duck", "owl"),
    *("unicorn", "honeybee", "butterfly", "snail", "bug", "spider", "turtle", "octopus", "crab", "fish"),
    *("tropical fish", "whale", "dolphin", "elephant", "horse", "sunflower", "rose", "tulip", "cherry blossom"),
    *("cactus", "palm tree", "evergreen tree", "Christmas tree", "four leaf clover", "rocket", "airplane"),
    *("automobile", "bus", "taxi", "police car", "fire engine", "ambulance", "tractor", "locomotive", "bicycle"),
    *("sailboat", "ship", "flying saucer", "helicopter", "anchor", "soccer ball", "basketball", "trophy", "guitar"),
    *("drum", "key", "candle", "light bulb", "open book", "camera", "crown", "bell", "house", "volcano", "balloon"),
    *("wrapped gift", "jack-o-lantern", "robot", "alien", "ghost", "grinning face", "smiling face with heart-eyes"),
    *("smiling face with sunglasses", "winking face", "red circle", "blue circle", "green circle", "yellow circle"),
    *("red square", "blue square", "green square"),
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


@dataclass(frozen=True, slots=True)
class Captions:
    """Draws the prompts of training rows: token ids [N][variant] of every picture, with and without the style word."""

    ids: tuple[tuple[tuple[int, ...], ...], ...]  # picture -> (name, name + style[, alias, alias + style])
    kept: frozenset[int]  # what stays when the others become `pad`: the unconditional format
    pad: int
    unknown: int

    @classmethod
    def of(cls, pictures: Pictures, tokenizer: PreTrainedTokenizerFast, aliases: Mapping[str, str]) -> "Captions":
        number = tokenizer.get_vocab()
        ids = []
        for caption, style in zip(pictures.captions, pictures.styles, strict=True):
            names = [caption, aliases[caption]] if caption in aliases else [caption]
            texts = [text for name in names for text in (name, f"{name} {style}")]
            ids.append(tuple(tuple(tokenizer(text + DRAW).input_ids) for text in texts))
        return cls(tuple(ids), frozenset({number[START], number[DRAW]}), number[PAD], number[UNKNOWN])

    def prompts(self, rows: Iterable[int], config: LMConfig, generator: torch.Generator) -> list[list[int]]:
        """One randomly varied prompt for each picture of `rows`."""
        prompts = []
        for row in rows:
            style, alias, null, unknown, place = torch.rand(5, generator=generator).tolist()
            variants = self.ids[row]
            k = 2 if len(variants) > 2 and alias < config.alias_share else 0
            prompt: list[int] = list(variants[k + (style >= config.style_dropout)])
            if unknown < config.unknown_words:
                prompt.insert(1 + int(place * (len(prompt) - 1)), self.unknown)
            if null < config.null_captions:
                prompt = [token if token in self.kept else self.pad for token in prompt]
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


def lm_rows(pictures: Pictures, styles: Collection[str], names: Collection[str] | None) -> tuple[Tensor, Tensor]:
    """Row numbers of the pictures a model is to draw (`names` None: all), and of those held out, in the given styles."""
    drawn = torch.tensor(
        [
            style in styles and (names is None or test or caption in names)
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
    train, test = lm_rows(pictures, config.styles, config.names)

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
        update(optimizer, losses.mean(), learning_rate(config.learning_rate, step, spent))
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
