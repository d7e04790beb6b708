"""Reads and writes models in Hugging Face's layout; downloads GPT-2.

Tensors are read and written one at a time; `architectures.py` has their names.
"""

import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tinygrad import dtypes
from tqdm import tqdm

from tinygpt import checkpoint, device
from tinygpt.data import DataError
from tinygpt.data.download import fetch
from tinygpt.data.tokenizer import BPETokenizer, Tokenizer
from tinygpt.huggingface import tokenizer_json
from tinygpt.huggingface.architectures import (
    ARCHITECTURES,
    Architecture,
    PretrainedError,
    Settings,
    has_bias,
    require,
)
from tinygpt.model.lora import is_adapter
from tinygpt.safetensors_file import TensorFile, TensorFileError, one_line, write

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = "https://huggingface.co/openai-community"
DTYPES = {dtypes.float32: "F32", dtypes.bfloat16: "BF16", dtypes.float16: "F16"}
TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Pretrained:
    """A model in open files; use it in a `with` statement, which closes them.

    config: the fields of its GPTConfig. sources: the tensors that make each of our weights.
    """

    path: str
    config: dict
    tokenizer: Tokenizer | None
    sources: dict[str, list[tuple[TensorFile, str]]]
    transposed: bool

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for file in {file for parts in self.sources.values() for file, _ in parts}:
            file.close()

    def config_with(self, options: dict) -> dict:
        """The fields of GPTConfig with options such as a smaller block_size or a dropout.

        Raises PretrainedError if an option contradicts the weights.
        """
        given = {k: v for k, v in options.items() if v is not None}
        for name, value in given.items():
            ours = self.config.get(name, value)
            smaller = name == "block_size" and value <= ours
            if value != ours and name != "dropout" and not smaller:
                raise PretrainedError(f"{self.path} has {name}={ours}, but {name}={value} was "
                                      f"asked for: leave out --{name}")
        return self.config | given

    def shapes(self, block_size: int) -> dict[str, tuple[int, ...]]:
        """The shape of each weight by our name; a position table longer than block_size is cropped.
        Raises PretrainedError if the parts of a weight do not fit together."""
        shapes = {}
        for name, parts in self.sources.items():
            first, *others = [file.shapes[part] for file, part in parts]
            if any(shape[1:] != first[1:] or not shape for shape in others):
                raise PretrainedError(f"{self.path} has parts of {name} with shapes {first} and "
                                      f"{', '.join(map(str, others))}, which do not fit together")
            rows = first[:1] and (sum(shape[0] for shape in (first, *others)),)
            shape = (*rows, *first[1:])
            if name == "wpe.weight" and shape:
                shape = (min(shape[0], block_size), *shape[1:])
            shapes[name] = shape[::-1] if self._is_transposed(name, shape) else shape
        return shapes

    def dtype(self, name: str, as_stored: bool) -> str:
        """What `fill` makes of a weight: F32, or BF16 or F16 of a matrix that is stored so."""
        found = {(file.dtypes[part], len(file.shapes[part])) for file, part in self.sources[name]}
        kinds = {dtype for dtype, axes in found if axes == 2} if as_stored else set()
        return kinds.pop() if kinds in ({"BF16"}, {"F16"}) else "F32"

    def check_memory(self, shapes: dict[str, tuple[int, ...]], as_stored: bool) -> None:
        """Raises ValueError where weights of these shapes do not fit into memory."""
        size = sum(math.prod(shape) * (4 if self.dtype(name, as_stored) == "F32" else 2)
                   for name, shape in shapes.items())
        device.check_memory(size, f"the weights of {self.path}", "choose a smaller model")

    def fill(self, weights: dict, as_stored: bool = False) -> None:
        """Gives weights, Tensors by name with the shapes of `shapes`, their memory and values, one
        at a time: float32, or with as_stored matrices of 16 bits as they are.

        Raises TensorFileError if one is damaged.
        """
        with tqdm(total=len(weights), unit="tensor", desc=self.path, leave=False,
                  disable=not sys.stderr.isatty()) as bar:
            for name, weight in weights.items():
                array = self._array(name, self.dtype(name, as_stored))[:weight.shape[0]]
                weight.replace(device.tensor_of(array))
                del array  # before the next one is read
                bar.update()

    def _array(self, name: str, dtype: str) -> np.ndarray:
        """A weight as float32, or of BF16 the bits, or as float16."""
        arrays = [file.read_float(part, widen=dtype == "F32") for file, part in self.sources[name]]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        array = array.astype(np.float32, copy=False) if dtype == "F32" else array
        return array.T if self._is_transposed(name, array.shape) else array

    def _is_transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.transposed and _is_linear(name) and len(shape) == 2


