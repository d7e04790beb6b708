"""python -m tinygpt.check: what is right is ok, what is broken on purpose fails by its own line."""

import re
import subprocess
import sys

import numpy as np
import operations
import pytest
from conftest import ROOT
from tiny import TINY
from tinygrad import Tensor

from gpt import GPT, KVCache
from tinygpt import check, checkpoint, kernels
from tinygpt.kernels import cases
from tinygpt.model.bigram import Bigram, BigramConfig

NO_OPERATIONS = {"IMPLEMENTATIONS", "in_use", "stored", "set_threads", "use"}


@pytest.fixture
def few(monkeypatch):
    """Checks that take seconds: of two operations by the C kernels, and of one tiny model."""
    for table in ("CASES", "WITHOUT_GRADIENT"):
        kept = {o: c for o, c in getattr(cases, table).items() if o in ("swiglu", "draw")}
        monkeypatch.setattr(cases, table, kept)
    monkeypatch.setattr(check, "MODELS", {"llama": check.MODELS["llama"]})
    monkeypatch.setattr(check, "PROMPT", 70)
    monkeypatch.setattr(check, "WRITTEN", 4)
    yield ["--kernels", "cpu"]
    kernels.use("auto")


@pytest.fixture
def lines(few, capsys):
    """Runs the command; its exit status, and of each check the mark and the rest of the line."""
    def run() -> tuple[int, dict[str, tuple[str, str]]]:
        status = check.main(few)
        out = capsys.readouterr().out.splitlines()
        rows = [re.fullmatch(r"(.+?) +(ok|FAILED) +(.*)", line) for line in out[2:-1]]
        found = {row[1]: (row[2], row[3]) for row in rows}
        failed = [name for name, (mark, _) in found.items() if mark == "FAILED"]
        assert out[-1] == (f"{len(found) - len(failed)} of {len(found)} checks are ok"
                           + (f"; FAILED: {'; '.join(failed)}" if failed else ""))
        return status, found
    return run


def failed(found: dict) -> set[str]:
    return {name for name, (mark, _) in found.items() if mark == "FAILED"}


def test_every_operation_and_every_implementation_here_is_checked():
    assert set(cases.CASES | cases.WITHOUT_GRADIENT) == set(kernels.__all__) - NO_OPERATIONS
    names = {name for name, _ in check.kernel_checks("auto")}
    for operation in cases.CASES | cases.WITHOUT_GRADIENT:
        dtypes = cases.TOLERANCE if operation in cases.IN_16_BITS else ["float32"]
        offered = [(i, d) for i in cases.implementations(operation, but="reference")
                   for d in dtypes if cases.can_run(i, d, operation)]
        assert {f"{operation}, {i}, {d}" for i, d in offered} == {
            name for name in names if name.startswith(f"{operation}, ")}


@pytest.mark.parametrize("operation", cases.CASES)
def test_what_is_right_is_so_to_float64s_last_digits(operation):
    shapes, options = cases.CASES[operation][0]
    arrays = {name: a.astype(np.float64) for name, a in cases.draw(shapes).items()}
    right = getattr(operations, f"np_{operation}")(**arrays, **options)
    found = check.specified(operation, 0)["y"]
    assert found.dtype == np.float64
    assert np.abs(found - right).max() <= 1e-12 * np.abs(right).max()


def test_all_is_ok(lines):
    status, found = lines()
    assert status == 0 and not failed(found)
    assert list(found) == [
        "compiler and device", *(f"swiglu, cpu, {dtype}" for dtype in cases.TOLERANCE),
        "draw, cpu, float32", "gradients, model like llama", "cached decoding, model like llama",
        "save and load"]
    error, tolerance = found["swiglu, cpu, float32"][1].split()
    assert 0 < float(error) < float(tolerance) == 2e-5


