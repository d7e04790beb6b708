"""Writes text with a trained GPT: `python generate.py --prompt "ROMEO:"`."""

import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt import GPT
from tinygpt import checkpoint, device, kernels, lora
from tinygpt.config import SampleConfig, check_choice, check_range, parse_flags
from tinygpt.pretrained import is_pretrained
from tinygpt.quantize import KINDS
from tinygpt.tokenizer import StreamDecoder


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
    stop: str | None = field(default=None, metadata={"help": "end before this string"})
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
        if self.stop == "":
            raise ValueError("stop is empty: give a string to stop at")


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
    """Passes text on up to, and without, the string `stop`."""

    def __init__(self, stop: str | None):
        self.stop, self.stopped = stop, False
        self._held = ""  # what may yet turn out to be the beginning of `stop`

    def push(self, text: str) -> str:
        if self.stopped or self.stop is None:
            return "" if self.stopped else text
        text = self._held + text
        if self.stop in text:
            self.stopped, self._held = True, ""
            return text[:text.index(self.stop)]
        longest = min(len(self.stop) - 1, len(text))
        kept = next((n for n in range(longest, 0, -1) if text.endswith(self.stop[:n])), 0)
        self._held = text[len(text) - kept:]
        return text[:len(text) - kept]

    def finish(self) -> str:
        return self._held


def write_one(model: GPT, ids: list[int], config: SampleConfig, stop: str | None) -> list[float]:
    """Streams one continuation to stdout; returns the seconds that each token took."""
    text, until, seconds = StreamDecoder(model.tokenizer), StopFilter(stop), []
    start = time.perf_counter()
    for token in model.stream([ids], config):
        seconds.append(time.perf_counter() - start)
        _put(until.push(text.push(token)))
        if until.stopped:
            break
        start = time.perf_counter()
    _put("" if until.stopped else until.push(text.finish()) + until.finish())
    return seconds


def write_many(model: GPT, prompt: str, ids: list[int], config: SampleConfig, stop: str | None,
               count: int) -> None:
    """Writes `count` continuations, drawn as one batch, to stdout."""
    rows = model.generate([ids] * count, config.max_new_tokens, temperature=config.temperature,
                          top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
                          repetition_penalty=config.repetition_penalty, seed=config.seed).numpy()
    for number, row in enumerate(rows, 1):
        until = StopFilter(stop)
        text = until.push(model.tokenizer.decode(row[len(ids):].tolist())) + until.finish()
        _put(f"--- sample {number} of {count} ---\n{prompt}{text}\n")


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
        model = GPT.from_pretrained(path, offline=what.offline)
    else:
        model = GPT.from_checkpoint(path, what.ema)
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
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
    print(f"{path}, {device.describe()}", file=sys.stderr)
    if what.num_samples > 1:
        start = time.perf_counter()
        write_many(model, prompt, ids, config, what.stop, what.num_samples)
        tokens, passed = what.num_samples * config.max_new_tokens, time.perf_counter() - start
        print(f"{tokens} tokens in {passed:.2f} s ({tokens / passed:,.1f} tokens/s, "
              "compilation included)", file=sys.stderr)
        return
    _put(prompt)
    seconds = write_one(model, ids, config, what.stop)
    _put("\n")
    if seconds:
        print(statistics(len(ids), seconds), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        flags = parse_flags({"what": GenerateConfig, "sample": SampleConfig},
                            sys.argv[1:] if argv is None else argv, __doc__)
        run(flags["what"], flags["sample"])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 141
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
