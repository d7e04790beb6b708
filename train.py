"""Trains a GPT: `python train.py`, or `from train import train`."""

import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from gpt import GPT, GPTConfig
from tinygpt import checkpoint, command, device, kernels, lora
from tinygpt.batch_size import ADVICE, available_memory, largest_micro_batch
from tinygpt.bigram import Bigram, BigramConfig
from tinygpt.config import PRESETS, TrainConfig, given, parse_flags
from tinygpt.data import TokenData, load_data
from tinygpt.pretrained import tokenizer_needed
from tinygpt.ranks import Ranks, world
from tinygpt.run import Interrupted, Run, TrainResult


def train(model: GPT, train_config: TrainConfig, train_data, tokenizer=None) -> TrainResult:
    """Trains model on train_data, saves checkpoints, and returns how it ended.

    train_data is a path, a glob, a string of text, an array of token ids, or a TokenData; see
    `tinygpt.data.load_data`. Text is tokenized by `tokenizer`, or by one that is made as
    train_config.tokenizer says for the model's vocabulary; a model of GPT-2's vocabulary, 50257,
    gets GPT-2's. A run that out_dir already holds is continued with train_config.resume and moved
    into a folder of its own without. With train_config.eval_only its best checkpoint is evaluated
    and nothing else happens. What to train is said by the arguments: data, init_from and offline of
    train_config are for the command. Raises ValueError where model, data and checkpoint do not fit,
    where the loss stays non-finite, or where memory does not suffice; Interrupted after a saved
    Ctrl-C or SIGTERM.

    Under mpirun every process calls this, and all train one model (see `tinygpt.ranks`).
    """
    ranks = world()
    _check_model(model, train_config)
    kernels.use(train_config.kernels)
    kernels.set_threads(train_config.threads or ranks.threads())
    if not isinstance(train_data, TokenData):
        kind = train_config.tokenizer
        if kind == "bpe" and model.config.vocab_size == 50257:
            kind = "gpt2"
        with ranks.one_first():
            train_data = load_data(train_data, tokenizer or kind, model.config.vocab_size,
                                   model.config.block_size, train_config.text_field)
        # what --resume would train on; of text and ids that a script holds it knows nothing
        named = train_data.source if train_data.is_named else ""
        train_config = replace(train_config, data=named)
    try:
        if train_config.auto_batch_size and not train_config.eval_only:
            if ranks.size > 1:
                raise ValueError("--batch_size auto is for one process: say a number under mpirun")
            train_config = fit_batch_size(model, train_config, train_data)
        try:
            run = Run(model, train_config, train_data, ranks)
        except ValueError:
            train_data.forget()
            raise
        try:
            return run.evaluate_only() if train_config.eval_only else run.train()
        finally:
            run.devices.collect(model)
    except (MemoryError, OSError) as error:
        if device.is_out_of_memory(error):
            raise command.out_of_memory(error, ADVICE) from error
        raise


def _check_model(model: GPT, config: TrainConfig) -> None:
    if config.model != model.kind:
        raise ValueError(f"model={config.model!r}, but a {model.kind} model was given")
    wanted, there = config.device.upper().partition(":")[0], device.default().partition(":")[0]
    if wanted not in ("AUTO", there):
        raise ValueError(f"device={config.device!r}, but the model is on {there}: set DEV={wanted} "
                         "in the environment, before the model is made")


def fit_batch_size(model: GPT, config: TrainConfig, data: TokenData) -> TrainConfig:
    """config with the largest micro-batch that fits, and as many tokens a step."""
    sequences = config.batch_size * config.gradient_accumulation_steps

    def split(n: int, **changes) -> TrainConfig:
        return replace(config, batch_size=n, gradient_accumulation_steps=sequences // n,
                       auto_batch_size=False, **changes)

    def trial(n: int) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(model, split(n, out_dir=folder, resume=False, curriculum=False), data)
        run.steps.evaluate([run.batches.batch(0)])
        for _ in range(2):  # compiled by the first
            run._step(0.0)  # which leaves the weights as they are
        return run

    print("finding the largest micro-batch that fits", file=sys.stderr)
    n = largest_micro_batch(sequences, trial, available_memory())
    print(f"batch_size {n}, gradient_accumulation_steps {sequences // n}", file=sys.stderr)
    return split(n)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command.prepare()
    ranks = Ranks()
    try:
        ranks = world()
        with ranks.one_first():
            shape, config = _settings(argv)
        device.choose(config.device, ranks.local_rank * config.devices)
        with ranks.one_first():
            model, data = _model_and_data(shape, config, argv)
        train(model, config, data)
    except Interrupted as stop:
        if ranks.first:
            print(stop, file=sys.stderr)
        return 128 + stop.signum
    except SystemExit as end:  # of the parser, which has said why
        ranks.abort(end.code)
        raise
    except command.FAILURES as error:
        status, message = command.failure(error, ADVICE)
        ranks.abort(status, message and f"train.py: {message}")
        return status
    return 0


