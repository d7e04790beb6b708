"""Training loops of users, with tinygrad's optimizers: they accumulate, clip and read gradients.

Tensors that our kernels make are assigned to, sliced and read, and have to behave as those that
tinygrad makes.
"""

import gc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from operations import CASES, cotangent, draw
from operations import constants as as_tensors
from operations import tensors as inputs_of
from tiny import TINY
from tinygrad import Tensor, TinyJit, nn
from tinygrad.tensor import all_tensors

from gpt import GPT, TrainConfig
from tinygpt import kernels
from tinygpt.data.load import TokenData
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.kernels.training import training
from tinygpt.training.run import prepare

OPERATIONS = ("linear", "embedding", "layer_norm", "rms_norm", "gelu", "swiglu", "rope",
              "attention", "cross_entropy")
for_each_kernel = pytest.mark.parametrize("operation, implementation", [
    *((operation, "cpu") for operation in OPERATIONS), ("linear", "portable"),
    ("attention", "portable")])


def batch(seed: int, rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, TINY.block_size + 1))
    return ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)


def numbers(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The values of tensors that are computed together."""
    Tensor.realize(*tensors.values())
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def model_and_batch(dropout: float = 0.0):
    return GPT(replace(TINY, dropout=dropout)), *map(Tensor, batch(0))


@for_each_kernel
def test_gradients_accumulate_and_can_be_assigned_to(operation, implementation):
    shapes, options = CASES[operation][0]
    arrays = draw(shapes)

    def gradients(name: str, times: int) -> dict[str, Tensor]:
        inputs, settings = inputs_of(arrays), as_tensors(options)
        for _ in range(times):
            y = getattr(kernels, operation)(**inputs, **settings, implementation=name)
            (y * Tensor(cotangent(y.shape))).sum().backward()
        return {k: x.grad for k, x in inputs.items()}

    right = numbers(gradients("reference", 1))
    for name, grad in numbers(gradients(implementation, 2)).items():
        size = np.abs(right[name]).max()
        np.testing.assert_allclose(grad, 2 * right[name], atol=2e-5 * size, rtol=0)
    ours = gradients(implementation, 1)
    norm = sum(g.square().sum() for g in ours.values()).sqrt()
    for grad in ours.values():
        grad.assign(grad / norm)
    Tensor.realize(*ours.values())  # together, as an optimizer does
    total = sum(np.square(g.numpy().astype(np.float64)).sum() for g in ours.values())
    assert total == pytest.approx(1, rel=1e-4)
    for name, grad in gradients(implementation, 1).items():
        grad += 1
        grad[:1] += 1
        wanted = right[name] + 1
        wanted[:1] += 1
        np.testing.assert_allclose(grad.numpy(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("divisor", [None, 2])
def test_a_loop_keeps_no_tensors_of_former_steps(divisor):
    """Each realize would search them, so that every step would be slower than the one before."""
    model, x, y = model_and_batch()
    optimizer = nn.optim.SGD(list(model.state_dict().values()), lr=0.1)
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x, y)[1]
        (loss / divisor if divisor else loss).backward()
        with training():
            optimizer.step()
        del loss
        gc.collect()
        counts.append(sum(ref() is not None for ref in list(all_tensors)))
    assert counts[1] == counts[2] == counts[3]


@for_each_kernel
def test_an_output_can_be_assigned_to_and_fed_back(operation, implementation):
    shapes, options = CASES[operation][0]
    inputs, settings = inputs_of(draw(shapes)), as_tensors(options)

    def output() -> Tensor:
        return getattr(kernels, operation)(**inputs, **settings, implementation=implementation)

    right = np.asarray(output().numpy())
    y = output()
    before = y * 3
    y.assign(y * 0.5)
    np.testing.assert_allclose(y.numpy(), right * 0.5, rtol=1e-6)
    np.testing.assert_allclose(before.numpy(), right * 3, rtol=1e-6)
    y = output()
    y += 1
    wanted = kernels.gelu(Tensor(right.tolist()) + 1, implementation="reference").numpy()
    fed_back = kernels.gelu(y, implementation=implementation).numpy()
    np.testing.assert_allclose(fed_back, wanted, atol=1e-5)
    y = output().realize()
    y.assign(y - 1)
    np.testing.assert_allclose(y.numpy(), right - 1, rtol=1e-6, atol=1e-6)
    if right.ndim:
        y = output()
        y[:1] = 7
        assert (y.numpy()[:1] == 7).all() and np.array_equal(y.numpy()[1:], right[1:])


def test_accumulation_clipping_and_assignment_of_a_model_equal_the_reference():
    def gradients(implementation: str, times: int) -> list[dict[str, np.ndarray]]:
        """Those of the same batch, at each of so many calls."""
        kernels.use(implementation)
        try:
            model = GPT(TINY)
            weights = model.state_dict()

            @TinyJit
            def step(x: Tensor, y: Tensor) -> list[Tensor]:
                for w in weights.values():
                    w.grad = None
                for _ in range(2):
                    (model(x, y)[1] / 2).backward()
                norm = sum(w.grad.square().sum() for w in weights.values()).sqrt()
                for w in weights.values():
                    w.grad.assign(w.grad * (0.1 / norm))
                grads = [w.grad for w in weights.values()]
                Tensor.realize(*grads)
                return grads

            found = []
            for seed in (2, 1, 2)[:times]:
                x, y = (Tensor(a).realize() for a in batch(seed))
                grads = step(x, y)
                if seed == 2:
                    found.append(dict(zip(weights, [g.numpy() for g in grads], strict=True)))
            return found
        finally:
            kernels.use("auto")

    (right,) = gradients("reference", 1)
    first, replayed = gradients("auto", 3)
    for name, grad in right.items():
        for ours in (first, replayed):
            np.testing.assert_allclose(ours[name], grad, atol=1e-6, err_msg=name)


def groups(model: GPT, make) -> nn.optim.OptimizerGroup:
    """Weight decay of matrices and not of vectors, as in train.py."""
    weights = list(model.state_dict().values())
    return nn.optim.OptimizerGroup(make([w for w in weights if w.ndim > 1], 0.1),
                                   make([w for w in weights if w.ndim == 1], 0.0))


def batch_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    """One of four batches, which a model can memorize."""
    return batch(number % 4)


def own_step(model: GPT, optimizer, *batches: Tensor) -> Tensor:
    """The loss of a step that accumulates the gradients of two micro-batches."""
    optimizer.zero_grad()
    losses = []
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        losses.append(model(x, y)[1] / 2)
        losses[-1].backward()
    return (losses[0] + losses[1]).realize(*optimizer.schedule_step())


def test_a_loop_with_tinygrads_adamw_equals_train(tmp_path):
    model = GPT(TINY)
    optimizer = groups(model, lambda params, decay: nn.optim.AdamW(
        params, lr=1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=decay))
    step = TinyJit(partial(own_step, model, optimizer))
    with training():
        ours = [step(*[Tensor(a).realize() for n in (0, 1) for a in batch_of(2 * number + n)]
                     ).item() for number in range(30)]
    config = TrainConfig(batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
                         warmup_iters=0, schedule="constant", grad_clip=0, weight_decay=0.1,
                         out_dir=str(tmp_path))
    data = TokenData(np.zeros(99, np.uint16), np.zeros(99, np.uint16), ByteTokenizer(), "zeros")
    run = prepare(GPT(TINY), config, data)
    theirs = [run.steps.train(number, batch_of, 1e-2, np.inf)[0] for number in range(30)]
    assert theirs[-1] < theirs[0] - 0.2
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_step_of_other_optimizers_equals_the_reference_kernels():
    """Without a TinyJit; every loss is read before its gradients."""
    def stepped(implementation: str) -> dict[str, np.ndarray]:
        kernels.use(implementation)
        try:
            model = GPT(TINY)
            block, *others = (w for name, w in sorted(model.state_dict().items()) if w.ndim > 1)
            optimizer = nn.optim.OptimizerGroup(nn.optim.Muon([block], lr=1e-2),
                                                nn.optim.SGD(others, lr=0.1, momentum=0.9))
            losses = []
            for x, y in (map(Tensor, batch_of(n)) for n in (0, 1)):
                loss = model(x, y)[1] / 2
                losses.append(loss.item())
                loss.backward()
            with training():
                optimizer.step()
            return {name: w.numpy() for name, w in model.state_dict().items()} | {
                "loss": np.array(losses)}
        finally:
            kernels.use("auto")

    start = {name: w.numpy() for name, w in GPT(TINY).state_dict().items()}
    ours, theirs = stepped("auto"), stepped("reference")
    for name, right in theirs.items():
        assert name == "loss" or (right.ndim == 1) == np.array_equal(right, start[name])
        np.testing.assert_allclose(ours[name], right, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("implementation", ["auto", "portable"])
def test_a_loss_is_read_before_backward_and_after_the_step(implementation):
    kernels.use(implementation)
    try:
        model, x, y = model_and_batch()
        weights = model.state_dict()
        optimizer = nn.optim.SGD(list(weights.values()), lr=1.0)
        loss = model(x, y)[1]
        value = loss.item()
        assert loss.numpy() == np.float32(value) and loss.realize().item() == value
        loss.backward()
        grads = numbers({name: w.grad for name, w in weights.items()})
        before = numbers(weights)

        optimizer.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        with training():
            optimizer.step()
        assert loss.item() == value  # that of the weights before the step
        for name, w in weights.items():  # the gradients, with a loss that was not read before them
            np.testing.assert_allclose(before[name] - w.numpy(), grads[name], atol=1e-6,
                                       err_msg=name)
        assert model(x, y)[1].item() < value - 0.01
    finally:
        kernels.use("auto")


def test_tensor_training_switches_dropout():
    model, x, y = model_and_batch(dropout=0.5)
    still = model(x, y)[1].item()
    assert model(x, y)[1].item() == still
    with training():
        Tensor.manual_seed(1)
        first, second = model(x, y)[1].item(), model(x, y)[1].item()
        Tensor.manual_seed(1)
        again = model(x, y)[1].item()

        @TinyJit
        def replayed(x: Tensor, y: Tensor) -> Tensor:
            return model(x, y)[1].realize()

        drawn = {replayed(x, y).item() for _ in range(5)}
    assert len({still, first, second}) == 3 and again == first and len(drawn) == 5
    assert model(x, y)[1].item() == still


def test_an_evaluation_inside_a_training_loop_has_no_dropout(tmp_path, text_file):
    from tinygpt.data.load import load_data

    data = load_data(text_file, "byte", 256)
    model, *_ = model_and_batch(dropout=0.5)
    run = prepare(model, TrainConfig(batch_size=4, out_dir=str(tmp_path)), data)
    batch = partial(run.val_batches.spread, count=2)
    right = run.steps.evaluate(batch, 2)
    with training():
        assert run.steps.evaluate(batch, 2) == right
        fresh = prepare(model, TrainConfig(batch_size=4, out_dir=str(tmp_path)), data)
        assert fresh.steps.evaluate(batch, 2) == right


@pytest.mark.parametrize("mark", [-1, -100])
def test_negative_targets_are_not_counted(mark):
    model, x, y = model_and_batch()
    targets = y.numpy().copy()
    targets[:, :4] = mark
    logits, loss = model(x, Tensor(targets))
    rows = logits.numpy().astype(np.float64).reshape(-1, TINY.vocab_size)
    nats = np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), y.numpy().reshape(-1)]
    counted = targets.reshape(-1) >= 0
    assert loss.item() == pytest.approx(nats[counted].mean(), rel=1e-5)


@pytest.mark.parametrize("which", ["idx", "targets"])
def test_ids_outside_the_vocabulary_are_refused(which):
    model, x, y = model_and_batch()
    for bad in (TINY.vocab_size, 10**6, *([-1] if which == "idx" else [])):
        ids = (x if which == "idx" else y).numpy().copy()
        ids[2, 3] = bad
        pair = (Tensor(ids), y) if which == "idx" else (x, Tensor(ids))
        with pytest.raises(ValueError, match=f"{which} has token id {bad}, outside the vocab"):
            model(*pair)
