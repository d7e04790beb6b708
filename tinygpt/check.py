"""Checks this machine and this copy of the code: `python -m tinygpt.check`. All kernels that run
here are checked, or with --kernels those of one implementation.

Prints a line for each check: ok or FAILED, the largest error and the tolerance. It is for whoever
changed gpt.py or a kernel, or has a new device. With --checkpoint it checks a trained model
instead. The exit status is 0 if all checks are ok, 1 if one failed, and 2 if nothing could be
checked: a wrong flag, no checkpoint, no device.
"""

import os
import signal
import sys

# Ctrl-C while modules are loaded; main() answers it better
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import functools
import math
import tempfile
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tinygrad import Tensor
from tinygrad.helpers import Context

from gpt import GPT, GPTConfig
from tinygpt import checkpoint, command, device, kernels
from tinygpt.config import LoadConfig, check, setting
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.flags import parse_flags
from tinygpt.huggingface.pretrained import is_pretrained
from tinygpt.kernels import cases
from tinygpt.kernels.jit import compiled
from tinygpt.kernels.random import make_key
from tinygpt.model.language_model import LanguageModel
from tinygpt.training.config import TrainConfig
from tinygpt.training.optim import make_optimizer

# Tolerances: of the loss, relative to the loss; of a slope, relative to the average slope of such a
# gradient in a random direction; of a cached logit, relative to the largest. float32 rounds to
# 6e-8, and on a CPU the errors are 1e-7, 1e-6 and 1e-6. A mistake in one weight is 1e-2 and more.
LOSS, SLOPE, LOGIT = 1e-5, 1e-4, 2e-5
ROOT = Path(__file__).parent.parent  # of this copy of the code
DIRECTIONS = 4  # in which the loss is differentiated
STEP = 1e-4  # of weights in float64: the difference quotient is right to about 1e-8
LOSS_FN = functools.partial(kernels.cross_entropy, label_smoothing=0.1, z_loss=1e-3)
# generated texts and their tokens: more than a chunk, then past block_size of a tiny model
TEXTS, PROMPT, WRITTEN = 8, 66, 10

# Together they have every option of the architecture both ways.
TINY = dict(block_size=72, vocab_size=97, n_layer=1, n_head=6, n_embd=36)
MODELS = {
    "gpt2": dict(n_layer=2, activation="gelu_tanh"),
    "llama": dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=3, bias=False,
                  tie_weights=False),
    "gptj": dict(position="rope", parallel=True, qk_norm=True, dropout=0.2),
    "smollm": dict(position="rope", head_dim=10, bias=False, qkv_bias=True, nope_interval=2,
                   n_layer=2, rope_scaling="llama3", rope_original_length=32),
    "window": dict(sliding_window=4, n_kv_head=1, norm="rmsnorm", n_inner=17, qk_norm=True),
}


@dataclass(frozen=True, kw_only=True)
class CheckConfig(LoadConfig):
    """The settings of a check."""

    checkpoint: str | None = setting(None,
        "check this trained model, as evaluate takes one: its weights, its gradients and its "
        "cached decoding; unset: the device, the kernels and tiny models", section="model")

    def __post_init__(self):
        check(self)
        if self.checkpoint is None and (not self.ema or self.offline or self.block_size):
            raise ValueError("no_ema, offline and block_size have no effect on tiny models: name a "
                             "--checkpoint, or leave them out")


@dataclass(frozen=True)
class Finding:
    """The largest error that a check has found, its tolerance, and where it is."""

    error: float
    tolerance: float
    where: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for nan

    def by_how_much(self) -> float:
        """The error in units of its tolerance, to compare findings."""
        if self.tolerance and not math.isnan(self.error):
            return self.error / self.tolerance
        return 0.0 if self.ok else math.inf


Check = tuple[str, Callable[[], Finding]]  # a name, and a function that measures


def worst(findings: Iterable[Finding]) -> Finding:
    return max(findings, key=Finding.by_how_much)


# ---- the machine


def check_compiler() -> Finding:
    """Compiles a kernel that is in no cache, and runs it on the device."""
    values = np.arange(1000, dtype=np.int32)
    number = int(np.random.default_rng().integers(1, 4000))  # makes the kernel a new one
    with Context(CACHELEVEL=0):
        total = (Tensor(values) * number).sum().item()
    return Finding(abs(total - number * values.sum()), 0, "the sum of 1000 integers")


# ---- the kernels


