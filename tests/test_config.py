"""Dataclass <-> flags <-> JSON."""

import json
import os
import re
from dataclasses import MISSING, Field, asdict, fields, replace

import numpy as np
import pytest
from commands import COMMANDS, parse, settings

from generate import GenerateConfig
from gpt import GPTConfig
from tinygpt.config import SampleConfig, check_value, kind_of
from tinygpt.evaluate import EvaluateConfig
from tinygpt.flags import parse_flags, to_json
from tinygpt.hints import HINTS
from tinygpt.model.bigram import BigramConfig
from tinygpt.training.config import TrainConfig

CLASSES = COMMANDS["train"]
CONFIGS = [BigramConfig, *(cls for classes in COMMANDS.values() for cls in classes.values())]


def complaint(capsys, *argv: str, classes=None) -> str:
    """The one line on stderr of flags that end the command with status 2."""
    with pytest.raises(SystemExit) as caught:
        if classes:
            parse_flags(classes, list(argv), "text")
        else:
            parse(*argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    return err


# ---- fields

@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_has_a_help_text(cls):
    for field in fields(cls):
        text = field.metadata["help"]
        assert text == text.strip() and len(text) > 5 and not text.endswith("."), field.name


@pytest.mark.parametrize("cls", [GPTConfig, TrainConfig, SampleConfig])
def test_configs_are_frozen_and_keyword_only(cls):
    with pytest.raises(AttributeError):
        cls().seed = 2
    with pytest.raises(TypeError):
        cls(1)


def test_no_name_stands_for_two_flags():
    names = [f.name for cls in CLASSES.values() for f in fields(cls)]
    assert len(names) == len(set(names)) and not {"preset", "config"} & set(names)


def test_help_lists_every_flag_with_its_words(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for cls in CLASSES.values():
        for field in fields(cls):
            assert f"--{field.name}" in text
            assert field.metadata["help"][:20] in text


def bad_values(f: Field) -> list:
    """Values that the declaration of a field rules out."""
    kind, optional = kind_of(f)
    rules = f.metadata
    bad = [] if optional else [None]
    if kind is bool:
        return [*bad, 1, "no"]
    if kind is tuple:
        return [*bad, "text", [""], [3]]
    if kind is str:
        bad += [3, "a\0b", "\ud800", *([] if rules.get("empty") else [""])]
        return bad + (["nonsense", next(iter(rules["choices"])).title()] if "choices" in rules
                      else [])
    step = 1 if kind is int else 1e-6
    bad += [rules[rule] + sign * step for rule, sign in (("low", -1), ("high", 1))
            if rule in rules]
    bad += [rules[rule] for rule in ("above", "below") if rule in rules]
    return [*bad, float("nan"), float("inf"), "3", True, 10 ** 400]


def good_values(f: Field) -> list:
    """Values at the ends of what the declaration of a field allows."""
    kind, optional = kind_of(f)
    rules = f.metadata
    good = [None] if optional else []
    if kind is bool:
        return [*good, True, False]
    if kind is tuple:
        return [*good, (), ("a", "b")]
    if kind is str:
        return [*good, *(rules.get("choices") or ["a = b, \u00e9"]),
                *([""] if rules.get("empty") else [])]
    step = 1 if kind is int else 1e-6
    good += [rules[rule] for rule in ("low", "high") if rule in rules]
    return good + [rules[rule] + sign * step for rule, sign in (("above", 1), ("below", -1))
                   if rule in rules]


FIELDS = {f"{cls.__name__}.{f.name}": (cls, f) for cls in CONFIGS for f in fields(cls)}


@pytest.mark.parametrize("cls, field", FIELDS.values(), ids=FIELDS)
def test_a_bad_value_is_named_with_its_field_and_the_remedy(cls, field):
    required = {f.name: "x" for f in fields(cls) if f.default is MISSING}
    for value in bad_values(field):
        with pytest.raises(ValueError) as caught:
            cls(**required | {field.name: value})
        message = str(caught.value)
        assert message.startswith(f"{field.name}=") and "choose" in message
        assert "\n" not in message and len(message) < 250
    for value in good_values(field):
        assert check_value(field, value) == value


def test_every_number_has_a_lowest_value():
    numbers = [f for _, f in FIELDS.values() if kind_of(f)[0] in (int, float)]
    assert len(numbers) > 40 and all({"low", "above"} & f.metadata.keys() for f in numbers)


def bad_words(f: Field) -> list[str]:
    """What a flag of the field refuses."""
    kind, _ = kind_of(f)
    if kind is bool:
        return ["perhaps"]
    if kind in (str, tuple):
        return [value for value in (*bad_values(f), "" if kind is tuple else None)
                if isinstance(value, str) and value != "text"]
    return ["three", *(str(value) for value in bad_values(f) if type(value) in (int, float))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_refuses_what_its_setting_does(command, capsys):
    known = {f.name: f for cls in COMMANDS[command].values() for f in fields(cls)}
    required = ["x" for f in known.values() if f.default is MISSING]
    for name, field in known.items():
        if field.default is MISSING:
            continue
        for word in bad_words(field):
            try:
                parse_flags(COMMANDS[command], [*required, f"--{name}={word}"], "text")
                message = "accepted"
            except ValueError as error:
                message = str(error)
            except SystemExit as end:
                message = capsys.readouterr().err
                assert end.code == 2
            assert name in message, (name, word, message)


def test_a_factor_of_spikes_is_0_or_at_least_1():
    with pytest.raises(ValueError, match=r"skip_spikes=0\.5 .*choose 0 or a value at least 1"):
        TrainConfig(skip_spikes=0.5)


@pytest.mark.parametrize("wrong, names", [
    ({"n_embd": 100, "n_head": 12}, ["n_embd=100", "n_head=12"]),
    ({"n_head": 12, "n_kv_head": 5}, ["n_head=12", "n_kv_head=5"]),
    ({"n_embd": 36, "position": "rope"}, ["rope", "3"]),
])
def test_values_that_do_not_fit_each_other_are_named(wrong, names):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**wrong)
    assert all(name in str(caught.value) for name in names) and "choose" in str(caught.value)


def test_a_min_lr_above_the_learning_rate_is_refused():
    with pytest.raises(ValueError, match=r"min_lr=0\.1 .*learning_rate=0\.01"):
        TrainConfig(learning_rate=0.01, min_lr=0.1)


# ---- flags

def test_dashes_and_underscores_are_the_same():
    expected = settings("--n_layer=3", "--max_iters", "7", "--learning_rate=0.5", "--out_dir=a-b")
    assert expected["n_layer"] == 3 and expected["out_dir"] == "a-b"
    assert settings("--n-layer=3", "--max-iters", "7", "--learning-rate=0.5",
                    "--out-dir=a-b") == expected


@pytest.mark.parametrize("words, name, value", [
    (["--bias"], "bias", True), (["--bias=False"], "bias", False),
    (["--bias", "true"], "bias", True),
    (["--grad-checkpoint=true"], "grad_checkpoint", True), (["--dropout=1e-1"], "dropout", 0.1),
    (["--n_kv_head=2"], "n_kv_head", 2), (["--n_kv_head=2", "--n_kv_head"], "n_kv_head", None),
    (["--out_dir=-x"], "out_dir", "-x"), (["--out_dir", "a b=c"], "out_dir", "a b=c"),
    (["--min_lr=0"], "min_lr", 0.0), (["--data", "/a-b/*.txt"], "data", "/a-b/*.txt"),
])
def test_flags_of_every_type(words, name, value):
    assert settings(*words) == settings() | {name: value}


@pytest.mark.parametrize("words", [
    ["--n_layers=3"], ["--n_lay=3"], ["--max", "3"], ["--learn=1"], ["stray"], ["-x"],
    ["--n_layer"], ["--n_layer=three"], ["--n_layer=1.5"], ["--learning_rate=fast"],
    ["--bias=perhaps"], ["--top_k=3"], ["--n_layer=3", "more"], ["--n_layer", "3", "4"]], ids=str)
def test_a_flag_that_is_unknown_or_cut_short_gets_one_line_and_status_2(capsys, words):
    assert "--help" in complaint(capsys, *words)


def test_a_command_without_presets_has_no_preset_flags(capsys):
    complaint(capsys, "--preset=gpt2", classes={"sample": SampleConfig})
    found = parse_flags({"sample": SampleConfig}, ["--top-k", "3"], "text")["sample"]
    assert found == SampleConfig(top_k=3)


def test_a_flag_out_of_range_is_a_value_error():
    with pytest.raises(ValueError, match=r"n_layer=0"):
        parse("--n_layer=0")
    with pytest.raises(ValueError, match=r"learning_rate=nan"):
        parse("--learning_rate=nan")


@pytest.mark.parametrize("word, says", [
    ("--n_lay", "did you mean --n_layer?"), ("--batchsize", "use --batch_size"),
    ("--lr=1", "use --learning_rate"), ("--max_steps", "use --max_iters"),
    ("--data-path", "use --data"), ("--grad_accum_steps", "use --gradient_accumulation_steps"),
    ("--bpe_vocab_size", "--vocab_size is the size"), ("--mlp", "--activation swiglu"),
    ("--pos_encoding", "use --position"), ("--amp", "--dtype bfloat16"),
    ("--decay_lr", "use --schedule constant"), ("--no_decay_lr", "use --schedule constant"),
    ("--compile", "leave it out"), ("--ddp", "mpirun"), ("--kv_cache", "leave it out"),
    ("--generate_only", "run generate.py"), ("--zzz", "no flag --zzz (")])
def test_an_unknown_flag_gets_the_name_that_is_meant(capsys, word, says):
    line = complaint(capsys, word, "1")
    assert f"there is no flag {word.partition('=')[0].replace('data-path', 'data_path')}" in line
    assert says in line


def test_hints_name_flags_that_a_command_has_and_never_one_that_it_lacks(capsys):
    known = {f.name for cls in (*CLASSES.values(), SampleConfig, GenerateConfig, EvaluateConfig)
             for f in fields(cls)}
    for name, texts in HINTS.items():
        for text in texts:
            assert set(re.findall(r"--(\w+)", text)) <= known, (name, text)
    assert "use --temperature" in complaint(capsys, "--temp", classes={"sample": SampleConfig})
    assert "learning_rate" not in complaint(capsys, "--lr", classes={"sample": SampleConfig})


def test_warmup_steps_is_a_name_for_warmup_iters(tmp_path):
    """As a flag, in JSON and in a script."""
    assert settings("--warmup-steps", "7") == settings("--warmup_iters=7")
    (tmp_path / "a.json").write_text('{"warmup_steps": 8}')
    assert settings("--config", tmp_path / "a.json")["warmup_iters"] == 8
    config = TrainConfig(batch_size=8, learning_rate=1e-3, warmup_steps=50, max_iters=1000,
                         eval_interval=100, eval_iters=20)
    assert config == replace(config, warmup_iters=50) and config.warmup_iters == 50
    assert replace(config, max_iters=3).warmup_iters == 50
    assert "warmup_steps" not in asdict(config)
    with pytest.raises(ValueError, match=r"warmup_steps=-1|warmup_iters=-1"):
        TrainConfig(warmup_steps=-1)
    with pytest.raises(ValueError, match=r"warmup_steps=3, but warmup_iters=4"):
        TrainConfig(warmup_steps=3, warmup_iters=4)


@pytest.mark.parametrize("words", [
    ["--lora_alpha=3"], ["--lora_targets=h.*"], ["--ema_decay=0.9", "--no_ema"],
    ["--decay_fraction=0.5"], ["--decay_fraction=0.5", "--schedule=linear"],
    ["--curriculum_start_block_size=8"],
    ["--shard_optimizer"], ["--rope_theta=5", "--position=learned"],
    ["--min_lr=1e-5", "--schedule=constant"], ["--lr_decay_iters=9", "--schedule=constant"]])
def test_a_flag_without_effect_is_refused_and_a_preset_is_not(words, tmp_path):
    name = words[0].partition("=")[0]
    with pytest.raises(ValueError, match=f"^{name} has no effect without --") as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text(json.dumps(settings(*words[1:])))
    assert parse("--config", tmp_path / "a.json") == parse(*words[1:])


def test_flags_with_what_they_need_are_taken():
    found = settings("--lora_rank=2", "--lora_alpha=3", "--ema", "--ema_decay=0.9", "--schedule",
                     "wsd", "--decay_fraction=0.5", "--curriculum",
                     "--curriculum_start_block_size=16", "--devices=2", "--shard_optimizer",
                     "--rope_theta=500")
    assert found["lora_alpha"] == 3 and found["ema_decay"] == 0.9 and found["shard_optimizer"]


def test_a_text_by_position_does_not_fall_to_the_switch_before_it(capsys):
    classes = COMMANDS["generate"]
    for words in (["ROMEO:"], ["--json", "ROMEO:"], ["--seed=3", "ROMEO:", "--json"],
                  ["--prompt=ROMEO:"], ["ROMEO:", "--no_ema"], ["--json", "true", "ROMEO:"]):
        flags = parse_flags(classes, words, "text")
        assert flags["generate"].prompt == "ROMEO:" and flags.typed >= {"prompt"}
        assert flags["generate"].json == any(word == "--json" for word in words)
    assert parse_flags(classes, ["-"], "text")["generate"].prompt == "-"
    assert parse_flags(classes, [], "text")["generate"].prompt == "\n"
    assert "twice" in complaint(capsys, "a", "--prompt=b", classes=classes)
    assert "quotes" in complaint(capsys, "ROMEO:", "speaks", classes=classes)


def test_help_has_plain_headings_kinds_choices_and_each_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse("--help", "--preset", "gpt2")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert not re.search(r"\['|TrainConfig|GPTConfig|\bstr\b|\bbool\b|--nobias|default: None", text)
    headings = [line for line in lines if re.fullmatch(r"\w.*:", line)]
    assert headings == ["general:", "model:", "data:", "run:", "optimizer:", "schedule:",
                        "logging:", "machine:"]
    assert "  --n_layer INT " in text and "(at least 1; default: 12)" in text  # the preset's
    assert "--tokenizer {bpe,gpt2,char,byte}" in text and "--bias, --no_bias " in text
    assert "  --data TEXT " in text and "  --learning_rate FLOAT " in text
    assert all(line.count("default") <= 1 for line in lines)
    assert next(line for line in lines if "--learning_rate" in line).endswith(
        "(above 0; default: 0.0006)")
    assert "(at least 1 and at most 64)" in text


# ---- JSON

@pytest.mark.parametrize("model, train", [
    (GPTConfig(), TrainConfig()),
    (GPTConfig(n_kv_head=4, n_inner=7, bias=False, norm="rmsnorm", dropout=0.3, norm_eps=1e-12,
               sliding_window=5, tie_weights=False, qk_norm=True, head_dim=10, qkv_bias=True,
               position="rope", rope_scaling="llama3", rope_factor=2.5, nope_interval=4),
     TrainConfig(data="-a path, with = and \u00e9\U0001f600", out_dir="--x", lr_decay_iters=3,
                 min_lr=1e-7, learning_rate=1 / 3, resume=True, schedule="constant", seed=2**63)),
])
def test_to_json_and_config_give_an_equal_config(tmp_path, model, train):
    file = tmp_path / "config.json"
    file.write_text(to_json(model, train), encoding="utf-8")
    assert parse("--config", file) == (model, train)
    everything = ["--preset=gpt2", "--n_kv_head=3", "--min_lr=1e-9", "--lr_decay_iters=5",
                  "--sliding_window=9"]  # None takes back what was set before
    assert parse(*everything, "--config", file) == (model, train)
    assert parse("--config", file, "--keep=9") == (model, replace(train, keep=9))


def test_decay_lr_of_an_older_file_is_the_constant_schedule(tmp_path):
    for decay, schedule in ((True, "linear"), (False, "constant")):
        (tmp_path / "a.json").write_text(json.dumps({"decay_lr": decay, "schedule": "linear"}))
        assert settings("--config", tmp_path / "a.json") == settings("--schedule", schedule)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", "\"text\"", "{'a': 1}"])
