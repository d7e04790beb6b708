"""The README's picture of a run's loss, docs/loss.png, from its metrics.jsonl and config.json.

    python train.py --max_iters 1200 --eval_interval 100
    python bench/pictures.py [RUN_FOLDER]
"""

import argparse
import json
import math
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "loss.png"


def draw(records: list[dict], config: dict, picture: Path) -> None:
    """The loss of each logged step, and of both splits at each evaluation."""
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["iter"] for r in steps], [r["loss"] for r in steps], color="0.75", linewidth=1,
              label="training batches")
    for key, name, style in (("train_loss", "training split", "C0.-"),
                             ("val_loss", "validation split", "C1.-")):
        axes.plot([r["iter"] for r in evaluations], [r[key] for r in evaluations], style,
                  label=f"{name}, {evaluations[-1][key]:.2f} at the end")
    chance = math.log(config["vocab_size"])
    axes.axhline(chance, color="0.4", linestyle=":", linewidth=1,
                 label=f"guessing, ln {config['vocab_size']} = {chance:.2f}")
    axes.set_title(f"{config['n_layer']} layers, {config['n_embd']} wide, "
                   f"{evaluations[-1]['iter']} steps: {evaluations[-1]['bits_per_byte']:.2f} bits "
                   "per byte of the validation split", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "checkpoints")
    run = parser.parse_args().run
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    draw([json.loads(line) for line in lines], config, PICTURE)
    print(f"{PICTURE}, {PICTURE.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