class TokenizerWarning(UserWarning, ValueError):
    """The tokenizer of a pretrained model cannot be used."""


@contextmanager
def tokenizer_needed(needed: bool = True):
    """A context in which a TokenizerWarning is an error, if a tokenizer is needed."""
    with warnings.catch_warnings():
        if needed:
            warnings.simplefilter("error", TokenizerWarning)
        yield


def is_pretrained(path: str | Path) -> bool:
    """Whether `open_pretrained` reads path, and path is not a checkpoint of this project."""
    if str(path) in NAMES or os.path.isdir(path):
        return True
    return (os.path.isfile(path) and (Path(path).parent / "config.json").is_file()
            and Path(path).suffix == ".safetensors" and not _is_ours(path))


def open_pretrained(name: str | Path, offline: bool = False,
                    base_url: str | None = None) -> Pretrained:
    """Opens one of NAMES, a folder in Hugging Face's layout, a .safetensors file with config.json
    in the same folder, or a checkpoint of this project.

    One of NAMES is downloaded from base_url (HUB) into the cache, unless a folder has that name or
    offline is given. Raises ValueError, in one line.
    """
    path = Path(name)
    if str(name) in NAMES and not (path / "config.json").is_file():
        path = _downloaded(str(name), offline, base_url or HUB)
    if not path.exists():
        raise PretrainedError(f"there is no pretrained model {name}: name one of "
                              f"{', '.join(NAMES)}, a folder or a .safetensors file")
    if path.is_file() and _is_ours(path):
        return _from_checkpoint(path)
    folder = path if path.is_dir() else path.parent
    if folder != path and not (folder / "config.json").exists():
        raise PretrainedError(f"{path} is not a checkpoint of this project, and its folder has no "
                              "config.json, which any other pretrained model needs")
    kind, config = _read_config(folder / "config.json")
    sources = _sources(ARCHITECTURES[kind], config, _tensors(path), str(folder))
    return Pretrained(str(name), config, _tokenizer(folder, kind, config["vocab_size"]), sources,
                      ARCHITECTURES[kind].transposed)


def _read_config(path: Path) -> tuple[str, dict]:
    """The architecture in a config.json and the fields of GPTConfig. Raises PretrainedError."""
    settings = _read_json(path)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        what = f"model_type {one_line(kind)}" if kind else "no model_type"
        raise PretrainedError(f"{path} has {what}: only {' and '.join(ARCHITECTURES)} models are "
                              "supported; of a run of train.py name the .safetensors file")
    require(settings, ARCHITECTURES[kind].required, str(path))
    return kind, ARCHITECTURES[kind].read(Settings(settings, str(path)))


def _downloaded(name: str, offline: bool, base_url: str) -> Path:
    """The cache folder of one of NAMES, after downloading the missing files."""
    folder = device.cache_dir() / "pretrained" / name
    for file, check in (("config.json", _read_json), ("model.safetensors", _check_file)):
        path = folder / file
        if path.is_file():
            continue
        if offline:
            raise PretrainedError(f"{path} does not exist, and --offline prevents the download: "
                                  "run once without it, or name a folder")
        try:
            fetch(f"{base_url}/{name}/resolve/main/{file}", path, check)
        except DataError as error:
            raise PretrainedError(f"{name} cannot be downloaded: {error}; connect, or copy "
                                  f"config.json and model.safetensors into {folder}") from error
    return folder


def _check_file(path: Path) -> None:
    TensorFile(path).close()


# ---- the files of a folder

def _read_json(path: Path) -> dict:
    if path.exists() and not path.is_file():
        raise PretrainedError(f"{path} is not a file: a pretrained model needs its config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read ({error.strerror}): a pretrained model needs "
                              "its config.json") from error
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(data, dict):
        raise PretrainedError(f"{path} is not a JSON object: download it again")
    return data


