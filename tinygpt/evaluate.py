"""Evaluates a model: `python -m tinygpt.evaluate CHECKPOINT TEXT`.

Prints loss, perplexity and bits per byte of TEXT, of a file of its token ids, or of the answers in
a .jsonl file of conversations; with --task
hellaswag (arXiv:1905.07830) or lambada (arXiv:1606.06031) TEXT is the published .jsonl file of that
test. A command, as train.py and generate.py are: nothing in tinygpt imports it.
"""

import os
import signal
import sys

# Ctrl-C while modules are loaded; main() answers it better
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import math
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from tinygpt import command, device
from tinygpt.config import LoadConfig, check, setting
from tinygpt.data.conversations import (
    are_conversations,
    encode_conversations,
    read_conversations,
)
from tinygpt.data.documents import check_readable, is_jsonl, read_documents, read_text
from tinygpt.data.load import is_token_file, read_tokens
from tinygpt.data.packing import Encoded
from tinygpt.data.token_data import mean_bytes
from tinygpt.data.token_files import Ids, chunks
from tinygpt.data.tokenizer import begin_of_text
from tinygpt.flags import parse_flags
from tinygpt.huggingface.pretrained import tokenizer_needed
from tinygpt.kernels.jit import compiled
from tinygpt.model.language_model import LanguageModel
from tinygpt.training.report import bits_per_byte

TASKS = ("text", "hellaswag", "lambada")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadConfig):
    """The settings of an evaluation."""

    checkpoint: str = setting(MISSING,
        "a .safetensors file, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in Hugging "
        "Face's layout", positional="required", section="model")
    text: str = setting(MISSING,
        "a UTF-8 text; a .jsonl file of texts, or of conversations, of which the assistant's words "
        "are scored; a file of token ids, .bin, or a folder with val.bin; or the .jsonl file of "
        "the task", positional="required", section="evaluation")
    task: str = setting("text", "what the text is", choices=TASKS)
    stride: int | None = setting(None,
        "tokens by which the window moves over a text: fewer give each token more context and take "
        "longer; unset: half of block_size", low=1)
    limit: int | None = setting(None, "number of questions of a task; unset: all", low=1)

    def __post_init__(self):
        check(self)
        if self.task == "text" and self.limit is not None:
            raise ValueError("limit is a number of questions: leave it out, or choose a --task")
        if self.task != "text" and self.stride is not None:
            raise ValueError(f"stride has no effect on --task {self.task}: leave it out")


def encode(model: LanguageModel, text: str) -> list[int]:
    """The ids of a text from its beginning."""
    return begin_of_text(model.tokenizer) + model.tokenizer.encode(text)


