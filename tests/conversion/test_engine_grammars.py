"""The grammars of an export say what `SpanGrammar` says: read by a small interpreter of their own, and by the engines.

What needs xgrammar, llguidance or outlines is skipped without them; `make test-engines` has them.
"""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch

from perceptio_hf.conversion.engine_grammars import (
    forbidden_ids,
    most_tokens_with_spans,
    span_grammar_texts,
    write_grammars,
)
from perceptio_hf.modeling.span_grammar import SPATIAL_MODES, SpanGrammar
from perceptio_hf.tokens import depth_span

MANY = 1000  # tokens before a span: no limit for what is written here
FIRST = 0xE000  # the character that stands for id 0 in this file's interpreter


def texts(model, processor, spatial: str, pictures: int = 1, **options) -> dict[str, str]:
    forbidden = forbidden_ids(model, processor)
    strings = [text for text, token in processor.tokenizer.get_vocab().items() if token in forbidden]
    options = {"tokens_before_span": MANY, **options}
    words = model.spatial_vocabulary()
    return span_grammar_texts(words, spatial, forbidden=forbidden, strings=strings, pictures=pictures, **options)


# --- by themselves ---------------------------------------------------------------------------------------------------


def _ids(listed: str) -> str:
    spans = (part.strip().split("-") for part in listed.split(","))
    return "".join(f"{chr(FIRST + int(span[0]))}-{chr(FIRST + int(span[-1]))}" for span in spans)


def as_pattern(grammar: str) -> re.Pattern:
    """EBNF or Lark with tokens -> a pattern over characters that stand for ids."""
    lines = [line for line in grammar.splitlines() if not line.startswith(("#", "//"))]
    rules = dict(re.split(r" ::= |: ", line, maxsplit=1) for line in lines)
    (top, *_) = rules

    def expand(body: str) -> str:
        body = re.sub(r"ExcludeToken\(([^)]*)\)|<\[\^([^\]]*)\]>", lambda m: f"[^{_ids(m[1] or m[2])}]", body)
        body = re.sub(r"Token\(([^)]*)\)|<\[([^\]]*)\]>", lambda m: f"[{_ids(m[1] or m[2])}]", body)
        body = re.sub(r"\b[a-z]+\b", lambda m: f"(?:{expand(rules[m[0]])})", body)
        return body.replace(" ", "")

    return re.compile(expand(rules[top]), re.DOTALL)


def span_grammar(model, spatial: str, pictures: int, rows: int = 1) -> SpanGrammar:
    """For responses without a prompt and without an end in sight."""
    shown, opened = torch.full((rows,), pictures), torch.full((rows,), -1)
    options = {"prompt_length": 0, "max_length": 10**6, "num_pictures": shown, "open_codes": opened}
    return SpanGrammar(model.spatial_vocabulary(), spatial=spatial, **options)


