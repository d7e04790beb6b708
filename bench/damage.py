"""Campaigns of bench/faults.py with damaged files: truncated, bits flipped, blocks swapped, values
in headers and JSON replaced, NaN in weights. Each is refused in one line that names the file, or
has no effect.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import generate
import train
from bench import light
from bench.campaign import Campaign, check, child
from gpt import GPT, GPTConfig, TrainConfig
from tinygpt import checkpoint, evaluate
from tinygpt.data.tokenizer import BPETokenizer
from tinygpt.model import lora

SECONDS, MEGABYTES = 10, 1000  # limits for reading a damaged file
CKPT = "out/ckpt_10.safetensors"
HOSTILE = (None, True, False, -1, 0, 1, 2, 7, 10**9, 10**30, -10**30, 10**400, 1e-300, 1e308,
           float("nan"), float("inf"), -float("inf"), "", "x", "1", "\ud800", "\0", [], [1],
           [[[[]]]], {}, {"a": 1}, [10**9], ["x"], "a" * 100_000)


# ---- readers, for `child`: the content of a file on stdout, or an error line and status 2

def reader(read: Callable[[], tuple[dict, object]]) -> Callable[[], int]:
    def run() -> int:
        try:
            arrays, more = read()
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(light.digest(arrays), json.dumps(more), sep="\n", flush=True)
        return 0
    return run


def tokens(folder: Path, source: str, in_shards: bool = False) -> Callable[[], int]:
    """The tokens of a text, through the cache in folder."""
    def read():
        light.cache_in(folder)
        if in_shards:
            light.DATA.LARGE, light.DATA.shards.cpu_count = 0, lambda: 1
        data = train.load_data(source, "bpe", 300)
        return {"train": data.train, "val": data.val}, data.tokenizer.to_json()
    return reader(read)


def token_files(name: str) -> Callable[[], int]:
    """The tokens of a folder of token files."""
    return tokens(Path.cwd(), str(Path(name).parent))


def pretrained(name: str) -> Callable[[], int]:
    return reader(lambda: _of(GPT.from_pretrained(name)))


def saved(name: str) -> Callable[[], int]:
    return reader(lambda: _of(GPT.from_checkpoint(name)))


def adapted(name: str) -> Callable[[], int]:
    def read():
        model = GPT.from_checkpoint(CKPT)
        lora.load(model, name)
        return _of(model)
    return reader(read)


def resumed(name: str) -> Callable[[], int]:
    """A run that is resumed for two steps."""
    def run() -> int:
        status = light.run(Path.cwd(), "--resume", "--max_iters", 12, *LORA_FLAGS)()
        if status == 0:
            print("\f", light.digest(checkpoint.load("out/ckpt_12.safetensors")[0]))
        return status
    return run


def _of(model) -> tuple[dict, object]:
    arrays = {k: t.numpy() for k, t in model.state_dict().items()}
    return arrays, [asdict(model.config), model.tokenizer and model.tokenizer.to_json()]


# ---- kinds of damage

def truncated(raw: bytes, rng) -> bytes:
    return raw[:int(rng.integers(len(raw)))]


def flipped(raw: bytes, rng) -> bytes:
    data = bytearray(raw)
    for _ in range(int(rng.choice([1, 1, 1, 8]))):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)


def swapped(raw: bytes, rng) -> bytes:
    """Two blocks swapped."""
    size = max(1, min(512, len(raw) // 4))
    a, b = sorted(int(n) for n in rng.integers(0, max(1, len(raw) - size), 2))
    b = max(b, a + size)
    return raw[:a] + raw[b:b + size] + raw[a + size:b] + raw[a:a + size] + raw[b + size:]


def zeroed(raw: bytes, rng) -> bytes:
    """A block of zeros, as after a crash of the file system."""
    a = int(rng.integers(len(raw)))
    return raw[:a] + bytes(len(raw[a:a + 512])) + raw[a + 512:]


def longer(raw: bytes, rng) -> bytes:
    return raw + rng.bytes(int(rng.integers(1, 1000)))


def patched(raw: bytes, rng) -> bytes:
    """A value replaced in JSON: a file, a safetensors header, a line, or metadata."""
    length = int.from_bytes(raw[:8], "little")
    if length < len(raw) and raw[8:9] == b"{":
        header = json.loads(raw[8:8 + length])
        text = _dump(_replace(header, rng))
        return len(text).to_bytes(8, "little") + text + raw[8 + length:]
    lines = raw.decode().splitlines()
    if len(lines) > 1 and lines[0].endswith("}"):
        i = int(rng.integers(len(lines)))
        lines[i] = _dump(_replace(json.loads(lines[i]), rng)).decode()
        return "\n".join(lines).encode()
    return _dump(_replace(json.loads(raw), rng))


def _dump(value) -> bytes:
    return json.dumps(value).encode()


def _replace(value, rng):
    """JSON with one value replaced, removed or renamed."""
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        return json.dumps(_replace(json.loads(value), rng))  # metadata is JSON in strings
    if isinstance(value, dict | list) and value and rng.random() < 0.95:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(rng.integers(len(keys)))]
        changed = value.copy()
        if rng.random() < 0.1:
            moved = changed.pop(key)
            if isinstance(changed, dict) and rng.random() < 0.5:
                changed[f"{key}x"] = moved
        else:
            changed[key] = _replace(changed[key], rng)
        return changed
    return HOSTILE[int(rng.integers(len(HOSTILE)))]


ACCIDENTS = (truncated, flipped, flipped, flipped, swapped, zeroed, longer)
LORA_FLAGS = ("--lora_rank", 2, "--ema")


# ---- campaigns

class Damage(Campaign):
    """One kind of file, damaged and read by one of several readers.

    checked: a checksum covers the file, so damage must be found; otherwise it may change values,
    but must not crash. strict: a patched value must not change the arrays. patches: whether values
    are patched.
    """

    def __init__(self, name: str, files: dict[str, tuple], checked: bool = True,
                 strict: bool = True, patches: bool = True, weight: float = 1.0):
        self.name, self.weight, self.most = f"damaged-{name}", weight, 4000
        self.files = [(file, read) for file, readers in files.items() for read in readers]
        self.checked, self.strict, self.patches = checked, strict, patches

    def prepare(self, folder: Path) -> None:
        done = child(lambda: make_files(folder), folder, 120)
        check(done.status == 0, done)
        self.wanted: dict[tuple, list[str]] = {}

    def undamaged(self, file: str, read, folder: Path) -> list[str]:
        """The content of the undamaged file; for a text this also caches its tokens."""
        if (file, read) not in self.wanted or read is tokens:
            place = folder if read is tokens else folder / "undamaged"
            link(folder.parent / "files", place)
            done = child(self.read(place, read, file), place)
            check(done.status == 0, f"the undamaged {file} is not read: {done}")
            self.wanted[file, read] = done.out.splitlines()
        return self.wanted[file, read]

    def read(self, folder: Path, read, file: str):
        return read(folder, "text.txt") if read is tokens else read(file)

    def case(self, number, rng, folder):
        file, read = self.files[number % len(self.files)]
        kinds = [*ACCIDENTS, *(patched,) * 3 * self.patches]
        damage = kinds[int(rng.integers(len(kinds)))]
        wanted = self.undamaged(file, read, folder)
        link(folder.parent / "files", folder)
        (path,) = folder.glob(file)
        raw = path.read_bytes()
        path.unlink()
        path.write_bytes(damage(raw, rng))
        done = child(self.read(folder, read, file), folder, SECONDS)
        what = f"{file} {damage.__name__}, {read.__name__}: {done}"
        check(not done.timed_out and done.megabytes < MEGABYTES, what)
        if done.status == 0:
            found = done.out.splitlines()
            if damage is patched:
                check(not self.strict or found[:1] == wanted[:1], f"not noticed: {what}")
            else:
                check(not self.checked or found == wanted, f"not noticed: {what}")
            return 1
        line = done.refusal("train.py:" if read is resumed else "")
        names = [path.name, path.parent.name]
        if file == "out/config.json":  # its settings may be named instead
            names += [f.name for f in fields(TrainConfig) + fields(GPTConfig)]
        check(any(n in line for n in names), f"does not name {path.name}: {what}")
        return 1


class NotFinite(Campaign):
    """NaN or infinity in one weight of an undamaged file: each command refuses it in one line that
    names the file."""

    name, weight = "weights-not-finite", 1.0

    def prepare(self, folder: Path) -> None:
        done = child(lambda: make_files(folder), folder, 120)
        check(done.status == 0, done)

    def case(self, number, rng, folder):
        link(folder.parent / "files", folder)
        name = ("base.safetensors", "gpt2/model.safetensors")[number % 2]
        path = folder / name
        with safe_open(path, framework="numpy") as file:  # without checksums
            tensors = {k: file.get_tensor(k) for k in list(file.keys())}
            metadata = {k: v for k, v in file.metadata().items() if not k.startswith("xxh3")}
        key = sorted(tensors)[int(rng.integers(len(tensors)))]
        array = tensors[key].copy()
        array.flat[int(rng.integers(array.size))] = rng.choice([np.nan, np.inf, -np.inf])
        path.unlink()
        save_file(tensors | {key: array}, path, metadata)
        source = name if number % 2 == 0 else "gpt2"
        commands = {
            "generate.py": lambda: generate.main(["--checkpoint", source, "--max_new_tokens", "2",
                                                  "--prompt", "a"]),
            "evaluate": lambda: evaluate.main([source, "text.txt"]),
            "train.py": lambda: train.main(["--init_from", source, "--data", "text.txt",
                                            "--max_iters", "1", "--eval_iters", "1", "--out_dir",
                                            "new", "--block_size", "8"])}
        command = list(commands)[number // 2 % len(commands)]
        done = child(commands[command], folder, 60)
        line = done.refusal(f"{command}:")
        check(Path(name).name in line or source in line, f"{command} does not name {name}: {done}")
        check(not (folder / "new").exists(), f"{command} left its folder")
        return 1


def link(source: Path, target: Path) -> None:
    """Copies a folder with hard links; its files are replaced, never modified."""
    if not (target / "text.txt").exists():
        shutil.copytree(source, target, symlinks=True, copy_function=os.link,
                        dirs_exist_ok=True)


def make_files(folder: Path) -> None:
    """Creates files of every kind: a run and its adapters, token files, exported models."""
    place = folder / "files"
    place.mkdir()
    os.chdir(place)
    light.write_text(place)
    if light.run(place, *LORA_FLAGS)():
        raise RuntimeError("the run whose files are damaged failed")
    if tokens(place, "text.txt")():
        raise RuntimeError("the text whose tokens are damaged was not read")
    next(place.glob("data/cache/text-bpe*")).rename(place / "tokens")
    shutil.rmtree(place / "data")
    sizes = dict(block_size=8, n_layer=2, n_head=2, n_embd=16)
    bpe = BPETokenizer.train(light.TEXT * 20, 300)
    plain = GPT(GPTConfig(vocab_size=bpe.vocab_size, **{**sizes, "n_layer": 1}))
    plain.tokenizer = bpe
    plain.save_checkpoint(3, out_dir=place)
    (place / "ckpt_3.safetensors").rename(place / "base.safetensors")
    plain.save_pretrained(place / "gpt2")
    _in_shards(place / "gpt2", place / "shards")
    llama = GPT(GPTConfig(vocab_size=bpe.vocab_size, norm="rmsnorm", position="rope", bias=False,
                          activation="swiglu", **sizes))
    llama.tokenizer = bpe
    llama.save_pretrained(place / "llama")


def _in_shards(whole: Path, folder: Path) -> None:
    """Copies a model, with its tensors in two files and an index."""
    shutil.copytree(whole, folder)
    tensors = load_file(whole / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(places.values())):
        save_file({k: t for k, t in tensors.items() if places[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def campaigns() -> list[Campaign]:
    cache = "data/cache/*"
    readers = ((cache, (tokens,)), ("tokens", (token_files,)))
    return [
        Damage("checkpoint", {CKPT: (saved, resumed), "base.safetensors": (
            saved, pretrained)}, weight=2),
        Damage("adapters", {"out/lora.safetensors": (adapted,)}),
        Damage("tokens", {f"{place}/{name}.bin": read for place, read in readers
                          for name in ("train", "val")}, patches=False, weight=1.5),
        Damage("meta", {f"{place}/meta.json": read for place, read in readers}, weight=1.5),
        Damage("run", {"out/config.json": (resumed,), "out/metrics.jsonl": (resumed,)},
               checked=False, strict=False),
        Damage("pretrained", {file: (pretrained_folder,) for file in (
            *(f"{kind}/{name}" for kind in ("gpt2", "llama") for name in (
                "config.json", "model.safetensors", "tokenizer.json")),
            "shards/model.safetensors.index.json", "shards/model-1.safetensors")},
               checked=False, strict=False, weight=3),
        NotFinite()]


def pretrained_folder(name: str) -> Callable[[], int]:
    return pretrained(str(Path(name).parent))
