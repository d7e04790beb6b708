"""The settings of a default run follow from the size of its text."""

import json
import math

import numpy as np
import pytest
from tiny import TINY

import train as command
from gpt import GPT, GPTConfig
from tinygpt.config import check_value
from tinygpt.training import trial
from tinygpt.training.config import PRESETS, TrainConfig
from tinygpt.training.ranks import Ranks
from tinygpt.training.recipe import (
    BATCH_SIZE,
    DEFAULTS,
    EPOCHS,
    MAX_ITERS,
    SHAPES,
    Trial,
    recipe,
    recipe_for,
)

SMALL = dict(n_layer=1, n_head=2, n_embd=16, block_size=8)
SHAPE = [*(f"--{name}={value}" for name, value in SMALL.items()), "--vocab_size=300"]


def test_a_smaller_text_gets_fewer_steps_and_more_weight_decay():
    made = [recipe(int(2000 * 1.3**n)) for n in range(50)]
    assert [m["max_iters"] for m in made] == sorted(m["max_iters"] for m in made)
    for name in ("weight_decay", "patience"):
        values = [m[name] for m in made]
        assert values == sorted(values, reverse=True)
    rates = [m["learning_rate"] for m in made]
    lowest = rates.index(min(rates))
    assert rates[:lowest] == sorted(rates[:lowest], reverse=True) and max(rates[lowest:]) == 8e-3
    assert recipe(10**12) == recipe(10**8) and recipe(10**8)["max_iters"] == MAX_ITERS


@pytest.mark.parametrize("rows, tokenizer, learning_rate", [
    (8, "bpe", 8e-3), (32, "bpe", None), (8, "char", 8e-3), (8, "bpe", 2e-3)])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_flags_change_neither_the_epochs_nor_what_the_weights_average(shape, rows, tokenizer,
                                                                       learning_rate):
    size, per_token = 300_000, {"bpe": 2.7, "char": 1}[tokenizer]
    made = recipe(size, shape, math.inf, DEFAULTS._replace(
        rows=rows, tokenizer=tokenizer, learning_rate=learning_rate))
    tokens, step = 0.9 * size / per_token, rows * shape["block_size"]
    assert made["max_iters"] * step == pytest.approx(EPOCHS * tokens, abs=5 * step)
    assert made["learning_rate"] == (learning_rate or made["learning_rate"])
    averaged = 1 / (made["learning_rate"] * made["weight_decay"]) * step / tokens
    assert averaged == pytest.approx(0.7, rel=0.05) or made["weight_decay"] == 6.0


def test_a_text_of_a_few_hundred_bytes_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("To be, or not to be, that is the question.\n" * 12)
    flags = ["--data", "note.txt", "--max_iters", "2", "--eval_iters", "1", "--n_layer", "1"]
    assert command.main(flags) == 0
    assert "1 KB of text: --block_size 16, " in (error := capsys.readouterr().err)
    assert "that is little to learn from" in error


def test_the_preset_is_the_recipe_of_its_text():
    assert PRESETS["shakespeare"].items() >= recipe(1_115_394).items()


def test_transformers_has_the_default_model(tmp_path):
    shape = {k: v for k, v in PRESETS["shakespeare"].items() if hasattr(GPTConfig, k)}
    folder = GPT(GPTConfig(**shape)).save_pretrained(tmp_path / "exported")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"


# ---- minutes

def machine(flops: float):
    """Times of a machine of so many FLOP/s, which takes a millisecond more for each step."""
    def measure(shape: dict) -> Trial:
        weights = 12 * shape["n_layer"] * shape["n_embd"]**2 + 1024 * shape["n_embd"]
        step = 1e-3 + 6 * weights * BATCH_SIZE * shape["block_size"] / flops
        return Trial(weights, step, 80 * step / 3)
    return measure


def seconds_of(made: dict, measure) -> float:
    trial = measure(made)
    return made["max_iters"] * trial.step + 11 * trial.evaluation


