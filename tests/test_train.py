"""Training: resumed runs, accumulation, non-finite losses, refusals."""

import gc
import json
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
from tiny import FLAGS, TINY, losses

import train as command_line
from gpt import GPT
from tinygpt import checkpoint
from tinygpt.data.load import load_data
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.kernels import use
from tinygpt.model import lora
from tinygpt.training.run import prepare
from train import train

pytestmark = pytest.mark.usefixtures("without_samples")

def weights(model) -> dict[str, np.ndarray]:
    return {k: w.numpy() for k, w in model.state_dict().items()}


@pytest.mark.parametrize("settings", [
    dict(optimizer="lion"), dict(optimizer="muon", ema=True, ema_decay=0.5),
    dict(optimizer="adamw8bit", gradient_accumulation_steps=2)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config, text, tmp_path, settings):
    config = replace(config, **settings)
    shape = replace(TINY, dropout=0.2)
    whole = GPT(shape)
    train(whole, config, text)
    expected = losses(tmp_path / "out")

    parts = replace(config, out_dir=str(tmp_path / "parts"))
    train(GPT(shape), replace(parts, max_iters=3), text)
    rest = GPT(shape, seed=99)  # its own weights do not matter
    train(rest, replace(parts, resume=True), text)
    assert losses(tmp_path / "parts") == expected
    ours, theirs = weights(rest), weights(whole)
    assert all(np.array_equal(w, ours[name]) for name, w in theirs.items())
    ends = [checkpoint.load(tmp_path / out / "ckpt_6.safetensors")[0] for out in ("out", "parts")]
    assert set(ends[0]) == set(ends[1])
    assert all(np.array_equal(array, ends[1][name]) for name, array in ends[0].items())


def test_compiled_steps_go_when_their_run_goes(config, text):
    """Not when the garbage collector finds them, in a thread that they would wait for."""
    run = prepare(GPT(TINY), config, load_data(text, "byte", 256))
    for _ in range(3):
        run.step(1e-3)
    steps = weakref.ref(run.steps)
    gc.collect()
    gc.disable()
    try:
        del run
        assert steps() is None
    finally:
        gc.enable()


def test_ema_is_evaluated_sampled_and_saved_besides_the_weights(config, text, tmp_path, capsys):
    config = replace(config, ema=True, learning_rate=0.1, eval_interval=1)
    model = GPT(TINY)
    result = train(model, config, text)
    assert "of the weights' moving average" in capsys.readouterr().out
    tensors, _ = checkpoint.load(result.last)
    averages = checkpoint.part(tensors, "ema.")
    assert set(averages) == set(weights(model)) and len(averages) > 5
    for name, w in weights(model).items():
        assert np.array_equal(tensors[f"model.{name}"], w), name
        assert not np.array_equal(averages[name], w), name
    run = prepare(GPT.from_checkpoint(result.last),
                  replace(config, ema=False, max_iters=1, out_dir=str(tmp_path / "other")),
                  load_data(text, "byte", 256))
    assert run.evaluate() == (result.train_loss, result.val_loss)
    started = GPT.from_pretrained(result.last)
    assert np.array_equal(started.wte.weight.numpy(), averages["wte.weight"])
    plain = GPT.from_checkpoint(result.last, ema=False)
    assert np.array_equal(plain.wte.weight.numpy(), tensors["model.wte.weight"])
    logged = [r["val_loss"] for r in map(json.loads, (
        tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) if "val_loss" in r]
    assert result.best_val_loss == min(logged[1:])  # the first is of no checkpoint


def test_ema_starts_at_the_weights_of_a_run_without(config, text, tmp_path):
    train(GPT(TINY), replace(config, max_iters=3), text)
    start = checkpoint.part(checkpoint.load(tmp_path / "out" / "ckpt_3.safetensors")[0], "model.")
    run = prepare(GPT(TINY), replace(config, ema=True, resume=True), load_data(text, "byte", 256))
    for name, average in run.ema.weights.items():
        assert np.array_equal(average.numpy(), start[name]), name


def test_accumulation_equals_one_large_batch(config, text, tmp_path):
    train(GPT(TINY), config, text)
    large = losses(tmp_path / "out")
    small = replace(config, batch_size=2, gradient_accumulation_steps=2,
                    out_dir=str(tmp_path / "small"))
    train(GPT(TINY), small, text)
    assert np.allclose(list(large.values()), list(losses(tmp_path / "small").values()), atol=1e-5)


def test_all_kernels_train_alike_over_60_steps(config, text, tmp_path):
    config = replace(config, max_iters=60, eval_interval=60, lr_decay_iters=60)
    expected = None
    try:
        for kernels in ("auto", "portable", "reference"):
            train(GPT(TINY), replace(config, kernels=kernels), text)
            found = list(losses(tmp_path / "out").values())
            expected = expected or found
            assert len(found) == 60 and np.allclose(expected, found, atol=1e-4), kernels
    finally:
        use("auto")
    assert (tmp_path / "out" / "run_2" / "metrics.jsonl").exists()


def test_one_batch_overfits(config, tmp_path):
    ids = np.tile(np.random.default_rng(1).integers(0, 256, 8), 40)
    result = train(GPT(TINY), replace(config, max_iters=150, eval_interval=150, lr_decay_iters=150,
                                      learning_rate=3e-2), ids)
    assert result.train_loss < 0.1 and result.val_loss < 0.1
    assert result.best_val_loss == result.val_loss and result.iter_num == 150


def test_a_non_finite_loss_changes_nothing_and_stops_with_advice(config, text):
    model = GPT(TINY)
    poisoned = weights(model)
    poisoned["ln_f.weight"] *= np.float32(3e38)  # finite, but its logits are not
    model.load_state_dict(poisoned)
    with pytest.raises(ValueError, match="--learning_rate"):
        train(model, replace(config, max_iters=50), text)
    for name, w in weights(model).items():
        assert np.array_equal(w, poisoned[name], equal_nan=True), name


def test_a_run_of_weights_that_are_not_finite_saves_nothing(config, text, tmp_path):
    """However few its steps are, all of which are skipped."""
    model = GPT(TINY)
    model.load_state_dict(weights(model) | {"ln_f.bias": np.full(TINY.n_embd, np.nan)})
    config = replace(config, max_iters=2, eval_interval=2)
    with pytest.raises(ValueError, match=r"ln_f\.bias has NaN or infinite values") as caught:
        train(model, config, text)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    run = prepare(GPT(TINY), config, load_data(text, "byte", 256))
    path = run.save(3.0)
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    run.model.load_state_dict(weights(model))
    with pytest.raises(ValueError, match=r"model\.ln_f\.bias has NaN or infinite values"):
        run.save(2.0)
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_killed_between_a_save_and_its_mark_is_marked_when_it_resumes(config, text, tmp_path,
                                                                            rank):
    config, out = replace(config, lora_rank=rank), tmp_path / "out"
    best = [out / checkpoint.BEST, *([out / lora.FILE] if rank else [])]
    train(GPT(TINY), replace(config, max_iters=3), text)
    older = [path.read_bytes() for path in best]
    result = train(GPT(TINY), replace(config, resume=True), text)
    header = checkpoint.load_metadata(result.last)
    assert header["is_best"] and header["iter_num"] == 6  # the tiny run improves all the time
    marked = [path.read_bytes() for path in best]
    assert marked[0] == result.last.read_bytes()
    for path, content in zip(best, older, strict=True):
        path.unlink()  # a link to the checkpoint
        path.write_bytes(content)
    train(GPT(TINY), replace(config, resume=True), text)
    assert [path.read_bytes() for path in best] == marked
    best[0].unlink()
    train(GPT(TINY), replace(config, resume=True), text)
    assert best[0].read_bytes() == marked[0]


def test_a_checkpoint_that_is_not_the_best_is_not_marked_when_its_run_resumes(config, text,
                                                                              tmp_path):
    data = load_data(text, "byte", 256)
    run = prepare(GPT(TINY), config, data)
    for n, loss in enumerate((3.0, 2.0, 2.5), 1):
        run.iter_num = n
        run.save(loss)
    best = checkpoint.load_metadata(tmp_path / "out" / checkpoint.BEST)
    assert best["iter_num"] == 2 and best["best_val_loss"] == 2.0
    resumed = train(GPT(TINY), replace(config, resume=True, max_iters=3), data)
    assert resumed.iter_num == 3
    assert checkpoint.load_metadata(tmp_path / "out" / checkpoint.BEST) == best


def test_dropout_is_fresh_at_every_step(config, text):
    run = prepare(GPT(replace(TINY, dropout=0.5)), replace(config, learning_rate=1e-30),
                  load_data(text, "byte", 256))
    batch = run.batches.batch(0)
    run.batches.batch = lambda number: batch
    seen = set()
    for _ in range(5):
        seen.add(run.step(0.0)[0])
    assert len(seen) == 5


def test_an_array_a_string_and_a_file_give_the_same_run(config, text, text_file, tmp_path):
    one = replace(config, max_iters=1, eval_interval=1)
    found = []
    ids = np.array(ByteTokenizer().encode(text))
    for data in (text, text_file, str(text_file), ids):
        train(GPT(TINY), one, data)
        found.append(losses(tmp_path / "out"))
    assert found[0] == found[1] == found[2] == found[3]
    assert sorted(p.name for p in (tmp_path / "out").glob("run_*")) == ["run_1", "run_2", "run_3"]


def test_a_resume_with_another_model_or_tokenizer_is_refused(config, text, tmp_path):
    train(GPT(TINY), replace(config, max_iters=1, eval_interval=1), text)
    again = replace(config, resume=True)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"n_embd=16, but n_embd=32"):
        train(GPT(replace(TINY, n_embd=32)), again, text)
    with pytest.raises(ValueError, match="another tokenizer"):
        train(GPT(TINY), replace(again, tokenizer="char"), text)
    with pytest.raises(ValueError, match="optimizer adamw, not of muon: use --optimizer adamw"):
        train(GPT(TINY), replace(again, optimizer="muon"), text)
    with pytest.raises(ValueError, match="no checkpoint"):
        train(GPT(TINY), replace(again, out_dir=str(tmp_path / "none")), text)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_data_that_does_not_fit_the_model_is_refused(config, text):
    with pytest.raises(ValueError, match="token id 300"):
        train(GPT(TINY), config, np.full(500, 300))
    with pytest.raises(ValueError, match=r"256 ids.*vocab_size=100"):
        train(GPT(replace(TINY, vocab_size=100)), config, text)


def test_checkpoints_rotate_and_the_best_stays(config, text, tmp_path):
    result = train(GPT(TINY), replace(config, eval_interval=1, keep=2), text)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["best.safetensors", "ckpt_5.safetensors", "ckpt_6.safetensors"]
    metadata = checkpoint.load_metadata(result.best)
    assert metadata["best_val_loss"] == result.best_val_loss


def test_the_command_trains_logs_and_resumes(command, text_file, tmp_path):
    done = command("train.py", "--data", text_file, *FLAGS, "--max-iters=4", "--eval_interval", 2)
    assert done.returncode == 0, done.stderr
    assert "step 4: train loss" in done.stdout and "iter 3: loss" in done.stdout
    assert "sample 4:" in done.stdout and "compiling" in done.stderr
    out = tmp_path / "checkpoints"
    assert {"best.safetensors", "ckpt_4.safetensors", "config.json", "loss.png",
            "metrics.jsonl"} <= set(os.listdir(out))
    more = command("train.py", "--resume", "--max_iters", 6)
    assert more.returncode == 0, more.stderr
    assert "resuming after step 4" in more.stderr and "iter 6: loss" in more.stdout
    refused = command("train.py", "--resume", "--n_layer", 2)
    assert refused.returncode == 2
    assert "n_layer=1, but n_layer=2" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(("flags", "says"), [
    (("--n_lay", "3"), "there is no flag --n_lay; did you mean --n_layer?"),
    (("--n_embd", "30", "--n_head", "4"), "n_embd=30 is not divisible by n_head=4"),
    (("--data", "missing.txt"), "there is no data at missing.txt"),
    (("--device", "nonsense"), "there is no device 'nonsense'"),
    (("--resume",), "there is no run in checkpoints"),
    (("--max_iters", "0"), "max_iters=0 is out of range")])
def test_a_mistake_gets_one_line_and_status_2(in_process, tmp_path, flags, says):
    done = in_process(command_line, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr
    assert os.listdir(tmp_path) == []
