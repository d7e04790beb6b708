"""What a run needs, checked before it changes anything: processes, vocabulary, memory, weights."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from tinygrad import dtypes

from tinygpt import checkpoint, device
from tinygpt.data.token_data import TokenData
from tinygpt.model import lora
from tinygpt.model.language_model import LanguageModel
from tinygpt.safetensors_file import BAD_VALUES
from tinygpt.training.config import TrainConfig
from tinygpt.training.optim import OPTIMIZERS
from tinygpt.training.ranks import Ranks


def check_ranks(model: LanguageModel, config: TrainConfig, data: TokenData, ranks: Ranks) -> None:
    """Raises ValueError where the processes cannot share a step, or differ in settings or data."""
    rows, _ = ranks.split(config.batch_size, config.gradient_accumulation_steps)
    if rows % config.devices:
        raise ValueError(f"the {rows} sequences of a micro-batch in each of {ranks.size} processes "
                         f"cannot be split among devices={config.devices}: choose a larger "
                         "batch_size, or fewer processes")
    ranks.check_same(**asdict(model.config), **{
        k: v for k, v in asdict(config).items() if k not in ("device", "threads")},
        training_data=data.fingerprint)


def check_vocabulary(model: LanguageModel, data: TokenData) -> None:
    """Raises ValueError where the tokenizer has more ids than the model."""
    tokenizer, size = data.tokenizer, model.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model "
                         f"vocab_size={size}: give it at least as many")


def check_curriculum(config: TrainConfig) -> None:
    """Raises ValueError where a curriculum would cut rows of several conversations."""
    if config.curriculum:
        raise ValueError("--curriculum cuts rows, and so the conversations in them: leave it out")


def check_memory(model: LanguageModel, config: TrainConfig) -> None:
    """Raises ValueError where training does not fit whatever the batch size is, or a micro-batch
    does not fit whatever the model computes with it."""
    shape, params = model.config, lora.trainable(model.state_dict(), config.freeze)
    trained = sum(p.numel() for p in params.values()) / config.devices
    needed = 4 * (model.num_params() * (2 if config.ema else 1)
                  + trained * (1 + OPTIMIZERS[config.optimizer].state_size))
    device.check_memory(int(needed), "the weights, their gradients and the optimizer's state",
                        "make the model smaller (--n_layer, --n_embd, --vocab_size), or take "
                        "--optimizer adamw8bit or --lora_rank")
    width = getattr(shape, "n_embd", shape.vocab_size)  # of a layer's output
    device.check_memory(4 * config.batch_size * shape.block_size * width // config.devices,
                        "the activations of one layer",
                        "choose a smaller --batch_size or --block_size")
    device.check_memory(8 * config.eval_iters, f"the losses of eval_iters={config.eval_iters} "
                        "batches", "choose a smaller --eval_iters")


def check_float32(model: LanguageModel) -> None:
    """Raises ValueError that names a weight which is not float32, as from_pretrained makes with
    as_stored."""
    for name, weight in model.state_dict().items():
        if weight.dtype != dtypes.float32:
            raise ValueError(f"the model's {name} is {weight.dtype.name}, which is not trained: "
                             "load it without as_stored")


def check_finite(model: LanguageModel) -> None:
    """Raises ValueError that names a weight with NaN or infinite values."""
    for name, weight in model.state_dict().items():
        if not np.isfinite(weight.numpy()).all():
            raise ValueError(f"the model's {name} {BAD_VALUES} before the first step: start from "
                             "other weights; a run that made these needs a lower --learning_rate")


def check_resumable(path: Path, header: dict, config: TrainConfig, data: TokenData) -> None:
    """Raises ValueError where a run with that config and data cannot continue the checkpoint at
    path, which has that metadata."""
    if header.get("tokenizer") != (data.tokenizer and data.tokenizer.to_json()):
        raise ValueError(f"{path} was trained with another tokenizer than the data has now: "
                         "use the same --data and --tokenizer, or start a new run")
    if (theirs := header.get("train_config")) is not None:  # None: saved by a user's script
        ours, names = asdict(config), ["lora_rank"]
        if config.lora_rank:
            names += ["lora_alpha", "lora_targets"]
        if not config.eval_only:  # the optimizer's state belongs to the weights that were trained
            names += ["freeze"]
        checkpoint.check_same(path, theirs, {k: ours[k] for k in names if k in theirs})
    if not config.eval_only:
        data.check_same(path, header.get("data"))