def _tensors(path: Path) -> dict[str, tuple[TensorFile, str]]:
    """The file and full name of every tensor, by its name without the architecture's prefix."""
    files = [path]
    if path.is_dir():
        files = [path / "model.safetensors"]
        if not files[0].is_file() and (path / INDEX).is_file():
            shards = _read_json(path / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not shards or any(
                    not isinstance(n, str) or Path(n).name != n for n in shards.values()):
                raise PretrainedError(f"{path / INDEX} has no weight_map of files in its folder")
            files = [path / name for name in sorted(set(shards.values()))]
    if not os.path.isfile(files[0]):  # is_file raises if a name in the index is too long
        raise PretrainedError(f"there is no {files[0]}: convert weights in other formats to "
                              "safetensors first")
    prefixes = tuple(architecture.prefix for architecture in ARCHITECTURES.values())
    found = {}
    for file in map(TensorFile, files):
        for name in file.shapes:
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            found[name.removeprefix(prefix)] = (file, name)
    return found


def _sources(architecture: Architecture, config: dict, tensors: dict[str, tuple[TensorFile, str]],
             path: str) -> dict[str, list[tuple[TensorFile, str]]]:
    """The tensors that make each of our weights. Raises PretrainedError if one is missing or not
    expected, or if a size in the configuration is not that of the tensors."""
    sources, used = {}, set()
    for ours, theirs in _names(architecture, config):
        for name in theirs:
            if name not in tensors:
                raise PretrainedError(f"{path} has no tensor {name}, which its configuration needs")
        sources[ours], used = [tensors[name] for name in theirs], used | set(theirs)
    for name in sorted(tensors.keys() - used):
        tied = name == "lm_head.weight" and config["tie_weights"]
        if not tied and not name.endswith(architecture.ignored):
            raise PretrainedError(f"{path} has a tensor {name} that is not in its configuration")
    for table, rows in (("wte.weight", "vocab_size"), ("wpe.weight", "block_size")):
        for file, name in sources.get(table, []):
            expected = config[rows], config["n_embd"]
            if file.shapes[name] != expected:
                raise PretrainedError(f"{path} has {name} of shape {file.shapes[name]}, its "
                                      f"configuration has {expected}")
    return sources


def _names(architecture: Architecture, config: dict) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields our name and theirs of every tensor; lazily, as config may claim any number of
    layers."""
    for ours, theirs in architecture.tensors.items():
        if ours.endswith(".bias") and not has_bias(ours, config):
            continue
        for i in range(config["n_layer"]) if "{}" in ours else (0,):
            yield ours.format(i), tuple(name.format(i) for name in theirs)
    if not config["tie_weights"]:
        yield "lm_head.weight", ("lm_head.weight",)


def _is_linear(name: str) -> bool:
    return name.startswith("h.") and name.endswith(".weight")


def _tokenizer(folder: Path, kind: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder; a GPT-2 without any file of one has GPT-2's. Warns if it cannot be
    used."""
    try:
        tokenizer = tokenizer_json.read(folder)
        if tokenizer is None and kind == "gpt2" and vocab_size == 50257:
            tokenizer = BPETokenizer()
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} ids, "
                             f"but the model has vocab_size={vocab_size}")
    except ValueError as error:
        warnings.warn(f"{folder} is read without its tokenizer: {error}", TokenizerWarning,
                      stacklevel=4)
        return None
    return tokenizer


# ---- checkpoints of this project

def _is_ours(path: str | Path) -> bool:
    with TensorFile(path) as file:
        return checkpoint.is_ours(file)


def _from_checkpoint(path: Path) -> Pretrained:
    file = checkpoint.Checkpoint(path)
    try:
        checkpoint.check_kind(path, file.header, "gpt")
        config = file.header["model_config"]
        if any(is_adapter(name) for name in file.part("model.")):
            raise PretrainedError(f"{path} has LoRA adapters: merge them with python generate.py "
                                  f"--checkpoint {path} --export FOLDER, and name that folder")
        tokenizer = checkpoint.tokenizer_of(file)
    except ValueError:
        file.close()
        raise
    prefix = "ema." if file.part("ema.") else "model."
    sources = {name: [(file, prefix + name)] for name in file.part(prefix)}
    return Pretrained(str(path), config, tokenizer, sources, False)


# ---- export

