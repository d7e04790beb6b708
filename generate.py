"""Writes text with a trained GPT: `python generate.py --prompt "ROMEO:"`."""

import os
import signal
import sys

# Ctrl-C while modules are loaded; main() answers it better
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from gpt import GPT
from tinygpt import checkpoint, command, device
from tinygpt.config import LoadConfig, SampleConfig, check, setting
from tinygpt.data.chat import chat_template_of
from tinygpt.data.tokenizer import begin_of_text, default_prompt
from tinygpt.export import c_file, html
from tinygpt.flags import parse_flags, read_file
from tinygpt.huggingface.pretrained import tokenizer_needed
from tinygpt.inference.chat import Conversation
from tinygpt.inference.decoder import cache_size
from tinygpt.inference.stop import pieces_of
from tinygpt.model import lora
from tinygpt.model.quantize import KINDS
from tinygpt.terminal import put, read_line, talk
from tinygpt.training.signals import pending_signals


def _export_html(model: GPT, path: Path, options: "GenerateConfig") -> None:
    chat = html.describe_chat(model.tokenizer, options.system) if options.chat else None
    html.write(model, path, options.quantize, options.checkpoint, prompt_for(model, options), chat)


def _export_gguf(model: GPT, path: Path, options: "GenerateConfig") -> None:
    from tinygpt.export import gguf  # which takes long to import

    gguf.write(model, path, options.quantize or "none")


# What writes the file that --export names, by its ending: a function of the model, the path and
# the options. Another name is that of a folder in Hugging Face's layout.
EXPORTS: dict[str, Callable[[GPT, Path, "GenerateConfig"], None]] = {
    ".c": lambda model, path, options: c_file.write(model, path, options.quantize),
    ".html": _export_html, ".gguf": _export_gguf}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(LoadConfig):
    """The settings of generate.py besides those of sampling."""

    prompt: str = setting("\n",
        "text to continue; FILE:path reads it from a file, - from standard input", empty=True,
        positional="optional", section="model")
    checkpoint: str | None = setting(None,
        "a .safetensors file, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in Hugging "
        "Face's layout; unset: the best one of the newest run in checkpoints/")
    lora: str | None = setting(None,
        "a lora.safetensors of a run with --lora_rank, to put on top of --checkpoint")
    quantize: str | None = setting(None,
        "keep the matrices in memory as int8, int4 or fp16 instead of float32; unset: none, but "
        "int8 in an exported file other than .gguf", choices=("none", *KINDS))

    interactive: bool = setting(False,
        "read lines from the keyboard and continue each; Ctrl-C ends a text, Ctrl-D the command",
        section="output")
    chat: bool = setting(False,
        "hold a conversation: answer the lines of standard input, by the model's chat template; "
        "Ctrl-C stops an answer, Ctrl-D ends the command, /help lists more; with --export "
        "model.html: write a page for conversations")
    system: str | None = setting(None, "system message of the conversation",
        needs=("--chat", lambda c: c.chat))
    num_samples: int = setting(1, "texts to write, as one batch", low=1)
    stop: tuple[str, ...] = setting((), "end before this string; may be given several times")
    json: bool = setting(False,
        "write one JSON object a sample: prompt, text, tokens, seconds and seed")
    out_dir: str | None = setting(None,
        "write the samples to sample_1.txt, sample_2.txt, ... in this folder instead of stdout; "
        "existing files are kept")
    export: str | None = setting(None,
        "instead of generating text, write the model into this new folder, in the layout of "
        "transformers, or by its ending into a new file: " + ", ".join(EXPORTS))

    serve: bool = setting(False,
        "answer OpenAI's /v1/completions and /v1/chat/completions, and show a page at /; a request "
        "has the sampling flags as its defaults")
    host: str = setting("127.0.0.1", "address to serve at; 0.0.0.0: other machines are served too",
        needs=("--serve", lambda c: c.serve))
    port: int = setting(8000, "port to serve at; 0: any that is free", low=0, high=65535,
        needs=("--serve", lambda c: c.serve))

    def __post_init__(self):
        check(self)
        if self.exports_folder and self.quantize not in (None, "none"):
            raise ValueError("export writes float32 into a folder: leave out --quantize, or name "
                             f"a file that ends in {', '.join(EXPORTS)}")
        if self.interactive and (self.num_samples > 1 or self.json or self.out_dir
                                 or self.prompt == "-"):
            raise ValueError("interactive writes one text to the terminal: leave out "
                             "--num_samples, --json, --out_dir and --prompt -")

    @property
    def exports_folder(self) -> bool:
        return self.export is not None and Path(self.export).suffix not in EXPORTS


SETTINGS = {f.name for cls in (GenerateConfig, SampleConfig) for f in fields(cls)}
LOADING = {"checkpoint", "lora", "quantize", *(f.name for f in fields(LoadConfig))}
SERVING = LOADING | {f.name for f in fields(SampleConfig)} - {"seed", "max_new_tokens"} | {
    "serve", "host", "port", "prompt"}
CHATTING = LOADING | {f.name for f in fields(SampleConfig)} - {"window_hop"} | {
    "chat", "system", "stop"}


