"""Spans that are guessed whole and corrected: the same results as code by code, in fewer passes."""

import collections
import copy
import itertools
import logging
import re

import pytest
import torch
from helpers import chat, encode, picture
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

import perceptio_hf
from perceptio_hf.modeling.span_grammar import SPATIAL_MODES, SpanGrammar
from perceptio_hf.modeling.spans import span_decoding, spatial_loop
from perceptio_hf.modeling.spans.grammar_state import GrammarState, LoopGrammar
from perceptio_hf.modeling.spans.span_cache import CACHE
from perceptio_hf.modeling.spans.spatial_request import SpatialRequest
from perceptio_hf.modeling.spans.token_choice import TokenChoice
from perceptio_hf.tokens import read_sequence
from perceptio_hf.world import DEMO_SEED, render_scene

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 4.0, "top_k": 0},
    "several samples": {"do_sample": True, "temperature": 3.0, "top_k": 30, "top_p": 0.9, "num_return_sequences": 3},
}
HELLO = [{"role": "user", "content": "Hello"}]


class Anything(LogitsProcessor):
    """A processor that nobody knows, and that changes nothing: it sends generation through transformers' own loop."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores


@pytest.fixture(scope="module")
def one(processor):
    return encode(processor, chat(picture()))


@pytest.fixture(scope="module")
def mixed(processor):
    """Rows of different lengths, with two pictures, one and none."""
    return encode(
        processor,
        chat(picture(seed=1), picture(20, 30, seed=2)),
        chat(picture(70, 20, seed=3), text="What is near, what is far?"),
        HELLO,
    )


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 60, "return_dict_in_generate": True, **options})


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("mask_logits", "mask_scores", "depth_maps", "depth_codes", "depth_confidence"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert ours.mask_pictures == theirs.mask_pictures and ours.depth_pictures == theirs.depth_pictures


@pytest.fixture
def passes(monkeypatch):
    """How many passes each loop of ours took."""
    counted, run = [], span_decoding.SpanDecoder.run

    def counting(self, *args):
        result = run(self, *args)
        counted.append(self.passes)
        return result

    monkeypatch.setattr(span_decoding.SpanDecoder, "run", counting)
    return counted


@pytest.mark.parametrize("spatial", SPATIAL_MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parallel_equals_sequential(model, mixed, strategy, spatial, monkeypatch):
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    options = {"spatial": spatial, **STRATEGIES[strategy]}
    parallel = generate(model, mixed, **options)
    assert_same(parallel, generate(model, mixed, spatial_decoding="sequential", **options))
    assert all(parallel.well_formed)
    again = model.decode_spatial(parallel.sequences, **mixed)
    for ours, theirs in zip(parallel.mask_logits, again.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_rows_share_the_places_of_a_pass(model):
    """What docs/generation.md says of rows on a CPU: with 13 and more of them there is one place for each."""
    request = SpatialRequest(model.spatial_vocabulary(), "depth", [], prompt_length=0, new_tokens=60)
    loop = spatial_loop.SpatialLoop(request, "parallel", insists=False, keeps_states=False)
    widths = [loop._width(rows, torch.device("cpu"), DynamicCache(), False) for rows in (1, 12, 13, 40)]
    assert widths == [request.words.span_length, 2, 1, 1]


@pytest.mark.parametrize("places", [2, 5, 1000])
def test_any_width_gives_the_same(model, one, places, monkeypatch, passes):
    expected = generate(model, one, spatial="seg+depth", spatial_decoding="sequential")
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", places)
    assert_same(generate(model, one, spatial="seg+depth"), expected)
    assert passes[1] < passes[0]


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
@pytest.mark.parametrize("spatial", ["auto", "seg", "seg+depth"])
def test_it_equals_transformers_own_loop(model, mixed, spatial, decoding):
    """Whose grammar is `SpanGrammar`, read off the ids."""
    theirs = generate(model, mixed, spatial=spatial, logits_processor=[Anything()])
    assert_same(generate(model, mixed, spatial=spatial, spatial_decoding=decoding), theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_and_logits(model, mixed, strategy, monkeypatch):
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    wanted = {"output_scores": True, "output_logits": True, "spatial": "seg+depth", **STRATEGIES[strategy]}
    parallel = generate(model, mixed, **wanted)
    sequential = generate(model, mixed, spatial_decoding="sequential", **wanted)
    assert len(parallel.scores) == len(parallel.logits) == parallel.sequences.shape[1] - parallel.prompt_length
    for ours, theirs in zip(parallel.scores + parallel.logits, sequential.scores + sequential.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    plain = generate(model, mixed, spatial="seg+depth", **STRATEGIES[strategy])
    assert torch.equal(plain.sequences, parallel.sequences), "asking for scores changes nothing"
    if strategy == "greedy":
        stock = generate(model, mixed, logits_processor=[Anything()], **wanted)
        ends = set(torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist())
        for row, ids in enumerate(stock.sequences[:, stock.prompt_length :].tolist()):
            length = next((step + 1 for step, token in enumerate(ids) if token in ends), len(ids))
            for step, table in itertools.product(range(length), ("scores", "logits")):
                ours, theirs = getattr(parallel, table)[step][row], getattr(stock, table)[step][row]
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spatial", SPATIAL_MODES)
def test_the_state_on_the_device_is_that_of_the_reference(model, spatial):
    """Random walks under both: at every step the same tokens are allowed."""
    words, steps = model.spatial_vocabulary(), 60
    vocabulary, generator = model.config.text_config.vocab_size, torch.Generator().manual_seed(0)
    pictures = torch.tensor([0, 1, 2, 3] * 8)
    if spatial not in ("auto", "none"):
        steps = 3 * (words.span_length + 1) + 6
    limits = {"prompt_length": 0, "max_length": steps, "num_pictures": pictures}
    limits["open_codes"] = torch.full_like(pictures, -1)
    reference, quick = (kind(words, spatial=spatial, **limits) for kind in (SpanGrammar, LoopGrammar))
    state = GrammarState(words, spatial, pictures, torch.zeros_like(pictures, dtype=torch.bool))
    ids, tempting = torch.zeros(len(pictures), 0, dtype=torch.long), torch.zeros(vocabulary)
    tempting[[words.seg, words.depth_start]] = 4.0
    for step in range(steps):
        allowed = reference(ids, torch.zeros(len(pictures), vocabulary)) == 0
        outside = ~state.in_span
        ours = state.restrict(
            torch.zeros(len(pictures), vocabulary), torch.full_like(pictures, steps - step), only=True
        )
        assert torch.equal((ours == 0)[outside], allowed[outside])
        scores = torch.randn(allowed.shape, generator=generator)
        scores[::3] = float("-inf")  # other processors left nothing: the grammar wins
        assert torch.equal(quick(ids, scores), reference(ids, scores))
        only = (
            allowed & (torch.arange(vocabulary) != words.seg) & (torch.arange(vocabulary) != words.depth_start)
        ).any(1)
        assert not (~only & outside & ~state.must_be_spatial()).any(), "the host is told when nothing else may come"
        noise = torch.rand(allowed.shape, generator=generator)
        tokens = (tempting - noise.log().neg().log()).masked_fill(~allowed, float("-inf")).argmax(1)
        state.write(tokens, outside)
        state.close(~outside & (tokens == words.depth_end))
        ids = torch.cat([ids, tokens[:, None]], 1)
    assert all(read_sequence([words.image, *row], words).well_formed for row in ids[pictures > 0].tolist())


def test_the_grammar_of_transformers_loops_moves_once(model):
    """What it knows of the prompts stays where the scores are."""
    words = model.spatial_vocabulary()
    limits = {"prompt_length": 0, "max_length": 9, "num_pictures": torch.tensor([1]), "open_codes": torch.tensor([-1])}
    grammar, ids = LoopGrammar(words, spatial="auto", **limits), torch.zeros(2, 3, dtype=torch.long, device="meta")
    grammar(ids, torch.zeros(2, model.config.text_config.vocab_size, device="meta"))
    assert grammar.num_pictures.is_meta and grammar.open_codes.is_meta


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf"), 0.5])
    expected, draws = logits.softmax(-1), 20000
    torch.manual_seed(0)
    choice = TokenChoice(None, sample=True, rows=draws, steps=2, spans=1, code_shape=(3, 5), device=torch.device("cpu"))
    scores = logits.expand(draws, -1)
    words = choice.words(scores, torch.ones(draws, dtype=torch.long), torch.ones(draws, dtype=torch.bool))
    codes = choice.codes(scores[:, None], torch.zeros(draws, dtype=torch.long), torch.full((draws, 1), 2))[:, 0]
    for tokens in (words, codes):
        share = torch.bincount(tokens, minlength=5) / draws
        error = (expected * (1 - expected) / draws).sqrt()
        assert ((share - expected).abs() <= 4.5 * error).all(), share


def test_seeds(model, one):
    options = {"spatial": "depth", "do_sample": True, "temperature": 2.0, "max_new_tokens": 40}
    torch.manual_seed(1)
    first = model.generate(**one, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**one, **options), first)
    assert not torch.equal(model.generate(**one, **options), first)


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_scores_that_are_no_numbers(model, mixed, decoding):
    """A temperature so small that scores are infinite; greedy decoding has no need of numbers."""
    options = {"do_sample": True, "temperature": 1e-38, "spatial_decoding": decoding}
    with pytest.raises(ValueError, match="No token can be drawn"):
        generate(model, mixed, **options)


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_a_pass_asks_the_configuration_nothing(model, one, decoding, monkeypatch):
    """The ids of spatial tokens are read once; with the marks of pictures they cost half a millisecond each time."""
    read, asked = type(model).spatial_vocabulary, []
    monkeypatch.setattr(type(model), "spatial_vocabulary", lambda self: asked.append(1) or read(self))
    for tokens in (20, 50):
        model.generate(**one, spatial="depth", spatial_decoding=decoding, max_new_tokens=tokens, eos_token_id=10**6)
        asked.append(None)
    first = asked.index(None)
    assert first == len(asked) - first - 2 <= 3


def test_a_span_that_the_prompt_left_open(model, one):
    words, full = model.spatial_vocabulary(), model.config.num_depth_tokens
    for count in (0, 1, full):
        given = torch.tensor([[words.depth_start, *words.codes[:count]]])
        ids = torch.cat([one.input_ids, given], 1)
        inputs = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for tokens in (60, full - count + 1):
            options = {"spatial": "none", "max_new_tokens": tokens}
            out = generate(model, inputs, **options)
            assert_same(out, generate(model, inputs, spatial_decoding="sequential", **options))
            assert out.well_formed == [True] and len(out.depth_maps[0]) == 1


def test_prompts_as_embeddings(model, processor):
    inputs = encode(processor, HELLO)
    embeds = model.get_input_embeddings()(inputs.input_ids)
    expected = generate(model, inputs, logits_processor=[Anything()])
    out = generate(model, {"inputs_embeds": embeds})
    assert torch.equal(out.sequences, expected.sequences[:, inputs.input_ids.shape[1] :])


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
@pytest.mark.parametrize("which", ["one", "mixed"])
def test_the_cache_that_comes_back_goes_on(model, request, which, decoding, monkeypatch):
    """It holds what has been read and nothing that was guessed wrong."""
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    inputs = request.getfixturevalue(which)
    out = generate(model, inputs, spatial="depth", spatial_decoding=decoding, max_new_tokens=45, eos_token_id=-1)
    cache = getattr(out, CACHE)
    assert int(cache.get_seq_length()) == out.sequences.shape[1] - 1
    ids = out.sequences
    mask = torch.cat([inputs.attention_mask, torch.ones_like(ids[:, inputs.input_ids.shape[1] :])], 1)
    plain, options = {"input_ids": ids, "attention_mask": mask}, {"max_new_tokens": 5, "spatial": "none"}
    expected = generate(model, {**plain, "pixel_values": inputs.pixel_values}, **options)
    assert torch.equal(generate(model, {**plain, CACHE: cache}, **options).sequences, expected.sequences)


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_the_cache_of_rows_that_ended_apart(model, mixed, decoding, monkeypatch):
    """Of every row it holds all tokens, the end marker of one that ended before others too."""
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    options = {"spatial": "depth", "spatial_decoding": decoding}
    prompt = mixed.input_ids.shape[1]
    free = generate(model, mixed, **options, eos_token_id=-1).sequences[:, prompt:].tolist()
    ends = {token: [(*row, token).index(token) for row in free] for token in set(itertools.chain(*free))}
    # The row without a picture, which writes words only, ends while the others are far ahead.
    end = next(token for token in free[2] if min(ends[token][:2]) > 20 > ends[token][2] > 5)
    out = generate(model, mixed, **options, eos_token_id=end)
    mask = torch.zeros_like(out.sequences)
    mask[:, :prompt] = mixed.attention_mask
    for row, place in zip(mask, ends[end], strict=True):
        row[prompt : prompt + place + 1] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        inputs = {"input_ids": out.sequences, "attention_mask": mask, "position_ids": positions}
        fresh = getattr(model(**inputs, pixel_values=mixed.pixel_values, use_cache=True), CACHE)
    found = getattr(out, CACHE)
    assert int(found.get_seq_length()) == out.sequences.shape[1] - 1
    known = mask[:, :-1].bool()
    for layer, expected in zip(found.layers, fresh.layers, strict=True):
        for name in ("keys", "values"):
            ours, theirs = getattr(layer, name).transpose(1, 2), getattr(expected, name).transpose(1, 2)[:, :-1]
            torch.testing.assert_close(ours[known], theirs[known], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_one_graph_and_no_recompilation(model, processor, decoding):
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    prompts = [encode(processor, chat(picture(seed=seed), text="Where?" + " Where?" * seed)) for seed in range(4)]
    options = {"spatial": "seg+depth", "cache_implementation": "static", "spatial_decoding": decoding}
    torch._dynamo.reset()
    graphs = []
    for prompt in prompts[::-1]:
        torch._dynamo.utils.counters.clear()
        out = generate(model, prompt, compile_config=config, **options)
        assert_same(out, generate(model, prompt, spatial="seg+depth", spatial_decoding="sequential"))
        graphs.append(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
        assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs[0] > 0 and graphs[2:] == [0, 0], graphs


def test_a_static_cache_of_several_rows(model, mixed):
    expected = generate(model, mixed, spatial="seg+depth")
    assert_same(generate(model, mixed, spatial="seg+depth", cache_implementation="static"), expected)


@pytest.fixture
def said(caplog):
    """What the loop says about falling back; each sentence is said once per process, so the memory of it is cleared."""
    log = spatial_loop.logger
    for say in (type(log).warning_once, type(log).info_once):
        say.cache_clear()
    log.propagate, before = True, log.propagate
    logging.getLogger("transformers").propagate = True
    yield lambda: [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]
    log.propagate = before


class OwnCache(DynamicCache):
    """A cache of the caller's, of which nobody knows whether it can be cut."""


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}])
def test_what_does_not_go_parallel_says_so_once(model, one, options, said):
    first = generate(model, one, spatial="depth", spatial_decoding="parallel", **options)
    second = generate(model, one, spatial="depth", spatial_decoding="parallel", **options)
    assert len(said()) == 1 and torch.equal(first.sequences, second.sequences)
    assert first.well_formed == [True] * len(first.well_formed)