@pytest.mark.parametrize("size", [2500, 30_000, 200_000, 1_115_394, 50_000_000])
@pytest.mark.parametrize("minutes", [1, 10, 60])
@pytest.mark.parametrize("flops", [2e10, 1e11, 1e13])
def test_a_run_fits_into_its_minutes_and_uses_them(size, minutes, flops):
    measure = machine(flops)
    made = recipe_for(size, 60 * minutes, measure)
    taken = seconds_of(made, measure)
    assert taken <= 60 * minutes
    text_is_used_up = made == recipe(size, {k: made[k] for k in SHAPES[0]}, math.inf)
    assert text_is_used_up or taken > 0.9 * 60 * minutes


def test_more_time_on_enough_text_gets_a_larger_model():
    def width(size, minutes, flops=1e11):
        return recipe_for(size, 60 * minutes, machine(flops))["n_embd"]
    assert [width(1_115_394, m) for m in (1, 10, 60)] == [128, 192, 256]
    assert width(200_000, 600) == 128 and width(10**9, 10, 1e14) == 384
    longer = recipe_for(10**9, 600, machine(1e11))
    assert longer["max_iters"] > 3000


def test_the_minutes_become_plain_settings(settings_of, monkeypatch):
    monkeypatch.setattr(command, "time_steps", lambda model, config: Trial(
        model.num_params(), 1e-3, 0.1))
    made = settings_of("--minutes", "1")
    assert made["minutes"] is None and "--minutes 1: " in made["note"]
    shape = {k: made[k] for k in SHAPES[0]}
    assert made["max_iters"] == recipe(30_000, shape, math.inf)["max_iters"]  # all that it bears
    assert (made["n_embd"], made["block_size"]) == (16, 8)  # as the flags have it
    monkeypatch.setattr(command, "time_steps", lambda model, config: Trial(1, 2.0, 0.0))
    assert settings_of("--minutes", "2")["max_iters"] == 50


def test_every_process_takes_part_where_the_main_one_measures(settings_of, monkeypatch):
    asked = []

    class Second(Ranks):
        is_main = False

        def threads(self):
            asked.append("threads")  # of all processes: it waits until each has called it
            return 1

        def broadcast(self, value):
            assert value is None
            return recipe(20_000)

    monkeypatch.setattr(command, "world", Second)
    monkeypatch.setattr(command.kernels, "set_threads", lambda count: None)
    assert settings_of("--minutes", "1")["max_iters"] == 130 and asked == ["threads"]


def test_a_trial_takes_steps_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "SECONDS", 0.01)
    model = GPT(TINY)
    before = {name: w.numpy() for name, w in model.state_dict().items()}
    found = trial.time_steps(model, TrainConfig(batch_size=2, eval_iters=3, max_iters=5))
    assert found.weights == model.num_params() and found.step > 0 and found.evaluation > 0
    assert all(np.array_equal(w.numpy(), before[n]) for n, w in model.state_dict().items())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--preset=gpt2"], ["--max_iters=5"], ["--init_from=gpt2"]],
                         ids=str)
def test_minutes_are_for_the_default_run(flags, text_file, capsys):
    assert command.main(["--data", str(text_file), "--minutes", "3", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "take --max_minutes instead" in error


def test_minutes_are_no_setting_of_a_script(text):
    with pytest.raises(ValueError, match="minutes=5 chooses the model"):
        command.train(GPT(TINY), TrainConfig(minutes=5), text)


# ---- the command

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
    wanted = {k: v for k, v in recipe(30_000, SMALL).items() if k not in SMALL}
    made = settings_of()
    assert {name: made[name] for name in wanted} == wanted
    assert made["note"].startswith("30 KB of text: --max_iters ")
    made = settings_of("--weight_decay", "0.3", "--max_iters", "7")
    assert (made["weight_decay"], made["max_iters"]) == (0.3, 7)
    assert made["eval_interval"] == wanted["eval_interval"]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"beta1": 0.8}))
    for flags in (("--preset", "shakespeare"), ("--config", str(file))):
        made = settings_of(*flags)
        assert made["weight_decay"] == PRESETS["shakespeare"]["weight_decay"]
        assert made["note"] == ""


def test_its_values_are_in_range():
    fields = {f.name: f for f in TrainConfig.__dataclass_fields__.values()}
    for size in (1, 20_000, 77_777, 10**9):
        for name, value in recipe(size).items():
            if name in fields:
                check_value(fields[name], value)
