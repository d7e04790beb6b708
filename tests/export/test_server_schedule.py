"""Which jobs share a batch, whose turn it is, and what each is answered."""

import itertools

import numpy as np
import pytest
from tinygrad import Tensor

from gpt import SampleConfig
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer
from tinygpt.export import schedule
from tinygpt.export.schedule import MOST_WAITING, PLACES, Job, Scheduler
from tinygpt.inference.decoder import Drawn


class Model:
    """Continues every row with the bytes of `text`, and records which batches it wrote."""

    def __init__(self, text: bytes = b"abcdefgh", tokenizer=None):
        self.text, self.tokenizer = text, tokenizer or ByteTokenizer()
        self.batches, self.turns, self.reused = [], [], []
        self.logits = Tensor.zeros(8, self.tokenizer.vocab_size).contiguous().realize()

    def stream_batch(self, prompts, config, reuse_cache):
        self.batches.append([bytes(prompt).decode() for prompt in prompts])
        self.reused.append(reuse_cache)
        return self.steps(prompts, config)

    def steps(self, prompts, config):
        for token in itertools.islice(itertools.cycle(self.text), config.max_new_tokens):
            self.turns.append(bytes(prompts[0]).decode())
            yield Drawn(np.full(len(prompts), token, np.int32), self.logits)


class Reader:
    """A job, and the pieces that answer it."""

    def __init__(self, prompt: str, count: int = 1, new: int = 4, stop=(), alone=False,
                 likeliest=None, **sampling):
        self.pieces = []
        config = SampleConfig(max_new_tokens=new, **sampling)
        self.job = Job(prompt=list(prompt.encode()), count=count, first=0, config=config, stop=stop,
                       alone=alone, likeliest=likeliest, send=self.pieces.append)

    def text(self, index: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces if piece.index == index)

    @property
    def finish(self) -> list[str]:
        return [piece.finish for piece in self.pieces if piece.finish]


def run(model, *readers, most_rows: int = 8) -> Scheduler:
    scheduler = Scheduler(model, most_rows)
    assert all(scheduler.submit([reader.job]) for reader in readers)
    for _ in range(100):
        scheduler.work(0)
    return scheduler


def test_what_waits_and_fits_is_one_batch_of_a_power_of_two():
    model = Model()
    readers = [Reader("a"), Reader("b", new=2), Reader("c", temperature=0.5), Reader("d", 3),
               Reader("e", seed=7, alone=True), Reader("f", seed=9)]
    run(model, *readers)
    assert model.batches == [["a", "b", "d", "d", "d", "f", "f", "f"], ["c"], ["e"]]
    assert [reader.text() for reader in readers] == ["abcd", "ab"] + 4 * ["abcd"]
    assert [readers[3].text(i) for i in range(3)] == 3 * ["abcd"]
    assert all(r.finish == r.job.count * ["length"] for r in readers)
    model = Model()
    run(model, *(Reader(letter) for letter in "abcdefg"), most_rows=3)
    assert model.batches == [["a", "b", "c"], ["d", "e", "f"], ["g"]]


def test_batches_take_turns_and_free_places_go_to_who_has_waited_longest():
    model = Model()
    count = PLACES + 2
    run(model, *(Reader(str(i), new=3, alone=True) for i in range(count)))
    first = [str(i) for i in range(PLACES)]
    rest = [str(i) for i in range(PLACES, count)]
    assert model.turns == 3 * first + 3 * rest


def test_who_leaves_frees_the_place():
    model = Model()
    readers = [Reader(str(i), new=1000, alone=True) for i in range(PLACES + 2)]
    scheduler = Scheduler(model, 8)
    for reader in readers:
        scheduler.submit([reader.job])
    scheduler.work(0)
    scheduler.leave([readers[0].job, readers[PLACES].job])  # one is written, one waits
    scheduler.work(0)
    scheduler.work(0)
    assert model.turns[-PLACES:] == ["1", "2", "3", str(PLACES + 1)]
    assert len(readers[0].text()) == 1 and readers[PLACES].text() == ""
    scheduler.leave([reader.job for reader in readers])
    scheduler.work(0)
    assert model.turns == model.turns[:3 * PLACES]


def test_too_many_have_to_wait_elsewhere():
    scheduler = Scheduler(Model(), 8)
    assert scheduler.submit([Reader("a", 8).job for _ in range(MOST_WAITING // 8)])
    assert not scheduler.submit([Reader("a").job])
    scheduler.work(0)
    assert scheduler.submit([Reader("a").job])


@pytest.mark.parametrize(("stop", "text", "finish"), [
    ((), "abcdefgha", "length"), (("de",), "abc", "stop"), (("x", "c", "bc"), "a", "stop"),
    (("hab",), "abcdefgha", "length")])
def test_stop_strings(stop, text, finish):
    reader = Reader("p", new=9, stop=stop, likeliest=1)
    run(Model(), reader)
    assert reader.text() == text and reader.finish == [finish]
    tokens = [token for piece in reader.pieces for token in piece.tokens]
    assert bytes(token.id for token in tokens).decode() == text
    assert [token.offset for token in tokens] == list(range(len(text)))


def test_characters_are_not_split_and_end_of_text_ends():
    tokenizer = BPETokenizer.train("text", 257)
    model = Model(tokenizer=tokenizer)
    model.text = [*tokenizer.encode("\u00e9\u20ac"), tokenizer.end_of_text, 65]
    reader = Reader("p", new=9, likeliest=0)
    run(model, reader)
    assert reader.text() == "\u00e9\u20ac" and reader.finish == ["stop"]
    assert [token.offset for piece in reader.pieces for token in piece.tokens] == [0, 0, 1, 1, 1]
    assert reader.pieces[-1].drawn == 6
    cut = Reader("p", new=1)
    run(model, cut)
    assert cut.text() == "\ufffd"


def test_no_tokens_may_be_asked_for():
    model, reader = Model(), Reader("p", 2, new=0)
    run(model, reader)
    assert model.turns == [] and reader.finish == ["length", "length"] and reader.text() == ""


def test_an_error_of_the_model_ends_its_batch_alone(monkeypatch):
    model = Model()
    draw = model.steps

    def steps(prompts, config):
        if bytes(prompts[0]) == b"bad":
            raise MemoryError("none left")
        yield from draw(prompts, config)

    monkeypatch.setattr(model, "steps", steps)
    bad, good = Reader("bad", alone=True), Reader("good", alone=True)
    run(model, bad, good)
    assert isinstance(bad.pieces[0], MemoryError) and good.text() == "abcd"


def test_log_probabilities():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32)) + 5
    logprob, likeliest = schedule.logprobs(2, logits, 2)
    assert logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [i for i, _ in likeliest] == [1, 3]
    np.testing.assert_allclose([p for _, p in likeliest], np.log([0.4, 0.3]), atol=1e-6)
    assert len(schedule.logprobs(0, logits, 9)[1]) == 4


def test_a_cache_is_used_again_where_no_seed_decides_the_text():
    model = Model()
    run(model, Reader("ab"), Reader("cd", alone=True))
    assert model.reused == [True, False]


def test_a_stop_id_ends_a_continuation_and_is_not_in_its_text():
    reader = Reader("ab", new=8)
    reader.job.stop_ids = frozenset(b"c")
    run(Model(), reader)
    assert reader.text() == "ab" and reader.finish == ["stop"]