def allowed_at(grammar: SpanGrammar, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """(rows, length) -> (rows, vocabulary) bool."""
    return torch.isfinite(grammar(ids, torch.zeros(len(ids), vocabulary)))


def sequences(model, processor, spatial: str, pictures: int, rows: int = 60, length: int = 60) -> list[list[int]]:
    """Random responses under the grammar, and the same with one token left out, put in or changed."""
    words, vocabulary = model.spatial_vocabulary(), model.config.text_config.vocab_size
    generator, rng = torch.Generator().manual_seed(pictures), random.Random(pictures)
    weights = torch.full((vocabulary,), 1 / vocabulary)
    weights[words.seg], weights[words.depth_start] = 0.3, 0.2
    weights[list(forbidden_ids(model, processor))] = 0
    grammar, ids = span_grammar(model, spatial, pictures, rows), torch.zeros(rows, 0, dtype=torch.long)
    for _ in range(length):
        chances = allowed_at(grammar, ids, vocabulary) * weights
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    whole = [row[: rng.randrange(length)] for row in ids.tolist()]
    spatial_ids = [words.seg, words.depth_start, words.depth_end, words.codes[0], 40]
    changed = []
    for row in whole:
        place, kind = rng.randrange(len(row) + 1), rng.randrange(3)
        changed.append([*row[:place], *([rng.choice(spatial_ids)] if kind else []), *row[place + (kind != 1) :]])
    return whole + changed


def accepts(model, spatial: str, pictures: int, rows: list[list[int]], end: int) -> list[bool]:
    """Whether each response may be written, and may end there."""
    vocabulary, verdicts = model.config.text_config.vocab_size, [True] * len(rows)
    grammar = span_grammar(model, spatial, pictures, len(rows))
    padded = torch.tensor([row + [end] * (1 + max(map(len, rows)) - len(row)) for row in rows])
    for place in range(padded.shape[1]):
        allowed = allowed_at(grammar, padded[:, :place], vocabulary)
        for number, row in enumerate(rows):
            if place <= len(row):
                verdicts[number] &= bool(allowed[number, padded[number, place]])
    return verdicts


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("spatial", SPATIAL_MODES)
def test_they_accept_what_the_span_grammar_accepts(model, processor, spatial, pictures):
    rows = sequences(model, processor, spatial, pictures)
    expected = accepts(model, spatial, pictures, rows, processor.tokenizer.eos_token_id)
    assert len(set(expected)) == 2, "some are whole and some are not"
    written = texts(model, processor, spatial, pictures)
    for ending in ("ebnf", "lark"):
        pattern = as_pattern(written[ending])
        found = [bool(pattern.fullmatch("".join(chr(FIRST + token) for token in row))) for row in rows]
        assert found == expected, ending


@pytest.mark.parametrize("spatial", SPATIAL_MODES)
def test_the_regular_expression_reads_the_text_of_whole_answers(model, processor, spatial):
    span, words, pattern = depth_span([3] * 16), " near, far\nand so on", texts(model, processor, spatial)["regex"]
    answers = {
        "": "auto none",
        words: "auto none",
        span + words: "auto depth",
        "[SEG]" + words: "auto seg",
        f"[SEG][SEG]{span}{words}": "auto seg+depth",
        f"a{words}[SEG]{span}{words}[SEG]": "auto",
        f"[SEG]{words}[SEG]": "auto seg",
        span + span: "",
        depth_span([3] * 15): "",
        span.replace("<DEPTH_END>", ""): "",
        "<DEPTH_3>": "",
        "<|im_end|>": "",
        "<img>": "",
    }
    for text, modes in answers.items():
        assert bool(re.fullmatch(pattern, text)) == (spatial in modes.split()), text


def test_a_span_that_would_begin_too_late_is_not_begun(model, processor):
    """Engines stop at `max_tokens` whatever a grammar says."""
    words = model.spatial_vocabulary()
    span = [words.depth_start, *[words.codes[0]] * words.num_depth_tokens, words.depth_end]
    pattern = as_pattern(texts(model, processor, "auto", 2, tokens_before_span=5)["lark"])
    for before, between, allowed in ((5, 5, True), (6, 0, False), (0, 6, False)):
        row = [*[40] * before, *span, *[40] * between, *span]
        assert bool(pattern.fullmatch("".join(chr(FIRST + token) for token in row))) == allowed
        assert len(row) <= most_tokens_with_spans(words, 2, 5) or not allowed


def test_no_control_token_and_no_unused_row_is_text(model, processor):
    forbidden = forbidden_ids(model, processor)
    tokenizer = processor.tokenizer
    named = {"<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert set(tokenizer.convert_tokens_to_ids(sorted(named))) <= forbidden
    used = set(tokenizer.get_vocab().values())
    assert set(range(model.config.text_config.vocab_size)) - used <= forbidden
    assert not {tokenizer.convert_tokens_to_ids("[SEG]"), *tokenizer("the red ball")["input_ids"]} & forbidden


def test_files_for_each_mode_and_number_of_pictures(model, processor, tmp_path):
    write_grammars(model, processor, tmp_path, pictures=3, tokens_before_span=7)
    names = sorted(f"{mode}.{ending}" for mode in SPATIAL_MODES for ending in ("ebnf", "lark", "regex"))
    folder = tmp_path / "grammars"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == names
    for count in (2, 3):
        assert sorted(path.name for path in (folder / f"{count}-pictures").iterdir()) == names
    assert "span{3} word*" in (folder / "3-pictures" / "depth.lark").read_text()
    assert "(free{0,7} span){0,1} free*" in (folder / "auto.ebnf").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"pictures": 0}, "pictures is 0"), ({"tokens_before_span": 0}, "tokens_before_span is 0")],
)
def test_numbers_that_make_no_grammar(model, processor, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        write_grammars(model, processor, tmp_path, **options)
    with pytest.raises(ValueError, match="'all' is unknown"):
        texts(model, processor, "all")


# --- by the engines --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "engine_grammars.py"
    spec = importlib.util.spec_from_file_location("engine_grammars_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need(engine: str) -> None:
    module = {"xgrammar-lark": "xgrammar", "outlines": "outlines_core"}.get(engine, engine)
    pytest.importorskip(module, reason=f"{module} is not installed; make test-engines installs it")


@pytest.mark.parametrize("engine", ["xgrammar", "xgrammar-lark", "llguidance"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("spatial", SPATIAL_MODES)
def test_an_engine_allows_what_the_span_grammar_allows(benchmark, model, processor, engine, spatial, pictures):
    """Step by step, token by token; what conversations are built of aside."""
    need(engine)
    vocabulary, end = model.config.text_config.vocab_size, processor.tokenizer.eos_token_id
    grammar = texts(model, processor, spatial, pictures)[benchmark.ENGINES[engine]]
    (restrict,) = benchmark.processor_maker(engine, processor.tokenizer, vocabulary, grammar)()
    ours = span_grammar(model, spatial, pictures)
    aside = list(forbidden_ids(model, processor) - {end})
    words, rng = model.spatial_vocabulary(), random.Random(spatial)
    ids = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(60):
        expected = allowed_at(ours, ids, vocabulary)[0]
        expected[aside] = False
        found = torch.isfinite(restrict(ids, torch.zeros(1, vocabulary)))[0]
        assert torch.equal(found, expected), (found != expected).nonzero()[:, 0].tolist()
        chosen = [token for token in expected.nonzero()[:, 0].tolist() if token != end]
        likely = [token for token in (words.seg, words.depth_start) if token in chosen]
        ids = torch.cat([ids, torch.tensor([[rng.choice(likely if likely and rng.random() < 0.5 else chosen)]])], dim=1)


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance"])
def test_a_stock_internvl_keeps_its_spans_whole(benchmark, tmp_path, engine):
    """A few dozen of the samples that benchmarks/engine_grammars.py draws, at a temperature at which any weights break
    spans without a grammar."""
    need(engine)
    runs = [("plain", "auto", 1)] if engine == "xgrammar" else []
    runs += [(engine, "auto", 1), (engine, "seg+depth", 1), (engine, "auto", 2)]
    rows = list(benchmark.measure(tmp_path / "served", runs, samples=32, batch=32, temperature=2.0))
    if engine == "xgrammar":
        assert rows.pop(0)["broken"] > 0
    for row in rows:
        assert row["samples"] == 32 and row["broken"] == 0 and row["with_span"] > 0, row


def test_a_grammar_of_characters_lets_codes_be_spelled(benchmark, model, processor):
    """Why the grammars name tokens: after a start marker a regular expression also allows the beginning of a code."""
    need("outlines")
    vocabulary, words = model.config.text_config.vocab_size, model.spatial_vocabulary()
    (restrict,) = benchmark.processor_maker(
        "outlines", processor.tokenizer, vocabulary, texts(model, processor, "depth")["regex"]
    )()
    begun = torch.zeros(1, 0, dtype=torch.long)
    assert torch.isfinite(restrict(begun, torch.zeros(1, vocabulary)))[0, words.depth_start]
    after = restrict(torch.tensor([[words.depth_start]]), torch.zeros(1, vocabulary))[0]
    allowed = set(torch.isfinite(after).nonzero()[:, 0].tolist())
    assert set(words.codes) < allowed
    assert {processor.tokenizer.decode([token]) for token in allowed - set(words.codes)} >= {"<"}
