"""Scores of a model, against ones that are counted out by hand here."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Tensor, TinyJit

from gpt import GPT, GPTConfig
from tinygpt import evaluate
from tinygpt.data.load import read_tokens
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.model.bigram import Bigram, BigramConfig

BLOCK = 8


@pytest.fixture(scope="module")
def model():
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    rng = np.random.default_rng(3)
    model.load_state_dict({k: w.numpy() + rng.normal(0, 0.3, w.shape)
                           for k, w in model.state_dict().items()})
    model.tokenizer = ByteTokenizer()
    return model


@functools.cache
def forward(model) -> TinyJit:
    return TinyJit(lambda ids: model(ids).realize())


def log_probs(model, ids) -> np.ndarray:
    """(T, V) after each of ids."""
    padded = np.zeros((1, BLOCK), np.int32)  # what comes later changes nothing before it
    padded[0, :len(ids)] = ids
    logits = forward(model)(Tensor(padded).realize()).numpy()[0, :len(ids)].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nats(model, context: bytes, token: int) -> float:
    return -log_probs(model, list(context))[-1][token]


@pytest.mark.parametrize("stride", [1, 3, BLOCK, None])
@pytest.mark.parametrize("text", ["the harbour sleeps, n\u00e4m", "eight ch", "nine char", "ab"])
def test_every_token_is_scored_once_with_the_context_of_its_window(model, text, stride):
    raw, step = text.encode(), stride or BLOCK // 2
    expected = []
    for i in range(1, len(raw)):
        # the first window holds 8 targets; each later one ends step targets further on
        end = BLOCK if i <= BLOCK else BLOCK + -(-(i - BLOCK) // step) * step
        begin = max(0, min(end, len(raw) - 1) - BLOCK)
        expected.append(nats(model, raw[begin:i], raw[i]))
    scores = evaluate.score_text(model, text, stride)
    assert scores["tokens"] == len(raw) - 1
    assert scores["loss"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(np.mean(expected) / math.log(2), abs=1e-5)


def test_bits_per_byte_counts_bytes_not_tokens(text):
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=300, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = BPETokenizer.train(text, 300)
    ids = model.tokenizer.encode(text[:200])
    size = len(model.tokenizer.decode_bytes(ids[1:]))
    assert size > len(ids)
    scores = evaluate.score_text(model, text[:200], 4)
    total = scores["loss"] * scores["tokens"]
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    documents = np.array([*ids, model.tokenizer.end_of_text, *ids])
    scores = evaluate.score_text(model, documents, 4)
    size += len(model.tokenizer.decode_bytes(ids))  # and none of the end of text
    total = scores["loss"] * scores["tokens"]
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / size)


def test_a_file_of_token_ids_scores_as_its_text(model, tmp_path):
    text = "the harbour sleeps"
    np.array(model.tokenizer.encode(text), "<u2").tofile(tmp_path / "val.bin")
    expected = evaluate.score_text(model, text, 2)
    bare = GPT(model.config)
    bare.load_state_dict({k: w.numpy() for k, w in model.state_dict().items()})
    paths = [m.save_checkpoint(n, None, tmp_path) for n, m in enumerate((model, bare))]
    for checkpoint, ids in itertools.product(paths, (tmp_path, tmp_path / "val.bin")):
        scores = evaluate.run(evaluate.EvaluateConfig(checkpoint=str(checkpoint), text=str(ids),
                                                      stride=2))
        assert scores.items() <= expected.items()
        assert ("bits_per_byte" in scores) == (checkpoint == paths[0])


def test_a_bigram_is_scored_to_compare_with(rng, tmp_path, capsys):
    bigram = Bigram(BigramConfig(block_size=BLOCK, vocab_size=256))
    table = rng.standard_normal((256, 256))
    bigram.load_state_dict({"table": table})
    bigram.tokenizer = ByteTokenizer()
    path = bigram.save_checkpoint(1, None, tmp_path)
    ids = list(b"the harbour sleeps")
    (tmp_path / "t.txt").write_bytes(bytes(ids))
    log_z = np.log(np.exp(table).sum(-1))
    loss = np.mean([log_z[a] - table[a, b] for a, b in itertools.pairwise(ids)])
    assert evaluate.main([str(path), str(tmp_path / "t.txt"), "--stride", "1"]) == 0
    assert f"loss {loss:.4f}\n" in capsys.readouterr().out


def test_token_files_of_another_tokenizer_or_damaged_are_refused(model, tmp_path):
    meta = {"made_with": "--tokenizer char", "files": [], "dtype": "<u2",
            "tokenizer": CharTokenizer("abc").to_json()}
    for name, content, says in (("a", b"\0\1" * 3, "token id 256, outside"),
                                ("b", b"abc", "b.bin is damaged"), ("c", b"", "c.bin is damaged"),
                                ("meta", b"a\0b\0", "made with another tokenizer")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.bin").write_bytes(content)
        if name == "meta":
            (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=says):
            evaluate.score_text(model, read_tokens(folder / f"{name}.bin", model.tokenizer))


def ending_cost(model, context: bytes, ending: bytes) -> list[float]:
    whole = (context + ending)[-(BLOCK + 1):]
    return [nats(model, whole[:i], whole[i]) for i in range(len(whole) - len(ending), len(whole))]


def test_hellaswag_takes_the_ending_that_costs_least(model, tmp_path):
    questions, right = [], np.zeros(2)
    rng = np.random.default_rng(1)
    for _ in range(12):
        words = ["".join(rng.choice(list("abcdefg"), rng.integers(1, 6))) for _ in range(5)]
        label = int(rng.integers(0, 4))
        questions.append({"ctx": words[0], "endings": words[1:], "label": label, "ind": 3})
        costs = [ending_cost(model, words[0].encode(), f" {w}".encode()) for w in words[1:]]
        right += [np.argmin([sum(c) for c in costs]) == label,
                  np.argmin([np.mean(c) for c in costs]) == label]
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)) + "\n")
    scores = evaluate.score_hellaswag(model, evaluate.read_questions(str(path), "hellaswag"))
    assert (scores["accuracy"], scores["accuracy_norm"]) == tuple(right / 12)
    assert 0 < right[0] < 12 and right[0] != right[1]  # else nothing is shown


def test_lambada_wants_the_last_word(model, tmp_path):
    questions = [{"text": "some words"}, {"text": "a b"}]
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    scores = evaluate.score_lambada(model, evaluate.read_questions(str(path), "lambada"))
    costs = [sum(ending_cost(model, b"some", b" words")), sum(ending_cost(model, b"a", b" b"))]
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(costs)), rel=1e-4)
    assert scores["accuracy"] == 0 and scores["questions"] == 2


def test_lambada_counts_a_word_when_all_its_tokens_are_the_likeliest(model, monkeypatch):
    hits = iter([[True, True], [True, False], [True]])
    monkeypatch.setattr(evaluate.Scorer, "ending",
                        lambda *args: (np.ones(1), np.array(next(hits))))
    scores = evaluate.score_lambada(model, [{"text": "a b"}] * 3)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tinygpt.evaluate", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True, timeout=100)


def test_the_command(model, tmp_path):
    path = model.save_checkpoint(1, None, tmp_path)
    (tmp_path / "t.txt").write_text("the harbour sleeps")
    done = run(path, tmp_path / "t.txt", "--stride", 2)
    assert done.returncode == 0, done.stderr
    scores = evaluate.score_text(model, "the harbour sleeps", 2)
    assert done.stdout.splitlines() == [
        f"loss {scores['loss']:.4f}", f"perplexity {scores['perplexity']:.4f}",
        f"bits_per_byte {scores['bits_per_byte']:.4f}", "tokens 17"]


GOOD = {"ctx": "The harbour", "endings": ["sleeps", "sings"], "label": 1}


@pytest.mark.parametrize(("task", "changes", "says"), [
    ("hellaswag", {"endings": "sleeps"}, "endings are not a list of two or more strings"),
    ("hellaswag", {"endings": ["sleeps", 5]}, "endings are not a list"),
    ("hellaswag", {"endings": ["sleeps", ""]}, "endings are not a list"),
    ("hellaswag", {"endings": ["sleeps"], "label": 0}, "endings are not a list"),
    ("hellaswag", {"endings": {"a": 1, "b": 2}}, "endings are not a list"),
    ("hellaswag", {"ctx": ["The"]}, "ctx"), ("hellaswag", {"ctx": "\ud83d"}, "ctx"),
    ("hellaswag", {"label": True}, "label"), ("hellaswag", {"label": 0.5}, "label"),
    ("hellaswag", {"label": ""}, "label"), ("hellaswag", {"label": "-1"}, "label"),
    ("hellaswag", {"label": 2}, "label 2 is not the number of an ending, 0 to 1"),
    ("hellaswag", {"label": None}, "label"), ("lambada", {"text": ["a", " ", "b"]}, "text"),
    ("lambada", {"text": " word "}, "text")], ids=str)
def test_a_question_of_other_types_is_named(tmp_path, task, changes, says):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD | {"text": "two words"}) + "\n\n" + json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=rf"jsonl:3 is not a question of {task} .*{says}"):
        evaluate.read_questions(str(path), task)


@pytest.mark.parametrize("line", ["[" * 100_000, "null", "5", '"text"', "[1]", "{"],
                         ids=lambda line: line[:9])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    for task in ("hellaswag", "lambada"):
        says = rf"jsonl:1 is not a question of {task} \(it is not (a )?JSON"
        with pytest.raises(ValueError, match=says):
            evaluate.read_questions(str(path), task)


def test_a_line_ends_with_a_line_break_and_a_label_may_be_digits(tmp_path):
    path = tmp_path / "questions.jsonl"
    question = GOOD | {"ctx": "one\u2028two\x85three", "label": "1"}
    path.write_text(json.dumps(question, ensure_ascii=False), encoding="utf-8")
    assert evaluate.read_questions(str(path), "hellaswag") == [question]


@pytest.mark.parametrize(("args", "says"), [
    (("t.txt", "--stride", 9), "stride=9 is above block_size=8"),
    (("t.txt", "--stride", 0), "stride=0"), (("t.txt", "--task", "x"), "task='x'"),
    (("one.txt",), "the text has 1 tokens"), (("none.txt",), "none.txt"),
    ((".",), "is a folder, not a file: name a file in it"),
    (("pipe",), "is a pipe, not a file"), (("pipe", "--task", "lambada"), "is a pipe, not a file"),
    (("/dev/zero",), "is a device, not a file"), (("pipe.bin",), "is a pipe, not a file"),
    (("t.txt", "--task", "hellaswag"), "t.txt:1 is not a question of hellaswag"),
    (("t.txt", "--task", "lambada"), "t.txt:1 is not a question of lambada"),
    (("empty", "--task", "lambada"), "no questions")], ids=str)
def test_a_mistake_gets_one_line_and_status_2(model, tmp_path, args, says, capsys):
    path = model.save_checkpoint(1, None, tmp_path)
    for name, text in (("t.txt", "the harbour"), ("one.txt", "a"), ("empty", "\n")):
        (tmp_path / name).write_text(text)
    for name in ("pipe", "pipe.bin"):
        os.mkfifo(tmp_path / name)
    assert evaluate.main([str(path), str(tmp_path / args[0]), *map(str, args[1:])]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and says in err
