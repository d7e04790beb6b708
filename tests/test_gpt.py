"""The model: every combination of options, decoding with and without the cache, checkpoints."""

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from covering import MODEL, covering
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from gpt import GPT, GPTConfig, KVCache
from tinygpt import kernels
from tinygpt.inference import decoder
from tinygpt.training.optim import AdamW

SMALL = dict(block_size=8, vocab_size=61, n_layer=2, n_head=4, n_embd=24)

COMBINATIONS = covering(MODEL)


def make(seed=3, **options) -> GPT:
    """A tiny model whose weights are large enough for its tokens to differ clearly."""
    model = GPT(GPTConfig(**SMALL | options), seed)
    rng = np.random.default_rng(seed)
    model.load_state_dict({k: w.numpy() + rng.normal(0, 0.3, w.shape).astype(np.float32)
                           for k, w in model.state_dict().items()})
    return model


def ids(rng, *shape, vocab=61) -> np.ndarray:
    return rng.integers(0, vocab, shape).astype(np.int32)


def test_the_covering_set_covers_every_pair():
    for a, b in itertools.combinations(MODEL, 2):
        seen = {(row[a], row[b]) for row in COMBINATIONS}
        assert seen == set(itertools.product(MODEL[a], MODEL[b]))


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda row: "-".join(map(str, row.values())))
def test_every_combination_decodes_as_the_full_forward_saves_and_loads(options, rng, tmp_path):
    model = make(**options)
    prompt = ids(rng, 2, 3)
    # past block_size, where the window slides
    text = model.generate(prompt, 13, temperature=0, window_hop=1).numpy()
    assert text.shape == (2, 16)
    assert (text[:, :3] == prompt).all()
    windows = np.concatenate([text[:, end - 8:end] for end in range(8, 16)])  # of block_size
    likeliest = model(Tensor(windows)).numpy().argmax(-1)
    assert (likeliest[:, -1] == text[:, 8:].T.ravel()).all()
    # causal: earlier positions are the predictions of shorter texts
    assert (likeliest[:2, 2:7] == text[:, 3:8]).all()

    path = model.save_checkpoint(5, None, tmp_path)
    twin = GPT.from_checkpoint(path)
    assert twin.config == model.config
    assert all((twin.state_dict()[k].numpy() == w.numpy()).all()
               for k, w in model.state_dict().items())


@pytest.mark.parametrize("options", COMBINATIONS[:4], ids=lambda o: "-".join(map(str, o.values())))
def test_combinations_train_every_weight(options, rng):
    model = make(**options)
    x, y = Tensor(ids(rng, 2, 8)), Tensor(ids(rng, 2, 8))
    weights = model.state_dict()
    grads = model(x, y)[1].gradient(*weights.values())
    Tensor.realize(*grads)
    for name, g in zip(weights, grads, strict=True):
        assert np.isfinite(g.numpy()).all() and np.abs(g.numpy()).max() > 0, name


def test_the_portable_kernels_write_the_same_text(rng):
    prompt, options = ids(rng, 2, 3), COMBINATIONS[0]
    expected = make(**options).generate(prompt, 13, temperature=0).numpy()
    kernels.use("portable")
    try:
        assert (make(**options).generate(prompt, 13, temperature=0).numpy() == expected).all()
    finally:
        kernels.use("auto")


def test_one_new_token_depends_only_on_what_comes_before(rng):
    model = make()
    x = ids(rng, 1, 8)
    other = x.copy()
    other[0, 5] = (x[0, 5] + 1) % 61
    a, b = model(Tensor(x)).numpy(), model(Tensor(other)).numpy()
    assert np.array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_long_prompts_are_read_in_chunks_and_in_the_last_window(rng, monkeypatch):
    monkeypatch.setattr(decoder, "CHUNKS", (16, 64))
    model = GPT(GPTConfig(**SMALL | dict(block_size=100)), 3)
    prompt = ids(rng, 1, 130)
    logits = model(Tensor(np.ascontiguousarray(prompt[:, -100:]))).numpy()
    assert model.generate(prompt, 1, temperature=0).numpy()[0, -1] == logits[0, -1].argmax()


