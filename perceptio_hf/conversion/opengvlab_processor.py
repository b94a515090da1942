"""The prompts, tokenizers and picture settings of OpenGVLab's InternVL, without the code that comes with them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .opengvlab_config import picture_side, tokens_per_tile
from .tensors import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerBase

IMAGE_TOKEN, TURN_END = "<IMG_CONTEXT>", "<|im_end|>"
PHI3_END = "<|end|>"
# What a message says: its text, and a line for each picture.
_WORDS = (
    "{% macro words(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
# The names transformers' InternVLProcessor looks for at a tokenizer.
_IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": "<video>",
}
_SYSTEM_V2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_V2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# `template` in config.json -> the system message it begins with, and what stands between two turns (conversation.py).
_TEMPLATES = {
    "Hermes-2": (_SYSTEM_V2, ""),
    "internlm2-chat": (_SYSTEM_V2, ""),
    "internvl2_5": (_SYSTEM_V2_5, "\n"),
}


@dataclass(frozen=True)
class ProcessorParts:
    """What a `PerceptioProcessor` is made of, read from an original checkpoint.

    Args:
        tokenizer: with the attributes transformers' InternVLProcessor reads.
        image_processor: tile size and tiling of the checkpoint.
        image_seq_length: language tokens per tile.
        crop_to_patches: whether large pictures are cut into tiles.
        chat_template: the original prompt in Jinja, system message included.
    """

    tokenizer: "PreTrainedTokenizerBase"
    image_processor: "GotOcr2ImageProcessorPil"
    image_seq_length: int
    crop_to_patches: bool
    chat_template: str


def processor_parts(
    folder: Path, config: Mapping[str, Any], *, prompt: str | None = None, **picture_settings
) -> ProcessorParts:
    """What the processor of a checkpoint is made of.

    Args:
        config: its config.json.
        prompt: the Jinja template; default: what `template` in `config` names.
        picture_settings: override those of `config`, under the names of transformers' image processor.

    Raises:
        ValueError: a template or tokenizer that is unknown or cannot be read.
    """
    prompt = chat_template(config) if prompt is None else prompt
    tokenizer, pictures = load_tokenizer(folder), image_processor(config, **picture_settings)
    tokenizer.chat_template = prompt  # Qwen2's own would be saved beside it
    return ProcessorParts(tokenizer, pictures, tokens_per_tile(config), pictures.crop_to_patches, prompt)


def chat_template(config: Mapping[str, Any]) -> str:
    """The Jinja form of the prompt that `template` in config.json names.

    Raises:
        ValueError: for a template that is unknown or not in ChatML.
    """
    name = config.get("template")
    if name not in _TEMPLATES:
        raise ValueError(f"template in config.json is {name!r}; known are {', '.join(_TEMPLATES)}.")
    system, between = _TEMPLATES[name]
    return chatml(config.get("system_message", system), between)


def chatml(system: str | None = None, between: str = "\n") -> str:
    """ChatML with pictures as InternVL writes them: the placeholder and a new line.

    Args:
        system: said before a conversation that brings no system turn; None says nothing.
        between: stands after the end of every turn.
    """
    begin = _WORDS
    end, after = TURN_END, json.dumps(between)
    if system is not None:
        said = json.dumps(f"<|im_start|>system\n{system}{end}{between}", ensure_ascii=False)
        begin += f"{{% if not messages or messages[0]['role'] != 'system' %}}{{{{ {said} }}}}{{% endif %}}"
    return begin + (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        # The markers let trainers find the assistant's words.
        f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ words(message) + '{end}' }}}}"
        f"{{% endgeneration %}}{{% else %}}{{{{ words(message) + '{end}' }}}}{{% endif %}}"
        f"{{{{ {after} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def phi3_chat() -> str:
    """Phi-3's format where its marks are no tokens but words, with pictures as InternVL writes them.

    An answer that is given, as in training, ends with `<|im_end|>`, which the language model knows from InternVL:
    nothing that is not a token could be learnt as the end of a turn.
    """
    return _WORDS + (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{{{{ words(message) + '{TURN_END}' }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ words(message) + '{PHI3_END}' }}}}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )


def image_processor(config: Mapping[str, Any], **settings) -> "GotOcr2ImageProcessorPil":
    """transformers' image processor with the checkpoint's tile size and tiling; `settings` override single ones."""
    from transformers import GotOcr2ImageProcessorPil

    side = picture_side(config)
    values = {
        "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "crop_to_patches": bool(config.get("dynamic_image_size", False)),
        "min_patches": config.get("min_dynamic_patch", 1),
        "max_patches": config.get("max_dynamic_patch", 6),
    }
    return GotOcr2ImageProcessorPil(**values | settings)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of `folder` with the attributes transformers' InternVLProcessor needs.

    tokenizer.json, or Qwen2's vocab.json and merges.txt, are loaded by transformers; InternLM2's tokenizer.model is
    read by `sentencepiece_model`. No code in the folder is run. ``<video>`` joins the vocabulary if it is not in it.

    Raises:
        ValueError: no tokenizer of these kinds, a damaged one, or one without InternVL's picture tokens.
    """
    settings, added = _tokenizer_settings(folder), _added_tokens(folder)
    known = {token.content for token in added.values()}
    for token in ("<img>", "</img>", IMAGE_TOKEN):
        if token not in known:
            raise ValueError(f"{folder}: the tokenizer has no added token {token}, so it is not InternVL's.")
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return _load_with_transformers(folder, settings)
    if (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder, settings, added)
    raise ValueError(f"{folder} has no tokenizer: expected tokenizer.json, vocab.json or tokenizer.model.")