@functools.cache
def specified(operation: str, number: int) -> dict[str, np.ndarray]:
    """The right values of a case: `reference` in float64 on the CPU."""
    shapes, options = (cases.CASES | cases.WITHOUT_GRADIENT)[operation][number]
    with Context(NOOPT=1):  # compiles in half the time
        return cases.run(operation, "reference", cases.draw(shapes), options, "float64",
                         device="CPU")


def check_kernel(operation: str, implementation: str, dtype: str) -> Finding:
    """An implementation against the reference, in every case of the operation."""
    found = []
    for number, (shapes, options) in enumerate((cases.CASES | cases.WITHOUT_GRADIENT)[operation]):
        if number and dtype != "float32":
            continue
        right = specified(operation, number)
        arrays = cases.draw(shapes)
        ours = cases.run(operation, implementation, arrays, options, dtype)
        case = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        for name, array in right.items():
            what = f"gradient of {name}" if operation in cases.CASES and name != "y" else name
            found.append(Finding(cases.error(ours[name], array),
                                 cases.tolerance(operation, dtype, array), f"{what}, of {case}"))
    return worst(found)


def kernel_checks(wanted: str) -> list[Check]:
    """A check for each operation, implementation and dtype: of all implementations that run here
    except the reference, or of the wanted one. Raises ValueError if that one cannot run."""
    names = [name for name in kernels.IMPLEMENTATIONS if cases.can_run(name)]
    if wanted != "auto" and wanted not in names:
        raise ValueError(f"kernels={wanted!r} cannot run on {device.default()}: choose auto or one "
                         f"of {', '.join(names)}")
    names = [name for name in names if name != "reference"] if wanted == "auto" else [wanted]
    return [(f"{operation}, {name}, {dtype}",
             functools.partial(check_kernel, operation, name, dtype))
            for name in names for operation in cases.CASES | cases.WITHOUT_GRADIENT
            if name in cases.implementations(operation) for dtype in cases.TOLERANCE
            if (dtype == "float32" or operation in cases.IN_16_BITS)
            and cases.can_run(name, dtype, operation)]


# ---- the model


def tiny_model(options: dict) -> GPT:
    """A model whose weights are far from zero and from one another, so that all have an effect."""
    model = GPT(GPTConfig(**TINY | options))
    rng = np.random.default_rng(1)
    model.load_state_dict({name: w.numpy() + 0.3 * rng.standard_normal(w.shape)
                           for name, w in model.state_dict().items()})
    return model


@contextmanager
def reference_kernels():
    before = kernels.in_use()
    kernels.use("reference")
    try:
        yield
    finally:
        kernels.use(before)


class Twin:
    """The loss of a model on a batch as a function of its weights, in float64.

    It is a model of the same class with float64 tensors and reference kernels on the CPU, which
    every machine has and which has float64. batch is ids, targets and dropout key, if any.
    """

    def __init__(self, model: LanguageModel, batch: list[np.ndarray]):
        kind, config = type(model), model.config
        self.model = kind.fitting(config, kind.shapes(config), "the model")
        self.model.compute_dtype = "float64"
        self.weights = self.model.state_dict()
        for weight in self.weights.values():
            weight.replace(Tensor.zeros(weight.shape, dtype="float64", device="CPU")
                           .contiguous().realize())
        self.batch = [Tensor(array, device="CPU").realize() for array in batch]
        self.step = compiled(self._step)

    def loss(self, arrays: dict[str, np.ndarray]) -> float:
        for name, array in arrays.items():
            device.write(self.weights[name], array)
        with reference_kernels():
            return self.step(*self.batch).item()

    def _step(self, *batch: Tensor) -> Tensor:
        return loss_of(self.model, batch).realize()


def loss_of(model: LanguageModel, batch) -> Tensor:
    ids, targets, *key = batch
    return model(ids, targets, *(key or [None]), LOSS_FN)[1]


