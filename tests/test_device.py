"""The compiler, the device, and writing into its memory."""

import os
import shlex
import stat
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Tensor, TinyJit, dtypes

from tinygpt import device
from tinygpt.device import DeviceError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with no CC, an empty PATH, a cache of its own, and a wheel `ziglang`."""
    wheel = tmp_path / "site packages" / "ziglang"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("")
    (wheel / "zig").write_text('#!/bin/sh\necho "$@"\n')
    (wheel / "zig").chmod(0o755)
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "ziglang", raising=False)
    monkeypatch.syspath_prepend(str(wheel.parent))
    return tmp_path


@pytest.fixture
def default_again():
    """The device is looked for anew, in the test and after it."""
    device.default.cache_clear()
    yield
    device.default.cache_clear()


def add_clang(machine) -> None:
    (machine / "bin" / "clang").write_text("#!/bin/sh\n")
    (machine / "bin" / "clang").chmod(0o755)


def test_cc_wins(machine, monkeypatch):
    add_clang(machine)
    monkeypatch.setenv("CC", "my-clang")
    device.export_compiler()
    assert os.environ["CC"] == "my-clang" and not (machine / "cache").exists()


def test_clang_on_the_path_comes_next(machine):
    add_clang(machine)
    device.export_compiler()
    assert "CC" not in os.environ and not (machine / "cache").exists()


def test_ziglangs_clang_comes_last_as_a_script_in_the_users_cache(machine, monkeypatch):
    device.export_compiler()
    script = os.environ["CC"]
    assert script.startswith(str(machine / "cache" / "tinygpt"))
    assert os.stat(script).st_mode & stat.S_IXUSR
    done = subprocess.run([script, "-x", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "clang -x a b\n"  # the path of zig has a space in it
    assert os.listdir(machine / "cache" / "tinygpt") == [os.path.basename(script)]
    before = os.stat(script).st_mtime_ns
    monkeypatch.delenv("CC")
    device.export_compiler()
    assert os.environ["CC"] == script and os.stat(script).st_mtime_ns == before


def test_a_cache_that_cannot_be_made_is_not_needed(machine):
    (machine / "cache").write_text("in the way")
    device.export_compiler()
    done = subprocess.run([os.environ["CC"], "-v"], capture_output=True, text=True, check=True)
    assert done.stdout == "clang -v\n"


def test_it_runs_without_any_cache(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    program = ("from tinygpt import device; from tinygrad import Tensor; device.prepare();"
               "print((Tensor([1.0]).contiguous() + 1).tolist())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, timeout=120,
                          env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
                          capture_output=True)
    assert (done.returncode, done.stdout) == (0, "[2.0]\n"), done.stderr


IMPORT = """
import os, signal, sys
def state():
    return (dict(os.environ), {s: signal.getsignal(s) for s in signal.valid_signals()},
            sorted(os.walk(sys.argv[2])))
for module in sys.argv[1].split():
    before = state()
    __import__(module)
    after = state()
    assert before == after, (module, [(a, b) for a, b in zip(before, after) if a != b])
"""


@pytest.mark.parametrize("modules, argv0", [
    ("tinygpt tinygpt.kernels gpt train generate tinygpt.evaluate tinygpt.check", "-c"),
    ("generate", "-m")])
def test_an_import_changes_no_environment_signal_handler_or_file(machine, modules, argv0):
    """On a machine where ziglang's clang is the only one, and where a package that imports this
    one is run by python -m."""
    env = {"PATH": os.environ["PATH"], "HOME": str(machine), "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": f"{ROOT}:{machine / 'site packages'}"}
    program = f"import sys; sys.argv[0] = {argv0!r}\n{IMPORT}"
    done = subprocess.run([sys.executable, "-c", program, modules, machine], env=env, text=True,
                          cwd=machine, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not find_spec("ziglang"), reason="ziglang is not installed")
@pytest.mark.parametrize("before", [
    "x = Tensor([1.0])", "fail()",
    "device.prepare(); (Tensor.ones(2).contiguous() + 1).tolist()"])
def test_a_model_finds_ziglangs_clang_whatever_was_computed_before_it(tmp_path, before):
    program = f"""
