"""The commands and the configurations that their flags come from."""

from generate import GenerateConfig
from gpt import GPTConfig
from tinygpt.check import CheckConfig
from tinygpt.config import SampleConfig
from tinygpt.evaluate import EvaluateConfig
from tinygpt.training.config import TrainConfig

COMMANDS = {"train": {"model": GPTConfig, "train": TrainConfig},
            "generate": {"generate": GenerateConfig, "sample": SampleConfig},
            "evaluate": {"evaluate": EvaluateConfig}, "check": {"check": CheckConfig}}
