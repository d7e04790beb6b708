"""Time per token of decoding with a KV cache, and to the first token after a long prompt, batch
size 1, against PyTorch in float32 and, where `llama-cpp-python` is installed, against llama.cpp
with the same weights, matrices of the same kind and as many threads:

    python bench/decode.py [small] [124M]

Ours and PyTorch's draw the tokens; llama.cpp's time has no drawing. "reading" is what reading as
many bytes as our matrices have takes: the product of one row and a float32 matrix of that size.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tinygrad import Device, Tensor, TinyJit
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import in_turn, record
from bench.peer import Cache, PeerGPT, enter_torch, torch_device
from gpt import GPT, GPTConfig
from tinygpt import kernels
from tinygpt.machine import cpu_count

CASES = {"small": (6, 6, 384, 256, 512), "124M": (12, 12, 768, 1024, 50257)}  # L, H, C, T, V
PROMPT, TOKENS = 16, 128
KINDS = ("float32", "fp16", "int8", "int4")


def works(case: str) -> dict[str, tuple[np.ndarray, int]]:
    """What is measured: the prompt, and how many tokens follow it."""
    *_, T, V = CASES[case]
    ids = np.random.default_rng(0).integers(0, V, T * 3 // 4)
    return {"per token": (ids[:PROMPT], TOKENS), f"a prompt of {len(ids)}": (ids, 1)}


def model_of(case: str) -> GPT:
    L, H, C, T, V = CASES[case]
    return GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V))


def ours(case: str, kind: str) -> GPT:
    model = model_of(case)
    return model if kind == "float32" else model.quantize(kind)


def writing(model: GPT):
    return lambda prompt, tokens: list(model.stream(prompt, max_new_tokens=tokens, temperature=1.0))


def reading(model: GPT, at_once: int = 16):
    """Reads, for each token, as many bytes as the model has but for its positions."""
    size = sum(t.nbytes() for name, t in get_state_dict(model).items() if "wpe" not in name)
    matrix = Tensor.ones(size // 4 // 1024, 1024).contiguous().realize()
    rows = [Tensor.ones(1, 1024).contiguous().realize() for _ in range(at_once)]
    read = TinyJit(lambda: Tensor.realize(*[kernels.linear(row, matrix) for row in rows]))

    def run(prompt: np.ndarray, tokens: int) -> None:
        for _ in range(tokens // at_once):
            read()
        Device["CPU"].synchronize()
    return run


def theirs(case: str):
    L, H, C, T, V = CASES[case]
    enter_torch()
    model = PeerGPT(L, H, C, T, V).eval().to(torch_device())

    @torch.inference_mode()
    def write(prompt: np.ndarray, tokens: int) -> None:
        enter_torch()
        caches = [Cache(H, T, C // H, torch.float32) for _ in range(L)]
        token = torch.from_numpy(prompt[None]).to(torch_device())
        for _ in range(tokens):
            logits = model(token, caches=caches)[:, -1]
            token = torch.multinomial(torch.softmax(logits, -1), 1)
            token.item()
    return write


def llamas(case: str, kind: str):
    import llama_cpp as api

    from tinygpt.export import gguf

    api.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = gguf.write(model_of(case), Path(folder) / "model.gguf",
                          "none" if kind == "float32" else kind)
        options = api.llama_model_default_params()
        options.n_gpu_layers, options.use_mmap = 0, False
        model = api.llama_model_load_from_file(str(path).encode(), options)
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = CASES[case][3]
    options.n_threads = options.n_threads_batch = cpu_count()
    context = api.llama_init_from_model(model, options)

    def read(ids: list[int]) -> None:
        tokens = (api.llama_token * len(ids))(*ids)  # which the batch only points to
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp cannot decode")
        api.llama_get_logits_ith(context, -1)  # which waits for them

    def write(prompt: np.ndarray, tokens: int) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        read(prompt.tolist())
        for _ in range(tokens - 1):
            read([0])
    return write


def main() -> None:
    torch.set_num_threads(cpu_count())
    for case in sys.argv[1:] or CASES:
        models = {kind: ours(case, kind) for kind in KINDS}
        writers = {kind: writing(model) for kind, model in models.items()} | {"torch": theirs(case)}
        if find_spec("llama_cpp"):
            writers |= {f"llama.cpp {kind}": llamas(case, kind) for kind in KINDS}
        for name, work in works(case).items():
            peers = dict(writers)
            if work[1] > 1:
                peers |= {f"reading {kind}": reading(model) for kind, model in models.items()}
            times = in_turn({peer: lambda run=run, work=work: run(*work)
                             for peer, run in peers.items()}, seconds=12, rounds=20)
            for kind in KINDS:
                for peer in ("torch", f"llama.cpp {kind}", f"reading {kind}"):
                    if peer in times:
                        record("decode.py", f"{case} {kind}, {name}", times[kind] / work[1],
                               peer.partition(" ")[0], times[peer] / work[1])


if __name__ == "__main__":
    main()
