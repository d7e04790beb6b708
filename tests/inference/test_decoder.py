"""Decoders: they follow the model's weights and layers, share nothing between texts, and write
prompts of several lengths as each would be written alone."""

import copy
import gc
import weakref

import numpy as np
import pytest
from test_gpt import COMBINATIONS, make
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters
from tinygrad.nn.state import get_state_dict, load_state_dict, safe_load, safe_save

from gpt import GPT, GPTConfig, Linear, SampleConfig
from tinygpt import kernels
from tinygpt.data.tokenizer import CharTokenizer
from tinygpt.inference import decoder
from tinygpt.model import lora
from tinygpt.model.bigram import Bigram, BigramConfig

TWO = ("CPU", "CPU:1")
PROMPT = [[5, 1, 7]]


def text(model, temperature: float = 1.0) -> list[int]:
    """What the model writes after PROMPT."""
    return model.generate(PROMPT, 6, temperature=temperature, seed=3).tolist()[0]


def small(**options) -> GPT:
    return make(n_layer=1, **options)


@pytest.fixture
def compilations(monkeypatch) -> list:
    """Grows by one for each step that is compiled."""
    made, compiled = [], decoder.compiled
    monkeypatch.setattr(decoder, "compiled", lambda step: made.append(step) or compiled(step))
    return made


# ---- weights and layers that were replaced

def other(w: Tensor, seed: int = 1) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(0, 0.5, w.shape).astype(np.float32))


def from_a_file(model, tmp_path) -> None:
    weights = {name: other(w).realize() for name, w in model.state_dict().items()}
    safe_save(weights, str(tmp_path / "other.safetensors"))
    load_state_dict(model, safe_load(str(tmp_path / "other.safetensors")), verbose=False)


def on_other_layer(model, _) -> None:
    model.lm_head = Linear(24, 61, False)
    model.lm_head.weight = other(model.lm_head.weight, 4)


def exchanged_block(model, _) -> None:
    model.h[0] = small(seed=9).h[0]


def wrapped_layer(model, _) -> None:
    """The same weight in the same memory, computed with in another way."""
    mlp = model.h[0].mlp
    model.h[0].mlp = lambda x, ctx, residual: mlp(-x, ctx, residual)


def trained_adapter(model, _) -> None:
    lora.attach(model, 2, 8.0, "h.*", 1)
    for adapter in lora.adapters(model):
        adapter.b.assign(other(adapter.b)).realize()


def other_alpha(model, tmp_path) -> None:
    trained_adapter(model, tmp_path)
    model.generate(PROMPT, 2, temperature=0)
    for adapter in lora.adapters(model):
        adapter.alpha = 40.0


CHANGES = {
    "load_state_dict": lambda m, _: m.load_state_dict(
        {k: other(w).numpy() for k, w in m.state_dict().items()}),
    "tinygrad's load_state_dict": lambda m, _: load_state_dict(
        m, {k: other(w) for k, w in m.state_dict().items()}, verbose=False),
    "tinygrad's, from a file": from_a_file,
    "replace": lambda m, _: m.wte.weight.replace(other(m.wte.weight)),
    "assign": lambda m, _: m.wte.weight.assign(other(m.wte.weight)).realize(),
    "assign, not realized": lambda m, _: m.wte.weight.assign(other(m.wte.weight)),
    "a new attribute": lambda m, _: setattr(m.wte, "weight", other(m.wte.weight)),
    "a view": lambda m, _: m.wte.weight.replace(other(Tensor.empty(99, 24)).realize()[7:68]),
    "another block": exchanged_block,
    "another output layer": on_other_layer,
    "a wrapped layer": wrapped_layer,
    "a setting": lambda m, _: setattr(m.ln_f, "kind", "rmsnorm"),
    "no block": lambda m, _: m.h.clear(),
    "lora.attach": trained_adapter,
    "alpha": other_alpha,
}


GREEDY = ("load_state_dict", "tinygrad's load_state_dict", "another block")


@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in CHANGES),
                                                   *((name, 0.0) for name in GREEDY)])
def test_text_follows_weights_and_layers_that_were_replaced(name, temperature, tmp_path):
    model, fresh = small(), small()
    before = text(model, temperature)
    for m in (model, fresh):
        CHANGES[name](m, tmp_path)
    assert before != text(model, temperature) == text(fresh, temperature)


