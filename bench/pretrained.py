"""Peak memory of reading a random Qwen3 of 600M parameters in bfloat16, quantizing it to int8 and
sampling from it, against transformers reading it for a forward pass, each in its own process:

    python bench/pretrained.py
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record
from bench.memory import peak
from tinygpt.safetensors_file import write

SETTINGS = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, hidden_size=1024,
    intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, hidden_act="silu", max_position_embeddings=40960, rms_norm_eps=1e-6,
    tie_word_embeddings=True, rope_theta=1e6, attention_bias=False, dtype="bfloat16")
BLOCK, TOKENS = 512, 24
IDS = np.array([[5, 6, 7]])


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of SETTINGS, as Qwen3-0.6B has them."""
    layer = {"self_attn.q_proj": (2048, 1024), "self_attn.k_proj": (1024, 1024),
             "self_attn.v_proj": (1024, 1024), "self_attn.o_proj": (1024, 2048),
             "self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "input_layernorm": (1024,),
             "post_attention_layernorm": (1024,), "mlp.gate_proj": (3072, 1024),
             "mlp.up_proj": (3072, 1024), "mlp.down_proj": (1024, 3072)}
    found = {"model.embed_tokens.weight": (151936, 1024), "model.norm.weight": (1024,)}
    return found | {f"model.layers.{i}.{name}.weight": shape
                    for i in range(28) for name, shape in layer.items()}


def create(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def bits(shape: tuple[int, ...]) -> np.ndarray:
        values = np.ones(shape, np.float32) if len(shape) == 1 else (
            0.07 * rng.random(shape, np.float32) - 0.035)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    layout = {name: (shape, "BF16") for name, shape in shapes().items()}
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    write(folder / "model.safetensors", layout, map(bits, shapes().values()), {"format": "pt"})


def measure(step: str, folder: str) -> dict[str, float]:
    """Seconds without imports, and peak MB."""
    if step == "transformers":
        import torch
        import transformers

        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model(torch.tensor(IDS))  # until then the file is mapped, and not read
        return {"seconds": time.perf_counter() - start, "MB": peak()}
    from gpt import GPT

    start = time.perf_counter()
    model = GPT.from_pretrained(folder, as_stored=True, block_size=BLOCK)
    if step == "sample":
        model.quantize("int8")
        assert len(list(model.stream(IDS, TOKENS))) == TOKENS
    return {"seconds": time.perf_counter() - start, "MB": peak()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    with tempfile.TemporaryDirectory() as name:
        create(Path(name))
        found = {step: json.loads(subprocess.run(
            [sys.executable, __file__, step, name], check=True, text=True,
            stdout=subprocess.PIPE).stdout.splitlines()[-1])
            for step in ("read", "sample", "transformers")}
    for step, what in (("read", "read"), ("sample", "read, quantize, sample")):
        record("pretrained.py", f"Qwen3 0.6B in bf16, {what}", found[step]["MB"],
               "transformers, a forward pass", found["transformers"]["MB"], "MB")


if __name__ == "__main__":
    main()
