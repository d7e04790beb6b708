"""The settings of a default run follow from the size of its text."""

import json

import pytest

import train as command
from tinygpt.config import check_value
from tinygpt.training.config import PRESETS, TrainConfig
from tinygpt.training.recipe import MEASURED, recipe

SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--vocab_size=300"]


def test_it_is_what_was_measured_and_monotonic_between():
    for size, steps, weight_decay, dropout in MEASURED:
        made = recipe(size)
        assert (made["max_iters"], made["weight_decay"], made["dropout"]) == (
            steps, weight_decay, dropout)
    sizes = [int(20_000 * 1.3**n) for n in range(20)]
    made = [recipe(size) for size in sizes]
    assert [m["max_iters"] for m in made] == sorted(m["max_iters"] for m in made)
    for name in ("weight_decay", "dropout"):
        values = [m[name] for m in made]
        assert values == sorted(values, reverse=True)
    assert recipe(1) == recipe(20_000) and recipe(10**12) == recipe(1_100_000)


def test_a_large_text_gets_the_preset():
    named = PRESETS["shakespeare"]
    made = recipe(1_115_394)
    assert all(made[k] == named.get(k, made[k]) for k in made)
    assert made["weight_decay"] == TrainConfig().weight_decay


@pytest.fixture
def settings_of(tmp_path, text, monkeypatch):
    """What train.py makes of flags for a text of 30 KB, and the configuration of the model."""
    seen = []
    monkeypatch.setattr(command, "train", lambda *args: seen.append(args))
    path = tmp_path / "verses.txt"
    path.write_text((text * 10)[:30_000], encoding="utf-8")

    def run(*flags) -> dict:
        assert command.main(["--data", str(path), *SHAPE, *flags]) == 0
        model, config, data = seen.pop()
        return vars(config) | vars(model.config) | {"note": data.note}
    return run


def test_flags_and_presets_override_it(settings_of, tmp_path):
    wanted = recipe(30_000)
    made = settings_of()
    assert {name: made[name] for name in wanted} == wanted
    assert made["note"].startswith("30 KB of text: --max_iters ")
    made = settings_of("--weight_decay", "0.3", "--max_iters", "7")
    assert (made["weight_decay"], made["max_iters"]) == (0.3, 7)
    assert made["dropout"] == wanted["dropout"]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"beta1": 0.8}))
    for flags in (("--preset", "shakespeare"), ("--config", str(file))):
        made = settings_of(*flags)
        assert (made["weight_decay"], made["dropout"]) == (0.1, 0.0)
        assert made["note"] == ""


def test_its_values_are_in_range():
    fields = {f.name: f for f in TrainConfig.__dataclass_fields__.values()}
    for size in (1, 20_000, 77_777, 10**9):
        for name, value in recipe(size).items():
            if name in fields:
                check_value(fields[name], value)
