"""A GPT in tinygrad: the model and what it computes.

Shapes, after each line that changes one:

    B batch   T query length   S key length    C n_embd
    H heads   G kv heads       D head size     V vocabulary
"""

import copy
import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt import device, kernels
from tinygpt.config import SampleConfig, check, setting
from tinygpt.data.tokenizer import BPETokenizer
from tinygpt.huggingface import pretrained
from tinygpt.kernels.jit import constant
from tinygpt.kernels.loss import Loss
from tinygpt.kernels.random import counter, new_key, next_key
from tinygpt.kernels.training import is_training
from tinygpt.model import lora
from tinygpt.model.language_model import LanguageModel
from tinygpt.model.quantize import quantize, refuse_quantized
from tinygpt.model.recompute import Chain
from tinygpt.training.config import TrainConfig

__all__ = ["GPT", "BPETokenizer", "GPTConfig", "KVCache", "SampleConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture. The defaults are GPT-2's, 124M parameters."""

    block_size: int = setting(1024, "context length in tokens", low=1, fixed=True,
        section="model")
    vocab_size: int = setting(50257,
        "number of token ids; with --tokenizer bpe the size of the trained vocabulary", low=1,
        fixed=True)
    n_layer: int = setting(12, "number of blocks", low=1, fixed=True)
    n_head: int = setting(12, "number of query heads", low=1, fixed=True)
    n_kv_head: int | None = setting(None,
        "number of key and value heads; unset: as many as n_head", low=1, fixed=True)
    n_embd: int = setting(768, "width of the residual stream", low=1, fixed=True)
    n_inner: int | None = setting(None,
        "width of the MLP; unset: 4 n_embd, with swiglu 8/3 n_embd up to a multiple of 8", low=1,
        fixed=True)
    dropout: float = setting(0.0, "dropout probability while training", low=0, below=1)
    bias: bool = setting(True, "biases in linear layers and LayerNorm", fixed=True)
    norm: str = setting("layernorm", "of the blocks", choices=("layernorm", "rmsnorm"), fixed=True)
    norm_eps: float = setting(1e-5, "epsilon inside the norms", above=0, fixed=True)
    activation: str = setting("gelu", "of the MLP; gelu is exact, gelu_tanh GPT-2's approximation",
        choices=("gelu", "gelu_tanh", "swiglu"), fixed=True)
    position: str = setting("learned", "how positions are encoded", choices=("learned", "rope"),
        fixed=True)
    rope_theta: float = setting(10000.0, "base wavelength of RoPE", above=0, fixed=True,
        needs=("--position rope", lambda c: c.position == "rope"))
    qk_norm: bool = setting(False, "RMSNorm on queries and keys", fixed=True)
    sliding_window: int | None = setting(None,
        "attend to the last so many positions only; unset: to all", low=1, fixed=True)
    parallel: bool = setting(False, "attention and MLP side by side on one norm, as GPT-J has them",
        fixed=True)
    tie_weights: bool = setting(True, "token embedding and output layer share their weights",
        fixed=True)

    def __post_init__(self):
        check(self)
        if self.n_embd % self.n_head:
            multiple = -(-self.n_embd // self.n_head) * self.n_head
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"choose n_embd={multiple} or another n_head")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head="
                             f"{self.n_kv_head}: choose a divisor of n_head")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"rope rotates pairs, but the head size n_embd / n_head = "
                             f"{self.head_size} is odd: choose an even one, or position=learned")

    def num_params(self) -> int:
        """The weights of such a model, tied ones once."""
        C, D, inner = self.n_embd, self.head_size, self.inner_size
        qkv, mlp_in = (self.n_head + 2 * self.kv_heads) * D, inner * (1 + self.is_gated)
        norm = C * (2 if self.bias and self.norm == "layernorm" else 1)
        block = (C * (qkv + C) + C * (mlp_in + inner) + 2 * D * self.qk_norm
                 + self.bias * (qkv + mlp_in + 2 * C) + norm * (1 if self.parallel else 2))
        tables = self.vocab_size * (1 if self.tie_weights else 2)
        tables += self.block_size if self.position == "learned" else 0
        return C * tables + self.n_layer * block + norm

    def check_memory(self, copies: float = 1) -> None:
        """Raises ValueError where such a model does not fit into memory, or not with as many
        numbers for each weight as a run keeps."""
        count = self.num_params()
        what = f"the model's {count:,} weights" + (", with what training keeps of each,"
                                                   if copies > 1 else "")
        device.check_memory(int(4 * copies * count), what, "choose a smaller n_layer, n_embd, "
                            "n_inner, vocab_size or block_size")

    @property
    def is_gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner_size(self) -> int:
        wide = math.ceil(self.n_embd / 3) * 8 if self.is_gated else 4 * self.n_embd
        return self.n_inner or wide