def slopes(twin: Twin, weights: dict[str, np.ndarray], grads: dict[str, np.ndarray],
           names: Iterable[str], seed: int) -> tuple[float, float, float]:
    """The slope of the loss in a random direction of unit length in the named weights: by central
    differences, by the gradient, and the average over such directions.

    A tensor's part of the direction is scaled by the inverse of its gradient's norm, up to 100
    times, so that all tensors contribute alike.
    """
    rng = np.random.default_rng(seed)
    norms = {name: float(np.linalg.norm(grads[name])) for name in names}
    least = max(0.01 * math.hypot(*norms.values()), 1e-30)
    direction = {name: rng.standard_normal(weights[name].shape) / max(norm, least)
                 for name, norm in norms.items()}
    length = math.sqrt(sum((d**2).sum() for d in direction.values()))
    direction = {name: d / length for name, d in direction.items()}
    up, down = (twin.loss({name: weights[name] + h * d for name, d in direction.items()})
                for h in (STEP, -STEP))
    twin.loss({name: weights[name] for name in direction})
    ours = sum((grads[name] * d).sum() for name, d in direction.items())
    usual = math.hypot(*(norm * float(np.linalg.norm(direction[name]))
                         / math.sqrt(direction[name].size) for name, norm in norms.items()))
    return (up - down) / (2 * STEP), ours, max(usual, 1e-30)


