"""Reads .jsonl files with a conversation in each line: {"messages": [{"role": ..., "content": ...},
...]}."""

from pathlib import Path

import numpy as np

from tinygpt.data import DataError
from tinygpt.data.chat import chat_template_of, check_messages, plain_text
from tinygpt.data.documents import UTF8_BOM, is_jsonl, open_file, parse_json, read_text
from tinygpt.data.packing import Encoded, PackedBatches
from tinygpt.data.token_data import SamplePrompt, TokenData, mean_bytes
from tinygpt.data.token_files import digest
from tinygpt.data.tokenizer import Tokenizer, make_tokenizer

SAMPLES = 3  # questions that a sample during training answers
Messages = list[dict]


class ChatData(TokenData):
    """Conversations of a training and a validation split; of their ids the assistant's are learned.

    prompts: the conversations of the validation split, up to the first message of the user.
    """

    def __init__(self, splits: tuple[Encoded, Encoded], prompts: list[Messages],
                 tokenizer: Tokenizer, source: str):
        self.splits, self.prompts = splits, prompts
        train, val = (split.ids for split in splits)
        hashes = [digest(array) for split in splits
                  for array in (split.ids, split.mask.astype(np.uint8), split.ends)]
        super().__init__(train, val, tokenizer, source, fingerprint="-".join(hashes))

    def batches(self, block_size: int, batch_size: int, seed: int
                ) -> tuple[PackedBatches, PackedBatches]:
        return tuple(PackedBatches(split, block_size, batch_size, seed) for split in self.splits)

    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes per token of the validation split's answers; what ends one has none."""
        val = self.splits[1]
        return mean_bytes(val.ids[val.mask], self.tokenizer, self.source)

    def sample_prompts(self) -> list[SamplePrompt]:
        """Questions of the validation split."""
        template = chat_template_of(self.tokenizer)
        return [SamplePrompt(template.encode(messages, reply=True),
                             f"{messages[-1]['content']}\n-> ", template.stop_ids)
                for messages in self.prompts[:SAMPLES]]


def are_conversations(files: list[Path], text_field: str) -> bool:
    """Whether the first line of the first file has messages, and no text at text_field."""
    if not is_jsonl(files[0]):
        return False
    with open_file(files[0]) as file:
        line = next((line for line in file if line.strip()), b"")
    try:
        first = parse_json(line.removeprefix(UTF8_BOM))
    except ValueError:
        return False
    return isinstance(first, dict) and "messages" in first and text_field not in first


def load_conversations(files: list[Path], source: str, tokenizer: str | Tokenizer,
                       vocab_size: int) -> ChatData:
    """The conversations of files, the last 10% of which are for validation.

    tokenizer: a tokenizer, or the kind of tokenizer to make, which learns from the conversations as
    plain text. Raises DataError that names the line of one that cannot be used.
    """
    lines = read_conversations(files)
    if len(lines) < 2:
        raise DataError(f"{source} has {len(lines)} conversations: give two or more, of which the "
                        "last tenth is for validation")
    cut = min(len(lines) - 1, int(len(lines) * 0.9))
    if isinstance(tokenizer, str):
        # characters have to cover everything; merges are learned from the training split
        learned = lines if tokenizer == "char" else lines[:cut]
        corpus = "".join(plain_text(messages) for _, messages in learned)
        tokenizer = make_tokenizer(tokenizer, corpus, vocab_size)
    pairs = encode_conversations(lines, tokenizer)
    prompts = [messages[:first + 1] for _, messages in lines[cut:]
               for first in [next((i for i, m in enumerate(messages) if m["role"] == "user"), None)]
               if first is not None]
    return ChatData((Encoded.of(pairs[:cut]), Encoded.of(pairs[cut:])), prompts, tokenizer, source)


def read_conversations(files: list[Path]) -> list[tuple[str, Messages]]:
    """The conversation in each line of files, and where it stands. Raises DataError."""
    found = []
    for path in files:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                found.append((where, _messages(where, line)))
    return found


def encode_conversations(lines: list[tuple[str, Messages]], tokenizer: Tokenizer
                         ) -> list[tuple[list[int], list[bool]]]:
    """Ids and mask of each conversation, by the tokenizer's template. Raises DataError."""
    template, pairs = chat_template_of(tokenizer), []
    for where, messages in lines:
        try:
            pairs.append(template.encode_with_mask(messages))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
    return pairs


def _messages(where: str, line: str) -> Messages:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}: write an object with \"messages\" in each line"
                        ) from error
    if not isinstance(value, dict) or "messages" not in value:
        raise DataError(f"{where}: no messages: write an object with \"messages\" in each line")
    try:
        check_messages(value["messages"])
        "".join(m["content"] for m in value["messages"]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair, {error.object[error.start]!a}, in a "
                        "message: remove it") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    return value["messages"]
