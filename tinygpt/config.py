"""How settings are declared and checked, and the settings that several commands share.

A configuration is a frozen dataclass. `setting` declares a field with its default, its help and the
values that it takes; the check, the flag and its place in --help follow from that (see flags.py).
"""

import difflib
import math
import operator
import os
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import get_args

from tinygpt.kernels import IMPLEMENTATIONS

LARGEST = 2 ** 64  # whole numbers are below it, as those of numpy are
RULES = {"low", "high", "above", "below", "choices", "empty", "auto", "needs", "fixed", "section",
         "positional"}


def setting(default, text: str, **rules):
    """A dataclass field whose metadata holds its help text and its rules:

    low, high, above, below    bounds of a number
    choices                    the strings that are allowed
    empty                      whether an empty string is allowed
    auto                       the switch that "auto" stands for on the command line
    needs                      (words, function of the configuration): if the function is false, the
                               setting has no effect, and a flag that sets it is refused
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
        wanted = "whole number" if kind is int else "number"
        raise ValueError(f"{f.name}={value!r} is not a {wanted}: choose one")
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
        raise ValueError(f"{f.name}={value!r} is not text: choose a string")
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{f.name}={value!r} is unknown: choose one of {', '.join(choices)}"
                         f"{did_you_mean(value, choices)}")
    if not value and not f.metadata.get("empty"):
        raise ValueError(f"{f.name}={value!r} is empty: choose another, or leave it out")
    if "\0" in value:
        raise ValueError(f"{f.name}={value!r} contains a zero byte: choose a text without one")
    try:
        value.encode("utf-8", "surrogateescape")  # as the names of files are encoded
    except UnicodeEncodeError as error:
        raise ValueError(f"{f.name}={value!r} contains half of a surrogate pair, which neither "
                         "text nor a file name can have: choose a text without one") from error
    return value


def _check_texts(f: Field, value) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{f.name}={value!r} is not a list: choose a list of strings")
    return tuple(_check_text(f, text) for text in value)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown word: "; did you mean ...?", or "" if none is close."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7)
    return f"; did you mean {prefix}{by_lower[close[0]]}?" if close else ""


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

    ema: bool = setting(True,
        "take the moving average of the weights, which a run with --ema evaluates, if there is one",
        section="model")
    block_size: int | None = setting(None,
        "context length of a pretrained model in tokens, at most its own; unset: its own", low=1)


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
    window_hop: int | None = setting(None,
        "tokens by which the window moves when the text outgrows block_size; unset: half of it; "
        "fewer are slower", low=1)
    seed: int = setting(1337, "same seed, same text", low=0)

    def __post_init__(self):
        check(self)
