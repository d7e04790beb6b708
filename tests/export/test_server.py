"""The server, asked by OpenAI's own client and by clients that mean harm."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from conftest import ROOT
from tinygrad import Tensor

import generate
from gpt import GPT, GPTConfig, SampleConfig
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.export import server
from tinygpt.export.completions import RequestError, parse
from tinygpt.model.bigram import Bigram, BigramConfig

DEFAULTS = SampleConfig(temperature=0.9)


class Served:
    """A server in a process of its own."""

    def __init__(self, checkpoint):
        self.log = open(checkpoint.parent / "log.txt", "w+")  # noqa: SIM115 - until close
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "generate.py"), "--serve", "--port", "0", "--temperature",
             "0.9", "--checkpoint", str(checkpoint)], stderr=self.log, cwd=checkpoint.parent)
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.said())):
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        self.port = int(found[1])

    def said(self) -> str:
        with open(self.log.name) as log:
            return log.read()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none",
                             max_retries=0, timeout=120)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, body: bytes, head: str = "", method: str = "POST",
             path: str = "/v1/completions", host: str = "localhost") -> tuple[int, bytes]:
        """The status and the body of the answer to a request in these bytes."""
        with self.connect() as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
                               f"Content-Length: {len(body)}\r\n{head}\r\n".encode())
            with contextlib.suppress(OSError):  # it answers before it has read everything
                connection.sendall(body)
            return answer(connection)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def answer(connection: socket.socket) -> tuple[int, bytes]:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def random_checkpoint(tokenizer, block_size: int, folder):
    """A model whose weights are large enough for its texts to differ."""
    model = GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=1,
                          n_head=2, n_embd=16))
    rng = np.random.default_rng(3)
    model.load_state_dict({name: rng.normal(0, 0.3, w.shape).astype(np.float32)
                           for name, w in model.state_dict().items()})
    model.tokenizer = tokenizer
    return model.save_checkpoint(1, None, folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(ByteTokenizer(), 16, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return GPT.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def served(checkpoint):
    served = Served(checkpoint)
    yield served
    served.close()


@pytest.fixture(scope="module")
def ask(served):
    """Asks for a completion of the client's."""
    client = served.client()
    return lambda prompt="ab", **options: client.completions.create(
        model="ckpt_1", prompt=prompt, **options)


def expected(model, prompt: bytes, count: int = 1, **options) -> list[str]:
    """The texts that generate.py writes."""
    rows = model.generate([list(prompt)] * count, **{"temperature": 0.9} | options).numpy()
    return [bytes(row[len(prompt):].tolist()).decode("utf-8", "replace") for row in rows]


# ---- what is answered

def test_the_model_is_listed(served):
    client = served.client()
    assert [m.id for m in client.models.list()] == ["ckpt_1"]
    assert client.models.retrieve("ckpt_1").object == "model"
    with pytest.raises(openai.NotFoundError, match="this server has ckpt_1"):
        client.completions.create(model="gpt-4", prompt="a")