def _settings(argv: list[str]) -> tuple[GPTConfig, TrainConfig]:
    """What argv asks for; of a run that is gone on with, all else is as that run had it."""
    flags = _parse(argv)
    config = flags["train"]
    if config.resume or config.eval_only:
        saved = Path(config.out_dir) / "config.json"
        if not saved.is_file():
            what = "evaluate: leave out --eval_only" if config.eval_only else (
                "resume: leave out --resume")
            raise ValueError(f"there is no run in {config.out_dir} to {what}, or name "
                             "another --out_dir")
        flags = _parse(["--config", str(saved), *argv])
        had = _parse(["--config", str(saved)])["train"].tokenizer
        if (asked := flags["train"].tokenizer) != had:
            raise ValueError(f"tokenizer={asked!r}, but the run in {config.out_dir} has "
                             f"--tokenizer {had}: leave out --tokenizer, or start a new run")
    return flags["model"], flags["train"]


def _model_and_data(shape: GPTConfig, config: TrainConfig, argv: list[str]):
    if config.init_from != "scratch":
        return _pretrained(shape, config, argv)
    _check_patterns(shape, config)
    data = load_data(config.data, config.tokenizer, shape.vocab_size, shape.block_size,
                     config.text_field)
    size = data.tokenizer.vocab_size
    if config.model == "bigram":
        return Bigram(BigramConfig(block_size=shape.block_size, vocab_size=size)), data
    return GPT(replace(shape, vocab_size=size), config.seed), data


def _pretrained(shape: GPTConfig, config: TrainConfig, argv: list[str]) -> tuple[GPT, TokenData]:
    """The model that --init_from names, or that the run in out_dir made of it, and data in its ids.
    """
    goes_on = config.resume or config.eval_only
    path = checkpoint.newest(Path(config.out_dir)) if goes_on else None
    if path is not None:
        model = GPT(shape, seed=None)
        with checkpoint.Checkpoint(path) as file:
            model.tokenizer = checkpoint.tokenizer_of(file)
    else:
        options = {name: getattr(shape, name) for name in given(GPTConfig, argv, PRESETS)}
        with tokenizer_needed("tokenizer" not in given(TrainConfig, argv, PRESETS)):
            model = GPT.from_pretrained(config.init_from, offline=config.offline, **options)
    if model.tokenizer is None and config.tokenizer in ("bpe", "char"):
        raise ValueError(f"{config.init_from} comes with no tokenizer that can be read here: pass "
                         "--tokenizer gpt2 or byte, whichever it was trained with")
    _check_patterns(model.config, config)
    data = load_data(config.data, model.tokenizer or config.tokenizer, model.config.vocab_size,
                     model.config.block_size, config.text_field)
    return model, data


def _check_patterns(shape: GPTConfig, config: TrainConfig) -> None:
    """Raises ValueError where a pattern of freeze or lora_targets matches no weight, before text is
    tokenized. The names are those of a small model with as many blocks."""
    if config.model != "gpt" or not (config.freeze or config.lora_rank):
        return
    small = GPT(replace(shape, block_size=1, vocab_size=1, n_embd=2 * shape.n_head, n_inner=1),
                seed=None)
    if config.lora_rank:
        lora.attach(small, 1, config.lora_alpha, config.lora_targets, config.seed)
    lora.trainable(small.state_dict(), config.freeze)


def _parse(argv: list[str]) -> dict:
    text = "\0".join(argv)  # --batch_size auto keeps the number that the preset has
    text = re.sub(r"(?<![^\0])--batch[-_]size[=\0]auto(?![^\0])", "--auto_batch_size", text)
    argv = text.split("\0") if argv else []
    return parse_flags({"model": GPTConfig, "train": TrainConfig}, argv, __doc__, PRESETS)


if __name__ == "__main__":
    sys.exit(main())