def test_a_config_file_that_is_no_object_is_a_value_error(tmp_path, content):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json") as caught:
        parse("--config", file)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_named(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"n_layer": 2, "n_layers": 3}))
    with pytest.raises(ValueError, match=r"bad\.json.*'n_layers'"):
        parse("--config", file)


@pytest.mark.parametrize("value", ["three", 1.5, True, [3], {"a": 1}, None], ids=repr)
def test_a_value_of_another_type_is_refused(tmp_path, capsys, value):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"n_layer": value}))
    try:
        assert "n_layer" in complaint(capsys, "--config", str(file))
    except ValueError as error:  # as good, in one line
        assert "n_layer" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["deep", "pipe", "latin", "device"])
def test_a_config_that_cannot_be_read_is_named_and_does_not_hang(tmp_path, kind):
    file = tmp_path / "bad.json"
    if kind == "deep":
        file.write_text("[" * 100_000)
    elif kind == "latin":
        file.write_bytes(b'{"data": "\xe9"}')
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"^--config: .*bad\.json ") as caught:
        parse("--config", file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--config"], ["--config="], ["--config", "none.json"],
                                   ["--config", "."]])
def test_a_missing_config_file_is_a_value_error(words):
    with pytest.raises(ValueError, match="--config"):
        parse(*words)


