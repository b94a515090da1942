"""Broken spans of a stock InternVL under the grammars of an export: `python benchmarks/engine_grammars.py`.

The embedded checkpoint is exported, and transformers' own InternVL samples answers about rendered scenes, freely, and
under the logits processors of xgrammar, llguidance and outlines. What is counted is counted by ids: a code spelled by
ordinary tokens is no code. `make test-engines` installs what this needs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModel, AutoProcessor, InternVLForConditionalGeneration, LogitsProcessor

from perceptio_hf import tiny_checkpoint
from perceptio_hf.conversion.engine_grammars import FOLDER
from perceptio_hf.conversion.export import export_internvl
from perceptio_hf.evaluation.run.answering import encode_chats
from perceptio_hf.files import out_file, write_json
from perceptio_hf.lab.held_out import held_out_items
from perceptio_hf.tokens import SpatialVocabulary, read_sequence

RESULTS = Path(__file__).parent / "results" / "engine_grammars.json"
# Engines and the grammar each reads; "plain" samples freely.
ENGINES = {"plain": "", "xgrammar": "ebnf", "xgrammar-lark": "lark", "llguidance": "lark", "outlines": "regex"}
# Engine, spatial mode, pictures of a prompt.
RUNS = [
    ("plain", "auto", 1),
    *((engine, mode, 1) for mode in ("auto", "seg+depth") for engine in ("xgrammar", "llguidance", "outlines")),
]


class RowMatchers(LogitsProcessor):
    """One matcher for each row, as engines keep them; `allowed` and `accept` are the engine's."""

    def __init__(self, start: Callable[[], object], vocab_size: int, ends: frozenset[int]):
        self.start, self.vocab_size, self.ends = start, vocab_size, ends
        self.rows: list | None = None

    def allowed(self, row) -> torch.Tensor:
        """(vocabulary,) bool."""
        raise NotImplementedError

    def accept(self, row, token: int) -> None:
        raise NotImplementedError

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.rows is None:
            self.rows = [self.start() for _ in input_ids]
        else:
            for number, token in enumerate(input_ids[:, -1].tolist()):
                if self.rows[number] is not None and token not in self.ends:
                    self.accept(self.rows[number], token)
                else:
                    self.rows[number] = None  # the answer has ended, and is being padded
        free = torch.ones(self.vocab_size, dtype=torch.bool)
        allowed = torch.stack([free if row is None else self.allowed(row) for row in self.rows])
        return scores.masked_fill(~allowed, float("-inf"))


class LLGuidanceProcessor(RowMatchers):
    """llguidance has no processor for `generate` of its own."""

    def allowed(self, row) -> torch.Tensor:
        bits = torch.frombuffer(bytearray(row.compute_bitmask()), dtype=torch.uint8)
        return (bits[:, None] >> torch.arange(8) & 1).flatten()[: self.vocab_size].bool()

    def accept(self, row, token: int) -> None:
        if not row.consume_token(token):
            raise RuntimeError(f"llguidance refused the token {token} that it had allowed: {row.get_error()}")


class OutlinesProcessor(RowMatchers):
    """What outlines does around `outlines_core`, without the rest of it."""

    def allowed(self, row) -> torch.Tensor:
        allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        allowed[row.get_tokens()] = True
        return allowed

    def accept(self, row, token: int) -> None:
        row.advance(token, return_tokens=False)


def processor_maker(engine: str, tokenizer, vocab_size: int, grammar: str) -> Callable[[], list[LogitsProcessor]]:
    """What makes the processors of one call of `generate`; the grammar is compiled once.

    Args:
        engine: one of `ENGINES`.
        tokenizer: of the exported folder.
        vocab_size: rows of the head.
        grammar: of the form that `ENGINES` names.
    """
    ends = frozenset({tokenizer.eos_token_id})
    if engine == "plain":
        return list
    if engine.startswith("xgrammar"):
        import xgrammar
        from xgrammar.contrib.hf import LogitsProcessor as XGrammarProcessor

        compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size))
        compiled = (compiler.compile_lark if ENGINES[engine] == "lark" else compiler.compile_grammar)(grammar)
        return lambda: [XGrammarProcessor(compiled)]
    if engine == "llguidance":
        import llguidance
        import llguidance.hf

        words = llguidance.hf.from_tokenizer(tokenizer, vocab_size)
        first = llguidance.LLMatcher(words, grammar)
        if first.is_error():
            raise ValueError(first.get_error())
        return lambda: [LLGuidanceProcessor(first.deep_copy, vocab_size, ends)]
    import outlines_core

    vocabulary = {}
    for token in range(len(tokenizer)):
        if token not in ends:
            vocabulary.setdefault(tokenizer.decode([token]), []).append(token)
    index = outlines_core.Index(grammar, outlines_core.Vocabulary(tokenizer.eos_token_id, vocabulary))
    return lambda: [OutlinesProcessor(lambda: outlines_core.Guide(index), vocab_size, ends)]


