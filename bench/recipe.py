"""Compares the default run, on texts of many sizes, with two peers that get the same minutes:
nanoGPT's CPU recipe in PyTorch, and the recipe before it followed the size of the text. Adds rows
to recipe.csv.

    python bench/recipe.py --shakespeare tinyshakespeare.txt [--corpora play shakespeare_20k ...]
        [--seeds 1 2 3] [--minutes 10] [--peers nanogpt former]

The corpora are the bundled play, prefixes of Tiny Shakespeare, Python's standard library as code,
and the documentation under /usr/share/doc as prose, each where this machine has it. Losses are over
the whole validation split: of the best checkpoint and of the last one.
"""

import argparse
import csv
import gzip
import json
import math
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BENCH = Path(__file__).parent
PLAY = BENCH.parent / "data" / "lantern_and_tide.txt"
FORMER = ["--activation=gelu", "--no_qk_norm", "--no_ema", "--weight_decay=0.1", "--dropout=0",
          "--max_iters=3000", "--eval_interval=300", "--patience=0"]
FIELDS = ["date", "corpus", "bytes", "recipe", "seed", "best", "last", "best step", "steps",
          "minutes"]


def corpora(shakespeare: Path | None) -> dict[str, Callable[[], str]]:
    """The texts by name; they are read when they are asked for."""
    found = {"play": lambda: PLAY.read_text(encoding="utf-8")}
    if shakespeare:
        text = shakespeare.read_text(encoding="utf-8")
        found |= {f"shakespeare_{n}k": lambda n=n: text[:1000 * n] for n in (20, 60, 200)}
        found["shakespeare"] = lambda: text
    library = Path(sysconfig.get_paths()["stdlib"])
    for megabytes in (5, 30):
        found[f"code_{megabytes}m"] = lambda m=megabytes: joined(library.rglob("*.py"), m)
        found[f"prose_{megabytes}m"] = lambda m=megabytes: joined(
            Path("/usr/share/doc").rglob("*"), m)
    return found


def joined(paths: Iterator[Path], megabytes: int) -> str:
    """The first megabytes of the UTF-8 files among the paths, in the order of their names."""
    parts, size = [], 0
    for path in sorted(paths):
        if size >= megabytes * 10**6:
            break
        try:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            parts.append(data.decode("utf-8"))
            size += len(data)
        except (OSError, UnicodeDecodeError, EOFError):
            continue  # a folder, or no text
    return "\n".join(parts)[:megabytes * 10**6]


def ours(text: Path, seed: int, flags: list[str]) -> dict:
    """The figures of a run of train.py with those flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(BENCH.parent / "train.py"), "--data", str(text),
                   "--out_dir", folder, "--seed", str(seed), *flags]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        minutes = (time.perf_counter() - start) / 60
        out = Path(folder)
        records = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
        losses = {r["iter"]: r["val_loss"] for r in records if "val_loss" in r}
        validation = out / "validation.txt"
        whole = text.read_text("utf-8")
        validation.write_text(whole[int(0.9 * len(whole)):], encoding="utf-8")
        best, last = (bits_per_byte(out / name, validation)
                      for name in ("best.safetensors", f"ckpt_{max(losses)}.safetensors"))
    best_step = min(losses, key=losses.get)
    return {"best": best, "last": last, "best step": best_step, "steps": max(losses),
            "minutes": minutes}


def bits_per_byte(checkpoint: Path, text: Path) -> float:
    """What `python -m tinygpt.evaluate` finds."""
    done = subprocess.run([sys.executable, "-m", "tinygpt.evaluate", str(checkpoint), str(text)],
                          cwd=BENCH.parent, check=True, capture_output=True, text=True)
    return float(re.search(r"bits_per_byte ([\d.]+)", done.stdout)[1])


def nanogpt(text: Path, seed: int, minutes: float) -> dict:
    """The figures of nanoGPT's CPU recipe (characters, 4 blocks of width 128, AdamW), in PyTorch,
    with as many steps as the minutes hold. Ten evaluations on at most 1024 blocks choose the best.
    """
    import torch
    from peer import PeerGPT

    T = 64
    characters = text.read_text("utf-8")
    table = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = torch.tensor([table[c] for c in characters])
    split = int(0.9 * len(ids))
    per_byte = len(characters[split:]) / len(characters[split:].encode()) / math.log(2)
    torch.manual_seed(seed)
    model = PeerGPT(n_layer=4, n_head=4, n_embd=128, block_size=T, vocab_size=len(table))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.99))
    batches = torch.Generator().manual_seed(seed)

    def loss_of(part, starts) -> torch.Tensor:
        windows = torch.stack([part[s:s + T + 1] for s in starts])
        return model(windows[:, :-1], windows[:, 1:])

    starts = torch.arange(0, len(ids) - split - T, T)

    @torch.no_grad()
    def validation(starts: torch.Tensor) -> float:
        sums = [len(some) * loss_of(ids[split:], some).item() for some in starts.split(128)]
        return sum(sums) / len(starts) * per_byte

    def step(number: int, steps: int) -> None:
        rate = min(number / 100, 1) * (1e-4 + 9e-4 * (1 + math.cos(math.pi * number / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of(ids[:split], torch.randint(split - T, (12,), generator=batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    start = time.perf_counter()
    for _ in range(30):  # with a learning rate of 0, to time them
        step(0, 1)
    steps = int(60 * minutes / ((time.perf_counter() - start) / 30))
    some, lowest = starts[::-(-len(starts) // 1024)], math.inf
    for number in range(1, steps + 1):
        step(number, steps)
        is_due = number % max(1, steps // 10) == 0 or number == steps
        if is_due and (loss := validation(some)) < lowest:
            lowest, best = loss, number
            weights = {name: w.clone() for name, w in model.state_dict().items()}
    minutes, last = (time.perf_counter() - start) / 60, validation(starts)
    model.load_state_dict(weights)
    return {"best": validation(starts), "last": last, "best step": best, "steps": steps,
            "minutes": minutes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shakespeare", type=Path)
    parser.add_argument("--corpora", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, help="train.py --minutes instead of the default")
    parser.add_argument("--peers", nargs="*", default=["nanogpt", "former"],
                        choices=["nanogpt", "former"])
    args = parser.parse_args()
    texts = corpora(args.shakespeare)
    path = BENCH / "recipe.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file, \
            tempfile.TemporaryDirectory() as folder:
        table = csv.DictWriter(file, FIELDS)
        if is_new:
            table.writeheader()
        for name in args.corpora or texts:
            text = Path(folder) / f"{name}.txt"
            text.write_text(texts[name](), encoding="utf-8")
            for seed in args.seeds:
                flags = [f"--minutes={args.minutes:g}"] if args.minutes else []
                found = {" ".join(["default", *flags]): ours(text, seed, flags)}
                minutes = next(iter(found.values()))["minutes"]
                if "former" in args.peers:
                    found["former"] = ours(text, seed, [*FORMER, f"--max_minutes={minutes}"])
                if "nanogpt" in args.peers:
                    found["nanogpt"] = nanogpt(text, seed, minutes)
                for recipe, figures in found.items():
                    rounded = {k: round(v, 4) for k, v in figures.items()}
                    row = {"date": time.strftime("%Y-%m-%d"), "corpus": name, "recipe": recipe,
                           "bytes": text.stat().st_size, "seed": seed} | rounded
                    table.writerow(row)
                    file.flush()
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