class Scorer:
    """Scores texts with a model, in one compiled step of block_size tokens."""

    def __init__(self, model: LanguageModel):
        self.model, self.block_size = model, model.config.block_size
        self.x, self.y = (Tensor.zeros(1, self.block_size, dtype="int32").contiguous().realize()
                          for _ in "xy")
        self.step = compiled(self._step)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        """(2, T): the loss of each target in nats, and whether it was the likeliest token."""
        logits = self.model(x).float()[0]  # (T, V)
        nats = -logits.log_softmax(-1).gather(-1, y.reshape(-1, 1))[:, 0]
        return Tensor.stack(nats, (logits.argmax(-1) == y[0]).float()).realize()

    def window(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nats and hits (n - 1,) of ids (n,) after the first, n <= block_size + 1."""
        n = len(ids) - 1
        padded = np.zeros(self.block_size + 1, np.int32)
        padded[:n + 1] = ids
        device.write(self.x, padded[:-1])
        device.write(self.y, padded[1:])
        nats, hits = device.read(self.step(self.x, self.y))[:, :n]
        return nats, hits > 0.5

    def text(self, ids: Ids, stride: int) -> np.ndarray:
        """Nats (n - 1,) of ids (n,) after the first. The window moves by stride; after the first
        window only its new tokens are scored, so that each has block_size - stride as context.
        """
        found, done = [], 0  # how many targets are scored
        while done < len(ids) - 1:
            end = min(len(ids) - 1, done + stride if done else self.block_size)
            nats, _ = self.window(ids[max(0, end - self.block_size):end + 1])
            found.append(nats[len(nats) - (end - done):])
            done = end
        return np.concatenate(found)

    def ending(self, context: list[int], ending: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Nats and hits of the ending's tokens after as much of the context as fits."""
        ids = np.array((context + ending)[-(self.block_size + 1):])
        nats, hits = self.window(ids)
        return nats[-len(ending):], hits[-len(ending):]


def score_text(model: LanguageModel, text: str | Ids,
               stride: int | None = None) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte and the tokens of a text or of its ids (n,).

    The first token, which has no context, is not scored, nor are its bytes. Without a tokenizer
    there is no bits_per_byte. Raises ValueError on fewer than two tokens, on ids outside
    the vocabulary, or on a stride above block_size.
    """
    stride = _stride(model, stride)
    ids = np.array(encode(model, text)) if isinstance(text, str) else text
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: give two or more")
    _check_vocabulary(model, ids)
    each = model.tokenizer and mean_bytes(ids, model.tokenizer, "the text", skip=1)
    return _scores(Scorer(model).text(ids, stride), each)


def score_conversations(model: LanguageModel, conversations: Encoded,
                        stride: int | None = None) -> dict[str, float]:
    """The same of what the assistant says in conversations, each read from its beginning."""
    stride = _stride(model, stride)
    _check_vocabulary(model, conversations.ids)
    scorer, nats = Scorer(model), [np.zeros(0)]
    for ids, targets in conversations:
        if (learned := targets[1:] >= 0).any():
            nats.append(scorer.text(ids, stride)[learned])
    if not sum(map(len, nats)):
        raise ValueError("the assistant says nothing in these conversations: give others")
    said = conversations.ids[conversations.mask]
    return _scores(np.concatenate(nats), mean_bytes(said, model.tokenizer, "the conversations"))


def _stride(model: LanguageModel, stride: int | None) -> int:
    block = model.config.block_size
    stride = max(1, block // 2) if stride is None else stride
    if stride > block:
        raise ValueError(f"stride={stride} is above block_size={block}: choose a smaller one")
    return stride


def _check_vocabulary(model: LanguageModel, ids: Ids) -> None:
    if (largest := max(part.max() for part in chunks(ids))) >= model.config.vocab_size:
        raise ValueError(f"the text has token id {largest}, outside the model's vocabulary of "
                         f"{model.config.vocab_size}: is it another tokenizer's?")


def _scores(nats: np.ndarray, bytes_each: float | None) -> dict[str, float]:
    loss = float(nats.astype(np.float64).mean())
    bits = {"bits_per_byte": bits_per_byte(loss, bytes_each)} if bytes_each else {}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), **bits, "tokens": len(nats)}


def score_hellaswag(model: LanguageModel, questions: list[dict]) -> dict[str, float]:
    """Share of questions whose right ending has the lowest loss: accuracy by the sum of its tokens,
    accuracy_norm by their mean.

    A question has ctx, endings and label, the number of the right one.
    """
    scorer, right = Scorer(model), np.zeros(2)
    for question in questions:
        context = encode(model, question["ctx"])
        costs = [scorer.ending(context, model.tokenizer.encode(f" {ending}"))[0]
                 for ending in question["endings"]]
        right += [np.argmin([c.sum() for c in costs]) == int(question["label"]),
                  np.argmin([c.mean() for c in costs]) == int(question["label"])]
    accuracy, normalized = right / len(questions)
    return {"accuracy": accuracy, "accuracy_norm": normalized, "questions": len(questions)}


def score_lambada(model: LanguageModel, questions: list[dict]) -> dict[str, float]:
    """Share of the texts whose last word is the likeliest, and its perplexity.

    A question has a text; the last word follows its last space.
    """
    scorer, right, total = Scorer(model), 0, 0.0
    for question in questions:
        context, _, word = question["text"].rstrip().rpartition(" ")
        nats, hits = scorer.ending(encode(model, context),
                                   model.tokenizer.encode(f" {word}"))
        right, total = right + bool(hits.all()), total + float(nats.sum())
    count = len(questions)
    return {"accuracy": right / count, "perplexity": math.exp(min(total / count, 700)),
            "questions": count}


def read_questions(path: str, task: str) -> list[dict]:
    """The questions of a task's .jsonl file. Raises ValueError that names a line with another."""
    found = []
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            wrong = _what_is_wrong(question, task)
        except (ValueError, RecursionError):
            wrong = "it is not JSON"
        if wrong is not None:
            raise ValueError(f"{path}:{number} is not a question of {task} ({wrong}): give its "
                             "published .jsonl")
        found.append(question)
    if not found:
        raise ValueError(f"{path} has no questions of {task}: give its published .jsonl")
    return found


def _what_is_wrong(question, task: str) -> str | None:
    """Why a JSON value is not a question of a task, or None."""
    if not isinstance(question, dict):
        return "it is not a JSON object"
    if task == "lambada":
        if not _is_text(text := question.get("text")) or " " not in text.strip():
            return "its text is not a string of two or more words"
        return None
    if not _is_text(question.get("ctx")):
        return "its ctx is not a string of text"
    endings, label = question.get("endings"), question.get("label")
    if not isinstance(endings, list) or len(endings) < 2 or not all(map(_is_text, endings)):
        return "its endings are not a list of two or more strings"
    is_digits = isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10
    if type(label) is not int and not is_digits:
        return "its label is not a whole number"
    if not 0 <= int(label) < len(endings):
        return f"its label {label} is not the number of an ending, 0 to {len(endings) - 1}"
    return None


def _is_text(value) -> bool:
    """Whether a JSON value is a string that is not empty and has no half of a surrogate pair."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= c <= "\udfff"
                                                              for c in value)


def run(config: EvaluateConfig) -> dict[str, float]:
    """The scores of config.checkpoint on config.text."""
    path = Path(config.text)
    if not is_token_file(path):
        check_readable(path)  # before the model is loaded, which may take long
    command.use_machine(config)
    has_ids = config.task == "text" and is_token_file(path)
    with tokenizer_needed(not has_ids):
        model = command.load_model(config.checkpoint, config.ema, config.offline,
                                   block_size=config.block_size, as_stored=True)
    if has_ids:
        return score_text(model, read_tokens(path, model.tokenizer), config.stride)
    if model.tokenizer is None:
        raise ValueError(f"{config.checkpoint} has no tokenizer that can be read here: give a file "
                         "of token ids, .bin")
    if config.task == "text" and are_conversations([path], "text"):
        pairs = encode_conversations(read_conversations([path]), model.tokenizer)
        return score_conversations(model, Encoded.of(pairs), config.stride)
    if config.task == "text":
        text = "\n".join(read_documents([path], "text")) if is_jsonl(path) else read_text(path)
        return score_text(model, text, config.stride)
    questions = read_questions(config.text, config.task)[:config.limit]
    score = {"hellaswag": score_hellaswag, "lambada": score_lambada}[config.task]
    return score(model, questions)


def main(argv: list[str] | None = None) -> int:
    command.prepare()
    try:
        flags = parse_flags({"evaluate": EvaluateConfig}, sys.argv[1:] if argv is None else argv,
                            __doc__)
        for name, value in run(flags["evaluate"]).items():
            print(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}")
        sys.stdout.flush()
    except command.FAILURES as error:
        return command.report("evaluate", error, "give a smaller model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
