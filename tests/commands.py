"""The commands, the configurations that their flags come from, and what flags of train.py give."""

from dataclasses import asdict

from generate import GenerateConfig
from gpt import GPTConfig
from tinygpt.check import CheckConfig
from tinygpt.config import SampleConfig
from tinygpt.evaluate import EvaluateConfig
from tinygpt.flags import parse_flags
from tinygpt.training.config import PRESETS, TrainConfig

COMMANDS = {"train": {"model": GPTConfig, "train": TrainConfig},
            "generate": {"generate": GenerateConfig, "sample": SampleConfig},
            "evaluate": {"evaluate": EvaluateConfig}, "check": {"check": CheckConfig}}


def parse(*argv: str) -> tuple[GPTConfig, TrainConfig]:
    """The configurations of train.py with these flags."""
    found = parse_flags(COMMANDS["train"], [str(word) for word in argv], "text", PRESETS)
    return found["model"], found["train"]


def settings(*argv: str) -> dict:
    return {k: v for config in parse(*argv) for k, v in asdict(config).items()}