def prompts(processor, rows: int, pictures: int = 1) -> Iterator:
    """Batches of questions of every kind about rendered scenes, without end."""
    items = held_out_items(max(rows // 4, pictures))
    place = 0
    while True:
        chats = []
        for _ in range(rows):
            item = items[place % len(items)]
            shown = [items[(place + step) % len(items)].picture for step in range(pictures)]
            content = [{"type": "image", "image": picture} for picture in shown]
            chats.append([{"role": "user", "content": [*content, {"type": "text", "text": item.question.text}]}])
            place += 1
        yield encode_chats(processor, chats)


def is_broken(ids: list[int], start: int, words: SpatialVocabulary, spatial: str, pictures: int) -> bool:
    """Whether a row, prompt and response, holds a broken span, or not the spans that the mode forces."""
    read = read_sequence(ids, words, start)
    masked, shown = {seg.picture for seg in read.segs}, set(range(pictures))
    kept = {
        "auto": len(read.spans) <= pictures,
        "none": not read.segs and not read.spans,
        "seg": bool(read.segs) and not read.spans,
        "depth": len(read.spans) == pictures,
        "seg+depth": len(read.spans) == pictures and masked == shown,
    }
    return not read.well_formed or not kept[spatial]


def is_spelled(ids: list[int], words: SpatialVocabulary, tokenizer) -> bool:
    """Whether ordinary tokens of a response spell a spatial token: as text it then reads otherwise than by ids."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spatial = {words.seg, words.depth_start, words.depth_end, *words.codes}
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [token for token in again if token in spatial] != [token for token in ids if token in spatial]


def sample(
    stock: InternVLForConditionalGeneration,
    processor,
    tokenizer,
    words: SpatialVocabulary,
    make: Callable[[], list[LogitsProcessor]],
    spatial: str,
    *,
    samples: int,
    batch: int,
    temperature: float,
    pictures: int = 1,
    max_new_tokens: int = 192,
) -> dict:
    """Counts of one engine in one mode; `max_new_tokens` are of each picture."""
    torch.manual_seed(0)
    found = {"samples": 0, "with_span": 0, "broken": 0, "spelled": 0, "cut_text": 0}
    begun = time.perf_counter()
    for inputs in prompts(processor, batch, pictures):
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        start = seen["input_ids"].shape[1]
        sequences = stock.generate(
            **seen,
            logits_processor=make(),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens * pictures,
        )
        for row in sequences[: samples - found["samples"]].tolist():
            ended = tokenizer.eos_token_id in row[start:]
            response = row[start : row.index(tokenizer.eos_token_id, start)] if ended else row[start:]
            found["samples"] += 1
            found["with_span"] += words.depth_start in response
            found["broken"] += is_broken(row[:start] + response, start, words, spatial, pictures)
            found["spelled"] += is_spelled(response, words, tokenizer)
            found["cut_text"] += not ended
        if found["samples"] >= samples:
            return found | {"seconds": round(time.perf_counter() - begun, 1)}


def measure(folder: Path, runs: list[tuple[str, str, int]], **options) -> Iterator[dict]:
    """The counts of (engine, spatial mode, pictures), one after another; the export is written to `folder`."""
    model = AutoModel.from_pretrained(tiny_checkpoint()).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    export_internvl(model, processor, folder, overwrite=True, pictures=max(pictures for *_, pictures in runs))
    stock = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    words, tokenizer = model.spatial_vocabulary(), processor.tokenizer
    for engine, spatial, pictures in runs:
        grammar = ""
        if engine != "plain":
            place = folder / FOLDER if pictures == 1 else folder / FOLDER / f"{pictures}-pictures"
            grammar = (place / f"{spatial}.{ENGINES[engine]}").read_text()
        make = processor_maker(engine, tokenizer, stock.config.text_config.vocab_size, grammar)
        counts = sample(stock, processor, tokenizer, words, make, spatial, pictures=pictures, **options)
        yield {"engine": engine, "spatial": spatial, "pictures": pictures, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--out", type=out_file, default=RESULTS)
    given = parser.parse_args()
    options = {"samples": given.samples, "batch": given.batch, "temperature": given.temperature}
    used = {name: version(name) for name in ("torch", "transformers", "xgrammar", "llguidance", "outlines_core")}
    command = " ".join(["python benchmarks/engine_grammars.py", *sys.argv[1:]])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder, "served"), RUNS, **options):
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_json(given.out, {"command": command, **options, "versions": used, "rows": rows})


if __name__ == "__main__":
    main()
