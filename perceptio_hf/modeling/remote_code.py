"""Lets a saved folder carry its own code, so that `trust_remote_code=True` loads it where this package is absent.

transformers copies only one flat folder of files; this package has several. `write_code` therefore writes the files
itself, with the imports among them made flat, and fills the `auto_map` that transformers reads.
"""

import os
import re
from pathlib import Path
from typing import Any

_CODEC_FILES = (
    "modeling/configuration_depth_vqvae.py",
    "modeling/modeling_depth_vqvae.py",
    "modeling/placement.py",
    "modeling/remote_code.py",
)
_FILES = (
    *_CODEC_FILES,
    "tokens.py",
    "modeling/attachments.py",
    "modeling/configuration_perceptio.py",
    "modeling/generation_perceptio.py",
    "modeling/spans/end_sequences.py",
    "modeling/spans/grammar_state.py",
    "modeling/mask_prediction.py",
    "modeling/modeling_perceptio.py",
    "modeling/spans/score_trace.py",
    "modeling/shards.py",
    "modeling/shared_mask_decoder.py",
    "modeling/spans/span_cache.py",
    "modeling/spans/span_decoding.py",
    "modeling/span_grammar.py",
    "modeling/spans/spatial_loop.py",
    "modeling/spans/spatial_output.py",
    "modeling/spans/spatial_reading.py",
    "modeling/spans/spatial_recorder.py",
    "modeling/spans/spatial_request.py",
    "modeling/spans/token_choice.py",
    "processing/messages.py",
    "processing/phrases.py",
    "processing/picture_sources.py",
    "processing/pictures.py",
    "processing/plain_text.py",
    "processing/processing_perceptio.py",
)
_MODEL = "modeling_perceptio.PerceptioForConditionalGeneration"
_AUTO_MAPS = {
    "PerceptioConfig": {
        "AutoConfig": "configuration_perceptio.PerceptioConfig",
        "AutoModel": _MODEL,
        "AutoModelForImageTextToText": _MODEL,
        "AutoModelForMultimodalLM": _MODEL,
    },
    "DepthVQVAEConfig": {
        "AutoConfig": "configuration_depth_vqvae.DepthVQVAEConfig",
        "AutoModel": "modeling_depth_vqvae.DepthVQVAE",
    },
    "PerceptioProcessor": {"AutoProcessor": "processing_perceptio.PerceptioProcessor"},
}
_OWN_IMPORT = re.compile(r"^(\s*from )(?:\.|perceptio_hf\.(?:\w+\.)*)(\w+ import )", re.MULTILINE)


def flatten_imports(source: str) -> str:
    """Rewrite every import of this package to a single dot: all files travel in one folder."""
    return _OWN_IMPORT.sub(r"\1.\2", source)


def write_code(saved: Any, folder: str | os.PathLike) -> None:
    """Write the code that `saved` (a configuration or processor) needs into `folder` and set its `auto_map`.

    Does nothing for classes that were themselves loaded as remote code: transformers copies those.
    """
    package = __name__.rpartition(".modeling.")[0]
    if not package or not type(saved).__module__.startswith(package):
        return
    name = type(saved).__name__
    saved.auto_map = dict(_AUTO_MAPS[name])
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for file in _CODEC_FILES if name == "DepthVQVAEConfig" else _FILES:
        source = Path(__file__).parents[1] / file
        partial = target / f".{source.name}.partial"
        partial.write_text(flatten_imports(source.read_text(encoding="utf-8")), encoding="utf-8")
        os.replace(partial, target / source.name)
