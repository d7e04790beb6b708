"""Downloads from a local server that makes errors."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import generate
from gpt import GPT, GPTConfig
from tinygpt import device
from tinygpt.data import DataError, download
from tinygpt.data.download import TRIES, fetch
from tinygpt.data.tokenizer import BPETokenizer
from tinygpt.huggingface import pretrained

BODY = np.random.default_rng(0).bytes(300_000)
PIECE = 70_000  # larger than one read


class Handler(BaseHTTPRequestHandler):
    """Serves `files`; `faults` has a list of errors for each path, one per request."""

    files: dict[str, bytes] = {}
    faults: dict[str, list] = {}
    asked: list[tuple[str, str | None]] = []
    etag = '"one"'
    release = threading.Event()

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        fault = (self.faults.get(self.path) or [None]).pop(0)
        if isinstance(fault, int) or self.path not in self.files:
            return self.head(fault or 404, 0)
        body, begin = self.files[self.path], 0
        if wanted and fault != "no ranges" and self.headers.get("If-Range") == self.etag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(body):
                return self.head(416, 0)
        stated = len(body) - begin + {"says more": 1000, "says less": -1000}.get(fault, 0)
        shift = 1 if fault == "another piece" else 0
        self.head(206 if begin else 200, stated, f"bytes {begin + shift}-{len(body) - 1}/"
                                                 f"{len(body)}" if begin else None)
        rest = body[begin:]
        try:
            self.wfile.write(rest[:PIECE] if fault in ("cut", "stall") else rest)
            if fault == "stall":
                self.release.wait(5)
        except OSError:  # the client has disconnected
            pass

    def head(self, status: int, length: int, span: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.etag)
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", (2, 0.3))
    Handler.files, Handler.faults, Handler.asked = {"/f": BODY}, {}, []
    Handler.etag, Handler.release = '"one"', threading.Event()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def accept(path):
    """A check that refuses nothing."""


def ranges() -> list:
    return [span for _, span in Handler.asked]


@pytest.mark.parametrize("fault", ["cut", "stall", "says more"])
def test_an_interrupted_download_is_resumed(server, tmp_path, fault):
    Handler.faults["/f"] = [fault]
    start = time.perf_counter()
    assert fetch(f"{server}/f", tmp_path / "f", accept).read_bytes() == BODY
    assert time.perf_counter() - start < 4  # the server would stall for five seconds
    if fault == "says more":  # the file is complete but shorter than announced
        assert len(ranges()) >= 2
    else:
        assert ranges()[0] is None and 0 < int(ranges()[1][6:-1]) <= PIECE
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_download_is_resumed_as_long_as_it_makes_progress(server, tmp_path):
    Handler.faults["/f"] = ["cut"] * 4
    assert fetch(f"{server}/f", tmp_path / "f", accept).read_bytes() == BODY
    assert len(ranges()) == 5


@pytest.mark.parametrize("fault", ["no ranges", "another piece", 503, 429])
def test_a_download_that_cannot_be_resumed_starts_again(server, tmp_path, fault):
    Handler.faults["/f"] = ["cut", fault]
    assert fetch(f"{server}/f", tmp_path / "f", accept).read_bytes() == BODY
    assert len(ranges()) == (2 if fault == "no ranges" else 3)


def test_a_file_that_changed_meanwhile_starts_again(server, tmp_path):
    Handler.faults["/f"] = ["cut", *[503] * 9]
    with pytest.raises(DataError, match="503"):
        fetch(f"{server}/f", tmp_path / "f", accept)
    assert (tmp_path / ".f.part").stat().st_size > 0 and not (tmp_path / "f").exists()
    Handler.faults.clear()
    Handler.etag, Handler.files = '"two"', {"/f": BODY[::-1]}
    assert fetch(f"{server}/f", tmp_path / "f", accept).read_bytes() == BODY[::-1]


def test_the_next_call_resumes_too(server, tmp_path):
    Handler.faults["/f"] = ["cut", *[503] * 9]
    with pytest.raises(DataError):
        fetch(f"{server}/f", tmp_path / "f", accept)
    Handler.faults.clear()
    Handler.asked.clear()
    assert fetch(f"{server}/f", tmp_path / "f", accept).read_bytes() == BODY
    assert len(ranges()) == 1 and ranges()[0] is not None


@pytest.mark.parametrize(("fault", "says"), [(404, "404"), (403, "403"), (503, "503")])
def test_an_error_is_reported_and_only_a_busy_server_is_tried_again(server, tmp_path, fault, says):
    Handler.faults["/f"] = [fault] * 20
    with pytest.raises(DataError, match=says) as caught:
        fetch(f"{server}/f", tmp_path / "f", accept)
    assert "\n" not in str(caught.value) and not (tmp_path / "f").exists()
    assert len(ranges()) == (TRIES if fault == 503 else 1)


def test_a_file_that_the_check_refuses_is_deleted(server, tmp_path):
    def refuse(path):
        raise ValueError("no good")

    with pytest.raises(DataError, match="the downloaded f is damaged"):
        fetch(f"{server}/f", tmp_path / "f", refuse)
    assert not any(p.name in ("f", ".f.part") for p in tmp_path.iterdir())


# ---- a model by its name

@pytest.fixture
def hub(server, tmp_path, monkeypatch, text):
    """A server with a tiny gpt2, and an empty cache."""
    model = GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=64,
                          activation="gelu_tanh"))
    model.tokenizer = BPETokenizer.train(text, 300)
    folder = model.save_pretrained(tmp_path / "tiny")
    Handler.files = {f"/gpt2/resolve/main/{p.name}": p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(pretrained, "HUB", server)
    monkeypatch.setattr(device, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return model


WEIGHTS = "/gpt2/resolve/main/model.safetensors"


def test_a_name_is_downloaded_once_and_then_read_offline(hub, tmp_path):
    Handler.faults[WEIGHTS] = ["cut", "stall", 503]
    model = GPT.from_pretrained("gpt2")
    assert model.config == hub.config
    assert np.array_equal(model.wte.weight.numpy(), hub.wte.weight.numpy())
    folder = tmp_path / "cache" / "pretrained" / "gpt2"
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    Handler.asked.clear()
    GPT.from_pretrained("gpt2", offline=True)
    assert Handler.asked == []


def test_a_length_that_is_too_short_is_noticed(hub, tmp_path):
    Handler.faults[WEIGHTS] = ["says less"]
    with pytest.raises(ValueError, match="is damaged") as caught:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(caught.value)
    assert GPT.from_pretrained("gpt2").config == hub.config  # the next try starts again


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_without_the_model_gets_one_line_and_status_2(hub, capsys, status):
    Handler.faults[WEIGHTS] = [status] * 20
    assert generate.main(["--checkpoint", "gpt2", "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(status) in err and "copy config.json" in err


def test_without_a_network_or_with_offline_there_is_a_clear_line(hub, monkeypatch, capsys):
    assert generate.main(["--checkpoint", "gpt2", "--prompt", "a", "--offline"]) == 2
    assert "--offline" in capsys.readouterr().err and Handler.asked == []
    monkeypatch.setattr(pretrained, "HUB", "http://127.0.0.1:9")
    assert generate.main(["--checkpoint", "gpt2", "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "gpt2 cannot be downloaded" in err


# ---- a file with a known hash

HASH = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def get(server, tmp_path):
    return lambda sha=HASH: download.download(f"{server}/f", tmp_path / "new" / "file.bin", sha)


def leftovers(tmp_path) -> list:
    return [p for p in (tmp_path / "new").rglob("*") if p.is_file()]


def test_a_file_is_complete_and_downloaded_once(get, tmp_path):
    path = get()
    assert path.read_bytes() == BODY and leftovers(tmp_path) == [path]
    assert get() == path and len(Handler.asked) == 1


def test_a_file_with_another_hash_is_downloaded_again(get):
    path = get()
    path.write_bytes(b"damaged")
    assert get().read_bytes() == BODY


@pytest.mark.parametrize("fault", ["hash", 404, 503, "cut"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failed_download_leaves_the_old_file(get, tmp_path, fault, old):
    if old:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file.bin").write_bytes(old)
    Handler.faults = {"/f": [] if fault == "hash" else [fault] * 10}
    if fault == "cut":  # and not resumable
        Handler.faults = {"/f": ["cut", *[503] * 10]}
    with pytest.raises(DataError, match=r"file\.bin") as caught:
        get("0" * 64 if fault == "hash" else HASH)
    assert "\n" not in str(caught.value)
    assert [p.read_bytes() for p in leftovers(tmp_path)] == ([old] if old else [])


def test_a_busy_server_is_tried_again(get):
    Handler.faults = {"/f": [503]}
    assert get().read_bytes() == BODY and len(Handler.asked) == 2


def test_no_server_and_no_folder_are_data_errors(tmp_path, server):
    with pytest.raises(DataError):
        download.download("http://127.0.0.1:9/file", tmp_path / "file.bin", HASH)
    (tmp_path / "in_the_way").write_text("a file")
    with pytest.raises(DataError):
        download.download(f"{server}/f", tmp_path / "in_the_way" / "file.bin", HASH)
