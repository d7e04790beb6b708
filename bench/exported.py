"""Milliseconds a token of a model's exported forms, the C file and the WebAssembly module in node,
in turn with model.stream of the same weights, int8; size of the files, seconds to the first token:

    python bench/exported.py checkpoints/best.safetensors
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record
from gpt import GPT
from tinygpt.export import c_file, wasm

ROUNDS = 5
SCRIPT = """
import fs from "fs";
const [folder, count] = process.argv.slice(2), start = performance.now();
const read = (name) => fs.readFileSync(`${folder}/${name}`);
const layout = JSON.parse(read("layout.json"));
const {instance: {exports: e}} = await WebAssembly.instantiate(read("module.wasm"), {});
new Uint8Array(e.memory.buffer).set(read("weights.bin"), layout.first);
const token = new Int32Array(e.memory.buffer, layout.token, 1);
new Float32Array(e.memory.buffer, layout.parameters, 5).set([0.8, 0, 0, 0, 1]);
e.prefill(0, 0);
const next = (p) => { token[0] = e.sample(p); e.step(p); };
next(1);
const first = performance.now() - start;
for (const end = performance.now() + 1000; performance.now() < end;)
  for (let p = 1; p < count; p++) next(p);
const times = [];
for (let p = 1; p < count; p++) {
  const before = performance.now();
  next(p);
  times.push(performance.now() - before);
}
console.log(JSON.stringify([first / 1000, times.sort((a, b) => a - b)[count >> 1]]));
"""


def in_python(model: GPT, count: int) -> tuple[float, float]:
    """Seconds to the first token, once it is compiled, and milliseconds of the others."""
    times = [time.perf_counter()]
    for _ in model.stream([0], max_new_tokens=count):
        times.append(time.perf_counter())
    return times[1] - times[0], 1e3 * (times[-1] - times[1]) / (count - 1)


def in_c(program: Path, count: int) -> tuple[float, float]:
    """The same of the C file; the first token has the start of the process in it."""
    start = time.perf_counter()
    subprocess.run([program, "--max_new_tokens=1"], check=True, capture_output=True)
    first = time.perf_counter() - start
    done = subprocess.run([program, f"--max_new_tokens={count}"], check=True, capture_output=True,
                          text=True)
    return first, 1e3 / float(done.stderr.split("(")[1].split()[0])


def in_node(folder: Path, count: int) -> tuple[float, float]:
    """The same of the module; the first token has the compilation in it."""
    done = subprocess.run(["node", folder / "run.mjs", folder, str(count)], check=True,
                          capture_output=True, text=True)
    return tuple(json.loads(done.stdout))


def main(path: str) -> None:
    model = GPT.from_checkpoint(path)
    count = min(model.config.block_size, 64) - 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        c_file.write(model, folder / "model.c", "int8")
        subprocess.run(["cc", "-O3", folder / "model.c", "-o", folder / "model", "-lm"], check=True)
        peers = {"C file": lambda: in_c(folder / "model", count)}
        print(f"model.c {(folder / 'model.c').stat().st_size:,} bytes, "
              f"model.bin {(folder / 'model.bin').stat().st_size:,} bytes")
        if shutil.which("node"):
            module = wasm.build(model)
            for file, data in (("module.wasm", module.code), ("weights.bin", module.weights),
                               ("layout.json", json.dumps(module.layout).encode()),
                               ("run.mjs", SCRIPT.encode())):
                (folder / file).write_bytes(data)
            print(f"module {len(module.code):,} bytes, weights {len(module.weights):,} bytes")
            peers["WebAssembly in node"] = lambda: in_node(folder, count)
        in_python(model, count)  # compiles
        rounds = [(in_python(model, count), {k: run() for k, run in peers.items()})
                  for _ in range(ROUNDS)]
    python = np.median([found for found, _ in rounds], axis=0)
    for peer in peers:
        first, ms = np.median([found[peer] for _, found in rounds], axis=0)
        record("exported.py", f"{peer}, a token", ms, "model.stream", python[1])
        record("exported.py", f"{peer}, first token", first, "model.stream", python[0], "s")


if __name__ == "__main__":
    main(sys.argv[1])
