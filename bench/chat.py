"""A model that answers: trains the default model on the play, fine-tunes it on generated questions,
and counts the right answers to other questions before and after:

    python bench/chat.py [--checkpoint FILE] [--out FOLDER] [flags of train.py]

The questions ask for the number after another, and to spell or to reverse a word of three letters.
"""

import argparse
import csv
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpt import GPT
from tinygpt.data.chat import chat_template_of
from tinygpt.data.load import SHIPPED

ROOT = Path(__file__).parent.parent
TRAINING, HELD_OUT = 3000, 400  # questions, those of the validation split among the first
BATCH = 50  # questions that are answered at once
LONGEST = 24  # tokens of an answer
FINE_TUNING = ["--preset", "chat"]


def word(rng: np.random.Generator) -> str:
    """A consonant, a vowel and a consonant."""
    consonants, vowels = "bdfghjklmnprstvwz", "aeiou"
    return "".join(letters[rng.integers(len(letters))]
                   for letters in (consonants, vowels, consonants))


def counting(rng: np.random.Generator) -> tuple[str, str]:
    number = rng.integers(10, 1000)
    return f"What comes after {number}?", str(number + 1)


def spelling(rng: np.random.Generator) -> tuple[str, str]:
    chosen = word(rng)
    return f"Spell {chosen}.", " ".join(chosen)


def reversal(rng: np.random.Generator) -> tuple[str, str]:
    chosen = word(rng)
    return f"Reverse {chosen}.", chosen[::-1]


KINDS: tuple[Callable, ...] = (counting, spelling, reversal)  # as many of each


def questions(count: int, seed: int = 1) -> list[tuple[str, str, str]]:
    """Kind, question and answer of `count` different questions."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        kind = KINDS[rng.integers(len(KINDS))]
        question, answer = kind(rng)
        found[question] = kind.__name__, question, answer
    return list(found.values())


def write(path: Path, pairs: list[tuple[str, str, str]]) -> None:
    lines = [json.dumps({"messages": [{"role": "user", "content": question},
                                      {"role": "assistant", "content": answer}]})
             for _, question, answer in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def right_answers(model: GPT, asked: list[tuple[str, str, str]]) -> dict[str, float]:
    """The share of questions of each kind that the likeliest tokens answer exactly."""
    template = chat_template_of(model.tokenizer)
    prompts = [template.encode([{"role": "user", "content": question}], reply=True)
               for _, question, _ in asked]
    right: dict[str, list[bool]] = {kind.__name__: [] for kind in KINDS}
    for at in range(0, len(asked), BATCH):
        rows = model.generate(prompts[at:at + BATCH], LONGEST, temperature=0)
        rows = rows if isinstance(rows, list) else rows.tolist()
        for (kind, _, answer), prompt, row in zip(asked[at:at + BATCH], prompts[at:], rows,
                                                  strict=False):
            ids = takewhile(lambda i: i not in template.stop_ids, row[len(prompt):])
            right[kind].append(model.tokenizer.decode(list(ids)) == answer)
    return {kind: float(np.mean(found)) for kind, found in right.items()} | {
        "all": float(np.mean(np.concatenate(list(right.values()))))}


def train(*flags: str) -> float:
    """Runs train.py; how many seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)
    return time.perf_counter() - start


def record(row: dict) -> None:
    path = ROOT / "bench/chat.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="instead of a new default model")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/chat"))
    options, flags = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    base, chats = options.checkpoint, options.out / "questions.jsonl"
    if base is None:
        train("--data", str(SHIPPED), "--out_dir", str(options.out / "base"))
        base = options.out / "base/best.safetensors"
    pairs = questions(TRAINING + HELD_OUT)
    write(chats, pairs[:TRAINING])
    tuned = options.out / "tuned"
    seconds = train("--init_from", str(base), "--data", str(chats), "--out_dir", str(tuned),
                    *FINE_TUNING, *flags)
    for name, path in (("before", base), ("after", tuned / "best.safetensors")):
        found = right_answers(GPT.from_pretrained(path), pairs[TRAINING:])
        shares = {kind: f"{share:.3f}" for kind, share in found.items()}
        print(name, shares)
        record({"date": datetime.date.today(), "model": name, **shares,
                "seconds": f"{seconds:.0f}", "flags": " ".join([*FINE_TUNING, *flags])})


if __name__ == "__main__":
    main()
