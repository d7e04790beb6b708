"""The model against the same model written out in PyTorch: logits, loss, gradients, training."""

import math
from functools import partial

import numpy as np
import pytest
from tinygrad import Tensor

from gpt import GPT, GPTConfig, TrainConfig
from tinygpt.data.load import TokenData
from tinygpt.kernels import cross_entropy
from tinygpt.training.run import prepare

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

B, T, V = 2, 9, 97
# together they have every option both ways; most share their sizes, and with them compiled kernels
SHARED = dict(n_layer=1, n_head=6, n_kv_head=3, n_embd=36)
CONFIGS = {
    "gpt2": dict(n_layer=1, n_head=5, n_embd=80, activation="gelu_tanh", block_size=T + 3),
    "llama": SHARED | dict(n_layer=2, norm="rmsnorm", bias=False, activation="swiglu",
                           position="rope", tie_weights=False, block_size=T + 3),
    "gptj": SHARED | dict(position="rope", rope_theta=100.0, qk_norm=True, parallel=True,
                          norm_eps=1e-2),
    "window": SHARED | dict(sliding_window=4, activation="swiglu", qk_norm=True, n_inner=17),
    "parallel": SHARED | dict(norm="rmsnorm", parallel=True, sliding_window=1, bias=False,
                              activation="gelu_tanh", tie_weights=False),
    "nanogpt": SHARED | dict(bias=False),
}


class TorchNorm(nn.Module):
    def __init__(self, c, size, kind):
        super().__init__()
        self.kind, self.eps = kind, c.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        has_bias = c.bias and kind == "layernorm"
        self.bias = nn.Parameter(torch.zeros(size)) if has_bias else None

    def forward(self, x):
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rotate(x, c):
    """x (B, H, T, D) times e^(i position frequency), pairs (j, j + D/2) as complex numbers."""
    D = x.shape[-1]
    frequency = c.rope_theta ** (-torch.arange(0, D, 2) / D)
    if c.rope_scaling != "none":  # compared with transformers' in tests/huggingface
        frequency = torch.tensor(c.frequencies(D))
    angle = torch.outer(torch.arange(x.shape[2]), frequency)
    turned = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones(()), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