def check_gradients(model: LanguageModel) -> Finding:
    """Compares the loss with that in float64, and its gradient with finite differences there."""
    config = model.config
    rng, T = np.random.default_rng(2), min(config.block_size, 12)
    batch = [rng.integers(0, config.vocab_size, (2, T)).astype(np.int32) for _ in range(2)]
    batch[1][0, T // 2] = -1
    if config.dropout:
        batch.append(make_key(1))
    tensors = model.state_dict()
    loss = loss_of(model, [Tensor(array).realize() for array in batch])
    grads = loss.gradient(*tensors.values())
    Tensor.realize(loss, *grads)
    grads = {name: g.numpy().astype(np.float64) for name, g in zip(tensors, grads, strict=True)}
    weights = {name: w.numpy().astype(np.float64) for name, w in tensors.items()}

    twin = Twin(model, batch)
    right = twin.loss(weights)
    found = [Finding(abs(loss.item() - right) / abs(right), LOSS,
                     f"the loss {loss.item():.7f}, {right:.7f} in float64")]
    for seed in range(DIRECTIONS):
        there, ours, usual = slopes(twin, weights, grads, grads, seed)
        found.append(Finding(abs(ours - there) / usual, SLOPE, f"direction {seed + 1}"))
    if (bad := worst(found[1:])).ok:
        return worst(found)
    each = {name: slopes(twin, weights, grads, [name], 0) for name in grads}
    blamed = [f"{name}: slope {ours:.3e}, {there:.3e} by finite differences"
              for name, (there, ours, usual) in each.items()
              if not abs(ours - there) <= SLOPE * usual]
    return Finding(bad.error, SLOPE, "the gradient of " + "; of ".join(blamed[:3]) + (
        f"; of {len(blamed) - 3} more" if blamed[3:] else "") if blamed else bad.where)


def check_decoding(model: LanguageModel, prompt: int, written: int) -> Finding:
    """Generates text with the key-value cache; every token has to be the likeliest one in a full
    forward pass over the same window."""
    block, V = model.config.block_size, model.config.vocab_size
    if model.tokenizer is not None:
        V = min(V, model.tokenizer.vocab_size)
    ids = np.random.default_rng(3).integers(0, V, (TEXTS, prompt)).astype(np.int32)
    text = model.generate(ids, written, temperature=0, window_hop=1).numpy()
    ends = range(prompt, prompt + written)
    windows = np.zeros((written, TEXTS, min(block, ends[-1])), np.int32)
    for window, end in zip(windows, ends, strict=True):  # later tokens have no effect
        window[:, :min(end, block)] = text[:, max(0, end - block):end]
    logits = model(Tensor(windows.reshape(written * TEXTS, -1))).float().numpy()[..., :V]
    logits = logits.reshape(written, TEXTS, -1, V)
    found = []
    for end, rows in zip(ends, logits, strict=True):
        after = rows[:, min(end, block) - 1]  # (TEXTS, V)
        short = (after.max(-1) - after[np.arange(TEXTS), text[:, end]]) / np.abs(after).max()
        row = int(short.argmax())
        found.append(Finding(float(short[row]), LOGIT, f"token {end + 1} of text {row + 1} is "
                             f"{text[row, end]}, by the full pass {after[row].argmax()}"))
    return worst(found)


def check_saving(folder: Path) -> Finding:
    """Saves and loads a model and its optimizer: every tensor to the bit, and the metadata."""
    model, rng = tiny_model(dict(vocab_size=256)), np.random.default_rng(4)
    model.tokenizer = ByteTokenizer()
    optimizer = make_optimizer(model.state_dict(), TrainConfig())
    for state in optimizer.state_dict().values():
        device.write(state, rng.standard_normal(state.shape))
    path = model.save_checkpoint(7, optimizer, folder)
    twin = GPT.from_checkpoint(path)
    again = make_optimizer(twin.state_dict(), TrainConfig())
    metadata = twin.load_checkpoint(path, again)
    differing = [name for name, ours, theirs in (
        ("iter_num", 7, metadata["iter_num"]), ("the config", model.config, twin.config),
        ("the tokenizer", model.tokenizer.to_json(), twin.tokenizer.to_json())) if ours != theirs]
    for before, after in ((model, twin), (optimizer, again)):
        loaded = after.state_dict()
        differing += [name for name, t in before.state_dict().items()
                      if t.numpy().tobytes() != loaded[name].numpy().tobytes()]
    return Finding(len(differing), 0, ", ".join(differing[:3]))


def check_weights(model: LanguageModel) -> Finding:
    """The number of weights that are not finite."""
    bad = {name: int((~np.isfinite(w.numpy())).sum()) for name, w in model.state_dict().items()}
    return Finding(sum(bad.values()), 0, ", ".join(
        f"{count} of {name}" for name, count in bad.items() if count))


# ---- all of them


def code_checks(config: CheckConfig, folder: Path) -> list[Check]:
    found = kernel_checks(config.kernels)
    for name, options in MODELS.items():
        model = functools.cache(functools.partial(tiny_model, options))
        found += [
            (f"gradients, model like {name}", lambda model=model: check_gradients(model())),
            (f"cached decoding, model like {name}",
             lambda model=model: check_decoding(model(), PROMPT, WRITTEN))]
    return [*found, ("save and load", lambda: check_saving(folder))]


def checkpoint_checks(config: CheckConfig) -> list[Check]:
    """The checks of a trained model. Raises ValueError if there is none."""
    path = config.checkpoint
    if not is_pretrained(path):
        checkpoint.load_metadata(path)
    try:
        model = command.load_model(path, config.ema, config.offline,
                                   block_size=config.block_size)
    except checkpoint.CheckpointError as error:
        damage = Finding(math.inf, 0, str(error))
        return [("weights", lambda: damage)]
    prompt = max(1, min(PROMPT, model.config.block_size - WRITTEN // 2))
    return [("weights", lambda: check_weights(model)),
            ("gradients", lambda: check_gradients(model)),
            ("cached decoding", lambda: check_decoding(model, prompt, WRITTEN))]


def measured(measure: Callable[[], Finding]) -> Finding:
    """What a check finds, an exception included."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - whatever a changed kernel raises is a finding
        ours = [f for f in traceback.extract_tb(error.__traceback__)
                if Path(f.filename).is_relative_to(ROOT)]
        at = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"
        message = (str(error).strip() or "without a message").splitlines()[0]
        return Finding(math.inf, 0, f"{at}: {type(error).__name__}: {message}")


def report(checks: list[Check]) -> list[str]:
    """Runs the checks and prints a line for each; returns the names of those that failed."""
    failed = []
    print(f"{'check':38} {'':6} {'error':>8} {'tolerance':>9}")
    for name, measure in checks:
        print(f"{name:38} ", end="", flush=True)  # before the check, which may crash
        finding = measured(measure)
        mark = "ok" if finding.ok else "FAILED"
        where = "" if finding.ok else finding.where
        print(f"{mark:6} {finding.error:8.1e} {finding.tolerance:9.1e}  {where}".rstrip(),
              flush=True)
        if not finding.ok:
            failed.append(name)
    return failed


def run(config: CheckConfig) -> bool:
    """Runs all checks of config and prints the findings; returns whether all are ok."""
    command.use_machine(config)
    with tempfile.TemporaryDirectory(prefix="tinygpt-") as folder:
        checks = [("compiler and device", check_compiler), *(
            checkpoint_checks(config) if config.checkpoint else code_checks(config, Path(folder)))]
        print(f"{device.describe()}, tinygrad {version('tinygrad')}")
        failed = report(checks)
    print(f"{len(checks) - len(failed)} of {len(checks)} checks are ok"
          + (f"; FAILED: {'; '.join(failed)}" if failed else ""), flush=True)
    return not failed


def main(argv: list[str] | None = None) -> int:
    command.prepare()
    try:
        flags = parse_flags({"check": CheckConfig}, sys.argv[1:] if argv is None else argv, __doc__)
        return 0 if run(flags["check"]) else 1
    except command.FAILURES as error:
        return command.report("check", error, "give a smaller model")


if __name__ == "__main__":
    sys.exit(main())
