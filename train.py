"""Trains a GPT: `python train.py`, or `from train import train`."""

import os
import signal
import sys

# Ctrl-C while modules are loaded; main() answers it better
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from gpt import GPT, GPTConfig
from tinygpt import checkpoint, command, device, kernels
from tinygpt.data.load import TokenData, load_data, shakespeare, text_size
from tinygpt.flags import Settings, parse_flags, read_settings
from tinygpt.huggingface.pretrained import tokenizer_needed
from tinygpt.model import lora
from tinygpt.model.bigram import Bigram, BigramConfig
from tinygpt.streams import print_error
from tinygpt.training.batch_size import ADVICE, fit_batch_size
from tinygpt.training.config import PRESETS, TrainConfig
from tinygpt.training.loggers import check_loggers
from tinygpt.training.optim import OPTIMIZERS
from tinygpt.training.ranks import Ranks, world
from tinygpt.training.recipe import SHAPES, Given, Trial, describe, recipe, recipe_for
from tinygpt.training.run import Interrupted, TrainResult, prepare
from tinygpt.training.schedule import context_length
from tinygpt.training.trial import time_steps

SETTINGS = {f.name: f for cls in (GPTConfig, TrainConfig) for f in fields(cls)}
# flags that affect an evaluation, and flags that have no effect on a bigram model
EVALUATING = {"data", "text_field", "out_dir", "resume", "eval_only", "batch_size", "eval_iters",
              "dtype", "ema", "seed", "device", "devices", "kernels", "threads"}
STARTING = 15  # seconds in which a run starts and ends, besides its steps
GPT_ONLY = {f.name for f in fields(GPTConfig)} - {"block_size", "vocab_size"}


def train(model: GPT, train_config: TrainConfig, train_data, tokenizer=None) -> TrainResult:
    """Trains model on train_data, saves checkpoints, and returns how it ended.

    train_data is a path, a glob, a string of text, an array of token ids, or a TokenData; see
    `tinygpt.data.load.load_data`. Text is tokenized by `tokenizer`, or by one of the kind
    train_config.tokenizer, trained for the model's vocabulary; a model with GPT-2's vocabulary,
    50257, gets GPT-2's. If out_dir already holds a run, train_config.resume continues it; without
    resume it is moved into a folder of its own. train_config.eval_only only evaluates its best
    checkpoint. data, init_from and offline of train_config are for the command and have no effect
    here. Raises ValueError if model, data and checkpoint do not fit, if the loss stays non-finite,
    or if memory runs out; Interrupted after Ctrl-C or SIGTERM, when the run is saved.

    Under mpirun every process calls this, and all train one model (see `tinygpt.training.ranks`).
    """
    ranks = world()
    _check_model(model, train_config)
    kernels.use(train_config.kernels)
    kernels.set_threads(train_config.threads or ranks.threads())
    if not isinstance(train_data, TokenData):
        kind = train_config.tokenizer
        if kind == "bpe" and model.config.vocab_size == 50257:
            kind = "gpt2"
        with ranks.local_main_first():
            train_data = load_data(train_data, tokenizer or kind, model.config.vocab_size,
                                   model.config.block_size, train_config.text_field)
        # what --resume would train on; it cannot find text or ids of a script
        named = train_data.source if train_data.is_named else ""
        train_config = replace(train_config, data=named)
    try:
        if train_config.auto_batch_size and not train_config.eval_only:
            if ranks.size > 1:
                raise ValueError("--batch_size auto is for one process: choose a number")
            train_config = fit_batch_size(model, train_config, train_data)
        try:
            run = prepare(model, train_config, train_data, ranks)
        except ValueError:
            train_data.delete_new_cache()
            raise
        try:
            return run.evaluate_only() if train_config.eval_only else run.train()
        finally:
            run.devices.to_first(model)
    except (MemoryError, OSError) as error:
        if device.is_out_of_memory(error):
            raise command.out_of_memory(error, ADVICE) from error
        raise


