"""The sample's model before training: sizes, image tokenizer, processor, and the Janus model around them."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
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

IMAGE_SIZE = 64  # pixels a side
GRID = 16  # tokens a side
CODEBOOK = 512
HIDDEN = 256  # width of the language model
NO_GUIDANCE = 1.000001  # Janus' own loop fails unless the guidance scale is above 1; this is 1 to six digits
PAD, START, UNKNOWN, DRAW = "<pad>", "<s>", "<unk>", "<boi>"  # what a prompt holds beside words


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


def new_processor(captions: Iterable[str]) -> JanusProcessor:
    """A `JanusProcessor` whose tokenizer knows the words of `captions`, lower-cased and without punctuation.

    A prompt becomes `<s> word word … <boi>` with `generation_mode="image"`; words never seen become `<unk>`.
    """
    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
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
    special = [PAD, START, "</s>", UNKNOWN, DRAW, "<eoi>", "<image>"]
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, words.token_to_id(START))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=START,
        eos_token="</s>",
        pad_token=PAD,
        unk_token=UNKNOWN,
        boi_token=DRAW,
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