class Linear:
    """y = x W^T + b, from C numbers to N. weight (N, C), bias (N,) or None, float32; lora adds to
    it where there is one (see tinygpt/model/lora.py). draw(shape, std) makes the weights (see GPT).
    """

    def __init__(self, draw, n_in: int, n_out: int, bias: bool, std: float = 0.02):
        self.weight = draw((n_out, n_in), std)
        self.bias = draw((n_out,), 0.0) if bias else None
        self.lora: lora.LoRA | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = kernels.linear(x, self.weight, self.bias, residual)
        return y if self.lora is None else y + self.lora(x)


class Norm:
    """LayerNorm or RMSNorm over the last axis."""

    def __init__(self, draw, config: GPTConfig, size: int, kind: str | None = None):
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.weight = draw((size,), None)
        self.bias = draw((size,), 0.0) if config.bias and self.kind == "layernorm" else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return kernels.rms_norm(x, self.weight, self.eps)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding:
    """Rows of weight (V, C) by token id, or by position."""

    def __init__(self, draw, rows: int, size: int):
        self.weight = draw((rows, size), 0.02)

    def __call__(self, idx: Tensor) -> Tensor:
        return kernels.embedding(idx, self.weight)

    def unembed(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)


class CausalSelfAttention:
    """Every position gathers values from the positions before it, weighted by query and key."""

    def __init__(self, draw, config: GPTConfig):
        self.config = config
        H, G, D, C = config.n_head, config.kv_heads, config.head_size, config.n_embd
        self.c_attn = Linear(draw, C, (H + 2 * G) * D, config.bias)
        self.c_proj = Linear(draw, C, C, config.bias, std=0.02 / math.sqrt(2 * config.n_layer))
        self.q_norm = Norm(draw, config, D, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(draw, config, D, "rmsnorm") if config.qk_norm else None

    def __call__(self, x: Tensor, run: "Pass", layer: int, residual: Tensor | None) -> Tensor:
        B, T, C = x.shape
        H, G, D = self.config.n_head, self.config.kv_heads, self.config.head_size
        q, k, v = self.c_attn(x).split([H * D, G * D, G * D], dim=-1)
        q = q.reshape(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.reshape(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        v = v.reshape(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position == "rope":
            cos, sin = run.rotation(self.config, x.device)  # (T, D/2)
            q, k = kernels.rope(q, cos, sin), kernels.rope(k, cos, sin)
        window = self.config.sliding_window
        if run.cache is not None:
            y = run.cache.attend(layer, q, k, v, run.position, window)  # (B, H, T, D)
        else:
            y = kernels.attention(q, k, v, 0, window, self.config.dropout, run.next_dropout_key())
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return run.dropout(self.c_proj, y, residual, self.config.dropout)


class MLP:
    """Each position by itself: up to inner_size, through the activation, and down again."""

    def __init__(self, draw, config: GPTConfig):
        self.config = config
        C, inner = config.n_embd, config.inner_size
        self.c_fc = Linear(draw, C, inner, config.bias)
        self.c_gate = Linear(draw, C, inner, config.bias) if config.is_gated else None
        self.c_proj = Linear(draw, inner, C, config.bias, std=0.02 / math.sqrt(2 * config.n_layer))

    def __call__(self, x: Tensor, run: "Pass", residual: Tensor) -> Tensor:
        if self.c_gate is not None:
            h = kernels.swiglu(self.c_gate(x), self.c_fc(x))  # (B, T, inner)
        else:
            h = kernels.gelu(self.c_fc(x), tanh=self.config.activation == "gelu_tanh")
        return run.dropout(self.c_proj, h, residual, self.config.dropout)  # (B, T, C)


class Block:
    """Attention, then MLP, each added to the residual stream and fed from a norm of it."""

    def __init__(self, draw, config: GPTConfig):
        self.ln_1 = Norm(draw, config, config.n_embd)
        self.attn = CausalSelfAttention(draw, config)
        self.ln_2 = None if config.parallel else Norm(draw, config, config.n_embd)
        self.mlp = MLP(draw, config)

    def __call__(self, x: Tensor, run: "Pass", layer: int) -> Tensor:
        if self.ln_2 is None:
            h = self.ln_1(x)
            return self.mlp(h, run, self.attn(h, run, layer, residual=x))
        x = self.attn(self.ln_1(x), run, layer, residual=x)
        return self.mlp(self.ln_2(x), run, residual=x)


class KVCache:
    """Keys and values of the positions that a model has seen, so that it need not see them again.

    Two tensors (B, G, S, D) a layer with S = block_size; position p of the text lies at index p.
    With start (B,) int32 the text of row b begins at index start[b], and before it is padding.
    """

    def __init__(self, config: GPTConfig, batch_size: int, dtype=dtypes.float32,
                 start: Tensor | None = None, device: str | tuple[str, ...] | None = None):
        self.start = start
        shape = (batch_size, config.kv_heads, config.block_size, config.head_size)
        def empty() -> Tensor:
            return Tensor.zeros(shape, dtype=dtype).to(device).contiguous().realize()
        self.layers = [(empty(), empty()) for _ in range(config.n_layer)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, position: int | UOp,
               window: int | None) -> Tensor:
        """Keeps k and v (B, G, T, D) at position; what q (B, H, T, D) gathers from all so far."""
        return kernels.cached_attention(q, k, v, *self.layers[layer], position, window,
                                        self.start)


class Pass:
    """What one forward pass knows beside its input: position, cache, and random keys."""

    def __init__(self, T: int, position: int | UOp = 0, cache: KVCache | None = None,
                 dropout_key: Tensor | None = None):
        self.T, self.position, self.cache, self._key = T, position, cache, dropout_key

    def rotation(self, config: GPTConfig, device: str | tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2) of RoPE's angles at the positions of this pass."""
        cos, sin = rope_tables(config.block_size, config.head_size, config.rope_theta, device)
        here = slice(self.position, self.position + self.T)
        return cos[here], sin[here]

    def positions(self, wpe: Embedding) -> Tensor:
        """Rows of wpe at the positions of this pass: (T, C), or (B, T, C) after padding."""
        if self.cache is None or self.cache.start is None:
            return wpe.weight[self.position:self.position + self.T]
        start = self.cache.start.unsqueeze(1)  # (B, 1)
        return wpe((counter(self.T, start.device) + self.position - start).maximum(0))

    def next_dropout_key(self) -> Tensor | None:
        if self._key is not None:
            self._key = next_key(self._key)
        return self._key

    def dropout(self, layer: Linear, x: Tensor, residual: Tensor | None, p: float) -> Tensor:
        """residual + dropout(layer(x)), in one kernel where there is no dropout."""
        key = self.next_dropout_key() if p else None
        if key is None:
            return layer(x, residual)
        return residual + kernels.dropout(layer(x), p, key)


@functools.cache
def rope_tables(length: int, head_size: int, theta: float,
                device: str | tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """cos and sin (length, D/2) float32 of position * theta^(-2i/D)."""
    frequency = theta ** (-np.arange(0, head_size, 2) / head_size)
    angle = np.outer(np.arange(length), frequency)
    return (constant(np.cos(angle).astype(np.float32), device),
            constant(np.sin(angle).astype(np.float32), device))


class GPT(LanguageModel):
    """The model. Weights are float32 tensors drawn as GPT-2's are, from `seed`; None: not drawn.

    It writes text with `generate` and `stream`, and is kept by `save_checkpoint` and its like: see
    `tinygpt.model.language_model`. Raises ValueError where no device is usable.
    """

    kind, config_class = "gpt", GPTConfig

    def __init__(self, config: GPTConfig, seed: int | None = 1337):
        device.default()
        config.check_memory()
        super().__init__(config)
        rng = np.random.default_rng(seed)

        def draw(shape: tuple[int, ...], std: float | None) -> Tensor:
            """Normal with that deviation; ones where it is None."""
            if not std or seed is None:
                array = np.full(shape, 1.0 if std is None else 0.0, dtype=np.float32)
            else:
                array = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
            return Tensor(array).realize()
        self._build(config, draw)

    def _build(self, config: GPTConfig, draw) -> None:
        C = config.n_embd
        self.wte = Embedding(draw, config.vocab_size, C)
        self.wpe = Embedding(draw, config.block_size, C) if config.position == "learned" else None
        self.h = [Block(draw, config) for _ in range(config.n_layer)]
        self.ln_f = Norm(draw, config, C)
        self.lm_head = None if config.tie_weights else Linear(draw, C, config.vocab_size, False)

    def __call__(self, idx: Tensor, targets: Tensor | None = None,
                 dropout_key: Tensor | None = None, label_smoothing: float = 0.0,
                 z_loss: float = 0.0) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the token after each position of idx (B, T) int, T <= block_size.

        With targets (B, T) int, negative where none counts: (logits, loss), the loss a scalar in
        nats. Dropout follows dropout_key (1,) uint32; without one it acts where Tensor.training is
        set (Context(TRAINING=1) from tinygrad 0.14 on) and is drawn by tinygrad's generator. Raises
        ValueError on a wrong shape, and on an id outside the vocabulary, except while a TinyJit
        captures the call and no value can be read.
        """
        if idx.ndim != 2 or not 1 <= idx.shape[1] <= self.config.block_size:
            raise ValueError(f"idx has shape {idx.shape}: give (B, T) with 1 <= T <= "
                             f"block_size={self.config.block_size}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets has shape {targets.shape}, idx {idx.shape}: "
                             "give one target a position")
        self._check_tokens(idx, targets)
        if dropout_key is None and self.config.dropout and is_training():
            dropout_key = new_key(idx.device)
        logits = self._head(self._features(idx, Pass(idx.shape[1], dropout_key=dropout_key)))
        if targets is None:
            return logits
        return logits, Loss(self._loss(logits, targets, label_smoothing, z_loss), self.state_dict)

    def loss_in_little_memory(self, idx: Tensor, targets: Tensor,
                              dropout_key: Tensor | None = None, label_smoothing: float = 0.0,
                              z_loss: float = 0.0) -> tuple[Tensor, Chain]:
        """The loss as above, and the chain of blocks whose `gradients` of that loss compute every
        block a second time (see `tinygpt.model.recompute`)."""
        run = Pass(idx.shape[1], dropout_key=dropout_key)
        chain = Chain(self._embed(idx, run))
        for layer, block in enumerate(self.h):
            again = copy.copy(run)  # which draws the same dropout
            chain.append(functools.partial(block, run=run, layer=layer),
                         functools.partial(block, run=again, layer=layer))
        return self._loss(self._head(chain.end), targets, label_smoothing, z_loss), chain

    def _loss(self, logits: Tensor, targets: Tensor, label_smoothing: float,
              z_loss: float) -> Tensor:
        logits = logits.reshape(-1, self.config.vocab_size)  # (B T, V)
        targets = targets.reshape(-1)  # (B T,)
        return kernels.cross_entropy(logits, targets, label_smoothing, z_loss)

    def _features(self, idx: Tensor, run: Pass) -> Tensor:
        """What the last block says of each position: idx (B, T) -> (B, T, C)."""
        x = self._embed(idx, run)
        for layer, block in enumerate(self.h):
            x = block(x, run, layer)
        return x

    def _embed(self, idx: Tensor, run: Pass) -> Tensor:
        """What goes into the first block: idx (B, T) -> (B, T, C)."""
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + run.positions(self.wpe)
        return kernels.dropout(x.cast(self.compute_dtype), self.config.dropout,
                               run.next_dropout_key())

    def _head(self, x: Tensor) -> Tensor:
        """(B, T, C) -> logits (B, T, V)."""
        return (self.lm_head or self.wte.unembed)(self.ln_f(x))

    @property
    def device(self) -> str | tuple[str, ...]:
        return self.wte.weight.device

    def _new_cache(self, batch_size: int, start: Tensor | None = None) -> KVCache:
        return KVCache(self.config, batch_size, self.compute_dtype, start, self.device)

    def _next_logits(self, tokens: Tensor, cache: KVCache, position: UOp | int,
                     row: UOp | int) -> Tensor:
        x = self._features(tokens, Pass(tokens.shape[1], position, cache))
        return self._head(x[:, row:row + 1])[:, 0].cast(dtypes.float32)

    # ---- weights and sizes

    def quantize(self, kind: str) -> "GPT":
        """Keeps its matrices as "int8" or "fp16" from now on, to write text with; returns itself.

        It can then be neither trained nor saved. Raises ValueError where it is quantized already.
        """
        self.free_decoders()  # which hold the matrices
        lora.merge(self)
        quantize(self, kind)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight by its name, GPT-2's names; a tied lm_head is wte.weight and not listed.

        Raises ValueError where the model is quantized.
        """
        refuse_quantized(self, "trained, saved or loaded into")
        return get_state_dict({"wte": self.wte, "wpe": self.wpe, "h": self.h, "ln_f": self.ln_f,
                               "lm_head": self.lm_head})

    def num_params(self, non_embedding: bool = False) -> int:
        """The number of weights, tied ones once; without the position table if asked so."""
        total = sum(w.numel() for w in self.state_dict().values())
        if non_embedding and self.wpe is not None:
            total -= self.wpe.weight.numel()
        return total

    def estimate_flops(self, length: int | None = None) -> int:
        """Floating-point operations of a training step, forward and backward, per token.

        6 for each weight of a matrix that multiplies, 12 C a layer and visible position for
        attention, on sequences of `length`, block_size where none is given (PaLM,
        arXiv:2204.02311, appendix B).
        """
        c = self.config
        matrices = sum(w.numel() for name, w in self.state_dict().items()
                       if w.ndim == 2 and not name.startswith(("wpe", "wte")))
        matrices += c.vocab_size * c.n_embd if c.tie_weights else 0
        seen = min(length or c.block_size, c.sliding_window or c.block_size)
        return 6 * matrices + 12 * c.n_layer * c.n_embd * seen

    # ---- checkpoints, and the world outside

    @classmethod
    def shapes(cls, config: GPTConfig) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of a model of that configuration, by its name; allocates
        nothing."""
        model, shapes = cls.__new__(cls), {}

        def draw(shape: tuple[int, ...], std: float | None) -> Tensor:
            weight = Tensor.empty(0)
            shapes[weight] = shape
            return weight
        model._build(config, draw)
        return {name: shapes[weight] for name, weight in model.state_dict().items()}

    @classmethod
    def _undrawn(cls, config: GPTConfig) -> "GPT":
        return cls(config, seed=None)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, offline: bool = False, **options) -> "GPT":
        """The model, with its tokenizer where that can be read, of "gpt2", "gpt2-medium",
        "gpt2-large" or "gpt2-xl" (downloaded once unless offline), of a folder or .safetensors
        file in Hugging Face's layout (GPT-2 or Llama), or of a checkpoint of ours.

        options are fields of GPTConfig: a block_size that is smaller than the model's crops it, a
        dropout is taken, any other has to be the model's own. Raises ValueError.
        """
        with pretrained.open_pretrained(name, offline) as found:
            config = cls._config_of({"model_config": found.configured(options)}, name)
            model = cls.fitting(config, found.shapes(config.block_size), found.path)
            found.fill(model.state_dict())
        model.tokenizer = found.tokenizer
        return model

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a new folder that transformers opens, as GPT-2 or Llama; returns its path.

        Adapters (LoRA) are merged for good. Raises ValueError that names the option which neither
        has.
        """
        lora.merge(self)
        return pretrained.export(asdict(self.config), self.state_dict(), self.tokenizer, folder)