def test_a_cache_that_cannot_be_cut(model, one, said):
    expected = generate(model, one, spatial="depth")
    cache = OwnCache(config=model.config.text_config)
    out = generate(model, {**one, CACHE: cache}, spatial="depth", spatial_decoding="parallel")
    assert_same(out, expected)
    assert len(said()) == 1 and "OwnCache" in said()[0]


def test_a_processor_that_reads_ids_sees_what_it_would_see(model, one, said):
    """Every prefix of the sequence, inside the span too."""
    seen = {}
    for decoding in ("parallel", "sequential"):
        reader = Anything()
        out = generate(model, one, spatial="depth", spatial_decoding=decoding, logits_processor=[reader])
        seen[decoding] = reader.seen
        start, ids = out.prompt_length, out.sequences.tolist()
        assert reader.seen == [[row[:end] for row in ids] for end in range(start, len(ids[0]))]
    assert seen["parallel"] == seen["sequential"] and len(said()) == 1
    penalised = {"spatial": "depth", "repetition_penalty": 1.5}
    parallel = generate(model, one, spatial_decoding="parallel", **penalised)
    assert_same(parallel, generate(model, one, spatial_decoding="sequential", **penalised))


def nothing_changes(input_ids, scores):
    return scores


def test_what_reads_ids_is_named(model, one, said):
    for named in (nothing_changes, Anything()):
        generate(model, one, spatial="depth", spatial_decoding="parallel", logits_processor=[named])
    assert ["nothing_changes" in said()[0], "Anything" in said()[1]] == [True, True]


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_stopping_leaves_a_whole_span_or_none(model, processor, one, decoding, options):
    start, words = one.input_ids.shape[1], model.spatial_vocabulary()
    for length in (start + 1, start + 5, start + words.span_length, start + words.span_length + 2):
        stop = [StopAfter(length)]
        out = generate(model, one, spatial="depth", spatial_decoding=decoding, stopping_criteria=stop, **options)
        assert out.well_formed == [True] and len(out.depth_maps[0]) == 1
        assert out.sequences.shape[1] == max(length, start + words.span_length)
    out = generate(model, one, spatial="seg+depth", spatial_decoding=decoding, max_time=1e-9, **options)
    assert out.well_formed == [True]  # the first token is [SEG]; time is over before a span begins
    text = {"stop_strings": ["_1"], "tokenizer": processor.tokenizer}
    out = generate(model, one, spatial="depth", spatial_decoding=decoding, **text, **options)
    assert out.well_formed == [True] and len(out.depth_maps[0]) == 1


