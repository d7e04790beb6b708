"""Every flag does something, or is refused where it could not."""

import io
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from commands import COMMANDS
from conftest import ROOT
from tinygrad import Tensor

import generate
import train as command
from gpt import GPT, GPTConfig
from tinygpt import check, evaluate, kernels
from tinygpt.config import SampleConfig
from tinygpt.data.load import load_data
from tinygpt.data.token_data import Batches
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.inference.decoder import Decoder, Drawn
from tinygpt.model import lora
from tinygpt.training.config import TrainConfig
from tinygpt.training.optim import EMA
from tinygpt.training.run import Run, prepare
from tinygpt.training.steps import Steps
from train import train

SHAPE = dict(block_size=8, vocab_size=256, n_layer=1, n_head=4, n_embd=16)
TINY = GPTConfig(**SHAPE)
SHAPE_FLAGS = [f"--{k}={v}" for k, v in SHAPE.items()]


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=4, max_iters=12,
                       eval_iters=1, log_interval=1, warmup_iters=1, learning_rate=1e-2)


@pytest.fixture
def data(text):
    return load_data(text, "byte", 256)


@pytest.fixture
def no_steps(monkeypatch):
    """Runs whose steps and evaluations compute nothing; the steps after which a sample was due."""
    sampled = []
    monkeypatch.setattr(Steps, "train", lambda *args: (2.0, 1.0))
    monkeypatch.setattr(Run, "evaluate", lambda run: (1.0, 1.0))
    monkeypatch.setattr(Run, "sample", lambda run, model: sampled.append(run.iter_num))
    return sampled


def weights(model) -> dict[str, np.ndarray]:
    return {k: w.numpy() for k, w in model.state_dict().items()}


