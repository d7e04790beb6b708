"""What a run and a draw can be told, and the way from dataclass to flags to JSON and back.

A configuration is a frozen dataclass whose fields say what they mean; flags are made from those
fields. `--preset NAME` and `--config FILE` stand for the flags that they contain, at the place
where they are given, so that of two settings the later one wins.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import NoReturn

from simple_parsing import ArgumentParser


def check_range(config, name: str, low=None, high=None, above=None, below=None) -> None:
    """Raises ValueError where the field is not finite, outside the bounds or of another type; None
    is taken where its type has it."""
    value = getattr(config, name)
    wanted = next(f.type for f in fields(config) if f.name == name)
    if value is None and isinstance(None, wanted):
        return
    kind = Integral if wanted in (int, int | None) else Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is no number, or no whole one where it has to be")
    bounds = [(low, "at least", lambda v, b: v >= b), (high, "at most", lambda v, b: v <= b),
              (above, "above", lambda v, b: v > b), (below, "below", lambda v, b: v < b)]
    given = [(text, bound, holds) for bound, text, holds in bounds if bound is not None]
    if not math.isfinite(value) or not all(holds(value, bound) for _, bound, holds in given):
        wanted = " and ".join(f"{text} {bound}" for text, bound, _ in given)
        raise ValueError(f"{name}={value} is out of range: choose a value {wanted}")


def check_choice(config, name: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError where the field is none of the choices."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}={getattr(config, name)!r} is unknown: "
                         f"choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. The names are nanoGPT's where nanoGPT has one."""

    data: str = field(default="shakespeare", metadata={
        "help": "a text or .jsonl file, a folder or glob of them, a folder with train.bin and "
                "val.bin, or 'shakespeare'"})
    text_field: str = field(default="text", metadata={
        "help": "where the text is in each object of a .jsonl file"})
    tokenizer: str = field(default="bpe", metadata={
        "help": "bpe (trained on the data), gpt2, char or byte"})
    model: str = field(default="gpt", metadata={
        "help": "gpt, or bigram: a table of what follows each token, to compare with"})
    out_dir: str = field(default="checkpoints", metadata={"help": "where the run is saved"})
    init_from: str = field(default="scratch", metadata={
        "help": "weights to begin with: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder "
                "in Hugging Face's layout, or a .safetensors file; without a --preset, "
                "finetune_shakespeare is the recipe then"})
    offline: bool = field(default=False, metadata={
        "help": "take what --init_from names from the cache only"})
    freeze: str | None = field(default=None, metadata={
        "help": "weights that stay as they are: patterns of their names, comma-separated, such as "
                "'wte*,wpe*,h.[0-5].*'"})
    lora_rank: int = field(default=0, metadata={
        "help": "train low-rank adapters of that rank and nothing else (LoRA); 0: all weights"})
    lora_alpha: float = field(default=16.0, metadata={
        "help": "the adapters are multiplied by lora_alpha / lora_rank"})
    lora_targets: str = field(default="h.*.attn.c_attn", metadata={
        "help": "linear layers that get an adapter: patterns of their names, comma-separated"})
    resume: bool = field(default=False, metadata={
        "help": "continue the newest checkpoint in out_dir"})
    eval_only: bool = field(default=False, metadata={
        "help": "evaluate the best checkpoint in out_dir, or the newest where there is no best, "
                "and end; changes nothing there"})
    batch_size: int = field(default=12, metadata={
        "help": "sequences in a micro-batch; auto: what it would be, as --auto_batch_size"})
    auto_batch_size: bool = field(default=False, metadata={
        "help": "take the largest micro-batch that fits into memory, and as many as make up "
                "batch_size times gradient_accumulation_steps sequences"})
    gradient_accumulation_steps: int = field(default=1, metadata={
        "help": "micro-batches in a step"})
    grad_checkpoint: bool = field(default=False, metadata={
        "help": "keep only the inputs of the blocks and compute the rest again in the backward "
                "pass: slower, and memory for one block instead of all"})
    max_iters: int = field(default=2000, metadata={"help": "training steps"})
    max_minutes: float | None = field(default=None, metadata={
        "help": "stop after so many minutes as if max_iters were reached; the schedule is by "
                "steps all the same"})
    curriculum: bool = field(default=False, metadata={
        "help": "train on short contexts first: lengths that double up to block_size over the "
                "first half of the steps, with as many tokens a step"})
    curriculum_start_block_size: int = field(default=32, metadata={
        "help": "the first length of --curriculum: a half, a quarter, an eighth ... of block_size"})
    patience: int = field(default=0, metadata={
        "help": "stop after so many evaluations in a row without a new best; 0: never"})
    optimizer: str = field(default="adamw", metadata={
        "help": "adamw, lion, muon (AdamW but for the blocks' matrices) or adamw8bit"})
    learning_rate: float = field(default=1e-3, metadata={"help": "the highest learning rate"})
    decay_lr: bool = field(default=True, metadata={
        "help": "let the learning rate fall after the warm-up"})
    schedule: str = field(default="cosine", metadata={
        "help": "how the learning rate falls: cosine, linear, wsd (late and linear) or constant "
                "(not at all)"})
    decay_fraction: float = field(default=0.2, metadata={
        "help": "share of the steps, the last ones, in which wsd falls"})
    warmup_iters: int = field(default=100, metadata={
        "help": "steps over which the learning rate rises"})
    lr_decay_iters: int | None = field(default=None, metadata={
        "help": "step at which min_lr is reached; unset: max_iters"})
    min_lr: float | None = field(default=None, metadata={
        "help": "the lowest learning rate; unset: a tenth of learning_rate"})
    weight_decay: float = field(default=0.1, metadata={"help": "of matrices, not of vectors"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW's decay of the first moment"})
    beta2: float = field(default=0.99, metadata={"help": "AdamW's decay of the second moment"})
    ema: bool = field(default=False, metadata={
        "help": "keep a moving average of the weights too, and evaluate and sample from it"})
    ema_decay: float = field(default=0.999, metadata={
        "help": "share of the average that a step keeps; less in the first steps"})
    grad_clip: float = field(default=1.0, metadata={
        "help": "largest norm of the gradient; 0: unlimited"})
    skip_spikes: float = field(default=0.0, metadata={
        "help": "skip a step whose gradient's norm is above so many times the median of the "
                "last 100; 0: never"})
    label_smoothing: float = field(default=0.0, metadata={
        "help": "share of the target spread over the vocabulary"})
    z_loss: float = field(default=0.0, metadata={
        "help": "weight of log(Z)^2 in the loss, which keeps logits small"})
    dtype: str = field(default="float32", metadata={
        "help": "of activations: float32, bfloat16, or float16, with the loss scaled so that "
                "gradients do not underflow; weights are kept in float32"})
    eval_interval: int = field(default=250, metadata={
        "help": "steps between evaluations, each of which saves a checkpoint"})
    eval_iters: int = field(default=20, metadata={"help": "batches in an evaluation of a split"})
    log_interval: int = field(default=10, metadata={"help": "steps between log lines"})
    sample_interval: int = field(default=0, metadata={
        "help": "steps between samples; 0: only at the end"})
    tensorboard: bool = field(default=False, metadata={
        "help": "log to TensorBoard too, in out_dir/tensorboard; needs tensorboardX"})
    wandb: bool = field(default=False, metadata={
        "help": "log to Weights & Biases too; needs wandb"})
    keep: int = field(default=2, metadata={"help": "newest checkpoints to keep beside the best"})
    seed: int = field(default=1337, metadata={
        "help": "of weights, batches, dropout and samples"})
    device: str = field(default="auto", metadata={
        "help": "auto, cpu, cuda, metal, or what else tinygrad knows"})
    devices: int = field(default=1, metadata={
        "help": "so many devices of that kind, cuda:0, cuda:1, ..., each with the weights and its "
                "part of every micro-batch"})
    shard_optimizer: bool = field(default=False, metadata={
        "help": "each of several devices keeps its part of the optimizer's state instead of all "
                "(ZeRO-1)"})
    kernels: str = field(default="auto", metadata={
        "help": "implementation of the operations: auto, cpu, portable, reference, or flash: "
                "attention in kernels for GPUs, all else automatic"})
    threads: int | None = field(default=None, metadata={
        "help": "threads of the CPU kernels; unset: one for each CPU of this process"})

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval",
                     "eval_iters", "log_interval", "keep", "lr_decay_iters",
                     "curriculum_start_block_size"):
            check_range(self, name, low=1)
        for name in ("warmup_iters", "sample_interval", "seed", "weight_decay", "grad_clip",
                     "z_loss", "min_lr", "patience"):
            check_range(self, name, low=0)
        check_range(self, "learning_rate", above=0)
        check_range(self, "lora_rank", low=0)
        check_range(self, "lora_alpha", above=0)
        check_range(self, "max_minutes", above=0)
        if self.skip_spikes:
            check_range(self, "skip_spikes", low=1)
        check_range(self, "decay_fraction", above=0, high=1)
        for name in ("beta1", "beta2", "ema_decay", "label_smoothing"):
            check_range(self, name, low=0, below=1)
        check_choice(self, "tokenizer", ("bpe", "gpt2", "char", "byte"))
        check_choice(self, "model", ("gpt", "bigram"))
        if self.model == "bigram":
            for flag, given in (("grad_checkpoint", self.grad_checkpoint),
                                ("lora_rank", self.lora_rank),
                                ("init_from", self.init_from != "scratch")):
                if given:
                    raise ValueError("a bigram model is a table without blocks, made from scratch: "
                                     f"leave out --{flag}")
        check_choice(self, "optimizer", ("adamw", "lion", "muon", "adamw8bit"))
        check_choice(self, "schedule", ("cosine", "linear", "wsd", "constant"))
        check_choice(self, "dtype", ("float32", "bfloat16", "float16"))
        check_choice(self, "kernels", ("auto", "cpu", "portable", "reference", "flash"))
        check_range(self, "threads", low=1, high=64)
        check_range(self, "devices", low=1)
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
    """How text is drawn from a model."""

    max_new_tokens: int = field(default=500, metadata={"help": "tokens to write"})
    temperature: float = field(default=0.8, metadata={
        "help": "divides the logits; below 1 plainer text, above 1 wilder, 0 the likeliest token"})
    top_k: int | None = field(default=None, metadata={"help": "draw among the k likeliest"})
    top_p: float | None = field(default=None, metadata={
        "help": "draw among the likeliest that together have probability p"})
    min_p: float | None = field(default=None, metadata={
        "help": "draw among those at least p times as likely as the likeliest"})
    repetition_penalty: float = field(default=1.0, metadata={
        "help": "above 1: makes tokens less likely that were used before"})
    window_hop: int = field(default=1, metadata={
        "help": "tokens by which the window moves when the text outgrows it; more is faster and "
                "forgets sooner"})
    seed: int = field(default=1337, metadata={"help": "same seed, same text"})

    def __post_init__(self):
        for name in ("max_new_tokens", "temperature", "seed"):
            check_range(self, name, low=0)
        check_range(self, "top_k", low=1)
        check_range(self, "window_hop", low=1)
        check_range(self, "top_p", above=0, high=1)
        check_range(self, "min_p", low=0, high=1)
        check_range(self, "repetition_penalty", above=0)


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
        gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, decay_lr=False,
        warmup_iters=0, beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0, eval_interval=5,
        eval_iters=40, log_interval=1),
}