def test_end_tokens_as_a_criterion_take_the_place_of_the_settings(model, one):
    """As in transformers, of which one of each kind counts; it is known, and needs no other loop."""
    options = {"spatial": "none", "max_new_tokens": 20}
    ids = generate(model, one, eos_token_id=10**6, **options).sequences[0].tolist()
    start = one.input_ids.shape[1]
    early, late = ids[start + 2], next(token for token in ids[start + 4 :] if token not in ids[start : start + 4])
    for more in ({}, {"spatial_decoding": "sequential"}, {"logits_processor": [Anything()]}):
        out = generate(model, one, eos_token_id=early, stopping_criteria=[EosTokenCriteria(late)], **options, **more)
        assert out.sequences[0].tolist() == ids[: ids.index(late, start) + 1]


def test_a_configuration_of_the_call_is_not_warned_of(model, one, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", said.append)
    for own in (None, 1e9):
        monkeypatch.setattr(model.generation_config, "max_time", own)
        config = GenerationConfig(spatial="depth", max_time=1e-9, max_new_tokens=60, eos_token_id=10**6)
        ids = model.generate(**one, generation_config=config)
        assert ids.shape[1] == one.input_ids.shape[1] + 1 + model.config.num_depth_tokens + 1, "the given time is over"
        assert config.max_time == 1e-9
        if own is None:
            assert not any("max_time" in text for text in said)


def test_time_that_is_over_within_a_span(model, one, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(spatial_loop, "time", lambda: next(clock) * 1e12)  # over at the second look, amid the span
    out = generate(model, one, spatial="depth", max_time=1e11, max_new_tokens=60)
    words = model.spatial_vocabulary()
    assert out.well_formed == [True] and out.sequences.shape[1] == out.prompt_length + words.span_length


@pytest.mark.parametrize("wrong", ["paralel", "", False, ["parallel"]])
def test_mistyped(model, one, wrong):
    for given in ({"spatial_decoding": wrong}, {"generation_config": GenerationConfig(spatial_decoding=wrong)}):
        message = f"spatial_decoding={wrong!r} is unknown; use one of 'parallel', 'sequential'"
        with pytest.raises(ValueError, match=re.escape(message)):
            model.generate(**one, **given)
    with pytest.raises(ValueError, match="spatial='' is unknown"):
        model.generate(**one, spatial="")


def test_the_generation_configuration_says_how(model, one, passes):
    for decoding in ("sequential", "parallel"):
        config = GenerationConfig(spatial_decoding=decoding, spatial="depth", max_new_tokens=30)
        model.generate(**one, generation_config=config)
    assert passes[1] < passes[0]


def test_a_streamer_gets_every_token(model, one, mixed):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            self.ended += 1

    for options in ({}, {"logits_processor": [Anything()]}, {"spatial_decoding": "sequential"}):
        streamer = Streamer()
        out = generate(model, one, spatial="seg+depth", streamer=streamer, **options)
        assert streamer.tokens == out.sequences[0].tolist() and streamer.ended == 1
    streamer = Streamer()  # of several rows: a token of each at a time
    out = generate(model, mixed, spatial="seg+depth", streamer=streamer)
    start = out.prompt_length
    told = [*out.sequences[:, :start].flatten().tolist(), *out.sequences[:, start:].T.flatten().tolist()]
    assert streamer.tokens == told and streamer.ended == 1


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, in our code and in what it calls."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def add(self, name: str) -> None:
        self.count[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING or (
            name in ("index", "index_put_", "_index_put_impl_")
            and any(index is not None and index.dtype == torch.bool for index in args[1])
        ):
            self.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
@pytest.mark.parametrize(("which", "returns_dict"), [("one", True), ("one", False), ("mixed", False)])
def test_the_host_waits_about_once_a_token(model, request, which, decoding, returns_dict, monkeypatch, passes):
    """Also where the ids of the codes do not follow one another, as in a tokenizer that somebody else filled."""
    inputs, codes = request.getfixturevalue(which), model.config.depth_token_ids
    if which == "mixed":
        monkeypatch.setattr(model.config, "depth_token_ids", [codes[1], codes[0], *codes[2:]])
    waits, tolist, made, made_like = Waits(), torch.Tensor.tolist, torch.tensor, torch.Tensor.new_tensor

    def tensor(*args, **options):
        if "device" in options:
            waits.add("tensor")
        return made(*args, **options)

    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.add("tolist") or tolist(self))
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda self, data: waits.add("tensor") or made_like(self, data))
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(model.generation_config, "end_sequences", [[10**6, 10**6]], raising=False)
    counts = []
    for tokens in (60, 120):
        options = {"spatial_decoding": decoding, "return_dict_in_generate": returns_dict, "eos_token_id": -1}
        waits.count.clear()
        with waits:
            model.generate(**inputs, spatial="depth", max_new_tokens=tokens, **options)
        counts.append(sum(waits.count.values()))
    assert 0 < counts[1] - counts[0] <= 1.5 * 60, (counts, waits.count)
    assert counts[0] - passes[0] <= 32, "once a pass within spans, and what a call needs"


@pytest.fixture(scope="module")
def shipped():
    """The embedded checkpoint, and prompts whose spans begin at different steps or never."""
    folder = perceptio_hf.tiny_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(render_scene(DEMO_SEED + number, size=128).image) for number in range(3)]
    questions = ("How many objects are there?", "Give me the mask of the ball.", "Which is closer, A or B?")
    prompts = [chat(shown, text=text) for shown, text in zip(pictures, questions, strict=True)]
    return model, encode(processor, *prompts, HELLO), [encode(processor, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("spatial", ["auto", "seg+depth"])
def test_the_shipped_weights(shipped, spatial, options, monkeypatch):
    model, batch, _ = shipped
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    options = {"spatial": spatial, "max_new_tokens": 140, **options}
    parallel = generate(model, batch, **options)
    assert_same(parallel, generate(model, batch, spatial_decoding="sequential", **options))
    words, start = model.spatial_vocabulary(), parallel.prompt_length
    begun = [(row == words.depth_start).nonzero()[:1].flatten().tolist() for row in parallel.sequences[:, start:]]
    assert len({tuple(steps) for steps in begun}) > 1, "some spans begin at other steps than others, or never"


def test_a_trained_models_spans_take_few_passes(shipped, passes, monkeypatch):
    model, _, singles = shipped
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    for prompt in singles:
        generate(model, prompt, spatial="depth", max_new_tokens=model.spatial_vocabulary().span_length)
    assert sum(passes) / len(passes) < 0.45 * model.config.num_depth_tokens, passes


class OneByOne(span_decoding.SpanDecoder):
    """Sequential decoding in passes of the same width: whatever is guessed is wrong, so that each makes one code."""

    def _read_codes(self, code_logits, logits, start):
        result, first = super()._read_codes(code_logits, logits, start), self.words.codes[0]
        columns = torch.arange(self.ids.shape[1])
        guessed = (columns >= self.length[:, None]) & (columns < self.span_end[:, None]) & self.grammar.in_span[:, None]
        self.ids = torch.where(guessed, (self.ids - first + 1) % len(self.words.codes) + first, self.ids)
        return result


def test_in_half_precision_spans_are_those_of_one_by_one_at_the_same_width(shipped, passes, monkeypatch):
    """A static cache, in which no pass is narrower; to the bit, which float32 and the width of 1 are not needed for."""
    model, _, singles = shipped
    half = copy.deepcopy(model).to(torch.bfloat16)
    words = model.spatial_vocabulary()
    options = {"spatial": "depth", "max_new_tokens": words.span_length, "cache_implementation": "static"}
    for prompt in singles[:2]:
        few = half.generate(**prompt, **options)
        with monkeypatch.context() as patched:
            patched.setattr(spatial_loop, "SpanDecoder", OneByOne)
            many = half.generate(**prompt, **options)
        assert torch.equal(few, many)
        assert passes[-2] < 0.5 * words.num_depth_tokens < 0.9 * words.num_depth_tokens < passes[-1], passes


@pytest.mark.parametrize("places", [24, 1000])
def test_in_half_precision_the_width_decides_as_rounding_does(shipped, places, monkeypatch):
    """Every code is the most probable one after those before it, as far as bfloat16 can tell."""
    model, _, singles = shipped
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", places)
    half = copy.deepcopy(model).to(torch.bfloat16)
    words = model.spatial_vocabulary()
    for prompt in singles:
        ids = half.generate(**prompt, spatial="depth", max_new_tokens=words.span_length)
        start = prompt.input_ids.shape[1]
        with torch.no_grad():
            whole = {"pixel_values": prompt.pixel_values.bfloat16(), "attention_mask": torch.ones_like(ids)}
            logits = half(input_ids=ids, **whole).logits[0, start:-2, list(words.codes)].float()
        chosen = ids[0, start + 1 : -1] - words.codes[0]
        lost = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
        assert (lost <= 4 * torch.finfo(torch.bfloat16).eps * logits.abs().amax(-1)).all(), lost.max()
