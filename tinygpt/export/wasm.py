"""A model as a WebAssembly module, which computes its logits and draws tokens in a browser.

The module exports its memory and the functions of c/module.c:

    prefill(start_pos, row)   reads tokens[0..row] at positions start_pos.. and writes the logits
                              of the token after tokens[row]
    step(start_pos)           reads token, and writes logits and attention
    predict()                 writes the probabilities of logits, and the ids of the ten highest
    sample(key)               predicts, and draws the next token by parameters and seen
    make_key(seed, length)    the key of the token that follows a text of that length

The weights go into its memory before the first call.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tinygpt import device
from tinygpt.export import program
from tinygpt.inference.decoder import cache_size

PAGE = 65536  # bytes
LARGEST = 1 << 32  # bytes that a module can address
HEAD = """#include <stddef.h>
#include <stdint.h>
#include <wasm_simd128.h>

#define VECTORIZED
"""
PLACES = ("tokens", "token", "logits", "parameters", "seen", "probabilities", "likeliest",
          "attention")


@dataclass(frozen=True)
class Module:
    """code is the .wasm file; weights go into its memory at layout["first"].

    layout has the addresses of tokens int32 (chunk,), token int32 (1,), logits float32
    (V,), parameters float32 (5,) in the order of `tinygpt.inference.sampling.OPTIONS`, seen uint8
    (vocab_size,), probabilities float32 (vocab_size,), likeliest int32 (listed,) in falling order,
    and attention float32 (n_layer, n_head, block_size); the sizes chunk, block_size, vocab_size (of
    ids that may be drawn), listed (at most 10), n_layer and n_head; and pages, the 64 KB pages of
    memory.
    """

    code: bytes
    weights: bytes
    layout: dict[str, int]


def build(model) -> Module:
    """The module of a GPT, quantized or not. Raises ValueError where it does not fit into a
    module's memory, or there is no compiler."""
    c = model.config
    is_int8 = program.kind(model) == "int8"
    weights = program.weights(model, program.pairs if is_int8 else program.panels)
    if (needed := len(weights) + 4 * cache_size(c)) > LARGEST - (1 << 28):
        raise ValueError(f"the model takes {needed / 1e9:.1f} GB, and WebAssembly can address "
                         "4.3 GB: choose --quantize int8, or a smaller model")
    code = _compile("\n".join([
        HEAD, program.source("functions.c"), program.constants(model),
        f"#define WEIGHTS_BYTES {len(weights)}u\n", program.enum(dict(BITS=_bits(c))),
        program.source("pairs.c" if is_int8 else "panels.c", "model.c", "sampler.c", "module.c")]))
    addresses, pages = _exports(code)
    layout = {name: addresses[name] for name in PLACES}
    vocab_size = program.known_ids(model)
    layout |= dict(first=addresses["weights_image"], pages=pages, chunk=program.chunk(c),
                   block_size=c.block_size, vocab_size=vocab_size, listed=min(10, vocab_size),
                   n_layer=c.n_layer, n_head=c.n_head)
    return Module(code, weights, layout)


def _bits(config) -> int:
    """Bits in half of an input of c/pairs.c, at most as many as the sums of the longest layer, of
    products with 127, allow in 32 bits."""
    return min(12, 25 - (program.longest(config) - 1).bit_length())


def _compile(source: str) -> bytes:
    zig = device.zig()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module.c").write_text(source, encoding="utf-8")
        _run(zig, "clang", "--target=wasm32-freestanding", "-O3", "-msimd128", "-mbulk-memory",
             "-fno-math-errno", "-isystem", zig.parent / "lib" / "include",
             "-c", folder / "module.c", "-o", folder / "module.o")
        _run(zig, "wasm-ld", "--no-entry", "--strip-all", "--stack-first", "-z", "stack-size=65536",
             *(f"--export={place}" for place in ("weights_image", *PLACES)),
             folder / "module.o", "-o", folder / "module.wasm")
        return (folder / "module.wasm").read_bytes()


def _run(*command) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"zig cannot compile the model ({done.stderr.strip()[-200:]})")


class _Reader:
    """Reads the numbers of a .wasm file (LEB128)."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self) -> int:
        value = shift = 0
        while (byte := self.take(1)[0]) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift


def _exports(code: bytes) -> tuple[dict[str, int], int]:
    """The addresses of the exported variables of a module, and its pages of memory."""
    reader, sections = _Reader(code), {}
    reader.take(8)
    while reader.at < len(code):
        kind, size = reader.number(), reader.number()
        sections[kind] = _Reader(reader.take(size))
    memories, globals_, exports = (sections[kind] for kind in (5, 6, 7))
    memories.take(2)  # one, without a maximum
    values = []
    for _ in range(globals_.number()):
        globals_.take(3)  # its type, whether it changes, i32.const
        values.append(globals_.number())
        globals_.take(1)
    found = {}
    for _ in range(exports.number()):
        name = exports.take(exports.number()).decode()
        kind, index = exports.number(), exports.number()
        if kind == 3:
            found[name] = values[index]
    return found, memories.number()