class Parser(ArgumentParser):
    """Flags from dataclasses. A mistake gets one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def parse_flags(classes: dict[str, type], argv: list[str], description: str,
                presets: dict[str, dict] | None = None) -> dict[str, object]:
    """Reads argv into one instance of each dataclass, by its key.

    Every flag can be written with `-` or `_`. With presets, --preset and --config are flags too,
    and the first preset holds where no other is named. Prints one line and exits with status 2 on
    a flag that does not exist or does not parse; raises ValueError on a value out of range.
    """
    parser = Parser(description=description, allow_abbrev=False, add_config_path_arg=False)
    if presets:
        parser.add_argument("--preset", metavar="NAME", default=next(iter(presets)),
                            help=f"a recipe: {', '.join(presets)}")
        parser.add_argument("--config", metavar="FILE", help="settings from a JSON file, such as "
                            "the config.json that a run leaves beside its checkpoints")
    flags, base = [_underscored(word) for word in argv], {}
    if presets:
        known = {f.name for cls in classes.values() for f in fields(cls)}
        named = {word.split("=")[0] for word in flags}
        if "--preset" not in named:
            base = next(iter(presets.values()))
            if "--init_from" in named and FINETUNE in presets:
                base = presets[FINETUNE]
        flags = _expand(flags, presets, known)
    for name, cls in classes.items():
        own = {f.name: base[f.name] for f in fields(cls) if f.name in base}
        parser.add_arguments(cls, dest=name, default=cls(**own) if own else None)
    return vars(parser.parse_args(flags))


def given(cls: type, argv: list[str], presets: dict[str, dict]) -> list[str]:
    """The fields of a dataclass that argv sets, itself or through a --preset or a --config."""
    words = _expand([_underscored(word) for word in argv], presets, None)
    names = {word.split("=")[0].removeprefix("--") for word in words}
    return [f.name for f in fields(cls) if f.name in names]


def _underscored(word: str) -> str:
    """A flag with every dash of its name as an underscore; anything else as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _expand(flags: list[str], presets: dict[str, dict], known: set[str] | None) -> list[str]:
    """Puts in place of every --preset and --config the flags that it stands for."""
    result, words = [], iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--preset", "--config"):
            result.append(word)
            continue
        value = value if equals else next(words, "")
        if name == "--config":
            result += _as_flags(_read_json(value, known))
        elif value in presets:
            result += _as_flags(presets[value])
        else:
            raise ValueError(f"there is no preset {value!r}: choose one of {', '.join(presets)}")
    return result


def _as_flags(settings: dict) -> list[str]:
    # a flag without a value sets an optional field to None
    return [f"--{k}" if v is None else f"--{k}={v}" for k, v in settings.items()]


def _read_json(path: str, known: set[str] | None) -> dict:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: cannot be read as JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: is no JSON object of settings")
    if unknown := sorted(set(settings) - (known or set(settings))):
        raise ValueError(f"--config {path}: there is no setting {unknown[0]!r}")
    return settings


def to_json(*configs) -> str:
    """Dataclasses as one flat JSON object, which `--config` reads back."""
    merged = {k: v for config in configs for k, v in asdict(config).items()}
    return json.dumps(merged, indent=2) + "\n"