def flags_with_effect(options: GenerateConfig) -> set[str]:
    if options.serve:
        return SERVING
    if options.export is None:
        return CHATTING if options.chat else SETTINGS
    pages = {"prompt", "chat", "system"} if options.export.endswith(".html") else set()
    return LOADING | {"export"} | pages


def read_prompt(prompt: str) -> str:
    """The text that --prompt names. Raises ValueError where it cannot be read."""
    if prompt.startswith("FILE:"):
        return read_file(prompt.removeprefix("FILE:"))
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"standard input cannot be read as UTF-8 text ({error})") from error


def prompt_for(model: GPT, options: GenerateConfig) -> str:
    """The text that --prompt names, where the default is one that the model's tokenizer has."""
    prompt = read_prompt(options.prompt)
    return default_prompt(model.tokenizer) if prompt == GenerateConfig.prompt else prompt


def write_one(model: GPT, ids: list[int], config: SampleConfig, stop: Sequence[str],
              pending: Sequence[int] = ()) -> tuple[list[int], list[float]]:
    """Prints one continuation while it is sampled, until there is a signal in pending; returns its
    tokens and the seconds for each."""
    tokens, seconds = [], []

    def timed() -> Iterator[int]:
        start = time.perf_counter()
        for token in model.stream([ids], config=config, reuse_cache=True):
            seconds.append(time.perf_counter() - start)
            tokens.append(token)
            yield token
            start = time.perf_counter()

    for piece in pieces_of(model.tokenizer, timed(), stop):
        put(piece)
        if pending:
            break
    return tokens, seconds


def draw_many(model: GPT, ids: list[int], config: SampleConfig, stop: Sequence[str],
              count: int) -> list[tuple[str, int]]:
    """`count` continuations, sampled as one batch, and the number of tokens in the text of each."""
    rows = model.generate([ids] * count, **asdict(config)).numpy()
    found = []
    for row in rows[:, len(ids):].tolist():
        pieces = list(pieces_of(model.tokenizer, row, stop))
        found.append(("".join(pieces), len(pieces) - 1))
    return found


def write_many(model: GPT, prompt: str, ids: list[int], config: SampleConfig,
               options: GenerateConfig, folder: Path | None) -> None:
    """Writes options.num_samples continuations to stdout, as text or JSON lines, or into a folder.

    The seconds in a JSON line are those of the whole batch.
    """
    start, count = time.perf_counter(), options.num_samples
    drawn = draw_many(model, ids, config, options.stop, count)
    seconds, tokens = time.perf_counter() - start, count * config.max_new_tokens
    for number, (text, length) in enumerate(drawn, 1):
        if folder:
            path = _unused(folder)
            checkpoint.write_atomically(path, f"{prompt}{text}\n".encode())
            print(path, file=sys.stderr)
        if options.json:
            put(json.dumps({"sample": number, "prompt": prompt, "text": text,
                            "tokens": length, "seconds": round(seconds, 4),
                            "seed": config.seed}) + "\n")
        elif not folder:
            put(f"--- sample {number} of {count} ---\n{prompt}{text}\n")
    print(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:,.1f} tokens/s, "
          "compilation included)", file=sys.stderr)