def _check_model(model: GPT, config: TrainConfig) -> None:
    if config.minutes:
        raise ValueError(f"minutes={config.minutes:g} chooses the model, which is given here: "
                         "take max_minutes instead")
    if config.model != model.kind:
        raise ValueError(f"model={config.model!r}, but a {model.kind} model was given")
    wanted, there = config.device.upper().partition(":")[0], device.default().partition(":")[0]
    if wanted not in ("AUTO", there):
        raise ValueError(f"device={config.device!r}, but the model is on {there}: set DEV={wanted} "
                         "in the environment, before the model is made")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command.prepare()
    ranks = Ranks()
    try:
        ranks = world()
        with ranks.local_main_first():
            flags = _settings(argv)
        config = flags["train"]
        device.choose(config.device, ranks.local_rank * config.devices)
        note = _adapt_to_text(flags, ranks)
        with ranks.local_main_first():
            model, data = _model_and_data(flags)
        data.note = note
        train(model, flags["train"], data)
    except Interrupted as stop:
        if ranks.is_main:
            print_error(str(stop))
        return 128 + stop.signum
    except SystemExit as end:  # of the parser, which has printed why
        ranks.abort(end.code)
        raise
    except command.FAILURES as error:
        status, message = command.failure(error, ADVICE)
        ranks.abort(status, message and f"train.py: {message}")
        return status
    return 0


def _settings(argv: list[str]) -> Settings:
    """The settings of argv, and for a run that is resumed or evaluated that run's for the rest.
    Raises ValueError on a flag that has no effect."""
    flags = parse_flags({"model": GPTConfig, "train": TrainConfig}, argv, __doc__, PRESETS,
                        _former_settings)
    shape, config = flags["model"], flags["train"]
    if config.resume or config.eval_only:
        _check_former(flags, read_settings(_former_settings(config), SETTINGS))
    if config.model == "bigram" and (unused := flags.typed & GPT_ONLY):
        raise ValueError(f"--{min(unused)} has no effect on --model bigram, a table: leave one of "
                         "them out")
    if "offline" in flags.typed and config.init_from == "scratch":
        raise ValueError("--offline has no effect without --init_from: add it, or leave out "
                         "--offline")
    context_length(0, config, shape.block_size)
    check_loggers(config.tensorboard, config.wandb)
    checkpoint.check_out_dir(Path(config.out_dir))
    return flags


def _adapt_to_text(flags: Settings, ranks: Ranks) -> str:
    """Replaces the defaults of a run without a preset by the recipe for the size of its text, and
    for the minutes that it may take. Returns the line that reports it, "" where nothing changed."""
    start = time.perf_counter()
    config, minutes = flags["train"], flags["train"].minutes
    is_default = (flags.given == flags.typed and config.data and config.init_from == "scratch"
                  and config.model == "gpt" and not config.resume and not config.eval_only)
    if minutes and (not is_default or "max_iters" in flags.typed):
        raise ValueError("--minutes chooses the model and the steps of the default run: leave out "
                         "--max_iters, --preset, --config, --init_from and --resume, or take "
                         "--max_minutes instead")
    if not is_default:
        return ""
    with ranks.local_main_first():
        data = str(shakespeare()) if config.data == "shakespeare" else config.data
    flags["train"] = config = replace(config, data=data, minutes=None)
    if (size := text_size(data)) is None:
        if minutes:
            raise ValueError(f"--minutes is for text, but {data} has token files: take "
                             "--max_minutes instead")
        return ""
    typed = {name: getattr(flags["model"], name) for name in flags.typed & SHAPES[0].keys()}
    shapes = [SHAPES[0] | typed] if typed else SHAPES
    given = Given(config.batch_size * config.gradient_accumulation_steps,
                  config.learning_rate if "learning_rate" in flags.typed else None,
                  config.tokenizer)
    if minutes:
        seconds = 60 * minutes - STARTING - (time.perf_counter() - start)
        measure = _measure(flags, ranks)
        settings = ranks.broadcast(recipe_for(size, seconds, measure, shapes, given)
                                   if ranks.is_main else None)
    else:
        settings = recipe(size, shapes[0], given=given)
    settings = {k: v for k, v in settings.items() if k not in flags.typed}
    for key in ("model", "train"):
        names = {f.name for f in fields(flags[key])} & settings.keys()
        flags[key] = replace(flags[key], **{name: settings[name] for name in names})
    return describe(size, settings, minutes)


