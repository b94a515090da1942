"""The tiny Perceptio that ships with the package: its parts, fresh and untrained.

Every part is the stock class with small numbers: InternVL's ViT and Qwen2, SAM2's Hiera and mask decoder, our codec.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerFast, Qwen2Config, Sam2Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.world.cells import cell_words, nearness_words

IMAGE_SIZE = 128
PATCH_SIZE = 8
IMAGE_SEQ_LENGTH = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2  # pixel shuffle halves both sides
MASK_IMAGE_SIZE = 128
MASK_THRESHOLD = 0.0  # -0.5 and -1 give the same or less on scenes from seed 900,000,000 on

# ChatML as InternVL writes it. The generation markers let TRL find the assistant's words.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ words(message) }}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ words(message) }}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS_MACRO = (
    "{% macro words(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)


def tiny_tokenizer(corpus: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from `corpus`, with InternVL's special tokens and one token for each cell and
    each nearness level in words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    words.add_tokens(cell_words(int(IMAGE_SEQ_LENGTH**0.5)) + nearness_words())
    return words


def tiny_processor(tokenizer: PreTrainedTokenizerFast, depth_config: DepthVQVAEConfig) -> PerceptioProcessor:
    """The processor of the tiny model: one tile of 128 x 128 per picture."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        crop_to_patches=False,
    )
    return PerceptioProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=IMAGE_SEQ_LENGTH,
        chat_template=_WORDS_MACRO + CHAT_TEMPLATE,
        num_depth_tokens=depth_config.num_tokens,
        num_depth_codes=depth_config.num_codes,
        mask_image_size=MASK_IMAGE_SIZE,
        crop_to_patches=False,
        mask_threshold=MASK_THRESHOLD,
    )


def tiny_mask_config() -> Sam2Config:
    """SAM2 with a four-stage Hiera of 0.3 M parameters; masks of 32 x 32."""
    side = MASK_IMAGE_SIZE
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 24,
                "num_attention_heads": 1,
                "image_size": [side, side],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [24, 48, 96, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 4],
                "window_size_per_stage": [8, 4, 8, 4],
                "global_attention_blocks": [3],
                "mlp_ratio": 2.0,
            },
            "backbone_channel_list": [128, 96, 48, 24],
            "backbone_feature_sizes": [[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
            "fpn_hidden_size": 96,
        },
        prompt_encoder_config={"hidden_size": 96, "image_size": side, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": 96,
            "mlp_dim": 192,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 64,
            "dynamic_multimask_via_stability": False,
        },
    )


def tiny_config(processor: PerceptioProcessor, depth_config: DepthVQVAEConfig) -> PerceptioConfig:
    """The configuration that fits `processor` and the depth codec."""
    tokenizer = processor.tokenizer
    return PerceptioConfig(
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            # InternVL's defaults (0.1 and zero positions) suit a pretrained ViT; from scratch they learn slowly.
            "layer_scale_init_value": 1.0,
            "model_type": InternVLVisionConfig.model_type,
        },
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=384,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=IMAGE_SEQ_LENGTH,
        mask_config=tiny_mask_config(),
        depth_config=depth_config,
        mask_multimask_output=False,
        picture_mark_token_ids=processor.picture_mark_token_ids(),
        **processor.spatial_token_ids(),
    )