def records(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


# ---- every setting has an effect

CHECKS = {"__post_init__", "check_memory", "num_params", "parse_flags"}
DECLARATIONS = {"config.py", "flags.py", "test_flags.py"}


def is_use(frame) -> bool:
    """Whether code of the project reads a setting for anything but a check of its value."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT) or path.name in DECLARATIONS:
        return False
    while frame and frame.f_code.co_name not in CHECKS:
        frame = frame.f_back
    return frame is None


@pytest.fixture
def read(monkeypatch):
    """The names of the settings of each class that are used."""
    found = {}

    def record(cls):
        names, found[cls] = {f.name for f in fields(cls)}, set()

        def get(self, name):
            if name in names and is_use(sys._getframe(1)):
                found[cls].add(name)
            return object.__getattribute__(self, name)
        monkeypatch.setattr(cls, "__getattribute__", get, raising=False)

    for classes in COMMANDS.values():
        for cls in classes.values():
            record(cls)
    return found


def unread(read: dict, name: str) -> dict[str, set[str]]:
    """The settings of a command that were not read."""
    return {cls.__name__: missing for cls in COMMANDS[name].values()
            if (missing := {f.name for f in fields(cls)} - read[cls])}


def test_a_setting_that_is_only_checked_counts_as_unread(read):
    TrainConfig(seed=3, devices=3, batch_size=3).__post_init__(None)
    replace(GPTConfig(), n_layer=2).check_memory()
    assert unread(read, "train") == {cls.__name__: {f.name for f in fields(cls)}
                                     for cls in COMMANDS["train"].values()}


def test_training_reads_every_setting(tmp_path, text_file, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    GPT(TINY).save_pretrained("pretrained")
    flags = ["--data", str(text_file), "--tokenizer=byte", "--max_iters=2", "--eval_iters=1",
             "--batch_size=2"]
    assert command.main([*flags, *SHAPE_FLAGS, "--curriculum", "--curriculum_start_block_size=4",
                         "--ema", "--schedule=wsd", "--warmup_iters=0",
                         "--rope_scaling=llama3"]) == 0
    assert unread(read, "train")  # so that each run adds something
    assert command.main([*flags, "--init_from=pretrained", "--offline", "--lora_rank=1"]) == 0
    assert not unread(read, "train")


def test_generating_reads_every_setting(saved, read, monkeypatch):
    assert generate.main(["--max_new_tokens=10"]) == 0
    assert unread(read, "generate") == {"GenerateConfig": {"host", "port", "system"}}
    monkeypatch.setattr("tinygpt.export.server.serve", lambda *args: None)
    assert generate.main(["--serve", "--port=0"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert generate.main(["--chat"]) == 0
    assert not unread(read, "generate")


def test_evaluating_reads_every_setting(saved, tmp_path, read):
    (tmp_path / "t.txt").write_text("to sleep")
    (tmp_path / "l.jsonl").write_text('{"text": "to sleep"}')
    assert evaluate.main([saved, "t.txt"]) == 0
    assert unread(read, "evaluate") == {"EvaluateConfig": {"limit"}}
    assert evaluate.main([saved, "l.jsonl", "--task=lambada"]) == 0
    assert not unread(read, "evaluate")


def test_checking_reads_every_setting(saved, read, monkeypatch):
    monkeypatch.setattr(check, "report", lambda checks: [])
    assert check.main(["--checkpoint", saved]) == 0
    assert unread(read, "check") == {}


# ---- train.py

def test_what_train_makes_of_its_flags(tmp_path, text, monkeypatch):
    documents = text[:3000], text[3000:]
    file = tmp_path / "verses.jsonl"
    file.write_text("".join(json.dumps({"body": t, "text": "?"}) + "\n" for t in documents))
    given = []
    monkeypatch.setattr(command, "train", lambda *args: given.append(args))
    flags = ["--data", str(file), "--text_field", "body", "--seed", "5", *SHAPE_FLAGS]
    assert command.main([*flags, "--tokenizer", "bpe", "--vocab_size", "300"]) == 0
    assert command.main([*flags, "--tokenizer", "byte"]) == 0
    for (model, _, data), size in zip(given, (300, 256), strict=True):
        assert model.config.vocab_size == data.tokenizer.vocab_size == size
        ids = [*data.train.tolist(), *data.val.tolist()]
        assert data.tokenizer.decode(ids).startswith(documents[0])
        drawn = weights(GPT(model.config, 5))
        assert all(np.array_equal(w, drawn[name]) for name, w in weights(model).items())


def test_the_function_takes_the_text_field_and_the_seed(tmp_path, config, no_steps, monkeypatch):
    (tmp_path / "verses.jsonl").write_text('{"body": "' + "abcd" * 40 + '"}\n')
    seen = []
    monkeypatch.setattr(Steps, "train", lambda steps, n, batch, *args: (
        seen.append(batch(n)[0]), (2.0, 1.0))[1])
    train(GPT(TINY), replace(config, text_field="body", seed=3, max_iters=1),
          tmp_path / "verses.jsonl")
    ids = np.frombuffer(b"abcd" * 36, np.uint8)
    assert np.array_equal(seen[0], Batches(ids, 8, 4, 3).batch(0)[0])
    assert not np.array_equal(seen[0], Batches(ids, 8, 4, 4).batch(0)[0])


def test_the_intervals_of_a_run(config, data, no_steps, tmp_path):
    result = train(GPT(TINY), replace(config, eval_interval=2, log_interval=3, sample_interval=5,
                                      keep=3, schedule="linear"), data)
    out = tmp_path / "out"
    logged = [r for r in records(out) if "loss" in r]
    assert [r["iter"] for r in logged] == [3, 6, 9, 12] and result.iter_num == 12
    assert no_steps == [5, 10, 12]
    assert {p.name for p in out.glob("*.safetensors")} == {
        "best.safetensors", *(f"ckpt_{n}.safetensors" for n in (8, 10, 12))}


def test_an_evaluation_is_of_so_many_batches(config, data, monkeypatch):
    run = prepare(GPT(TINY), replace(config, eval_iters=7, batch_size=3), data)
    shapes = []
    monkeypatch.setattr(run.steps, "evaluate", lambda batch, count: (
        shapes.extend(batch(n)[0].shape for n in range(count)), 1.0)[1])
    run.evaluate()
    assert shapes == 2 * 7 * [(3, 8)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_of_a_step(config, data, dtype):
    run = prepare(GPT(TINY), replace(config, label_smoothing=0.3, z_loss=0.01, dtype=dtype), data)
    x, y = run.batches.batch(0)
    logits = GPT(TINY)(Tensor(x)).numpy().astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z[..., None] - logits
    right = np.take_along_axis(nats, y[..., None], -1).mean()
    expected = 0.7 * right + 0.3 * nats.mean() + 0.01 * (log_z ** 2).mean()
    error = abs(run.step(0.0)[0] - expected)
    low, high = {"float32": (0, 1e-5), "bfloat16": (1e-5, 2e-2), "float16": (0, 2e-3)}[dtype]
    assert low <= error < high and run.model.compute_dtype == dtype


def test_the_average_after_a_step(config, data):
    run = prepare(GPT(TINY), replace(config, ema=True, ema_decay=0.1), data)
    before = weights(run.model)
    run.step(0.1)
    for name, after in weights(run.model).items():
        np.testing.assert_allclose(run.ema.weights[name].numpy(),
                                   0.1 * before[name] + 0.9 * after, atol=1e-6)


def test_adapters_are_as_they_were_asked_for(config, data):
    run = prepare(GPT(TINY), replace(config, lora_rank=3, lora_alpha=7.0, lora_targets="h.0.mlp.*"),
                  data)
    assert {name: p.shape for name, p in run.params.items()} == {
        "h.0.mlp.c_fc.lora.a": (3, 16), "h.0.mlp.c_fc.lora.b": (64, 3),
        "h.0.mlp.c_proj.lora.a": (3, 64), "h.0.mlp.c_proj.lora.b": (16, 3)}
    assert lora.alpha_of(run.model) == 7.0


def test_kernels_and_threads_are_those_asked_for(config, data, no_steps, monkeypatch):
    given = []
    for function in ("use", "set_threads"):
        monkeypatch.setattr(kernels, function, lambda what: given.append(what))
    train(GPT(TINY), replace(config, kernels="reference", threads=3, max_iters=1), data)
    assert given == ["reference", 3]


# ---- generate.py and python -m tinygpt.evaluate

@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint, with a moving average that is another model, in the folder of the command."""
    monkeypatch.chdir(tmp_path)
    model, other = GPT(TINY), GPT(TINY, seed=2)
    model.tokenizer = ByteTokenizer()
    return str(model.save_checkpoint(1, None, tmp_path / "checkpoints",
                                     ema=EMA(other.state_dict())))


@pytest.fixture
def drawn(monkeypatch):
    """What decoders are given, in the place of drawing: the lengths of the prompts and the
    SampleConfig."""
    given = []

    def run(decoder, prompts, config, reuse_cache, with_logits):
        given.append((tuple(map(len, prompts)), config))
        yield from [Drawn(np.full(len(prompts), ord("a")), None)] * config.max_new_tokens

    monkeypatch.setattr(Decoder, "run", run)
    return given


@pytest.mark.parametrize("samples", [1, 3])
def test_every_option_of_a_draw_reaches_the_decoder(saved, drawn, samples):
    options = dict(max_new_tokens=4, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1,
                   repetition_penalty=1.5, window_hop=4, seed=9)
    assert options.keys() == {f.name for f in fields(SampleConfig)}
    flags = [f"--{name}={value}" for name, value in options.items()]
    assert generate.main([*flags, "--prompt", "ab", f"--num_samples={samples}"]) == 0
    assert drawn == [((2,) * samples, SampleConfig(**options))]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_text_ends_before_each_stop(saved, drawn, samples, capsys):
    for stops in ([], ["--stop", "aaa"], ["--stop", "aaaaaa", "--stop", "aa"]):
        assert generate.main(["--prompt", "b", f"--num_samples={samples}", "--max_new_tokens=5",
                              *stops]) == 0
        found = capsys.readouterr().out
        assert found.count("baaaaa\n") == (0 if stops else samples)
        assert found.count("b\n") == (samples if stops else 0)


def test_what_generate_does_with_the_machine(saved, drawn, monkeypatch, capsys):
    given = []
    for function in ("use", "set_threads"):
        monkeypatch.setattr(kernels, function, given.append)
    monkeypatch.setattr(GPT, "quantize", lambda model, kind: given.append(kind))
    assert generate.main(["--kernels=portable", "--threads=3", "--quantize=int8"]) == 0
    assert given == ["portable", 3, "int8"]
    assert generate.main(["--device", "nonsense"]) == 2
    assert "there is no device 'nonsense'" in capsys.readouterr().err
    assert "'null' cannot compute" in refusal(generate.main, ["--device", "null"], capsys)


def test_what_evaluate_scores(saved, tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(evaluate, "score_lambada", lambda model, questions: (
        given.append((model.wte.weight.numpy(), questions)), {"questions": 0})[1])
    (tmp_path / "l.jsonl").write_text("".join(f'{{"text": "a {n}"}}\n' for n in range(5)))
    flags = ["l.jsonl", "--task", "lambada"]
    machine = []
    for function in ("use", "set_threads"):
        monkeypatch.setattr(kernels, function, machine.append)
    assert evaluate.main([saved, *flags, "--limit", "2"]) == 0
    machine_flags = ["--kernels", "reference", "--threads", "2"]
    assert evaluate.main([saved, *flags, "--no_ema", *machine_flags]) == 0
    assert machine == ["auto", "reference", 2]
    (average, two), (plain, five) = given
    assert [q["text"] for q in two] == ["a 0", "a 1"] and len(five) == 5
    assert np.array_equal(average, GPT(TINY, seed=2).wte.weight.numpy())
    assert np.array_equal(plain, GPT(TINY).wte.weight.numpy())
    assert evaluate.main([saved, *flags, "--device", "nonsense"]) == 2
    assert "there is no device 'nonsense'" in capsys.readouterr().err
    null = [saved, *flags, "--device", "null"]
    assert "'null' cannot compute" in refusal(evaluate.main, null, capsys)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert evaluate.main(["gpt2", *flags, "--offline"]) == 2
    assert "--offline prevents" in capsys.readouterr().err


def test_a_flag_that_could_do_nothing_is_refused(saved, tmp_path, capsys):
    folder = str(GPT(TINY).save_pretrained(tmp_path / "pretrained"))
    for name in ("t.txt", "l.jsonl"):
        (tmp_path / name).write_text("some text")
    for main, flags, says in (
            (generate.main, ["--export", "x", "--quantize", "int8"], "leave out --quantize"),
            (evaluate.main, [folder, "l.jsonl", "--task=lambada", "--stride=2"], "no effect"),
            (evaluate.main, [saved, "t.txt", "--limit", "2"], "limit is a number of questions"),
            (evaluate.main, [saved, "l.jsonl", "--task=lambada", "--stride=2"], "has no effect")):
        assert main(flags) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and says in err


# ---- flags that a run, or what else is asked for, leaves without effect

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of the command, and of its text; a run of one step."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "t.txt").write_text("To sleep: perchance to dream.\n" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Run, "sample", lambda run, model: None)
        assert command.main(["--data", "t.txt", *SHAPE_FLAGS, "--tokenizer=byte", "--max_iters=1",
                             "--eval_iters=1", "--lora_rank=1"]) == 0
    return folder


def refusal(main, flags, capsys) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("flags, says", [
    ("--resume --vocab_size 300", "vocab_size=256, but vocab_size=300"),
    ("--resume --n_embd 32", "n_embd=16, but n_embd=32"),
    ("--resume --norm layernorm", "norm=rmsnorm, but norm=layernorm"),
    ("--resume --tokenizer bpe", "tokenizer=byte, but tokenizer=bpe"),
    ("--out_dir new --offline", "--offline has no effect without --init_from"),
    ("--resume --init_from x", "init_from=scratch, but init_from=x"),
    ("--resume --lora_alpha 3", "lora_alpha=16.0, but lora_alpha=3.0"),
    ("--resume --lora_rank 0", "lora_rank=1, but lora_rank=0"),
    ("--resume --freeze h.0.*", "freeze=None, but freeze=h.0.*"),
    ("--resume --optimizer lion", "optimizer=muon, but optimizer=lion"),
    ("--eval_only --max_iters 5", "--max_iters has no effect on --eval_only"),
    ("--eval_only --learning_rate 1", "--learning_rate has no effect on --eval_only"),
    ("--out_dir new --model bigram --n_layer 2", "--n_layer has no effect on --model bigram"),
    ("--out_dir new --tokenizer byte --vocab_size 300", "leave out --vocab_size"),
    ("--out_dir new --tokenizer byte --lora_rank 1 --freeze wte* --block_size 8",
     "named like 'wte*'"),
    ("--out_dir new --n_layer 100000000", "choose a smaller n_layer"),
    ("--out_dir t.txt/x", "t.txt is a file"), ("--curriculum --out_dir new "
     "--curriculum_start_block_size 7", "does not double up"),
    ("--out_dir new --tokenizer byte --block_size 8 --eval_iters 1000000000000000",
     "choose a smaller --eval_iters"),
    ("--tokenizer char --out_dir=\ud800", "half of a surrogate pair"),
])
def test_what_train_cannot_do_is_refused_and_leaves_everything(finished, monkeypatch, capsys,
                                                               flags, says):
    monkeypatch.chdir(finished)
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert says in refusal(command.main, ["--data", "t.txt", *flags.split()], capsys)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    assert {p.name for p in finished.iterdir()} == {"t.txt", "checkpoints"}


@pytest.mark.parametrize("flags", [
    "--resume --vocab_size 256 --n_embd 16 --lora_rank 1 --tokenizer byte --dropout 0.1",
    "--resume --preset shakespeare --lora_rank 1 --block_size 8 --n_layer 1 --n_embd 16 "
    "--tokenizer byte --vocab_size 256", "--eval_only --max_iters 1 --eval_iters 2"])
def test_what_the_run_has_may_be_asked_for_again(finished, monkeypatch, flags):
    given = []
    monkeypatch.chdir(finished)
    monkeypatch.setattr(command, "train", lambda *args: given.append(args))
    assert command.main(flags.split()) == 0 and len(given) == 1


@pytest.mark.parametrize("flags, says", [
    ("--prompt a", "--prompt has no effect on --export"), ("a", "--prompt has no effect on"),
    ("--interactive", "--interactive has no effect"), ("--num_samples 2", "--num_samples has no"),
    ("--temperature 1", "--temperature has no"), ("--stop a", "--stop has no effect")])
def test_an_export_writes_no_text(saved, capsys, tmp_path, flags, says):
    assert says in refusal(generate.main, ["--export", "x", *flags.split()], capsys)
    assert not (tmp_path / "x").exists()


def test_offline_without_anything_to_fetch_is_refused(saved, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("some text")
    assert "never downloaded" in refusal(generate.main, ["--offline"], capsys)
    for main, words in ((generate.main, ["--checkpoint"]), (evaluate.main, ["t.txt"])):
        flags = ["--offline", *words, saved] if main is generate.main else [saved, *words]
        assert "never downloaded" in refusal(main, [*flags, "--offline"], capsys)
