"""A GPT in tinygrad: its configuration, its layers and the model.

Comments give the shape after each line that changes it:

    B batch   T query length   S key length    C n_embd
    H heads   G kv heads       D head size     V vocabulary
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt import device, kernels
from tinygpt.config import SampleConfig, check, setting
from tinygpt.data.tokenizer import BPETokenizer
from tinygpt.huggingface import pretrained
from tinygpt.kernels.loss import Loss
from tinygpt.kernels.random import counter, new_key, next_key
from tinygpt.kernels.training import is_training
from tinygpt.model import lora
from tinygpt.model.language_model import LanguageModel, LossFunction
from tinygpt.model.quantize import refuse_quantized
from tinygpt.model.recompute import Chain
from tinygpt.model.rope import RopeConfig, rope_tables
from tinygpt.training.config import TrainConfig

__all__ = ["GPT", "BPETokenizer", "GPTConfig", "KVCache", "SampleConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig(RopeConfig):
    """The architecture, besides RoPE's settings. The defaults are GPT-2's, 124M parameters."""

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
    head_dim: int | None = setting(None, "width of a head; unset: n_embd / n_head", low=1,
        fixed=True)
    n_inner: int | None = setting(None,
        "width of the MLP; unset: 4 n_embd, with swiglu 8/3 n_embd up to a multiple of 8", low=1,
        fixed=True)
    dropout: float = setting(0.0, "dropout probability while training", low=0, below=1)
    bias: bool = setting(True, "biases in linear layers and LayerNorm", fixed=True)
    qkv_bias: bool | None = setting(None, "biases of queries, keys and values; unset: as bias",
        fixed=True)
    norm: str = setting("layernorm", "of the blocks", choices=("layernorm", "rmsnorm"), fixed=True)
    norm_eps: float = setting(1e-5, "epsilon inside the norms", above=0, fixed=True)
    activation: str = setting("gelu", "of the MLP; gelu is exact, gelu_tanh GPT-2's approximation",
        choices=("gelu", "gelu_tanh", "swiglu"), fixed=True)
    position: str = setting("learned", "how positions are encoded", choices=("learned", "rope"),
        fixed=True)
    qk_norm: bool = setting(False, "RMSNorm on queries and keys", fixed=True)
    sliding_window: int | None = setting(None,
        "attend to the last so many positions only; unset: to all", low=1, fixed=True)
    parallel: bool = setting(False, "attention and MLP side by side on one norm, as GPT-J has them",
        fixed=True)
    tie_weights: bool = setting(True, "token embedding and output layer share their weights",
        fixed=True)

    def __post_init__(self):
        check(self)
        super().__post_init__()
        if self.head_dim is None and self.n_embd % self.n_head:
            multiple = -(-self.n_embd // self.n_head) * self.n_head
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"choose n_embd={multiple}, another n_head, or a head_dim")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head="
                             f"{self.n_kv_head}: choose a divisor of n_head")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"rope rotates pairs, but the head size {self.head_size} is odd: "
                             "choose an even head_dim, or position=learned")

    def num_params(self) -> int:
        """The number of weights of such a model, tied ones counted once."""
        one, two = (sum(map(math.prod, GPT.shapes(replace(self, n_layer=n)).values()))
                    for n in (1, 2))
        return one + (self.n_layer - 1) * (two - one)

    def check_memory(self, copies: float = 1) -> None:
        """Raises ValueError where such a model, with `copies` numbers kept for each weight, does
        not fit into memory."""
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
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner_size(self) -> int:
        wide = math.ceil(self.n_embd / 3) * 8 if self.is_gated else 4 * self.n_embd
        return self.n_inner or wide


class Linear:
    """y = x W^T + b. weight (n_out, n_in) and bias (n_out,) or None are initialized by GPT."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        self.weight = Tensor.empty(n_out, n_in)
        self.bias = Tensor.empty(n_out) if bias else None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, residual)


class Norm:
    """LayerNorm or RMSNorm over the last axis."""

    def __init__(self, config: GPTConfig, size: int, kind: str | None = None):
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.weight = Tensor.empty(size)
        self.bias = Tensor.empty(size) if config.bias and self.kind == "layernorm" else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return kernels.rms_norm(x, self.weight, self.eps)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding:
    """The rows of weight (V, C) by token id, or by position."""

    def __init__(self, rows: int, size: int):
        self.weight = Tensor.empty(rows, size)

    def __call__(self, idx: Tensor) -> Tensor:
        return kernels.embedding(idx, self.weight)

    def unembed(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)