from gpt import GPT, GPTConfig
from tinygrad import Tensor
from tinygpt import device
def fail():
    try:
        (Tensor([1.0]).contiguous() + 1).realize()  # for which tinygrad looks for a clang
    except FileNotFoundError:
        return
    raise AssertionError("there is another clang")
{before}
model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4))
assert model(Tensor([[1, 2]])).numpy().shape == (1, 2, 8)
assert Tensor([1.0]).device == model.device == "CPU"
"""
    env = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_cache_is_made_in_the_repository(machine):
    assert not device.cache_dir().is_relative_to(ROOT)


def test_without_a_compiler_one_line_names_what_to_install(tmp_path):
    """The whole command, on a machine without clang and without ziglang."""
    (tmp_path / "a.txt").write_text("To sleep: perchance to dream.\n" * 50)
    program = ("import sys; sys.modules['ziglang'] = None; import train;"
               "sys.exit(train.main(['--data', 'a.txt', '--device', sys.argv[1], '--tokenizer',"
               "'byte', '--block_size=4', '--n_embd=4', '--n_head=1']))")
    env = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for name in ("auto", "cpu"):
        done = subprocess.run([sys.executable, "-c", program, name], env=env, cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: ")
        assert "pip install ziglang" in done.stderr
        seen = [name for name in os.listdir(tmp_path) if not name.startswith(".")]
        assert seen == ["a.txt"]  # and nothing was begun


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "", "false", "echo gcc"])
def test_a_cc_that_is_not_clang_is_refused(monkeypatch, default_again, tmp_path, compiler):
    if compiler.startswith("echo"):
        (tmp_path / "gcc").write_text("#!/bin/sh\necho gcc 13\n")
        (tmp_path / "gcc").chmod(0o755)
        compiler = str(tmp_path / "gcc")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(device, "Device", SimpleNamespace(DEFAULT="CPU", canonicalize=str))
    with pytest.raises(DeviceError, match="clang") as caught:
        device.default()
    assert "\n" not in str(caught.value) and f"CC={compiler}" in str(caught.value)


def test_without_a_device_the_message_names_what_to_install(monkeypatch, default_again):
    def nothing(self):
        raise RuntimeError("no usable devices")

    monkeypatch.setattr(device, "Device", type("Empty", (), {"DEFAULT": property(nothing)})())
    with pytest.raises(DeviceError, match="pip install ziglang"):
        device.default()


@pytest.mark.parametrize("name", ["toaster", "", "cpuu", "no such\ndevice", "gpu:x", "cuda:99",
                                  "cpu:1", "null", "NULL:1", "disk", "disk:/tmp/x", "npy", "rdma",
                                  "tinyfs"])
def test_a_device_that_is_unknown_or_missing_is_refused(name):
    before = device.default()
    with pytest.raises(DeviceError, match="device") as caught:
        device.choose(name)
    assert "\n" not in str(caught.value)
    assert device.default() == before


def test_a_driver_error_without_a_message_is_reported(monkeypatch):
    class Silent:
        def canonicalize(self, name):
            raise RuntimeError

    monkeypatch.setattr(device, "Device", Silent())
    with pytest.raises(DeviceError, match="'cuda'"):
        device.choose("cuda")


def test_a_device_can_be_chosen_by_any_case():
    before = device.default()
    try:
        assert device.choose("cpu") == device.choose("CPU") == "CPU"
        assert Tensor([1.0]).device == "CPU"
        assert "CPU" in device.describe() and "\n" not in device.describe()
    finally:
        device.choose(before)
    assert device.choose("auto") == before


def test_model_flops_utilization_is_against_the_devices_peak(monkeypatch):
    monkeypatch.setattr(device, "default", lambda: "CUDA")
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA H200")
    assert device.peak_flops("bfloat16")() == 989e12
    monkeypatch.setattr(device, "gpu_name", lambda: "a new one")
    assert device.peak_flops("bfloat16")() is None


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.int32, dtypes.uint32, dtypes.bool])
def test_write_changes_what_a_compiled_step_reads(dtype):
    tensor = Tensor.zeros(3, 4, dtype=dtype).contiguous().realize()
    step = TinyJit(lambda: (tensor + tensor).cast(dtypes.float32).realize())
    for n in range(5):
        data = (np.arange(12).reshape(3, 4) + n) % (2 if dtype == dtypes.bool else 100)
        device.write(tensor, data.tolist() if n % 2 else data)
        array = data.astype(tensor.numpy().dtype)
        assert np.array_equal(tensor.numpy(), array)
        assert np.array_equal(step().numpy(), (array + array).astype(np.float32))


def test_write_takes_any_layout_and_nothing_of_another_size():
    tensor = Tensor.zeros(2, 3).contiguous().realize()
    device.write(tensor, np.arange(6.0).reshape(3, 2).T)
    assert tensor.tolist() == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError):
        device.write(tensor, [1.0, 2.0])
    assert tensor.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_the_compiler_of_this_machine_is_named():
    if "CC" in os.environ:
        done = subprocess.run([os.environ["CC"], "--version"], capture_output=True, text=True,
                              check=False)
        assert "clang" in done.stdout, shlex.quote(os.environ["CC"])
