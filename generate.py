"""Writes text with a trained GPT: `python generate.py --prompt "ROMEO:"`."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from gpt import GPT
from tinygpt import checkpoint, command, device, kernels, lora
from tinygpt.bigram import Bigram
from tinygpt.config import SampleConfig, check_choice, check_range, parse_flags
from tinygpt.pretrained import is_pretrained, tokenizer_needed
from tinygpt.quantize import KINDS
from tinygpt.tokenizer import StreamDecoder, up_to_end


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to write with, and what to write on."""

    checkpoint: str | None = field(default=None, metadata={
        "help": "a .safetensors file, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in "
                "Hugging Face's layout; unset: the best one of the newest run in checkpoints/"})
    offline: bool = field(default=False, metadata={
        "help": "take what --checkpoint names from the cache only"})
    lora: str | None = field(default=None, metadata={
        "help": "a lora.safetensors of a run with --lora_rank, to put on top of --checkpoint"})
    export: str | None = field(default=None, metadata={
        "help": "instead of writing text, write the model into this new folder, as transformers "
                "has GPT-2 or Llama"})
    ema: bool = field(default=False, metadata={
        "help": "write with the moving average of the weights, of a run with --ema"})
    prompt: str = field(default="\n", metadata={
        "help": "text to continue; FILE:path reads it from a file, - from standard input"})
    num_samples: int = field(default=1, metadata={"help": "texts to write, as one batch"})
    stop: list[str] = field(default_factory=list, metadata={
        "help": "end before this string; may be given several times",
        "custom_args": {"action": "append", "nargs": None}})
    out_dir: str | None = field(default=None, metadata={
        "help": "write the samples to sample_1.txt, sample_2.txt, ... in this folder instead of "
                "stdout, after those that it has"})
    json: bool = field(default=False, metadata={
        "help": "write one JSON object a sample: prompt, text, tokens, seconds and seed"})
    interactive: bool = field(default=False, metadata={
        "help": "read lines from the keyboard and continue each; Ctrl-D ends"})
    device: str = field(default="auto", metadata={
        "help": "auto, cpu, cuda, metal, or what else tinygrad knows"})
    quantize: str = field(default="none", metadata={
        "help": "keep the matrices in memory as int8 or fp16 instead of float32: none, fp16 or "
                "int8"})
    threads: int | None = field(default=None, metadata={
        "help": "threads of the CPU kernels; unset: one for each CPU of this process"})

    def __post_init__(self):
        check_range(self, "num_samples", low=1)
        check_choice(self, "quantize", ("none", *KINDS))
        check_range(self, "threads", low=1, high=64)
        if "" in self.stop:
            raise ValueError("stop is empty: give a string to stop at")
        if self.export and self.quantize != "none":
            raise ValueError("export writes float32: leave out --quantize")
        if self.interactive and (self.num_samples > 1 or self.json or self.out_dir
                                 or self.prompt == "-"):
            raise ValueError("interactive writes one text to the terminal: leave out "
                             "--num_samples, --json, --out_dir and --prompt -")


def read_prompt(prompt: str) -> str:
    """The text that --prompt names. Raises ValueError where it cannot be read."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompt {prompt} cannot be read as UTF-8 text ({error})") from error
    return prompt


class StopFilter:
    """Passes text on up to, and without, the one of some strings that is complete first."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.stopped = stops, False
        self._held = ""  # what may yet turn out to be the beginning of a stop

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)[1]]
        kept = max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1))
                    if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept:]
        return text[:len(text) - kept]

    def finish(self) -> str:
        return self._held


def told(model: GPT, tokens: Iterable[int], stop: Sequence[str]) -> Iterator[str]:
    """The text of each token up to the one that completes a stop, or to an end-of-text, and then
    what was held back."""
    text, until = StreamDecoder(model.tokenizer), StopFilter(stop)
    for token in up_to_end(model.tokenizer, tokens):
        yield until.push(text.push(token))
        if until.stopped:
            break
    yield "" if until.stopped else until.push(text.finish()) + until.finish()


def write_one(model: GPT, ids: list[int], config: SampleConfig, stop: Sequence[str]
              ) -> tuple[list[int], list[float]]:
    """Streams one continuation to stdout; returns its tokens and the seconds that each took."""
    tokens, seconds = [], []

    def timed() -> Iterator[int]:
        start = time.perf_counter()
        for token in model.stream([ids], config):
            seconds.append(time.perf_counter() - start)
            tokens.append(token)
            yield token
            start = time.perf_counter()

    for piece in told(model, timed(), stop):
        _put(piece)
    return tokens, seconds


def draw_many(model: GPT, ids: list[int], config: SampleConfig, stop: Sequence[str],
              count: int) -> list[tuple[str, int]]:
    """`count` continuations, drawn as one batch, and how many tokens of each are told."""
    rows = model.generate([ids] * count, **asdict(config)).numpy()
    found = []
    for row in rows[:, len(ids):].tolist():
        pieces = list(told(model, row, stop))
        found.append(("".join(pieces), len(pieces) - 1))
    return found