class CausalSelfAttention:
    """Each position averages the values up to its own, weighted by how its query fits the keys."""

    def __init__(self, config: GPTConfig):
        self.config = config
        H, G, D, C = config.n_head, config.kv_heads, config.head_size, config.n_embd
        self.c_attn = Linear(C, (H + 2 * G) * D,
                             config.bias if config.qkv_bias is None else config.qkv_bias)
        self.c_proj = Linear(H * D, C, config.bias)
        self.q_norm = Norm(config, D, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(config, D, "rmsnorm") if config.qk_norm else None

    def __call__(self, x: Tensor, ctx: "ForwardContext", layer: int, residual: Tensor) -> Tensor:
        B, T, _ = x.shape
        H, G, D = self.config.n_head, self.config.kv_heads, self.config.head_size
        q, k, v = self.c_attn(x).split([H * D, G * D, G * D], dim=-1)
        q = q.reshape(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.reshape(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        v = v.reshape(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotates(layer):
            cos, sin = ctx.rotation(x.device)  # (T, D/2)
            q, k = kernels.rope(q, cos, sin), kernels.rope(k, cos, sin)
        window = self.config.sliding_window
        if ctx.cache is not None:
            y = ctx.cache.attend(layer, q, k, v, ctx.start_pos, window)  # (B, H, T, D)
        else:
            y = kernels.attention(q, k, v, 0, window, self.config.dropout, ctx.next_dropout_key(),
                                  ctx.starts)
        y = y.transpose(1, 2).reshape(B, T, H * D)  # (B, T, H D)
        return ctx.add(residual, self.c_proj, y)


class MLP:
    """Two linear layers with the activation between them, on each position separately."""

    def __init__(self, config: GPTConfig):
        self.config = config
        C, inner = config.n_embd, config.inner_size
        self.c_fc = Linear(C, inner, config.bias)
        self.c_gate = Linear(C, inner, config.bias) if config.is_gated else None
        self.c_proj = Linear(inner, C, config.bias)

    def __call__(self, x: Tensor, ctx: "ForwardContext", residual: Tensor) -> Tensor:
        if self.c_gate is not None:
            h = kernels.swiglu(self.c_gate(x), self.c_fc(x))  # (B, T, inner)
        else:
            h = kernels.gelu(self.c_fc(x), tanh=self.config.activation == "gelu_tanh")
        return ctx.add(residual, self.c_proj, h)  # (B, T, C)


class Block:
    """Attention, then the MLP: each takes a norm of the residual stream x and is added to it."""

    def __init__(self, config: GPTConfig):
        self.ln_1 = Norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = None if config.parallel else Norm(config, config.n_embd)
        self.mlp = MLP(config)

    def __call__(self, x: Tensor, ctx: "ForwardContext", layer: int) -> Tensor:
        if self.ln_2 is None:
            h = self.ln_1(x)
            return self.mlp(h, ctx, residual=self.attn(h, ctx, layer, residual=x))
        x = self.attn(self.ln_1(x), ctx, layer, residual=x)  # x + attn(ln_1(x))
        return self.mlp(self.ln_2(x), ctx, residual=x)  # x + mlp(ln_2(x))


class KVCache:
    """The keys and values of the tokens so far, so that decoding computes only those of new ones.

    Two tensors (B, G, S, D) for each layer with S = block_size; index p has position p. With start
    (B,) int32 the text of row b begins at index start[b], after padding.
    """

    def __init__(self, config: GPTConfig, batch_size: int, dtype=dtypes.float32,
                 start: Tensor | None = None, device: str | tuple[str, ...] | None = None):
        self.start = start
        shape = (batch_size, config.kv_heads, config.block_size, config.head_size)
        def empty() -> Tensor:
            return Tensor.zeros(shape, dtype=dtype).to(device).contiguous().realize()
        self.layers = [(empty(), empty()) for _ in range(config.n_layer)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start_pos: int | UOp,
               window: int | None) -> Tensor:
        """Stores k and v (B, G, T, D) from start_pos on; attention of q (B, H, T, D) to all keys
        stored so far."""
        return kernels.cached_attention(q, k, v, *self.layers[layer], start_pos, window, self.start)


class ForwardContext:
    """What the blocks of one forward pass share besides x (B, T, C).

    start_pos is the position of the first of the T tokens. Decoding has a cache of the tokens
    before them; training has a dropout_key (1,) uint32, from which each dropout derives its own,
    and starts (B, T) int32 where rows hold several documents: where that of each token begins.
    """

    def __init__(self, config: GPTConfig, T: int, start_pos: int | UOp = 0,
                 cache: KVCache | None = None, dropout_key: Tensor | None = None,
                 starts: Tensor | None = None):
        self.config, self.T, self.start_pos, self.cache = config, T, start_pos, cache
        self.starts = starts if cache is None or cache.start is None else cache.start.unsqueeze(1)
        self._key = dropout_key if config.dropout else None

    def rotation(self, device: str | tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2) of RoPE's angles at the positions of the tokens."""
        c = self.config
        cos, sin = rope_tables(c.block_size, c.frequencies(c.head_size), device)
        here = slice(self.start_pos, self.start_pos + self.T)
        return cos[here], sin[here]

    def positions(self, wpe: Embedding) -> Tensor:
        """The rows of wpe at the positions of the tokens: (T, C), or (B, T, C) with starts."""
        if self.starts is None:
            return wpe.weight[self.start_pos:self.start_pos + self.T]
        return wpe((counter(self.T, self.starts.device) + self.start_pos - self.starts).maximum(0))

    def next_dropout_key(self) -> Tensor | None:
        if self._key is not None:
            self._key = next_key(self._key)
        return self._key

    def dropout(self, x: Tensor) -> Tensor:
        return kernels.dropout(x, self.config.dropout, self.next_dropout_key())

    def add(self, residual: Tensor, linear: Linear, x: Tensor) -> Tensor:
        """residual + dropout(linear(x)). Without dropout the linear layer adds the residual in its
        own kernel, which saves 5% of the time of decoding, 12% with int8 weights."""
        if self._key is None:
            return linear(x, residual)
        return residual + self.dropout(linear(x))


def initial_weight(name: str, shape: tuple[int, ...], config: GPTConfig,
                   rng: np.random.Generator | None) -> np.ndarray:
    """The weight of that name as GPT-2 draws it: matrices are normal with deviation 0.02, a smaller
    one where the output is added to the residual stream. Without rng matrices are zeros."""
    if len(shape) == 1:
        return np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
    if rng is None:
        return np.zeros(shape, np.float32)
    std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
    return rng.standard_normal(shape, np.float32) * np.float32(std)


class GPT(LanguageModel):
    """The model. Its weights are float32 tensors, drawn from `seed`; None: to be loaded.

    For `generate`, `stream`, `save_checkpoint` and `from_checkpoint` see
    `tinygpt.model.language_model`. Raises ValueError where no device is usable.
    """

    kind, config_class = "gpt", GPTConfig

    def __init__(self, config: GPTConfig, seed: int | None = 1337):
        device.default()
        config.check_memory()
        super().__init__(config)
        self._build(config)
        rng = None if seed is None else np.random.default_rng(seed)
        for name, weight in self.state_dict().items():
            weight.replace(Tensor(initial_weight(name, weight.shape, config, rng)).realize())

    def _build(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.wte = Embedding(config.vocab_size, C)
        self.wpe = Embedding(config.block_size, C) if config.position == "learned" else None
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = Norm(config, C)
        self.lm_head = None if config.tie_weights else Linear(C, config.vocab_size, False)

    def __call__(self, idx: Tensor, targets: Tensor | None = None,
                 dropout_key: Tensor | None = None,
                 loss_fn: LossFunction = kernels.cross_entropy, starts: Tensor | None = None
                 ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the token after each position of idx (B, T) int, T <= block_size.

        With targets (B, T) int, negative where a token is not to be predicted: (logits, loss), the
        loss a scalar in nats, loss_fn(logits (B T, V), targets (B T,)). With starts (B, T) int32 a
        row holds documents that do not see each other; that of token t begins at starts[b, t].

        Dropout is drawn from dropout_key (1,) uint32; without one, from tinygrad's generator where
        Tensor.training is set (Context(TRAINING=1) from tinygrad 0.14 on). Raises ValueError on a
        wrong shape, and on an id outside the vocabulary, except while a TinyJit captures the call
        and no value can be read.
        """
        if idx.ndim != 2 or not 1 <= idx.shape[1] <= self.config.block_size:
            raise ValueError(f"idx has shape {idx.shape}: give (B, T) with 1 <= T <= "
                             f"block_size={self.config.block_size}")
        for name, given in (("targets", targets), ("starts", starts)):
            if given is not None and given.shape != idx.shape:
                raise ValueError(f"{name} has shape {given.shape}, idx {idx.shape}: "
                                 "give one a position")
        self._check_tokens(idx, targets)
        if dropout_key is None and self.config.dropout and is_training():
            dropout_key = new_key(idx.device)
        ctx = ForwardContext(self.config, idx.shape[1], dropout_key=dropout_key, starts=starts)
        logits = self._head(self._features(idx, ctx))
        if targets is None:
            return logits
        return logits, Loss(self._loss(logits, targets, loss_fn), self.state_dict)

    def checkpointed_loss(self, idx: Tensor, targets: Tensor, dropout_key: Tensor | None = None,
                          loss_fn: LossFunction = kernels.cross_entropy,
                          starts: Tensor | None = None) -> tuple[Tensor, Chain]:
        """The loss as above, and the chain of blocks whose `gradients` compute every block a second
        time (see `tinygpt.model.recompute`)."""
        ctx = ForwardContext(self.config, idx.shape[1], dropout_key=dropout_key, starts=starts)
        chain = Chain(self._embed(idx, ctx), self.h, ctx)
        return self._loss(self._head(chain.end), targets, loss_fn), chain

    def _features(self, idx: Tensor, ctx: ForwardContext) -> Tensor:
        """The output of the last block: idx (B, T) -> (B, T, C)."""
        x = self._embed(idx, ctx)
        for layer, block in enumerate(self.h):
            x = block(x, ctx, layer)
        return x

    def _embed(self, idx: Tensor, ctx: ForwardContext) -> Tensor:
        """The input of the first block: idx (B, T) -> (B, T, C)."""
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + ctx.positions(self.wpe)
        return ctx.dropout(x.cast(self.compute_dtype))

    def _head(self, x: Tensor) -> Tensor:
        """(B, T, C) -> logits (B, T, V)."""
        return (self.lm_head or self.wte.unembed)(self.ln_f(x))

    @property
    def device(self) -> str | tuple[str, ...]:
        return self.wte.weight.device

    def _new_cache(self, batch_size: int, start: Tensor | None = None) -> KVCache:
        return KVCache(self.config, batch_size, self.compute_dtype, start, self.device)

    def _next_logits(self, tokens: Tensor, cache: KVCache, start_pos: UOp | int,
                     row: UOp | int) -> Tensor:
        x = self._features(tokens, ForwardContext(self.config, tokens.shape[1], start_pos, cache))
        return self._head(x[:, row:row + 1])[:, 0].cast(dtypes.float32)

    # ---- weights and sizes

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight by its name in GPT-2; a tied lm_head is wte.weight and not listed.

        Raises ValueError where the model is quantized.
        """
        refuse_quantized(self, "trained, saved or loaded into")
        return get_state_dict({"wte": self.wte, "wpe": self.wpe, "h": self.h, "ln_f": self.ln_f,
                               "lm_head": self.lm_head})

    def estimate_flops(self, length: int | None = None) -> int:
        """Floating-point operations of a training step per token, on sequences of `length`, else
        block_size (PaLM, arXiv:2204.02311, appendix B): 6 for each weight of a matrix product, and
        for attention 12 H D for each layer and visible position."""
        c = self.config
        matrices = sum(w.numel() for name, w in self.state_dict().items()
                       if w.ndim == 2 and not name.startswith(("wpe", "wte")))
        matrices += c.vocab_size * c.n_embd if c.tie_weights else 0
        seen = min(length or c.block_size, c.sliding_window or c.block_size)
        return 6 * matrices + 12 * c.n_layer * c.n_head * c.head_size * seen

    # ---- loading and exporting

    @classmethod
    def _unloaded(cls, config: GPTConfig) -> "GPT":
        """A model whose weights have no memory yet, to be replaced."""
        LanguageModel.__init__(model := cls.__new__(cls), config)
        model._build(config)
        return model

    @classmethod
    def shapes(cls, config: GPTConfig) -> dict[str, tuple[int, ...]]:
        return {name: weight.shape for name, weight in cls._unloaded(config).state_dict().items()}

    @classmethod
    def from_pretrained(cls, name: str | Path, *, offline: bool = False, as_stored: bool = False,
                        **options) -> "GPT":
        """Loads "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" (downloaded once unless offline),
        a folder or .safetensors file in Hugging Face's layout (see docs/pretrained.md), or a
        checkpoint of ours, with its tokenizer where that can be read.

        Weights become float32; with as_stored matrices of 16 bits stay so, which cannot be trained.
        options are fields of GPTConfig: dropout, and a smaller block_size, which crops the model;
        any other has to be the model's own. Raises ValueError.
        """
        with pretrained.open_pretrained(name, offline) as found:
            config = cls._config_of({"model_config": found.config_with(options)}, name)
            shapes = found.shapes(config.block_size)
            cls.check_fit(config, shapes, found.path)
            found.check_memory(shapes, as_stored)
            model = cls._unloaded(config)
            found.fill(model.state_dict(), as_stored)
        model.tokenizer = found.tokenizer
        return model

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a new folder that transformers loads as a GPT-2, a Llama, ...; returns its path.

        LoRA adapters are merged into the model. Raises ValueError, which names the option, where no
        architecture has it.
        """
        lora.merge(self)
        return pretrained.export(asdict(self.config), self.state_dict(), self.tokenizer, folder)