def _measure(flags: Settings, ranks: Ranks) -> Callable[[dict[str, int]], Trial]:
    """What takes a few steps of the run with a shape, in the main process alone."""
    shape, config = flags["model"], flags["train"]
    kernels.use(config.kernels)
    kernels.set_threads(config.threads or ranks.threads())  # which asks the other processes
    rows, count = ranks.split(config.batch_size, config.gradient_accumulation_steps)
    config = replace(config, batch_size=rows, gradient_accumulation_steps=count // ranks.size)
    if ranks.is_main:
        print("measuring training steps", file=sys.stderr)
    return lambda sizes: time_steps(GPT(replace(shape, **sizes), config.seed), config)


def _former_settings(config) -> Path | None:
    """The config.json of the run that config resumes or evaluates."""
    if not (config.resume or config.eval_only):
        return None
    saved = Path(config.out_dir) / "config.json"
    if not saved.is_file():
        verb, flag = ("evaluate", "eval_only") if config.eval_only else ("resume", "resume")
        raise ValueError(f"there is no run in {config.out_dir} to {verb}: leave out --{flag}, or "
                         "name another --out_dir")
    return saved


def _check_former(flags: Settings, former: dict) -> None:
    """Raises ValueError on a flag that contradicts the former run, or has no effect on it."""
    config = flags["train"]
    values = vars(flags["model"]) | vars(config)
    for name in sorted(flags.typed):
        if values[name] == former.get(name, SETTINGS[name].default):
            continue
        if SETTINGS[name].metadata.get("fixed"):
            raise ValueError(f"the run in {config.out_dir} has {name}={former.get(name)}, but "
                             f"{name}={values[name]} was asked for: use the same, or start a new "
                             "run")
        if config.eval_only and name not in EVALUATING:
            raise ValueError(f"--{name} has no effect on --eval_only, which takes no step: leave "
                             "one of them out")


def _model_and_data(flags: Settings):
    shape, config = flags["model"], flags["train"]
    if config.init_from != "scratch":
        return _pretrained(flags)
    part = config.lora_rank or config.freeze or config.devices > 1
    # a lower bound, before text is tokenized
    state = OPTIMIZERS[config.optimizer].state_size
    replace(shape, vocab_size=1).check_memory(1 if part else 2 + state)
    _check_patterns(shape, config)
    data = load_data(config.data, config.tokenizer, shape.vocab_size, shape.block_size,
                     config.text_field)
    size = data.tokenizer.vocab_size
    if "vocab_size" in flags.typed and config.tokenizer != "bpe" and size != shape.vocab_size:
        data.delete_new_cache()
        raise ValueError(f"vocab_size={shape.vocab_size} is for --tokenizer bpe, "
                         f"{config.tokenizer} has {size} ids here: leave out --vocab_size")
    if config.model == "bigram":
        return Bigram(BigramConfig(block_size=shape.block_size, vocab_size=size)), data
    return GPT(replace(shape, vocab_size=size), config.seed), data


def _pretrained(flags: Settings) -> tuple[GPT, TokenData]:
    """The model that --init_from names, or the one of the run in out_dir, and the data for it."""
    shape, config = flags["model"], flags["train"]
    path = None
    if config.resume or config.eval_only:
        path = checkpoint.newest(Path(config.out_dir))
    if path is not None:
        model = GPT(shape, seed=None)
        with checkpoint.Checkpoint(path) as file:
            model.tokenizer = checkpoint.tokenizer_of(file)
    else:
        options = {f.name: getattr(shape, f.name) for f in fields(shape) if f.name in flags.given}
        with tokenizer_needed("tokenizer" not in flags.given):
            model = GPT.from_pretrained(config.init_from, offline=config.offline, **options)
        _check_tokenizer(model, config, flags.typed)
    if model.tokenizer is None and config.tokenizer in ("bpe", "char"):
        raise ValueError(f"{config.init_from} has no tokenizer that can be read here: pass "
                         "--tokenizer gpt2 or byte, whichever it was trained with")
    _check_patterns(model.config, config)
    data = load_data(config.data, model.tokenizer or config.tokenizer, model.config.vocab_size,
                     model.config.block_size, config.text_field)
    return model, data


def _check_tokenizer(model: GPT, config: TrainConfig, typed: set[str]) -> None:
    """Raises ValueError if --tokenizer is not the one that comes with the model."""
    if model.tokenizer is None or "tokenizer" not in typed:
        return
    kinds = {model.tokenizer.kind, *(["gpt2"] if model.tokenizer.vocab_size == 50257 else [])}
    if config.tokenizer not in kinds:
        raise ValueError(f"{config.init_from} has its own tokenizer, of the kind "
                         f"{model.tokenizer.kind}: leave out --tokenizer {config.tokenizer}")


def _check_patterns(shape: GPTConfig, config: TrainConfig) -> None:
    """Raises ValueError if a pattern of freeze or lora_targets matches no weight, before text is
    tokenized. The names are those of a small model with as many blocks."""
    if config.model != "gpt" or not (config.freeze or config.lora_rank):
        return
    small = GPT(replace(shape, block_size=1, vocab_size=1, n_embd=2 * shape.n_head, n_inner=1,
                        head_dim=None), seed=None)
    if config.lora_rank:
        lora.attach(small, 1, config.lora_alpha, config.lora_targets, config.seed)
    lora.trainable(small.state_dict(), config.freeze)


if __name__ == "__main__":
    sys.exit(main())
