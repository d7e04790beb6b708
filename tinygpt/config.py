"""The settings of a run and of sampling, each declared in one place, and the recipes.

A configuration is a frozen dataclass. `setting` declares a field with its default, its help and the
values that it takes; the check, the flag and its place in --help follow from that (see flags.py).
"""

import difflib
import math
import operator
import os
from collections.abc import Iterable
from dataclasses import Field, InitVar, dataclass, field, fields
from numbers import Integral, Real
from typing import get_args

from tinygpt.kernels import IMPLEMENTATIONS

LARGEST = 2 ** 64  # of whole numbers: what no machine can count, and numpy cannot hold
RULES = {"low", "high", "above", "below", "choices", "empty", "auto", "needs", "fixed", "section",
         "positional"}


def setting(default, text: str, **rules):
    """A dataclass field whose metadata holds its help text and its rules:

    low, high, above, below    bounds of a number
    choices                    the strings that are allowed
    empty                      whether an empty string is allowed
    auto                       the switch that "auto" stands for on the command line
    needs                      (words, function of the configuration): where the function is false
                               the setting has no effect, and a flag that sets it is refused
    fixed                      whether it stays the same when a run is resumed
    section                    the heading in --help of this field and those after it
    positional                 whether a command takes it by position: "required" or "optional"

    A flag whose default is a tuple can be given several times.
    """
    assert rules.keys() <= RULES, rules
    return field(default=default, metadata={"help": text, **rules})


def kind_of(setting: Field) -> tuple[type, bool]:
    """The type of a field's values, and whether None is one of them."""
    if setting.type == tuple[str, ...]:
        return tuple, False
    types = [t for t in get_args(setting.type) if t is not type(None)]
    return (types[0], True) if types else (setting.type, False)


def check(config) -> None:
    """Raises ValueError that names the first field with a value of the wrong type, out of range, or
    unknown, and the remedy. Paths and numpy's numbers become Python's own strings and numbers."""
    for f in fields(config):
        object.__setattr__(config, f.name, check_value(f, getattr(config, f.name)))


def check_value(f: Field, value):
    """The value that a field gets from a value that is given for it. Raises ValueError."""
    kind, optional = kind_of(f)
    if optional and value is None:
        return None
    checks = {int: _check_number, float: _check_number, bool: _check_bool, str: _check_text,
              tuple: _check_texts}
    return checks[kind](f, value)


BOUNDS = {"low": ("at least", operator.ge), "above": ("above", operator.gt),
          "high": ("at most", operator.le), "below": ("below", operator.lt)}


def range_of(f: Field) -> str:
    """The bounds of a field's numbers in words, such as "at least 0 and below 1"; "" without any.
    """
    return " and ".join(f"{words} {f.metadata[rule]}" for rule, (words, _) in BOUNDS.items()
                        if rule in f.metadata)


def _check_number(f: Field, value) -> int | float:
    kind, _ = kind_of(f)
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise ValueError(f"{f.name}={value!r} is no {'whole number' if kind is int else 'number'}: "
                         "choose one")
    try:
        finite = math.isfinite(value) and (kind is float or value < LARGEST)
    except OverflowError:
        finite = False
    if not finite or not all(holds(value, f.metadata[rule]) for rule, (_, holds) in BOUNDS.items()
                             if rule in f.metadata):
        raise ValueError(f"{f.name}={str(value)[:40]} is out of range: choose a finite value "
                         f"{range_of(f)}".rstrip())
    return kind(value)


def _check_bool(f: Field, value) -> bool:
    if str(value) not in ("True", "False") or isinstance(value, str):
        raise ValueError(f"{f.name}={value!r} is neither True nor False: choose one")
    return bool(value)


def _check_text(f: Field, value) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError(f"{f.name}={value!r} is no text: choose a string")
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{f.name}={value!r} is unknown: choose one of {', '.join(choices)}"
                         f"{did_you_mean(value, choices)}")
    if not value and not f.metadata.get("empty"):
        raise ValueError(f"{f.name}={value!r} is empty: choose another, or leave it out")
    if "\0" in value:
        raise ValueError(f"{f.name}={value!r} has a zero byte: choose a text without")
    try:
        value.encode("utf-8", "surrogateescape")  # as the names of files are encoded
    except UnicodeEncodeError as error:
        raise ValueError(f"{f.name}={value!r} has half of a surrogate pair, which neither text nor "
                         "the name of a file can have: choose a text without") from error
    return value