def export(config: dict, weights: dict, tokenizer: Tokenizer | None, folder: str | Path) -> Path:
    """Writes a folder that transformers opens: config.json, model.safetensors, the tokenizer.

    config: the fields of GPTConfig. weights: Tensors by our names. The folder appears when it is
    complete. Raises PretrainedError if no architecture has the options of config, if the folder is
    not empty, or if it cannot be written.
    """
    folder = Path(folder)
    architecture = ARCHITECTURES[architecture_of(config)]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PretrainedError(f"{folder} already exists: name a new folder")
    settings = architecture.write(config, tokenizer)
    settings["dtype"] = TORCH_DTYPES[DTYPES[weights["wte.weight"].dtype]]
    files = {"config.json": settings} | tokenizer_json.dump(
        tokenizer, config["block_size"])
    files["generation_config.json"] = {k: v for k, v in files["config.json"].items()
                                       if k in ("bos_token_id", "eos_token_id")}
    if tokenizer is not None and "tokenizer.json" not in files:
        warnings.warn(f"{folder} is written without a tokenizer: transformers has no "
                      f"equivalent of {type(tokenizer).__name__}", stacklevel=3)
    shapes, sources = _layout(architecture, config, weights)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for name, data in files.items():
            (part / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        arrays = (_rows(config, weights, architecture, *source) for source in sources)
        layout = {name: (shape, DTYPES[weights[ours].dtype] if ours in weights else "F32")
                  for (name, shape), (ours, _, _) in zip(shapes.items(), sources, strict=True)}
        write(part / "model.safetensors", layout, arrays, {"format": "pt"})
        part.replace(folder)
    except (OSError, TensorFileError) as error:
        why = getattr(error, "strerror", None) or error
        raise PretrainedError(f"{folder} cannot be written ({why})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def hub_tensors(config: dict, weights: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a model by their names in Hugging Face's layout, one at a time.

    config: the fields of GPTConfig. weights: Tensors by our names. Raises PretrainedError as
    `architecture_of` does.
    """
    architecture = ARCHITECTURES[architecture_of(config)]
    shapes, sources = _layout(architecture, config, weights)
    for name, source in zip(shapes, sources, strict=True):
        yield name, _rows(config, weights, architecture, *source)


def architecture_of(config: dict) -> str:
    """The architecture with these options. Raises PretrainedError that names the options which the
    nearest one lacks."""
    lacks = {kind: architecture.lacks(config) for kind, architecture in ARCHITECTURES.items()}
    nearest = min(lacks, key=lambda kind: len(lacks[kind]))
    if lacks[nearest]:
        raise PretrainedError("transformers has no architecture for this model: the nearest, "
                              f"{ARCHITECTURES[nearest].name}, lacks {', '.join(lacks[nearest])}: "
                              "train a model without")
    return nearest


def _layout(architecture: Architecture, config: dict, weights: dict) -> tuple[dict, list]:
    """The shapes of their tensors by name, and for each (our name, part, number of parts)."""
    # GPT-2 has biases everywhere: they are zeros if ours has none
    filled = {"bias": True, "qkv_bias": None} if architecture.transposed else {}
    names = _names(architecture, config | filled)
    shapes, sources = {}, []
    for ours, theirs in names:
        for i, name in enumerate(theirs):
            shape = _rows_shape(config, weights, architecture, ours, i, len(theirs))
            full = name if name.startswith("lm_head") else architecture.prefix + name
            shapes[full] = shape
            sources.append((ours, i, len(theirs)))
    return shapes, sources


def _span(config: dict, part: int, parts: int) -> slice:
    """The rows of our matrix in one of their parts: all, or those of q, k or v."""
    if parts == 1:
        return slice(None)
    size = config["head_dim"] or config["n_embd"] // config["n_head"]
    q, kv = (n * size for n in (config["n_head"], config["n_kv_head"] or config["n_head"]))
    begin = (0, q, q + kv)[part]
    return slice(begin, begin + (q if part == 0 else kv))


def _rows_shape(config: dict, weights: dict, architecture: Architecture, name: str, part: int,
                parts: int) -> tuple[int, ...]:
    if name not in weights:  # a bias that ours lacks
        return (weights[name.replace(".bias", ".weight")].shape[0],)
    first, *rest = weights[name].shape
    rows = len(range(first)[_span(config, part, parts)])
    return (*rest, rows) if architecture.transposed and rest and _is_linear(name) else (rows, *rest)


def _rows(config: dict, weights: dict, architecture: Architecture, name: str, part: int,
          parts: int) -> np.ndarray:
    if name not in weights:
        return np.zeros(_rows_shape(config, weights, architecture, name, part, parts), np.float32)
    array = device.read(weights[name])[_span(config, part, parts)]
    return array.T if architecture.transposed and array.ndim == 2 and _is_linear(name) else array