def test_same_seed_same_text_other_seed_other_text(rng):
    model, prompt = make(), ids(rng, 1, 4)
    a, b, c = (model.generate(prompt, 20, seed=s).numpy() for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_stream_yields_what_generate_returns(rng):
    model, prompt = make(), ids(rng, 1, 4)
    options = dict(temperature=0.9, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    whole = model.generate(prompt, max_tokens=6, **options).numpy()
    assert list(model.stream(prompt, max_tokens=6, **options)) == whole[0, 4:].tolist()


@pytest.mark.parametrize(("window_hop", "hop"), [(None, 4), (3, 3)])  # of 8
def test_a_jump_of_the_window_keeps_decoding_right(window_hop, hop, rng):
    model = make()
    prompt = ids(rng, 1, 7)
    text = prompt[0].tolist() + list(model.stream(prompt, max_tokens=12, temperature=0,
                                                  window_hop=window_hop))
    start = 0
    for n in range(7, 19):
        if n - start > 8:
            start = n - 8 + hop - 1
        window = np.zeros((1, 8), np.int32)
        window[0, :n - start] = text[start:n]
        assert model(Tensor(window)).numpy()[0, n - start - 1].argmax() == text[n]


def test_state_dict_has_gpt2_names_and_weights_only(rng):
    model = make()
    model.generate(ids(rng, 1, 2), 2)
    names = set(model.state_dict())
    assert {"wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight",
            "h.1.mlp.c_fc.bias", "h.1.mlp.c_proj.weight", "ln_f.bias"} <= names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in make(tie_weights=False).state_dict()
    assert set(get_state_dict(model)) == names  # neither cache nor tables are found by tinygrad


def test_gpt2_has_124_million_weights_and_its_flops():
    gpt2 = GPTConfig()
    shapes = GPT.shapes(gpt2).values()
    assert gpt2.num_params() == sum(map(math.prod, shapes)) == 124_439_808  # as published
    tiny = GPT(GPTConfig(block_size=16, vocab_size=97, n_layer=3, n_head=2, n_embd=32))
    blocks = 3 * (4 * 32 + 12 * 32 * 32 + 9 * 32)
    assert tiny.num_params() == 97 * 32 + 16 * 32 + blocks + 2 * 32
    assert tiny.num_params(non_embedding=True) == tiny.num_params() - 16 * 32
    assert tiny.estimate_flops() == 6 * (3 * 12 * 32 * 32 + 97 * 32) + 12 * 3 * 32 * 16


def test_heads_of_any_size_have_a_cache_and_flops_of_their_own():
    config = GPTConfig(**SMALL | dict(n_embd=25, head_dim=10), n_kv_head=2)
    model = GPT(config)
    assert KVCache(config, 3).layers[0][0].shape == (3, 2, 8, 10)
    assert GPT.shapes(config)["h.0.attn.c_attn.weight"] == ((4 + 2 + 2) * 10, 25)
    assert GPT.shapes(config)["h.0.attn.c_proj.weight"] == (25, 4 * 10)
    matrices = sum(w.numel() for name, w in model.state_dict().items()
                   if w.ndim == 2 and name != "wpe.weight")
    assert model.estimate_flops() == 6 * matrices + 12 * 2 * (4 * 10) * 8


def test_a_checkpoint_of_before_these_options_is_read(tmp_path):
    model, new = make(position="rope"), ("head_dim", "qkv_bias", "rope_scaling", "rope_factor",
                                         "rope_low_freq", "rope_high_freq", "rope_original_length",
                                         "nope_interval")
    header = {k: v for k, v in asdict(model.config).items() if k not in new}
    assert len(header) == len(asdict(model.config)) - len(new)
    path = model.save_checkpoint(1, None, tmp_path, metadata={"model_config": header})
    assert GPT.from_checkpoint(path).config == model.config


def test_a_checkpoint_of_another_shape_is_refused_and_nothing_changes(tmp_path):
    model, other = make(), make(n_embd=32)
    path = other.save_checkpoint(1, None, tmp_path)
    before = {k: w.numpy() for k, w in model.state_dict().items()}
    with pytest.raises(ValueError, match="n_embd=32, but n_embd=24"):
        model.load_checkpoint(path)
    assert all((w.numpy() == before[k]).all() for k, w in model.state_dict().items())


def test_a_checkpoint_has_model_optimizer_and_metadata(tmp_path, rng):
    model = make()
    optimizer = AdamW(model.state_dict())
    optimizer.m["wte.weight"].assign(Tensor.ones(61, 24)).realize()
    path = model.save_checkpoint(1000, optimizer, tmp_path, {"note": [1, 2]})
    assert path.name == "ckpt_1000.safetensors"
    twin, twins = make(seed=8), AdamW(make(seed=8).state_dict())
    metadata = twin.load_checkpoint(path, twins)
    assert metadata["iter_num"] == 1000 and metadata["note"] == [1, 2]
    assert metadata["model_config"] == asdict(model.config)
    assert (twins.m["wte.weight"].numpy() == 1).all()
    with pytest.raises(ValueError, match=r"optimizer|tensor"):
        twin.load_checkpoint(model.save_checkpoint(1, None, tmp_path), twins)


@pytest.mark.parametrize("wrong", [[[61]], [[-1]], [[]], [3], [[0.5]]])
def test_token_ids_that_no_model_could_take_are_refused(wrong):
    with pytest.raises(ValueError, match=r"token id|idx has shape"):
        make().generate(wrong, 1)


@pytest.mark.parametrize("shape", [(2, 9), (2, 0), (8,)])
def test_forward_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="block_size"):
        make()(Tensor.zeros(*shape, dtype="int32"))


@pytest.mark.parametrize(("options", "names"), [
    (dict(n_embd=25), "n_embd=25.*n_head=4"), (dict(n_kv_head=3), "n_kv_head=3"),
    (dict(n_embd=20, position="rope"), "head size.*5"), (dict(dropout=1.0), "dropout=1.0"),
    (dict(norm="batch"), "norm='batch'"), (dict(n_layer=0), "n_layer=0"),
    (dict(sliding_window=0), "sliding_window=0"),
    (dict(head_dim=5, position="rope"), "head size 5 is odd"),
    (dict(rope_low_freq=4.0), "rope_low_freq=4.0 is not below rope_high_freq=4.0"),
    (dict(rope_scaling="yarn"), "rope_scaling='yarn'")])
def test_a_wrong_configuration_names_the_field(options, names):
    with pytest.raises(ValueError, match=names):
        GPTConfig(**SMALL | options)


@pytest.mark.parametrize("T", [1, 3])
def test_the_cache_is_an_object_of_its_own(T, rng):
    cache = KVCache(GPTConfig(**SMALL), batch_size=2)
    q, k, v = (rng.normal(size=(2, 4, T, 6)).astype(np.float32) for _ in "qkv")
    y = cache.attend(1, Tensor(q), Tensor(k), Tensor(v), 2, 1).numpy()  # each sees itself alone
    np.testing.assert_allclose(y, v, rtol=1e-6)
    for kept, given in zip(cache.layers[1], (k, v), strict=True):
        assert (kept.numpy()[:, :, 2:2 + T] == given).all()
        assert (kept.numpy()[:, :, :2] == 0).all() and (kept.numpy()[:, :, 2 + T:] == 0).all()
    assert (cache.layers[0][0].numpy() == 0).all()


@pytest.mark.parametrize("row", covering(MODEL), ids=str)
def test_the_weights_of_a_configuration_are_counted_without_them(row):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=4, n_embd=16, **row)
    assert config.num_params() == GPT(config, seed=None).num_params()


@pytest.mark.parametrize("wrong", [dict(n_layer=10 ** 8), dict(n_inner=10 ** 12),
                                   dict(vocab_size=10 ** 12)])
def test_a_model_that_no_memory_holds_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=r"weights take [\d,.]+ GB of memory.*choose a smaller"):
        GPT(GPTConfig(**wrong))


def test_the_width_that_is_proposed_can_be_taken():
    with pytest.raises(ValueError, match="choose n_embd=32, ") as caught:
        GPTConfig(n_embd=16, n_head=32)
    assert "n_head=32" in str(caught.value)
    GPTConfig(n_embd=32, n_head=32)