MOVES = {"lora.merge": lora.merge, "quantize": lambda m: m.quantize("int8"),
         "to": lambda m: [w.to_("CPU:1").realize() for w in m.state_dict().values()],
         "shard": lambda m: [w.shard_(TWO).realize() for w in m.state_dict().values()]}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_so_it_does_where_the_text_is_hardly_another_one(move, tmp_path):
    """What read the old memory of the weights is found out by overwriting that."""
    model, fresh = small(), small()
    for m in (model, fresh):
        trained_adapter(m, tmp_path)
    text(model)
    old = [Tensor(w.uop) for w in model.state_dict().values()]
    for m in (model, fresh):
        move(m)
    kept = {id(w.uop) for w in get_state_dict(model).values()}
    for w in old:
        if id(w.uop) not in kept:
            w.assign(w.zeros_like()).realize()
    assert text(model) == text(fresh)


def test_a_stream_that_meets_other_weights_half_way_leaves_no_wrong_step_behind():
    """The step that reads the prompt and the one that goes on are compiled at different times."""
    model = small()
    expected = text(model)
    model.free_decoders()
    mine = {k: Tensor(w.uop) for k, w in model.state_dict().items()}
    tokens = model.stream(PROMPT, max_new_tokens=4)
    next(tokens)
    CHANGES["tinygrad's load_state_dict"](model, None)
    list(tokens)
    for name, w in model.state_dict().items():
        w.replace(mine[name])
    assert text(model) == expected


def test_kernels_and_dtype_that_were_chosen_later_are_used(compilations):
    model = small()
    first = text(model)
    kernels.use("portable")
    try:
        assert text(model) == first and len(compilations) == 4
    finally:
        kernels.use("auto")
    model.compute_dtype = "bfloat16"
    text(model)
    assert len(compilations) == 6


def test_what_has_not_changed_is_not_compiled_again(compilations):
    model = small()
    for number in range(3):
        for text in (PROMPT, [[3]], [[1] * 20]):
            model.generate(text, 6, top_k=5 + number, seed=number)
        assert len(compilations) == 2
        CHANGES["load_state_dict"](model, None)  # into the same memory
        CHANGES["assign, not realized"](model, None)


# ---- memory

def test_a_model_that_is_dropped_takes_its_decoders_along():
    def used() -> int:
        gc.collect()
        return GlobalCounters.mem_used

    text(small())  # makes what all models share
    before = used()
    gc.disable()
    try:
        model = small()
        text(model)
        half_way = model.stream(PROMPT, temperature=0)
        next(half_way)
        parts = [weakref.ref(model), weakref.ref(half_way)]
        del model, half_way
        assert not any(part() for part in parts)
    finally:
        gc.enable()
    assert used() <= before


def test_a_stream_keeps_its_model():
    assert list(small().stream(PROMPT, max_new_tokens=3, seed=3)) == text(small())[3:6]


def test_few_decoders_are_kept(compilations, monkeypatch):
    monkeypatch.setattr(decoder, "MOST_IDLE", 2)
    model = small()
    for size, count in ((1, 1), (2, 2), (3, 3), (3, 3), (2, 3), (1, 4)):
        model.generate(np.ones((size, 1), int), 1)
        assert len(compilations) == count


def test_a_copy_of_a_model_has_its_own_decoders(compilations):
    model = small()
    text(model)
    twin = copy.deepcopy(model)
    text(twin)
    assert len(compilations) == 4
    CHANGES["tinygrad's load_state_dict"](twin, None)
    assert text(twin) != text(model) == text(small())


# ---- several texts of one model at a time

def test_streams_that_are_read_in_turn_write_what_they_write_alone():
    model = small()
    prompts, options = ([5, 1, 7], [9], list(range(11))), dict(max_new_tokens=12, seed=2, top_k=20)
    alone = [list(model.stream(p, **options)) for p in prompts]
    streams = [model.stream(p, **options) for p in prompts]
    found = [[], [], []]
    for turn in (0, 1, 0, 2, 1, 1, 0) * 6:
        found[turn] += [token for token in [next(streams[turn], None)] if token is not None]
        if len(found[2]) == 1:  # another text on the way, with the same options
            assert model.generate([prompts[0]], **options).tolist()[0][3:] == alone[0]
    for tokens, stream in zip(found, streams, strict=True):
        tokens += stream
    assert found == alone


def test_streams_that_are_abandoned_or_fail_change_nothing(compilations, monkeypatch):
    model = small()
    whole = list(model.stream(PROMPT, max_new_tokens=9, seed=1))
    for count in (1, 2, 4):
        abandoned = model.stream(PROMPT, max_new_tokens=9, seed=1)
        assert [next(abandoned) for _ in range(count)] == whole[:count]
        if count == 2:
            abandoned.close()
        del abandoned
    assert len(compilations) == 2

    failing = model.stream(PROMPT, max_new_tokens=9)
    next(failing)
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "make_key", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(failing)
    assert list(model.stream(PROMPT, max_new_tokens=9, seed=1)) == whole
    assert len(compilations) == 4  # a step that failed may be half done: it is not used again


