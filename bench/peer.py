"""The same GPT in PyTorch, written as in nanoGPT: the peer of the measurements."""

import ctypes
import functools

import torch
from tinygrad import Device
from tinygrad.runtime.autogen import cuda as _cuda
from torch import nn
from torch.nn import functional as F  # noqa: N812


def torch_device() -> str:
    """PyTorch's name for tinygrad's default device."""
    kinds = {"CUDA": "cuda", "NV": "cuda", "METAL": "mps"}
    return kinds.get(Device.DEFAULT.partition(":")[0], "cpu")


def synchronize() -> None:
    """Waits for PyTorch's device."""
    if (device := torch_device()) != "cpu":
        getattr(torch, device).synchronize()


def enter_torch() -> None:
    """Makes PyTorch's CUDA context current; call it before PyTorch uses a GPU. tinygrad makes its
    own context current, and PyTorch would use that one."""
    if torch_device() == "cuda":
        _cuda.cuCtxSetCurrent(_context())


@functools.cache
def _context():
    """PyTorch's context: the primary context of the device."""
    context = _cuda.CUcontext()
    _cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    return context


class Block(nn.Module):
    def __init__(self, C: int, H: int):
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.c_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.H, C // self.H).transpose(1, 2)
                   for z in self.c_attn(self.ln_1(x)).split(C, dim=2))
        if cache is not None:
            k, v = cache.update(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class Cache:
    """Keys and values (1, H, S, D) of earlier tokens; `length` is the next position."""

    def __init__(self, H: int, S: int, D: int, dtype):
        self.k, self.v = (torch.zeros(1, H, S, D, dtype=dtype, device=torch_device()) for _ in "kv")
        self.length = 0

    def update(self, k, v):
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class PeerGPT(nn.Module):
    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, caches=None):
        first = caches[0].length if caches else 0
        x = self.wte(idx) + self.wpe.weight[first:first + idx.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))