def _load_with_transformers(folder: Path, settings: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    is_qwen = str(settings.get("tokenizer_class", "Qwen2Tokenizer")).startswith("Qwen2Tokenizer")
    loader = Qwen2Tokenizer if is_qwen else PreTrainedTokenizerFast
    try:
        return loader.from_pretrained(folder, local_files_only=True, extra_special_tokens=dict(_IMAGE_TOKENS))
    except Exception as error:  # the Rust library raises plain Exceptions on files it cannot read
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"The tokenizer in {folder} cannot be read: {reason}") from None


def _load_sentencepiece(
    folder: Path, settings: Mapping[str, Any], added: "Mapping[int, AddedToken]"
) -> "PreTrainedTokenizerBase":
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from .sentencepiece_model import bpe_tokenizer, read_sentencepiece_model

    backend = bpe_tokenizer(read_sentencepiece_model(folder / "tokenizer.model"), added)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    names = {name: _text(settings.get(name) or default) for name, default in names.items()}
    bos = names["bos_token"]
    if settings.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    spare = [token.content for token in added.values() if token.special and token.content not in names.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        additional_special_tokens=[token for token in spare if token not in _IMAGE_TOKENS.values()],
        extra_special_tokens=dict(_IMAGE_TOKENS),
        **names,
    )


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _added_tokens(folder: Path) -> "dict[int, AddedToken]":
    """By id, from whichever of the three files that name them is there."""
    from tokenizers import AddedToken

    found: dict[int, AddedToken] = {}
    if (folder / "added_tokens.json").is_file():
        named = read_json(folder / "added_tokens.json")
        found |= {id: AddedToken(token, special=True, normalized=False) for token, id in named.items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = _tokenizer_settings(folder).get("added_tokens_decoder", {})
    if (folder / "tokenizer.json").is_file():
        listed = {token["id"]: token for token in read_json(folder / "tokenizer.json").get("added_tokens", [])} | listed
    for id, token in listed.items():
        found[int(id)] = AddedToken(token["content"], **{name: token[name] for name in flags if name in token})
    return found


def _text(token: str | Mapping[str, Any]) -> str:
    """Special tokens are strings, or objects with the string in them."""
    return token if isinstance(token, str) else token["content"]