# ---- several tokens in one call

def test_tokens_that_are_drawn_ahead_are_those_drawn_one_by_one(monkeypatch):
    options = dict(seed=2, repetition_penalty=1.5, top_k=9, window_hop=3)
    model = small()
    monkeypatch.setattr(decoder, "SECONDS_AHEAD", 1e9)  # as many as may be
    ahead = model.generate(RAGGED, 40, **options)
    assert model._decoders._idle[0].ahead == decoder.MOST_AHEAD
    model.free_decoders()
    monkeypatch.setattr(decoder.DecodeReplay, "of", lambda *_: None)
    assert model.generate(RAGGED, 40, **options) == ahead


def test_what_is_drawn_between_the_chunks_of_a_prompt_is_not_seen(rng, monkeypatch):
    monkeypatch.setattr(decoder, "CHUNKS", (4, 4))
    model, prompt = small(), rng.integers(0, 61, (1, 12))
    text = model.generate(prompt, 1, repetition_penalty=1.5).numpy()
    seen = model._decoders._idle[0].seen.numpy()[0]
    assert set(np.flatnonzero(seen)) == set(text[0])


# ---- prompts of several lengths

RAGGED = [[5, 1, 7, 7, 2], [9], list(range(11)), [40, 3, 22]]


def check_ragged(model, **options) -> None:
    """Every row is what it is alone, the likeliest tokens to the last one; past block_size."""
    written = model.generate(RAGGED, 12, temperature=0, **options)
    assert isinstance(written, list) and all(type(token) is int for row in written for token in row)
    for prompt, row in zip(RAGGED, written, strict=True):
        assert row == model.generate([prompt], 12, temperature=0, **options).tolist()[0]


@pytest.mark.parametrize("options", COMBINATIONS[::3], ids=lambda o: "-".join(map(str, o.values())))
def test_rows_of_several_lengths_are_what_they_are_alone(options):
    model = make(**options)
    for hop in (1, None):
        check_ragged(model, window_hop=hop)


def test_so_are_they_with_portable_kernels_quantized_penalized_or_on_two_devices():
    kernels.use("portable")
    try:
        check_ragged(small(n_kv_head=2, sliding_window=5))
    finally:
        kernels.use("auto")
    check_ragged(small().quantize("int8"), repetition_penalty=3.0)
    model = small()
    expected = model.generate(RAGGED, 5, temperature=0)
    for w in model.state_dict().values():
        w.shard_(TWO)
    assert model.generate(RAGGED, 5, temperature=0) == expected


def test_long_prompts_of_several_lengths_are_read_in_chunks(rng, monkeypatch):
    monkeypatch.setattr(decoder, "CHUNKS", (16, 64))
    model = GPT(GPTConfig(block_size=150, vocab_size=61, n_layer=2, n_head=4, n_kv_head=2,
                          n_embd=24), 3)
    prompts = [rng.integers(0, 61, n).tolist() for n in (140, 3, 70, 200)]
    for prompt, row in zip(prompts, model.generate(prompts, 15, temperature=0), strict=True):
        assert row == model.generate([prompt], 15, temperature=0).tolist()[0]


def test_draws_of_a_row_depend_on_its_text_its_place_and_the_seed():
    model = small()
    options = dict(seed=5, top_k=20, repetition_penalty=1.2, window_hop=1)
    written = model.generate(RAGGED, 12, **options)
    assert written[0] == model.generate([RAGGED[0]], 12, **options).tolist()[0]
    for row, prompt in enumerate(RAGGED):  # other prompts beside it change nothing
        same = model.generate([prompt] * len(RAGGED), 12, **options).tolist()
        assert same[row] == written[row]
        assert len(set(map(tuple, same))) == len(RAGGED)  # every place has its own draws
    longer = [row[:-5] for row in written]
    assert model.generate(longer, 5, **options) == written


def test_a_bigram_model_takes_them_too():
    model = Bigram(BigramConfig(block_size=8, vocab_size=5))
    model.table.assign(Tensor.eye(5)[[1, 2, 3, 4, 0]].contiguous()).realize()  # 0, 1, 2, ...
    assert model.generate([[3], [0, 1]], 3, temperature=0) == [[3, 4, 0, 1], [0, 1, 2, 3, 4]]


# ---- what is asked for

