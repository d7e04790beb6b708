"""Time per token of decoding with a KV cache, batch size 1, with float32, fp16 and int8 matrices
against PyTorch in float32:

    python bench/decode.py [small] [124M]
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import in_turn, record
from bench.peer import Cache, PeerGPT, enter_torch, torch_device
from gpt import GPT, GPTConfig
from tinygpt.machine import cpu_count

CASES = {"small": (6, 6, 384, 256, 512), "124M": (12, 12, 768, 1024, 50257)}  # L, H, C, T, V
PROMPT, TOKENS = 16, 128
KINDS = ("float32", "fp16", "int8")


def ours(case: str, kind: str):
    L, H, C, T, V = CASES[case]
    model = GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V))
    if kind != "float32":
        model.quantize(kind)
    prompt = np.random.default_rng(0).integers(0, V, (1, PROMPT))
    return lambda: list(model.stream(prompt, max_new_tokens=TOKENS, temperature=1.0))


def theirs(case: str):
    L, H, C, T, V = CASES[case]
    enter_torch()
    model = PeerGPT(L, H, C, T, V).eval().to(torch_device())
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, V, (1, PROMPT)))
    prompt = prompt.to(torch_device())

    @torch.inference_mode()
    def write():
        enter_torch()
        caches = [Cache(H, T, C // H, torch.float32) for _ in range(L)]
        token = prompt
        for _ in range(TOKENS):
            logits = model(token, caches=caches)[:, -1]
            token = torch.multinomial(torch.softmax(logits, -1), 1)
            token.item()
    return write


def main() -> None:
    torch.set_num_threads(cpu_count())
    for case in sys.argv[1:] or CASES:
        peers = {kind: ours(case, kind) for kind in KINDS} | {"torch": theirs(case)}
        times = in_turn(peers, seconds=15)
        for kind in KINDS:
            record("decode.py", f"{case} {kind}, per token", times[kind] / TOKENS, "torch",
                   times["torch"] / TOKENS)


if __name__ == "__main__":
    main()