def test_a_seed_gives_the_text_of_generate_streamed_or_not(ask, model):
    own = dict(window_hop=4)
    right = expected(model, b"ab", max_new_tokens=30, seed=5, **own)
    whole = ask(max_tokens=30, seed=5, extra_body=own)
    assert [whole.choices[0].text] == right
    assert whole.choices[0].finish_reason == "length" and whole.object == "text_completion"
    assert whole.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": 2, "completion_tokens": 30}
    chunks = list(ask([97, 98], max_tokens=30, seed=5, extra_body=own, stream=True,
                      stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == right[0]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == 29 * [None] + ["length"]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_several_choices_and_prompts(ask, model):
    made = ask(["ab", "xyz"], n=2, max_tokens=8, seed=5)
    assert [c.index for c in made.choices] == list(range(4))
    assert [c.text for c in made.choices] == [
        *expected(model, b"ab", 2, max_new_tokens=8, seed=5),
        *expected(model, b"xyz", 2, max_new_tokens=8, seed=5)]
    assert made.usage.completion_tokens == 32 and made.usage.prompt_tokens == 5
    texts = ["", ""]
    for chunk in ask(n=2, max_tokens=8, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected(model, b"ab", 2, max_new_tokens=8, seed=5)


def test_without_a_seed_texts_differ_and_16_tokens_are_the_default(ask):
    first, second = (ask().choices[0] for _ in range(2))
    assert first.text != second.text and first.finish_reason == "length"
    assert ask().usage.completion_tokens == 16


def test_stop_and_echo(ask, model):
    text, = expected(model, b"ab", max_new_tokens=12, temperature=0)
    stop = text[4:6]
    made = ask(max_tokens=12, temperature=0, stop=[stop, "never there"], echo=True).choices[0]
    assert made.text == "ab" + text[:text.index(stop)] and made.finish_reason == "stop"
    assert ask(max_tokens=0, echo=True).choices[0].text == "ab"


def test_log_probabilities_are_those_of_the_model(ask, model):
    made = ask("ab", max_tokens=6, seed=1, logprobs=3,
               extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    ids = [int(name.removeprefix("token_id:")) for name in made.tokens]
    logits = model(Tensor([[97, 98, *ids]])).numpy()[0, 1:-1].astype(np.float64)
    right = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(made.token_logprobs, right[range(6), ids], atol=1e-4)
    for found, row in zip(made.top_logprobs, right, strict=True):
        assert list(found) == [f"token_id:{i}" for i in np.argsort(-row)[:3]]
        np.testing.assert_allclose(list(found.values()), np.sort(row)[::-1][:3], atol=1e-4)
    named = ask("ab", max_tokens=6, seed=1, logprobs=0).choices[0]
    assert named.logprobs.tokens == [chr(i) if i < 128 else f"bytes:\\x{i:02x}" for i in ids]
    assert named.logprobs.top_logprobs == 6 * [{}] and named.logprobs.text_offset[0] == 0


def test_fifty_clients_at_once(ask, model):
    """Each gets the text that follows its own prompt, whatever the others of its batch have."""
    prompts = [f"{i:02}" for i in range(50)]

    def get(prompt: str) -> str:
        if int(prompt) % 2:
            return ask(prompt, max_tokens=10, temperature=0).choices[0].text
        return "".join(chunk.choices[0].text for chunk in ask(
            prompt, max_tokens=10, temperature=0, stream=True))

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(get, prompts))
    assert texts == [text for p in prompts
                     for text in expected(model, p.encode(), max_new_tokens=10, temperature=0)]
    assert len(set(texts)) > 5


def test_the_page_is_at_the_root(served):
    status, body = served.send(b"", method="GET", path="/")
    assert status == 200 and b"ckpt_1" in body and b"v1/completions" in body


# ---- who leaves, and who means harm

def test_clients_that_are_killed_half_way_free_their_places(served, ask):
    """More of them than there are places, with texts that would take minutes."""
    connections = [served.connect() for _ in range(6)]
    body = json.dumps({"prompt": "a", "max_tokens": 30000, "seed": 1, "stream": True}).encode()
    for connection in connections:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    assert b"text/event-stream" in connections[0].recv(1 << 16)
    for connection in connections:
        connection.close()
    assert len(ask(max_tokens=3).choices) == 1


JUNK = {
    "no json": b"{", "empty": b"", "no object": b"[]", "nesting": b"[" * 100_000,
    "no prompt": b"{}", "binary": bytes(range(256)), "empty prompt": b'{"prompt": ""}',
    "huge number": b'{"prompt": "a", "max_tokens": %s}' % (b"9" * 5000),
    "infinite": b'{"prompt": "a", "temperature": 1e999}',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "half a pair": b'{"prompt": "\\ud800"}', "half in stop": b'{"prompt":"a","stop":"\\ud800"}',
    "huge body": b'{"prompt": "%s"}' % (b"a" * (3 << 20))}


@pytest.mark.parametrize("name", JUNK)
def test_junk_gets_an_error_object(served, name):
    status, body = served.send(JUNK[name])
    assert status == (413 if name == "huge body" else 400)
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) < 400
    assert error.keys() == {"message", "type", "param", "code"}


def test_what_is_no_request_and_what_is_slow_hinder_nobody(served, ask):
    begun = [served.connect() for _ in range(20)]
    for i, connection in enumerate(begun):
        connection.sendall((b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                            b"99\r\n\r\n{", b"POST /v1", b"")[i % 3])
    with served.connect() as connection:
        connection.sendall(b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n")
        assert answer(connection)[0] == 400
    assert served.send(b"", method="DELETE")[0] == 405
    status, body = served.send(b"", path="/v1/embeddings")
    assert status == 404 and "error" in json.loads(body)
    assert len(ask(max_tokens=3).choices) == 1
    for connection in begun:
        connection.close()


@pytest.mark.parametrize(("host", "origin", "status"), [
    ("localhost", "", 200), ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 200),
    ("[::1]:5", "", 200), ("evil.example", "", 403), ("localhost.evil.example:{port}", "", 403),
    ("", "", 403), ("localhost:{port}", "http://evil.example", 403),
    ("localhost:{port}", "null", 403), ("localhost:{port}", "http://localhost:1", 403)])
def test_pages_of_other_sites_are_refused(served, host, origin, status):
    head = f"Origin: {origin}\r\n".format(port=served.port) if origin else ""
    made = served.send(b"", head, "GET", "/v1/models", host.format(port=served.port))
    assert made[0] == status and (b"error" in made[1]) == (status == 403)


def test_after_all_of_it_there_is_no_traceback(served, ask):
    assert len(ask(max_tokens=1).choices) == 1
    assert len(served.said().splitlines()) == 2, served.said()


def test_ctrl_c_finishes_what_streams(checkpoint):
    served = Served(checkpoint)
    stream = served.client().completions.create(model="ckpt_1", prompt="a", max_tokens=200,
                                                stream=True)
    next(iter(stream))
    served.process.send_signal(signal.SIGINT)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) == 199
    assert served.process.wait(30) == 0
    with pytest.raises(ConnectionRefusedError):
        served.connect()
    assert "Traceback" not in served.said() and "finishing" in served.said()
    served.close()


# ---- in this process

@pytest.mark.parametrize(("fields", "says", "param"), [
    (dict(prompt=5), "neither text nor", "prompt"), (dict(prompt=["a", 5]), "neither", "prompt"),
    (dict(prompt=[[1], [True]]), "neither", "prompt"), (dict(prompt=[]), "empty", "prompt"),
    (dict(prompt=[256]), "token id 256 is outside the vocabulary 0..255", "prompt"),
    (dict(prompt=[-1]), "outside", "prompt"), (dict(prompt=["a"] * 65), "at most 64", "prompt"),
    (dict(prompt=["a" * 40_000] * 2), "80,000 tokens", "prompt"),
    (dict(n=0), "n=0 is out of range", "n"), (dict(n=9), "at most 8", "n"),
    (dict(max_tokens=1.5), "not a whole number", "max_tokens"),
    (dict(max_tokens=10 ** 6), "out of range", "max_tokens"),
    (dict(temperature="1"), "not a number", "temperature"),
    (dict(temperature=True), "not a number", "temperature"), (dict(top_p=2), "top_p=2", "top_p"),
    (dict(stream="yes"), "neither True nor False", "stream"),
    (dict(stop=[""]), "empty", "stop"), (dict(stop=[5]), "not text", "stop"),
    (dict(stop=["a"] * 17), "at most 16", "stop"), (dict(logprobs=21), "logprobs=21", "logprobs"),
    (dict(logprobs=1, echo=True), "leave out one", "echo"), (dict(seed=-1), "seed=-1", "seed"),
    (dict(frequency_penalty=0.5), "not supported", "frequency_penalty"),
    (dict(logit_bias={"5": 1}), "not supported", "logit_bias"),
    (dict(stream_options=[]), "not an object", "stream_options"),
    (dict(max_new_tokens=5), "no parameter", "max_new_tokens"),
    (dict(tools=[]), "no parameter 'tools'", "tools")], ids=str)
def test_a_wrong_parameter_is_named(fields, says, param):
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        parse({"prompt": "a"} | fields, ByteTokenizer(), 256, DEFAULTS, 8)
    assert caught.value.body["error"]["param"] == param and caught.value.status == 400


def test_null_and_what_is_neutral_count_as_not_given():
    made = parse({"prompt": "a", "temperature": None, "frequency_penalty": 0, "best_of": 1,
                  "user": "me", "logit_bias": {}, "top_k": 3, "suffix": None}, ByteTokenizer(),
                 256, DEFAULTS, 8)
    assert made.sample == replace(DEFAULTS, top_k=3, max_new_tokens=16, seed=made.sample.seed)
    assert not made.has_seed


def test_sampling_parameters_are_those_of_the_request():
    given = dict(temperature=0.5, top_k=7, top_p=0.3, min_p=0.1, repetition_penalty=1.5,
                 window_hop=3, seed=11)
    made = parse({"prompt": "a", "max_tokens": 9, **given}, ByteTokenizer(), 256, DEFAULTS, 8)
    assert made.sample == SampleConfig(max_new_tokens=9, **given) and made.has_seed


def test_a_body_that_does_not_arrive_is_not_waited_for(monkeypatch):
    async def stream():
        yield b"{"
        await asyncio.sleep(60)

    monkeypatch.setattr(server, "BODY_SECONDS", 0.01)
    with pytest.raises(RequestError, match="did not arrive") as caught:
        asyncio.run(server.read_json(SimpleNamespace(stream=stream)))
    assert caught.value.status == 408


def test_rows_of_a_batch_are_as_many_as_fit_into_memory(model, monkeypatch):
    assert server.rows_that_fit(model) == 8
    row = 4 * 2 * 16 * 16
    monkeypatch.setattr(server.device, "memory", lambda: 2 * 12 * row * 3)
    assert server.rows_that_fit(model) == 3
    monkeypatch.setattr(server.device, "memory", lambda: 5)
    assert server.rows_that_fit(model) == 1


def test_a_bigram_model_is_not_served(tmp_path, capsys):
    model = Bigram(BigramConfig())
    model.tokenizer = ByteTokenizer()
    path = model.save_checkpoint(1, None, tmp_path)
    assert generate.main(["--serve", "--checkpoint", str(path)]) == 2
    assert "which is not served" in capsys.readouterr().err


def test_an_address_that_cannot_be_had_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 .*in use"):
            server.listen("127.0.0.1", port)


@pytest.mark.parametrize(("flags", "says"), [
    ("--serve --json", "--json has no effect on --serve"),
    ("--serve --seed 5", "--seed has no effect on --serve"),
    ("--serve --export x", "--export has no effect on --serve"),
    ("--port 80", "port"), ("--serve --port 70000", "port=70000")])
def test_flags_without_an_effect_are_refused(flags, says, capsys):
    assert generate.main(flags.split()) == 2
    assert says in capsys.readouterr().err