def test_ids_may_be_lists_arrays_or_tensors():
    model = small()
    expected = text(model, 0)
    array = np.array(PROMPT)
    for ids in (PROMPT, tuple(PROMPT), array, array.astype(np.uint8), array.astype(np.int64),
                Tensor(array), [array[0]], [Tensor(array[0])], Tensor(array.astype(np.int32))):
        assert model.generate(ids, 6, temperature=0).tolist() == [expected]
    for ids in (PROMPT, PROMPT[0], array[0], Tensor(array[0])):  # a stream takes one row itself
        assert list(model.stream(ids, max_tokens=6, temperature=0)) == expected[3:]
    assert model.generate([[1], array[0]], 2)[1][:3] == PROMPT[0]


def test_no_new_tokens_are_the_prompts():
    model = small()
    assert model.generate(PROMPT, 0).tolist() == PROMPT
    assert model.generate(RAGGED, max_tokens=0) == RAGGED
    assert list(model.stream(PROMPT, max_new_tokens=0)) == []


@pytest.mark.parametrize(("ids", "says"), [
    (3, "no list of rows"), (None, "no list of rows"), ([[1, [2]]], "no list of rows"),
    ([], "no rows"), ([[1], []], r"row 1 of idx has shape \(0,\)"), ("ab", "row 0 .*<U1"),
    ([[1, 2], [0.5]], "row 1 .*float"), ([[[1]]], r"row 0 of idx has shape \(1, 1\)"),
    ([[True]], "dtype bool"), ([[1, 2], [61]], "token id 61"), ([[10**30]], "dtype object"),
    ([1, 2], r"row 0 of idx has shape \(\)")])
def test_ids_that_are_none_are_refused(ids, says):
    with pytest.raises(ValueError, match=says):
        GPT(GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=4)).generate(ids, 1)


@pytest.mark.parametrize(("options", "says"), [
    (dict(temperature=True), "temperature=True"), (dict(top_k=True), "top_k=True"),
    (dict(top_k=2.5), r"top_k=2\.5"), (dict(max_new_tokens=True), "max_new_tokens=True"),
    (dict(max_new_tokens=3.0), r"max_new_tokens=3\.0"), (dict(seed=None), "seed=None"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(temperature=np.nan), "temperature=nan"),
    (dict(temperature=None), "temperature=None"), (dict(top_p="0.5"), r"top_p='0\.5'"),
    (dict(max_new_tokens=10**9), "max_new_tokens=1000000000 .* stream"),
    (dict(max_new_tokens=3, max_tokens=4), "max_new_tokens=3 and max_tokens=4")])
def test_options_of_a_wrong_kind_are_refused(options, says):
    model = GPT(GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match=says):
        model.generate(PROMPT, **options)
    if options.get("max_new_tokens") != 10**9:
        with pytest.raises(ValueError, match=says):
            model.stream(PROMPT, **options)


def test_generate_and_stream_have_the_defaults_of_the_config():
    model, default = small(), SampleConfig()
    expected = model.generate(PROMPT, default.max_new_tokens, temperature=default.temperature)
    assert model.generate(PROMPT).tolist() == expected.tolist()
    assert list(model.stream(PROMPT)) == expected.tolist()[0][3:]


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.5, temperature=0)], ids=str)
def test_a_batch_is_streamed_with_the_models_logits(options):
    model = small()
    model.tokenizer = CharTokenizer("".join(map(chr, range(40))))  # of a vocabulary of 61
    rows = [[5, 1, 7], [3, 2]]
    steps = [(drawn.tokens, drawn.logits.numpy())
             for drawn in model.stream_batch(rows, 5, **options)]
    tokens, logits = map(np.array, zip(*steps, strict=True))  # (5, 2), (5, 2, 40)
    whole = model.generate(rows, 5, **options)
    for i, (row, text) in enumerate(zip(rows, whole, strict=True)):
        assert text == row + tokens[:, i].tolist()
        right = model(Tensor([text])).numpy()[0, len(row) - 1:-1, :40]
        np.testing.assert_allclose(logits[:, i], right, atol=1e-4)


def test_a_stream_takes_one_row_and_its_options_once():
    model = small()
    with pytest.raises(ValueError, match="one sequence, not 2"):
        model.stream([[1, 2], [3]])
    for write in (model.stream, model.generate):
        with pytest.raises(ValueError, match="put top_k, max_new_tokens into the config"):
            write(PROMPT, 5, config=SampleConfig(), top_k=3)
    endless = model.stream(PROMPT, max_new_tokens=10**12, temperature=0)  # in little memory
    assert [next(endless) for _ in range(6)] == text(model, 0)[3:]


def test_only_ids_that_the_tokenizer_has_follow_prompts_of_several_lengths():
    model = small()
    model.tokenizer = CharTokenizer("abc")
    for row, prompt in zip(model.generate(RAGGED, 9, repetition_penalty=1.2), RAGGED, strict=True):
        assert row[:len(prompt)] == prompt and max(row[len(prompt):]) < 3
