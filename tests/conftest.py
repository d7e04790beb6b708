"""What several test files share."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DEV", "CPU")  # so that no test looks for other devices first

VERSES = """ROMEO:
The harbour sleeps, and I that know her dreams
Must wake and walk them with a lead and line.

JULIET:
Then walk them softly: they are lightly made.

"""


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)


@pytest.fixture
def without_samples(monkeypatch):
    """Runs in this process end without a sample, which would have to be compiled."""
    monkeypatch.setattr("tinygpt.training.run.Run.sample", lambda run, model: None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for the tokens of texts."""
    from tinygpt.data import documents, load

    monkeypatch.setattr(load, "DATA_DIR", tmp_path)
    monkeypatch.setattr(documents, "MTIME_RESOLUTION", 0)
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def config(tmp_path):
    """Six steps of a tiny model, into a folder that is not there yet."""
    from gpt import TrainConfig  # once DEV is set

    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=4, max_iters=6,
                       eval_interval=3, eval_iters=1, log_interval=1, warmup_iters=2,
                       learning_rate=1e-2, lr_decay_iters=6)


@pytest.fixture
def text():
    """A little English text, enough for a tiny model's data."""
    words = VERSES.split(" ")
    order = np.random.default_rng(7).integers(0, len(words), 4000)
    return " ".join(words[i] for i in order)


@pytest.fixture
def text_file(tmp_path, text):
    path = tmp_path / "verses.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def command(tmp_path):
    """Runs one of the project's commands in an empty folder, as a user would."""

    def run(script: str, *flags, **kwargs) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)],
                              cwd=kwargs.pop("cwd", tmp_path), env=env, text=True,
                              capture_output=True, timeout=300, **kwargs)

    return run


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Runs the main function of a command in an empty folder: faster than a process of its own."""

    def run(module, *flags) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        try:
            status = module.main(list(map(str, flags)))
        except SystemExit as end:  # of flags that are not understood
            status = end.code
        return subprocess.CompletedProcess(flags, status, *capsys.readouterr())

    return run


@pytest.fixture
def gpt2_files(monkeypatch):
    """tiktoken's files of GPT-2's encoding, or a skip."""
    shared = ROOT.parent / "shared" / "tiktoken"
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not shared.is_dir():
            pytest.skip("GPT-2's tokenizer files are not here: set TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared))


def pytest_configure():
    from tinygrad import helpers  # once DEV is set

    from tinygpt import device

    if hasattr(helpers, "PARALLEL"):  # 0.14's processes that compile end after 16 kernels each
        helpers.PARALLEL.value = 0  # the commands that tests start have them
    gc.set_threshold(50_000, 20, 20)  # compiling takes a sixth less time
    device.prepare()  # for tests that compute without a model


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Each process takes files that follow each other, so that what tests share is compiled once,
    and at the end half of what another one has left."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def frozen_caches():
    """Spares garbage collection what earlier test files left in tinygrad's caches: searching that
    takes many seconds in a process that has run thousands of tests. Forgets the kernels' tables of
    sizes, which each realize would search."""
    from tinygpt.kernels.cpu import kernel  # once DEV is set

    kernel.constants.cache_clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_gradients_left():
    """Frees what `backward` left in a test: it gives a gradient to every tensor in a graph, also to
    those that the gradients of kernels refer to, which would live on with the graph. Each realize
    searches the graphs of all tensors that are alive."""
    from tinygrad.tensor import all_tensors  # once DEV is set

    yield
    for tensor in [ref() for ref in all_tensors]:
        if tensor is not None:
            tensor.grad = None


@pytest.fixture(autouse=True)
def c_kernels_on_a_cpu(request):
    """Skips the tests of C kernels where the default device is another, as on a GPU."""
    from tinygrad import Device  # once DEV is set

    values = getattr(request.node, "callspec", None) and request.node.callspec.params.values()
    asked = any(isinstance(value, str) and value == "cpu" for value in values or ())
    if asked and request.path.parent.name == "kernels" and not Device.DEFAULT.startswith("CPU"):
        pytest.skip("the C kernels are for a CPU")


def pytest_sessionfinish(session):
    """The tokens of the tests' texts do not stay in the cache; workers of xdist come first."""
    if not hasattr(session.config, "workerinput"):
        for folder in (ROOT / "data" / "cache").glob("verses-*"):
            shutil.rmtree(folder, ignore_errors=True)