def write_many(model: GPT, prompt: str, ids: list[int], config: SampleConfig,
               what: GenerateConfig) -> None:
    """Writes what.num_samples continuations to stdout, as text or as JSON lines, or to files.

    The seconds in a JSON line are those of the whole batch.
    """
    folder = _folder_for_samples(what.out_dir) if what.out_dir else None
    start, count = time.perf_counter(), what.num_samples
    drawn = draw_many(model, ids, config, what.stop, count)
    seconds, tokens = time.perf_counter() - start, count * config.max_new_tokens
    for number, (text, length) in enumerate(drawn, 1):
        if folder:
            path = _unused(folder)
            checkpoint.write_atomically(path, f"{prompt}{text}\n".encode())
            print(path, file=sys.stderr)
        if what.json:
            _put(json.dumps({"sample": number, "prompt": prompt, "text": text,
                             "tokens": length, "seconds": round(seconds, 4),
                             "seed": config.seed}) + "\n")
        elif not what.out_dir:
            _put(f"--- sample {number} of {count} ---\n{prompt}{text}\n")
    print(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:,.1f} tokens/s, "
          "compilation included)", file=sys.stderr)


def _folder_for_samples(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): name another --out_dir"
                         ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written: name another --out_dir")
    return folder


def _unused(folder: Path) -> Path:
    """The first name for a sample that no file in a folder has."""
    number = 1
    while (path := folder / f"sample_{number}.txt").exists():
        number += 1
    return path


def converse(model: GPT, ids: list[int], config: SampleConfig, stop: Sequence[str]) -> None:
    """Continues every line of standard input, on stdout, until the input ends.

    A line goes on the text so far, the last block_size tokens of which are kept; an empty one only
    lets the model write on. The line break that ends a line is not part of the text.
    """
    print("type, and it continues; Ctrl-D ends", file=sys.stderr)
    between, turn = "", 0
    while line := sys.stdin.readline():
        line = line.removesuffix("\n")
        try:
            ids += _encode_after(model, between, line) if line else []
        except ValueError as error:  # a character that the tokenizer lacks
            print(error, file=sys.stderr)
            continue
        tokens, _ = write_one(model, ids, replace(config, seed=config.seed + turn), stop)
        _put("\n")
        ids, between, turn = (ids + tokens)[-model.config.block_size:], "\n", turn + 1


def _encode_after(model: GPT, between: str, line: str) -> list[int]:
    """The ids of a line behind a line break, unless the tokenizer knows none."""
    try:
        return model.tokenizer.encode(between + line)
    except ValueError:
        return model.tokenizer.encode(line)


def statistics(prompt_tokens: int, seconds: list[float]) -> str:
    """What the drawing of each token took, in one line."""
    line = (f"prefill {prompt_tokens} tokens in {seconds[0]:.2f} s "
            f"({prompt_tokens / seconds[0]:,.1f} tokens/s, compilation included)")
    if len(seconds) > 1:
        line += (f"; decode {1 / np.median(seconds[1:]):,.1f} tokens/s in the median, "
                 f"{len(seconds)} tokens in {sum(seconds):.2f} s")
    return line


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run(what: GenerateConfig, config: SampleConfig) -> None:
    device.choose(what.device)
    if what.threads:
        kernels.set_threads(what.threads)
    path = what.checkpoint or checkpoint.best_of_newest_run(Path("checkpoints"))
    if is_pretrained(path):
        if what.ema:
            raise ValueError(f"{path} has no moving average of the weights: leave out --ema")
        with tokenizer_needed(what.export is None):
            model = GPT.from_pretrained(path, offline=what.offline)
    else:
        kind = checkpoint.model_kind(checkpoint.load_metadata(path))
        model = (Bigram if kind == "bigram" else GPT).from_checkpoint(path, what.ema)
    if what.lora is not None:
        lora.load(model, what.lora)
    if what.export is not None:
        print(f"{path} is now in {model.save_pretrained(what.export)}", file=sys.stderr)
        return
    if model.tokenizer is None:
        raise ValueError(f"{path} was trained on bare token ids, or has no tokenizer that can be "
                         "read here: use generate of a GPT in a script")
    if what.quantize != "none":
        model.quantize(what.quantize)
    prompt = read_prompt(what.prompt)
    try:
        ids = model.tokenizer.encode(prompt)
    except ValueError:  # a tokenizer of characters that knows no line break, which nobody asked for
        if prompt != GenerateConfig.prompt:
            raise
        ids, prompt = [0], model.tokenizer.decode([0])
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
    print(f"{path}, {device.describe()}", file=sys.stderr)
    if what.num_samples > 1 or what.json or what.out_dir:
        return write_many(model, prompt, ids, config, what)
    _put(prompt)
    if what.interactive:
        return converse(model, ids, config, what.stop)
    _, seconds = write_one(model, ids, config, what.stop)
    _put("\n")
    if seconds:
        print(statistics(len(ids), seconds), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    command.prepare()
    try:
        flags = parse_flags({"what": GenerateConfig, "sample": SampleConfig},
                            sys.argv[1:] if argv is None else argv, __doc__)
        run(flags["what"], flags["sample"])
    except command.FAILURES as error:
        return command.tell("generate.py", error, "ask for fewer --num_samples or "
                            "--max_new_tokens, or take --quantize int8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
