"""Training on conversations: rows equal one conversation at a time; accumulation; resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt import checkpoint, kernels
from tinygpt.data.load import load_data
from tinygpt.evaluate import score_conversations
from tinygpt.kernels.cases import can_run
from tinygpt.training.run import prepare
from train import train

ROPE = GPTConfig(block_size=96, vocab_size=256, n_layer=1, n_head=4, n_kv_head=2, n_embd=16,
                 position="rope", norm="rmsnorm", bias=False)
LEARNED = replace(ROPE, position="learned", n_head=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations of one or two turns, of very different numbers of answered tokens."""
    rng = np.random.default_rng(1)
    lines = []
    for i in range(40):
        answer = "no" * int(rng.integers(1, 9))
        turn = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turn * (1 + (i % 5 == 0))}))
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("\n".join(lines))
    return load_data(str(path), "byte", 256)


def one_a_row(batch) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of the conversations of a batch, each from the beginning of a row."""
    found = [(ids[starts == begin], targets[starts == begin])
             for ids, targets, starts in zip(*batch, strict=True) for begin in np.unique(starts)]
    x, y = np.zeros((2, len(found), batch[0].shape[1]), np.int32)
    y[:] = -1
    for row, (ids, targets) in enumerate(found):
        x[row, :len(ids)], y[row, :len(ids)] = ids, targets
    return x, y


@pytest.mark.parametrize("implementation, shape", [("cpu", ROPE), ("portable", LEARNED)])
def test_a_row_equals_one_conversation_at_a_time(data, implementation, shape):
    if not can_run(implementation):
        pytest.skip(f"no {implementation} kernels here")
    kernels.use(implementation)
    try:
        model = GPT(shape, seed=3)
        names, weights = zip(*model.state_dict().items(), strict=True)
        batch = data.batches(shape.block_size, 2, 1)[0].batch(0)
        alone = one_a_row(batch)
        empty = [np.full((len(alone[0]) - 2, shape.block_size), i, np.int32) for i in (0, -1, 0)]
        assert len(empty[0]) > 2
        # as many rows in both, so that most kernels are compiled once
        x, y, starts = (Tensor(np.concatenate(pair)) for pair in zip(batch, empty, strict=True))
        losses = [model(x, y, starts=starts)[1], model(*map(Tensor, alone))[1]]
        grads = [loss.gradient(*weights) for loss in losses]
        if implementation == "cpu":  # portable kernels are slow to compile
            loss, chain = model.checkpointed_loss(x, y, starts=starts)
            losses.append(loss)
            grads.append(chain.gradients(loss, model.state_dict()))
        Tensor.realize(*losses, *(g for each in grads for g in each))
        for loss, each in zip(losses[1:], grads[1:], strict=True):
            assert loss.item() == pytest.approx(losses[0].item(), abs=1e-5)
            for name, ours, right in zip(names, grads[0], each, strict=True):
                ours, right = ours.numpy(), right.numpy()
                assert np.abs(ours - right).max() <= 1e-5 + 1e-4 * np.abs(right).max(), name
    finally:
        kernels.use("auto")


@pytest.fixture
def chats(config):
    return replace(config, batch_size=2, gradient_accumulation_steps=2, max_iters=4,
                   eval_interval=2, eval_iters=4, lr_decay_iters=4)


def test_micro_batches_count_by_their_targets(data, chats):
    run = prepare(GPT(LEARNED, seed=3), chats, data)
    batches = [run.batches.batch(n) for n in range(2)]  # those of the first step
    counts = [(targets >= 0).sum() for _, targets, _ in batches]
    assert counts[0] != counts[1]
    losses = [run.model(*map(Tensor, batch[:2]), starts=Tensor(batch[2]))[1].item()
              for batch in batches]
    expected = np.average(losses, weights=counts)
    assert run.steps.evaluate(run.batches.batch, 2) == pytest.approx(expected, abs=1e-5)
    assert run.step(0.0)[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("flags", [{"freeze": "wte*"}, {"lora_rank": 2}], ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(data, chats, flags, tmp_path, without_samples):
    shape = replace(LEARNED, dropout=0.1)
    whole = train(GPT(shape, seed=3), replace(chats, **flags), data)
    half = replace(chats, out_dir=str(tmp_path / "half"), max_iters=2, **flags)
    train(GPT(shape, seed=3), half, data)
    resumed = train(GPT(shape, seed=3), replace(half, max_iters=4, resume=True), data)
    assert resumed.val_loss == whole.val_loss and resumed.train_loss == whole.train_loss
    files = [checkpoint.Checkpoint(result.last) for result in (whole, resumed)]
    names = files[0].part("model.").keys()
    for name in names:
        np.testing.assert_array_equal(*(f.read_float(f"model.{name}") for f in files))
    changed = load_data(data.source, "byte", 256)
    changed = type(changed)(changed.splits[::-1], [], changed.tokenizer, changed.source)
    with pytest.raises(ValueError, match="which is not the same data"):
        train(GPT(shape, seed=3), replace(half, max_iters=4, resume=True), changed)


def test_samples_are_answers_to_questions_of_the_validation_split(data, chats, capsys):
    model = GPT(LEARNED, seed=3)
    train(model, replace(chats, max_iters=2), data)
    out = "".join(capsys.readouterr())
    assert "40 conversations" not in out and "36 conversations lie in" in out
    assert "\n36?\n-> " in out and "\n38?\n-> " in out
    assert model.tokenizer.kind == "byte"


def test_evaluating_a_file_gives_the_loss_of_validation(data, chats):
    run = prepare(GPT(LEARNED, seed=3), chats, data)
    _, single = data.batches(LEARNED.block_size, 1, 1)
    loss = run.steps.evaluate(lambda n: tuple(a.repeat(2, axis=0) for a in single.batch(n)),
                              len(single.rows))
    found = score_conversations(run.model, data.splits[1])
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["tokens"] == data.splits[1].mask.sum()
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] / np.log(2) / data.bytes_per_token())


def test_a_curriculum_would_cut_conversations(data, chats):
    with pytest.raises(ValueError, match="curriculum"):
        prepare(GPT(LEARNED, seed=3), replace(chats, curriculum=True,
                                              curriculum_start_block_size=48), data)