class TorchAttention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.c, self.D, self.layer = c, c.head_dim or c.n_embd // c.n_head, layer
        self.sizes = [n * self.D for n in (c.n_head, c.kv_heads, c.kv_heads)]
        self.c_attn = nn.Linear(c.n_embd, sum(self.sizes),
                                c.bias if c.qkv_bias is None else c.qkv_bias)
        self.c_proj = nn.Linear(self.sizes[0], c.n_embd, c.bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (TorchNorm(c, self.D, "rmsnorm") for _ in "qk")

    def forward(self, x):
        c, (B, T, _) = self.c, x.shape
        q, k, v = (part.reshape(B, T, -1, self.D).transpose(1, 2)  # (B, H or G, T, D)
                   for part in self.c_attn(x).split(self.sizes, dim=-1))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        last = c.nope_interval and self.layer % c.nope_interval == c.nope_interval - 1
        if c.position == "rope" and not last:
            q, k = rotate(q, c), rotate(k, c)
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if c.sliding_window:
            seen = seen.triu(1 - c.sliding_window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class TorchMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.kind = c.activation
        wide = math.ceil(8 * c.n_embd / 3 / 8) * 8 if self.kind == "swiglu" else 4 * c.n_embd
        inner = c.n_inner or wide
        self.c_fc = nn.Linear(c.n_embd, inner, c.bias)
        self.c_gate = nn.Linear(c.n_embd, inner, c.bias) if self.kind == "swiglu" else None
        self.c_proj = nn.Linear(inner, c.n_embd, c.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        approximate = "tanh" if self.kind == "gelu_tanh" else "none"
        return self.c_proj(F.gelu(self.c_fc(x), approximate=approximate))


class TorchBlock(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.ln_1, self.attn = TorchNorm(c, c.n_embd, c.norm), TorchAttention(c, layer)
        self.mlp = TorchMLP(c)
        self.ln_2 = None if c.parallel else TorchNorm(c, c.n_embd, c.norm)

    def forward(self, x):
        if self.ln_2 is None:
            return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_1(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.position == "learned" else None
        self.h = nn.ModuleList(TorchBlock(c, i) for i in range(c.n_layer))
        self.ln_f = TorchNorm(c, c.n_embd, c.norm)
        self.lm_head = None if c.tie_weights else nn.Linear(c.n_embd, c.vocab_size, bias=False)

    def forward(self, idx, targets, label_smoothing=0.0):
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe.weight[:idx.shape[1]]
        for block in self.h:
            x = block(x)
        head = self.wte if self.lm_head is None else self.lm_head
        logits = self.ln_f(x) @ head.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                                       label_smoothing=label_smoothing)


def pair(options: dict) -> tuple[GPT, TorchGPT]:
    """Both models with the same weights, none of which is zero or one."""
    config = GPTConfig(**dict(block_size=T, vocab_size=V) | options)
    ours, theirs, rng = GPT(config), TorchGPT(config), np.random.default_rng(11)
    ours.load_state_dict({name: w.numpy() + 0.1 * rng.standard_normal(w.shape)
                          for name, w in ours.state_dict().items()})
    theirs.load_state_dict({name: torch.tensor(w.numpy())
                            for name, w in ours.state_dict().items()})
    return ours, theirs


def assert_close(ours: np.ndarray, theirs, name: str) -> None:
    right = theirs.detach().numpy()
    error = np.abs(ours - right).max() / max(np.abs(right).max(), 1e-3)
    assert error <= 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_equal_pytorch(name):
    ours, theirs = pair(CONFIGS[name])
    rng = np.random.default_rng(12)
    idx, targets = rng.integers(0, V, (2, B, T))
    targets[0, 3] = targets[1, 7] = -1

    logits, loss = ours(Tensor(idx, dtype="int32"), Tensor(targets, dtype="int32"),
                        loss_fn=partial(cross_entropy, label_smoothing=0.1))
    weights = ours.state_dict()
    grads = loss.gradient(*weights.values())
    Tensor.realize(logits, loss, *grads)

    right_logits, right_loss = theirs(torch.tensor(idx), torch.tensor(targets), 0.1)
    right_loss.backward()
    assert np.abs(logits.numpy() - right_logits.detach().numpy()).max() <= 1e-4
    assert abs(loss.item() - right_loss.item()) <= 1e-4
    right = {name: p.grad for name, p in theirs.named_parameters()}
    assert right.keys() == weights.keys()
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        assert grad.shape == weight.shape
        assert_close(grad.numpy(), right[name], name)


def test_configs_cover_every_option():
    configs = [GPTConfig(**options) for options in CONFIGS.values()]
    for field, values in {
            "norm": {"layernorm", "rmsnorm"}, "activation": {"gelu", "gelu_tanh", "swiglu"},
            "position": {"learned", "rope"}, "bias": {False, True}, "qk_norm": {False, True},
            "parallel": {False, True}, "tie_weights": {False, True}}.items():
        assert {getattr(c, field) for c in configs} == values, field
    assert any(c.sliding_window for c in configs)
    assert any(1 < c.kv_heads < c.n_head for c in configs)


def gradients(model: GPT, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    weights = model.state_dict()
    _, loss = model(Tensor(x, dtype="int32"), Tensor(y, dtype="int32"))
    grads = loss.gradient(*weights.values())
    Tensor.realize(*grads)
    return {name: g.numpy() for name, g in zip(weights, grads, strict=True)}


def test_training_equals_pytorch_for_20_steps(tmp_path):
    """PyTorch in float64. Of the first ten steps every gradient is compared too, each with its own
    model's weights; later ones drift, since AdamW divides small gradients by themselves."""
    lr, clip, decay = 3e-3, 0.5, 0.2
    ours, theirs = pair(CONFIGS["nanogpt"])
    theirs.double()
    tokens = np.random.default_rng(13).integers(0, V, 20 * B * T).astype(np.uint16)
    config = TrainConfig(out_dir=str(tmp_path), batch_size=B, learning_rate=lr, beta1=0.8,
                         beta2=0.95, weight_decay=decay, grad_clip=clip)
    run = prepare(ours, config, TokenData(tokens, tokens[:50], None, "numbers"))
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=decay),
                                   dict(params=vectors, weight_decay=0.0)], lr, (0.8, 0.95), 1e-8)
    clipped = 0
    for number in range(20):
        batch = run.batches.batch(number)
        x, y = (torch.tensor(a, dtype=torch.long) for a in batch)
        grads = gradients(ours, *batch) if number < 10 else {}
        loss, norm = run.step(lr)
        right = theirs(x, y)[1]
        optimizer.zero_grad()
        right.backward()
        for name, p in theirs.named_parameters():
            if grads:
                error = np.abs(grads[name] - p.grad.numpy()).max() / p.grad.norm().item()
                assert error <= 1e-6, f"step {number}, {name}: {error:.2e}"
        right_norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
        clipped += right_norm.item() > clip
        assert loss == pytest.approx(right.item(), abs=1e-5), number
        assert norm == pytest.approx(right_norm.item(), rel=1e-5), number
    assert clipped > 0
    for name, p in theirs.named_parameters():
        assert np.abs(run.params[name].numpy() - p.detach().numpy()).max() < lr / 100, name