def _folder_for_samples(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be created ({error.strerror}): name another --out_dir"
                         ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written: name another --out_dir")
    return folder


def _unused(folder: Path) -> Path:
    """The first sample_<n>.txt that does not exist in a folder."""
    number = 1
    while (path := folder / f"sample_{number}.txt").exists():
        number += 1
    return path


def converse(model: GPT, ids: list[int], config: SampleConfig, stop: Sequence[str]) -> None:
    """Continues every line of standard input, on stdout, until the input ends.

    A line is appended to the text so far, of which the last block_size tokens are kept; after an
    empty line the model just continues. The line break that ends a line is not part of the text.
    """
    between, turn = "", 0
    while line := read_line():
        line = line.removesuffix("\n")
        try:
            ids += _encode_after(model, between, line) if line else []
        except ValueError as error:  # a character that the tokenizer lacks
            print(error, file=sys.stderr)
            continue
        with pending_signals((signal.SIGINT,), "") as pending:
            tokens, _ = write_one(model, ids, replace(config, seed=config.seed + turn), stop,
                                  pending)
        put("\n")
        ids, between, turn = (ids + tokens)[-model.config.block_size:], "\n", turn + 1


def _encode_after(model: GPT, between: str, line: str) -> list[int]:
    """The ids of a line after a line break, or without one if the tokenizer has none."""
    try:
        return model.tokenizer.encode(between + line)
    except ValueError:
        return model.tokenizer.encode(line)


def statistics(prompt_tokens: int, seconds: list[float]) -> str:
    """The speed of prefill and decoding in one line, given the seconds before each token.

    Decoding is what follows the second token, during which its step is compiled. There is no median
    since several tokens may be drawn at once.
    """
    line = (f"prefill {prompt_tokens} tokens in {seconds[0]:.2f} s "
            f"({prompt_tokens / seconds[0]:,.1f} tokens/s, compilation included)")
    if len(seconds) > 2:
        line += f"; decode {(len(seconds) - 2) / sum(seconds[2:]):,.1f} tokens/s"
    return f"{line}; {len(seconds)} tokens in {sum(seconds):.2f} s"


def _check_memory(model: GPT, length: int, count: int) -> None:
    """Raises ValueError if the caches and ids of `count` texts of that length do not fit."""
    c = model.config
    cache = 0 if model.kind == "bigram" else cache_size(c)
    device.check_memory(count * (4 * cache + 4 * c.vocab_size + 16 * length),
                        f"num_samples={count} texts of {length} tokens", "ask for fewer or shorter "
                        "ones, or a smaller --block_size")


def export(model: GPT, options: GenerateConfig) -> None:
    """Writes the model into the file or folder options.export. Raises ValueError."""
    path = Path(options.export)
    if options.exports_folder:
        model.save_pretrained(path)
    elif path.exists():
        raise ValueError(f"{path} already exists: name a new file")
    else:
        EXPORTS[path.suffix](model, path, options)


def chat(model: GPT, path: str, options: GenerateConfig, config: SampleConfig) -> None:
    """Holds a conversation over standard input and output."""
    _check_memory(model, model.config.block_size, 1)
    conversation = Conversation(model, chat_template_of(model.tokenizer), config, options.system,
                                options.stop)
    print(f"{path}, {device.describe()}\ntype a message; Ctrl-C stops an answer, Ctrl-D ends the "
          "command, /help lists more", file=sys.stderr)
    talk(conversation)


def serve(model: GPT, path: str, options: GenerateConfig, config: SampleConfig) -> None:
    """Answers requests until Ctrl-C, and finishes those that have been accepted."""
    from tinygpt.export import server  # which takes long to import

    if model.kind != "gpt":
        raise ValueError(f"{path} is a {model.kind} model, which is not served: name a GPT")
    about = html.describe(model, path, prompt_for(model, options),
                          replace(config, max_new_tokens=html.TOKENS))
    service = server.Service(model, about["name"], html.page(about), config)
    listening = server.listen(options.host, options.port)
    print(f"{path}, {device.describe()}\nserving {about['name']} at http://{options.host}:"
          f"{listening.getsockname()[1]}; Ctrl-C ends it", file=sys.stderr, flush=True)
    with pending_signals(message="\nfinishing what was asked for; again to stop at once\n"
                         ) as pending:
        server.serve(service, listening, options.host, pending)


def run(options: GenerateConfig, config: SampleConfig) -> None:
    talks = options.chat and options.export is None
    if sys.stdin is None and (options.interactive or talks or options.prompt == "-"):
        raise ValueError("standard input is closed: open it, or give the text as --prompt")
    command.use_machine(options)
    path = options.checkpoint or checkpoint.best_of_newest_run(Path("checkpoints"))
    as_stored = options.lora is None and (options.export is None or options.exports_folder)
    with tokenizer_needed(not options.exports_folder):
        model = command.load_model(path, options.ema, options.offline,
                                   block_size=options.block_size, as_stored=as_stored)
    if options.lora is not None:
        lora.load(model, options.lora)
    if model.tokenizer is None and not options.exports_folder:
        raise ValueError(f"{path} was trained on bare token ids, or has no tokenizer that can be "
                         "read here: call generate() of the model in a script")
    if options.export is not None:
        export(model, replace(options, checkpoint=str(path)))
        print(f"{path} is now in {options.export}", file=sys.stderr)
        return
    if options.quantize not in (None, "none"):
        model.quantize(options.quantize)
    if options.serve:
        return serve(model, str(path), options, config)
    if options.chat:
        return chat(model, str(path), options, config)
    prompt = prompt_for(model, options)
    ids = begin_of_text(model.tokenizer) + model.tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
    _check_memory(model, len(ids) + config.max_new_tokens, options.num_samples)
    folder = _folder_for_samples(options.out_dir) if options.out_dir else None
    print(f"{path}, {device.describe()}", file=sys.stderr)
    if options.num_samples > 1 or options.json or options.out_dir:
        return write_many(model, prompt, ids, config, options, folder)
    if options.interactive:
        print("type a line to continue; Ctrl-C ends a text, Ctrl-D the command", file=sys.stderr)
    put(prompt)
    if options.interactive:
        return converse(model, ids, config, options.stop)
    _, seconds = write_one(model, ids, config, options.stop)
    put("\n")
    if seconds:
        print(statistics(len(ids), seconds), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    command.prepare()
    try:
        flags = parse_flags({"generate": GenerateConfig, "sample": SampleConfig},
                            sys.argv[1:] if argv is None else argv, __doc__)
        options = flags["generate"]
        if unused := sorted(flags.typed - flags_with_effect(options)):
            mode = next(m for m in ("serve", "export", "chat") if getattr(options, m))
            raise ValueError(f"--{unused[0]} has no effect on --{mode}: leave one of them out")
        run(options, flags["sample"])
    except command.FAILURES as error:
        return command.report("generate.py", error, "ask for fewer --num_samples or "
                            "--max_new_tokens, or take --quantize int8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