@pytest.mark.parametrize("words", [["--preset"], ["--preset="], ["--preset", "gpt5"]])
def test_an_unknown_preset_is_refused_with_the_known_names(words):
    with pytest.raises(ValueError, match=r"preset.*shakespeare_char_cpu") as caught:
        parse(*words)
    assert ("did you mean gpt2?" in str(caught.value)) == ("gpt5" in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [
    dict(learning_rate="1e-3"), dict(batch_size=8.0), dict(max_iters="10"), dict(threads=1.5),
    dict(batch_size=True), dict(learning_rate=False), dict(max_iters=10 ** 400),
    dict(learning_rate=10 ** 400), dict(ema=1), dict(ema="no"), dict(out_dir=3), dict(out_dir=""),
    dict(freeze=""), dict(dtype=None), dict(out_dir="a\0b"),
    dict(out_dir="\ud800"), dict(data="a\udfff")], ids=lambda s: str(s)[:30])
def test_a_setting_of_the_wrong_type_is_named(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}=.*choose") as caught:
        TrainConfig(**settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_numpy_and_paths_become_pythons_own(tmp_path):
    config = TrainConfig(batch_size=np.int64(8), learning_rate=np.float32(0.5), ema=np.bool_(True),
                         out_dir=tmp_path)
    assert json.loads(to_json(config))["out_dir"] == str(tmp_path)
    assert (config.batch_size, config.learning_rate, config.ema) == (8, 0.5, True)
    assert config.ema is True