def test_what_is_broken_fails_by_its_own_line(lines, monkeypatch):
    """The sign of a gradient, the place of a key in the cache, two names in a checkpoint."""
    swiglu, attend, save = kernels.cpu.swiglu, KVCache.attend, checkpoint.save

    def with_another_gradient(gate, up):
        y = swiglu(gate, up)
        return 2 * y.detach() - y

    def one_off(self, layer, q, k, v, position, *rest):
        return attend(self, layer, q, k, v, position - (q.shape[2] == 1), *rest)

    def under_other_names(path, tensors, *rest):
        first, second = "model.h.0.ln_1.weight", "model.h.0.ln_2.weight"
        return save(path, tensors | {first: tensors[second], second: tensors[first]}, *rest)

    monkeypatch.setattr(kernels.cpu, "swiglu", with_another_gradient)
    status, found = lines()
    assert status == 1
    assert failed(found) == {*(f"swiglu, cpu, {dtype}" for dtype in cases.TOLERANCE),
                             "gradients, model like llama"}
    assert re.match(r"2\.0e\+00 +2\.0e-05 +gradient of gate, of gate \(\d+, ",
                    found["swiglu, cpu, float32"][1])
    assert "the gradient of wte.weight: slope" in found["gradients, model like llama"][1]
    monkeypatch.setattr(kernels.cpu, "swiglu", swiglu)

    monkeypatch.setattr(KVCache, "attend", one_off)
    monkeypatch.setattr(checkpoint, "save", under_other_names)
    status, found = lines()
    assert status == 1
    assert failed(found) == {"cached decoding, model like llama", "save and load"}
    assert re.search(r"token 7\d of text \d is \d+, by the full pass \d+$",
                     found["cached decoding, model like llama"][1])
    assert found["save and load"][1].split(None, 2) == [
        "2.0e+00", "0.0e+00", "h.0.ln_1.weight, h.0.ln_2.weight"]


def test_what_raises_fails_and_names_its_place(lines, monkeypatch):
    def broken(*_):
        raise KeyError("no such thing\nand more")

    monkeypatch.setattr(check, "MODELS", {})
    monkeypatch.setattr(kernels.cpu, "draw", broken)
    status, found = lines()
    assert status == 1 and failed(found) == {"draw, cpu, float32"}
    assert re.search(r"tests/test_check.py:\d+: KeyError: 'no such thing", found[
        "draw, cpu, float32"][1])


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tinygpt.check", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True, timeout=200)


def test_a_trained_model(tmp_path, capsys):
    model = GPT(TINY)
    path = model.save_checkpoint(1, None, tmp_path)
    done = run("--checkpoint", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 of 4 checks are ok"

    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes(50) + whole[-50:])
    assert check.main(["--checkpoint", str(path)]) == 1
    *_, row, last = capsys.readouterr().out.splitlines()
    assert re.match(rf"weights +FAILED +inf .*{path}", row)
    assert last == "1 of 2 checks are ok; FAILED: weights"

    weight = model.h[0].mlp.c_fc.weight
    array = weight.numpy()
    array[3, 5] = np.nan
    weight.assign(Tensor(array)).realize()
    finding = check.check_weights(model)
    assert not finding.ok and (finding.error, finding.where) == (1, "1 of h.0.mlp.c_fc.weight")
    bad = check.worst([check.Finding(0.5, 1.0), check.Finding(np.nan, 1.0), finding])
    assert not bad.ok and np.isnan(bad.error)


def test_a_bigram_and_what_it_does_not_have(rng, tmp_path, capsys):
    bigram = Bigram(BigramConfig(block_size=72, vocab_size=97))
    bigram.load_state_dict({"table": rng.standard_normal((97, 97))})
    path = bigram.save_checkpoint(1, None, tmp_path)
    assert check.main(["--checkpoint", str(path)]) == 0, capsys.readouterr().out
    assert check.main(["--checkpoint", str(path), "--offline"]) == 2
    assert "never downloaded" in capsys.readouterr().err


def test_a_mistake_gets_one_line_and_status_2(tmp_path, capsys):
    for flags, says in ((["--checkpoint", tmp_path / "none"], "there is no checkpoint"),
                        (["--kernels", "flash"], "kernels='flash' cannot run on CPU"),
                        (["--kernels", "x"], "kernels='x' is unknown"),
                        (["--threads", 65], "threads=65 is out of range"),
                        (["--no_ema"], "name a --checkpoint"),
                        (["--offline"], "name a --checkpoint"),
                        (["--device", "nonsense"], "there is no device 'nonsense'")):
        try:
            assert check.main(list(map(str, flags))) == 2
        finally:
            kernels.use("auto")
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and says in err


def test_threads_are_those_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "set_threads", asked.append)
    monkeypatch.setattr(check, "code_checks", lambda *_: [])
    check.run(check.CheckConfig(threads=3))
    check.run(check.CheckConfig())
    assert asked == [3]