def _check_texts(f: Field, value) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{f.name}={value!r} is no list: choose a list of strings")
    return tuple(_check_text(f, text) for text in value)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What to append to a message about an unknown word: a question, or nothing."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7)
    return f"; did you mean {prefix}{by_lower[close[0]]}?" if close else ""


DECAYS = ("--schedule other than constant", lambda c: c.schedule != "constant")


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """The settings of every command: what computes, and whether anything may be downloaded."""

    device: str = setting("auto", "auto, cpu, cuda, metal, or another that tinygrad knows",
        section="machine")
    kernels: str = setting("auto",
        "implementation of the operations; flash: attention in kernels for GPUs, all else "
        "automatic", choices=("auto", *IMPLEMENTATIONS))
    threads: int | None = setting(None,
        "threads of the CPU kernels; unset: one for each CPU of this process", low=1, high=64)
    offline: bool = setting(False, "take pretrained weights from the cache only")


@dataclass(frozen=True, kw_only=True)
class LoadConfig(MachineConfig):
    """The settings of a command that loads a trained model."""

    ema: bool = setting(False, "use the moving average of the weights, of a run with --ema",
        section="model")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MachineConfig):
    """How a model is trained. The names are nanoGPT's where nanoGPT has one.

    `warmup_steps` is another name for `warmup_iters`.
    """

    data: str = setting("shakespeare",
        "a text or .jsonl file, a folder or glob of them, a folder with train.bin and val.bin, or "
        "'shakespeare'", empty=True, section="data")
    text_field: str = setting("text", "where the text is in each object of a .jsonl file")
    tokenizer: str = setting("bpe", "bpe is trained on the data", fixed=True,
        choices=("bpe", "gpt2", "char", "byte"))
    batch_size: int = setting(12,
        "sequences in a micro-batch; auto: the same as --auto_batch_size", low=1,
        auto="auto_batch_size")
    auto_batch_size: bool = setting(False,
        "use the largest micro-batch that fits into memory, and as many as make up batch_size "
        "times gradient_accumulation_steps sequences")
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step", low=1)
    curriculum: bool = setting(False,
        "train on short contexts first: lengths that double up to block_size over the first half "
        "of the steps, with as many tokens a step")
    curriculum_start_block_size: int = setting(32,
        "the first length of --curriculum: a half, a quarter, an eighth ... of block_size", low=1,
        needs=("--curriculum", lambda c: c.curriculum))

    model: str = setting("gpt", "bigram is a table of what follows each token, to compare with",
        choices=("gpt", "bigram"), fixed=True, section="model")
    init_from: str = setting("scratch",
        "initial weights: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in Hugging "
        "Face's layout, or a .safetensors file; without --preset, any but scratch implies the "
        "preset finetune_shakespeare", fixed=True)
    freeze: str | None = setting(None,
        "weights that are not trained: patterns of their names, comma-separated, such as "
        "'wte*,wpe*,h.[0-5].*'", fixed=True)
    lora_rank: int = setting(0,
        "train low-rank adapters of that rank and nothing else (LoRA); 0: all weights", low=0,
        fixed=True)
    lora_alpha: float = setting(16.0, "the adapters are multiplied by lora_alpha / lora_rank",
        above=0, fixed=True, needs=("--lora_rank", lambda c: c.lora_rank))
    lora_targets: str = setting("h.*.attn.c_attn",
        "linear layers that get an adapter: patterns of their names, comma-separated", fixed=True,
        needs=("--lora_rank", lambda c: c.lora_rank))

    out_dir: str = setting("checkpoints", "where the run is saved", section="run")
    resume: bool = setting(False, "continue the newest checkpoint in out_dir")
    eval_only: bool = setting(False,
        "evaluate the best checkpoint in out_dir, or the newest if there is no best, and exit; "
        "writes nothing")
    max_iters: int = setting(2000, "training steps", low=1)
    max_minutes: float | None = setting(None,
        "stop after so many minutes as if max_iters were reached; the schedule still follows the "
        "steps", above=0)
    patience: int = setting(0,
        "stop after so many evaluations in a row without a new best; 0: never", low=0)
    keep: int = setting(2, "newest checkpoints to keep besides the best", low=1)
    seed: int = setting(1337, "random seed of weights, batches, dropout and samples", low=0)

    optimizer: str = setting("adamw", "muon uses AdamW for all but the matrices of the blocks",
        choices=("adamw", "lion", "muon", "adamw8bit"), fixed=True, section="optimizer")
    weight_decay: float = setting(0.1, "decay of matrices; vectors have none", low=0)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", low=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay of the second moment", low=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: unlimited", low=0)
    skip_spikes: float = setting(0.0,
        "skip a step whose gradient norm is above so many times the median of the last 100; 0: "
        "never", low=0)
    ema: bool = setting(False,
        "also keep a moving average of the weights, and evaluate and sample from it")
    ema_decay: float = setting(0.999,
        "share of the average that a step keeps; less in the first steps", low=0, below=1,
        needs=("--ema", lambda c: c.ema))
    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary", low=0,
        below=1)
    z_loss: float = setting(0.0, "weight of log(Z)^2 in the loss, which keeps logits small", low=0)

    learning_rate: float = setting(1e-3, "peak learning rate", above=0, section="schedule")
    schedule: str = setting("cosine",
        "how the learning rate decays; wsd: late and linearly, constant: not at all",
        choices=("cosine", "linear", "wsd", "constant"))
    decay_fraction: float = setting(0.2, "share of the steps, the last ones, in which wsd decays",
        above=0, high=1, needs=("--schedule wsd", lambda c: c.schedule == "wsd"))
    warmup_iters: int = setting(100, "steps over which the learning rate rises", low=0)
    lr_decay_iters: int | None = setting(None,
        "step at which min_lr is reached; unset: max_iters", low=1,
        needs=(DECAYS[0], lambda c: DECAYS[1](c) or c.curriculum))
    min_lr: float | None = setting(None,
        "lowest learning rate; unset: a tenth of learning_rate", low=0, needs=DECAYS)

    eval_interval: int = setting(250,
        "steps between evaluations, each of which saves a checkpoint", low=1, section="logging")
    eval_iters: int = setting(20, "batches in an evaluation of a split", low=1)
    log_interval: int = setting(10, "steps between log lines", low=1)
    sample_interval: int = setting(0, "steps between samples; 0: only at the end", low=0)
    tensorboard: bool = setting(False,
        "also log to TensorBoard, in out_dir/tensorboard; needs tensorboardX")
    wandb: bool = setting(False, "also log to Weights & Biases; needs wandb")

    dtype: str = setting("float32",
        "dtype of activations; weights stay in float32, and with float16 the loss is scaled so "
        "that gradients do not underflow", choices=("float32", "bfloat16", "float16"),
        section="machine")
    grad_checkpoint: bool = setting(False,
        "keep only the inputs of the blocks and recompute the rest in the backward pass: slower, "
        "with the memory of one block instead of all")
    devices: int = setting(1,
        "number of devices of that kind, cuda:0, cuda:1, ..., each with the weights and its part "
        "of every micro-batch", low=1)
    shard_optimizer: bool = setting(False,
        "each of several devices keeps its part of the optimizer's state instead of all (ZeRO-1)",
        needs=("--devices 2 or more", lambda c: c.devices > 1))

    warmup_steps: InitVar[int | None] = None

    def __post_init__(self, warmup_steps: int | None):
        if warmup_steps is not None:
            if self.warmup_iters not in (TrainConfig.warmup_iters, warmup_steps):
                raise ValueError(f"warmup_steps={warmup_steps}, but warmup_iters="
                                 f"{self.warmup_iters}, which is the same: choose one of them")
            object.__setattr__(self, "warmup_iters", warmup_steps)
        check(self)
        if 0 < self.skip_spikes < 1:
            raise ValueError(f"skip_spikes={self.skip_spikes} is out of range: choose 0 or a value "
                             "at least 1")
        if self.model == "bigram":
            for flag, given in (("grad_checkpoint", self.grad_checkpoint),
                                ("lora_rank", self.lora_rank),
                                ("init_from", self.init_from != "scratch")):
                if given:
                    raise ValueError("a bigram model is a table without blocks, made from scratch: "
                                     f"leave out --{flag}")
        if self.devices > 1:
            self._check_devices()
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: "
                             "choose a lower one")

    def _check_devices(self) -> None:
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size={self.batch_size} cannot be split among devices="
                             f"{self.devices}: choose a multiple of {self.devices}")
        if self.auto_batch_size:
            raise ValueError(f"--batch_size auto is for one device, not devices={self.devices}: "
                             "choose a number")
        if self.kernels in ("cpu", "flash"):
            raise ValueError(f"kernels={self.kernels!r} run on one device, not devices="
                             f"{self.devices}: choose auto, portable or reference")
        if self.shard_optimizer and self.optimizer == "adamw8bit":
            raise ValueError("the blocks of adamw8bit's state cannot be split among devices: "
                             "choose another optimizer, or leave out --shard_optimizer")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How text is sampled from a model."""

    max_new_tokens: int = setting(500, "tokens to write", low=0, section="sampling")
    temperature: float = setting(0.8,
        "divides the logits; below 1 plainer text, above 1 wilder, 0 the likeliest token", low=0)
    top_k: int | None = setting(None, "draw among the k likeliest", low=1)
    top_p: float | None = setting(None,
        "draw among the likeliest that together have probability p", above=0, high=1)
    min_p: float | None = setting(None,
        "draw among those at least p times as likely as the likeliest", low=0, high=1)
    repetition_penalty: float = setting(1.0,
        "above 1: makes tokens less likely that were used before", above=0)
    window_hop: int = setting(1,
        "tokens by which the window moves when the text outgrows it; more is faster and forgets "
        "sooner", low=1)
    seed: int = setting(1337, "same seed, same text", low=0)

    def __post_init__(self):
        check(self)


FINETUNE = "finetune_shakespeare"  # the recipe where --init_from is given and no other is named

# Flags of train.py under one name. The default run is the first.
PRESETS: dict[str, dict] = {
    "shakespeare": dict(
        block_size=64, vocab_size=1024, n_layer=4, n_head=4, n_embd=128, bias=False,
        position="rope", norm="rmsnorm", data="shakespeare", tokenizer="bpe", batch_size=8,
        optimizer="muon", learning_rate=8e-3, max_iters=3000, warmup_iters=100, eval_interval=300,
        eval_iters=40, beta2=0.99),
    # nanoGPT's config/train_shakespeare_char.py
    "shakespeare_char": dict(
        block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False,
        data="shakespeare", tokenizer="char", batch_size=64, learning_rate=1e-3, min_lr=1e-4,
        max_iters=5000, lr_decay_iters=5000, warmup_iters=100, beta1=0.9, beta2=0.99,
        weight_decay=0.1, grad_clip=1.0, eval_interval=250, eval_iters=200, log_interval=10),
    # and the variant for a CPU that its README gives
    "shakespeare_char_cpu": dict(
        block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False,
        data="shakespeare", tokenizer="char", batch_size=12, learning_rate=1e-3, min_lr=1e-4,
        max_iters=2000, lr_decay_iters=2000, warmup_iters=100, beta1=0.9, beta2=0.99,
        weight_decay=0.1, grad_clip=1.0, eval_interval=250, eval_iters=20, log_interval=1),
    "gpt2": dict(
        block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
        bias=True, activation="gelu_tanh", tokenizer="gpt2", batch_size=12,
        gradient_accumulation_steps=40, learning_rate=6e-4, min_lr=6e-5, max_iters=600000,
        lr_decay_iters=600000, warmup_iters=2000, beta1=0.9, beta2=0.95, weight_decay=0.1,
        grad_clip=1.0, eval_interval=1000, eval_iters=200, log_interval=10, dtype="bfloat16"),
    # nanoGPT's config/finetune_shakespeare.py, of the smallest model
    FINETUNE: dict(
        init_from="gpt2", data="shakespeare", tokenizer="gpt2", batch_size=1,
        gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, schedule="constant",
        warmup_iters=0, beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0, eval_interval=5,
        eval_iters=40, log_interval=1),
}
