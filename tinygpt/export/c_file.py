"""A model as one C file and its weights: `cc -O3 model.c -o model -lm && ./model "ROMEO:"`."""

from dataclasses import fields
from pathlib import Path

import numpy as np

from tinygpt.checkpoint import write_atomically
from tinygpt.config import SampleConfig, kind_of
from tinygpt.data.tokenizer import BPETokenizer, CharTokenizer, default_prompt, end_of_text
from tinygpt.export import program
from tinygpt.export.characters import ranges

HEAD = """/* A GPT of {params:,} weights, which writes text:
 *
 *     cc -O3 {name}.c -o {name} -lm
 *     ./{name} "ROMEO:"
 *
 * {name}.bin has the weights and the tokenizer, and belongs in the folder of the program. The same
 * seed gives the same text as `python generate.py` of tinygpt, which wrote this file. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Functions that gcc compiles for AVX2 too, which is taken where the processor has it. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && defined(__x86_64__) && \\
    defined(__OPTIMIZE__) && !defined(__AVX2__)
#define VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORIZED
#endif
"""
FILES = ("panels.c", "model.c", "sampler.c", "tokenizer.c", "output.c", "options.c", "main.c")


def write(model, path: Path, quantize: str | None) -> None:
    """Writes `path`, the C source of a GPT, and a .bin file of the same name.

    quantize is "int8", which None is too, "fp16" or "none". Raises ValueError where the .bin file
    exists, or the model is no GPT or has no tokenizer.
    """
    data_path = path.with_suffix(".bin")
    if data_path.exists():
        raise ValueError(f"{data_path} already exists: name a new file")
    program.quantize(model, quantize)
    sizes, tables = _tokenizer(model.tokenizer)
    data = program.weights(model, program.panels) + tables
    head = HEAD.format(params=model.config.num_params(), name=path.stem)
    write_atomically(data_path, data)
    write_atomically(path, "\n".join([
        head, program.source("errors.c", "functions.c"), program.constants(model),
        program.enum(sizes | dict(FILE_SIZE=len(data))),
        f"#define FILE_NAME {_quoted(data_path.name)}",
        f"#define DEFAULT_PROMPT {_quoted(default_prompt(model.tokenizer))}",
        f"#define OPTIONS {_options()}\n", program.source(*FILES)]).encode())


def _tokenizer(tokenizer) -> tuple[dict[str, int], bytes]:
    """The sizes of c/tokenizer.c, and the tables that `take_tokenizer` takes."""
    end = end_of_text(tokenizer)
    count = tokenizer.vocab_size - (end is not None)
    tokens = [tokenizer.decode_bytes([i]) for i in range(count)]
    is_bpe = isinstance(tokenizer, BPETokenizer)
    letters, numbers, spaces = map(ranges, (r"\p{L}", r"\p{N}", r"\s")) if is_bpe else ([],) * 3
    sizes = dict(TOKENS=count, END_OF_TEXT=-1 if end is None else end, BPE=is_bpe,
                 CHARACTERS=isinstance(tokenizer, CharTokenizer), LETTERS=len(letters),
                 NUMBERS=len(numbers), SPACES=len(spaces))
    words = np.concatenate([np.cumsum([len(token) for token in tokens]),
                            sorted(range(count), key=tokens.__getitem__),
                            np.array(letters + numbers + spaces).reshape(-1)])
    return sizes, words.astype("<u4").tobytes() + b"".join(tokens)


def _options() -> str:
    """The fields of SampleConfig as rows of c/options.c."""
    rows = []
    for f in fields(SampleConfig):
        whole = kind_of(f)[0] is int
        most = (2**53 if f.name == "seed" else 2**30) if whole else 1e30
        low = f.metadata.get("low", 1e-30)
        rows.append(f'  {{"{f.name}", {f.default or 0}, {low}, {f.metadata.get("high", most)}, '
                    f'{int(whole)}, {_quoted(f.metadata["help"])}}}')
    return "\\\n" + ", \\\n".join(rows)


def _quoted(text: str) -> str:
    """A string in C."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}"
                         for b in text.encode()) + '"'
