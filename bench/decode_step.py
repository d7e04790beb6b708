"""CPU time of a token on one thread, in microseconds: as C replays the captured step, in turn with
the same through tinygrad's queue, within the context and past it; then where it goes, kernel by
kernel:

    python bench/decode_step.py checkpoints/best.safetensors [int8]

CPU time, unlike time by the clock, is about the same on a machine that does other work too.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record
from gpt import GPT
from tinygpt.kernels.cpu.replay import DecodeReplay, kernels_of
from tinygpt.kernels.cpu.threads import set_threads

ROUNDS = 20


def per_token(model: GPT, first: int, last: int) -> float:
    """Microseconds of a token between the first and the last, the lowest of ROUNDS."""
    def text(count: int) -> float:
        start = time.process_time()
        list(model.stream([0], max_new_tokens=count))
        return time.process_time() - start
    return 1e6 * (min(text(last) for _ in range(ROUNDS))
                  - min(text(first) for _ in range(ROUNDS))) / (last - first)


def compare(model: GPT, case: str) -> None:
    block_size, of = model.config.block_size, DecodeReplay.of
    parts = {"within the context": (2, block_size - 1), "past it": (block_size, 4 * block_size)}
    times = {}
    for way, make in (("C", of), ("queue", lambda *_: None)):
        DecodeReplay.of = make
        model.free_decoders()
        list(model.stream([0], max_new_tokens=2 * block_size))  # compiles
        times[way] = {name: per_token(model, *part) for name, part in parts.items()}
    DecodeReplay.of = of
    for name in parts:
        record("decode_step.py", f"{case}, {name}", times["C"][name], "queue",
               times["queue"][name], "us")


def bounds(words: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where in words each kernel begins and ends (see calls.h)."""
    begin = 0
    while begin < len(words):
        _, parts, room = map(int, words[begin:begin + 3])
        yield begin, begin + parts * (3 + room)
        begin += parts * (3 + room)


def profile(model: GPT) -> None:
    """Prints the time of each kind of kernel of a step."""
    model.free_decoders()
    list(model.stream([0], max_new_tokens=3))
    decoder = model._decoders._idle[0]
    replay, first = decoder.replays[1], decoder.replays[1].step.calls
    places = list(bounds(replay.words))
    names = [call.src[0].arg.function_name for call in kernels_of(decoder.steps[1])]

    def run(begin: int, end: int) -> float:
        replay.step.calls, replay.step.end = first + 8 * begin, first + 8 * end
        times = []
        for _ in range(5 * ROUNDS):
            start = time.thread_time()
            replay(np.zeros((1, 1), np.int32), model.config.block_size // 2, 0,
                   np.zeros((16, 1), np.uint32))
            times.append(time.thread_time() - start)
        return 1e6 * min(times) / 16

    call = run(0, 0)
    print(f"{'the whole step':60} {run(0, len(replay.words)):8.1f} us")
    print(f"{'a sixteenth of a call without kernels':60} {call:8.1f} us")
    kinds = Counter()
    for name, place in zip(names, places, strict=True):
        kinds[name] += max(0.0, run(*place) - call)
    for name, us in kinds.most_common():
        print(f"{names.count(name):4} {name:55} {us:8.1f} us")


def main(path: str, kind: str = "float32") -> None:
    set_threads(1)
    model = GPT.from_checkpoint(path)
    if kind != "float32":
        model.quantize(kind)
    compare(model, kind)
    profile(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
