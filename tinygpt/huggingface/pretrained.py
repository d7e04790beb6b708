"""GPT-2 and Llama models in Hugging Face's layout: read from a folder or downloaded, and written.

Tensors are read and written one at a time; `families.py` has their names.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinygpt import checkpoint, device
from tinygpt.data import DataError
from tinygpt.data.download import fetch
from tinygpt.data.tokenizer import BPETokenizer, Tokenizer
from tinygpt.huggingface import tokenizer_json
from tinygpt.huggingface.architectures import (
    ACTIVATIONS,
    FAMILIES,
    Family,
    PretrainedError,
    Settings,
    require,
)
from tinygpt.model.lora import is_adapter
from tinygpt.safetensors_file import TensorFile, TensorFileError, one_line, write

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = "https://huggingface.co/openai-community"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Pretrained:
    """A model in open files: the fields of its GPTConfig, its tokenizer, and where its weights are.

    The files close with a `with` statement.
    """

    path: str
    config: dict
    tokenizer: Tokenizer | None
    plan: dict[str, list[tuple[TensorFile, str]]]
    transposed: bool

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for file in {file for sources in self.plan.values() for file, _ in sources}:
            file.close()

    def configured(self, options: dict) -> dict:
        """The fields of the GPTConfig with options in it: a smaller block_size, a dropout.

        Raises PretrainedError where an option contradicts the weights.
        """
        for name, value in options.items():
            ours = self.config.get(name, value)
            smaller = name == "block_size" and value <= ours
            if value != ours and value is not None and name != "dropout" and not smaller:
                raise PretrainedError(f"{self.path} has {name}={ours}, but {name}={value} was "
                                      f"asked for: leave out --{name}")
        given = {k: v for k, v in options.items() if v is not None}
        return self.config | given

    def shapes(self, block_size: int) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by our name; a position table that is longer than block_size
        is cropped. Raises PretrainedError where parts of one do not fit together."""
        shapes = {}
        for name, sources in self.plan.items():
            first, *others = [file.shapes[source] for file, source in sources]
            if any(shape[1:] != first[1:] or not shape for shape in others):
                raise PretrainedError(f"{self.path} has parts of {name} with shapes {first} and "
                                      f"{', '.join(map(str, others))}, which do not fit together")
            rows = first[:1] and (sum(shape[0] for shape in (first, *others)),)
            shape = (*rows, *first[1:])
            if name == "wpe.weight" and shape:
                shape = (min(shape[0], block_size), *shape[1:])
            shapes[name] = shape[::-1] if self._is_transposed(name, shape) else shape
        return shapes

    def fill(self, weights: dict) -> None:
        """Writes the model into weights, realized Tensors by name whose shapes are those of
        `shapes`, one after another. Raises TensorFileError where one is damaged."""
        for name, weight in weights.items():
            array = self._array(name)[:weight.shape[0]]
            device.write(weight, array)
            del array  # before the next one is read

    def _array(self, name: str) -> np.ndarray:
        arrays = [file.read_float(source) for file, source in self.plan[name]]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return array.T if self._is_transposed(name, array.shape) else array

    def _is_transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.transposed and _is_linear(name) and len(shape) == 2


class TokenizerWarning(UserWarning, ValueError):
    """A pretrained model has a tokenizer that cannot be used here."""


@contextmanager
def tokenizer_needed(needed: bool = True):
    """Within it, a TokenizerWarning is raised as an error where a tokenizer is needed."""
    with warnings.catch_warnings():
        if needed:
            warnings.simplefilter("error", TokenizerWarning)
        yield


def is_pretrained(path: str | Path) -> bool:
    """Whether path names a model that `open_pretrained` reads and that is no checkpoint of ours."""
    if str(path) in NAMES or os.path.isdir(path):
        return True
    return (os.path.isfile(path) and (Path(path).parent / "config.json").is_file()
            and Path(path).suffix == ".safetensors" and not _is_ours(path))


def open_pretrained(name: str | Path, offline: bool = False,
                    base_url: str | None = None) -> Pretrained:
    """The model that name means: one of NAMES, a folder in Hugging Face's layout, a .safetensors
    file with its config.json beside it, or a checkpoint of ours.

    One of NAMES is downloaded from base_url (HUB) into the cache, unless a folder of that name is
    here, or offline is given. Raises ValueError, in one line.
    """
    path = Path(name)
    if str(name) in NAMES and not (path / "config.json").is_file():
        path = _downloaded(str(name), offline, base_url or HUB)
    if not path.exists():
        raise PretrainedError(f"there is no pretrained model {name}: name one of "
                              f"{', '.join(NAMES)}, a folder or a .safetensors file")
    if path.is_file() and _is_ours(path):
        return _own(path)
    folder = path if path.is_dir() else path.parent
    if folder != path and not (folder / "config.json").exists():
        raise PretrainedError(f"{path} is no checkpoint of this project, and has no config.json "
                              "beside it, which any other pretrained model needs")
    kind, config = _read_config(folder / "config.json")
    plan = _plan(FAMILIES[kind], config, _tensors(path), str(folder))
    return Pretrained(str(name), config, _tokenizer(folder, kind, config["vocab_size"]), plan,
                      FAMILIES[kind].transposed)


def _read_config(path: Path) -> tuple[str, dict]:
    """The family that a config.json names, and the fields of GPTConfig. Raises PretrainedError."""
    settings = _read_json(path)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        what = f"model_type {one_line(kind)}" if kind else "no model_type"
        raise PretrainedError(f"{path} has {what}: only {' and '.join(FAMILIES)} models are read; "
                              "of a run of ours name the .safetensors file")
    require(settings, FAMILIES[kind].required, str(path))
    return kind, FAMILIES[kind].read(Settings(settings, str(path)))


def _downloaded(name: str, offline: bool, base_url: str) -> Path:
    """The folder in the cache with the files of one of NAMES."""
    folder = device.cache_dir() / "pretrained" / name
    for file, check in (("config.json", _read_json), ("model.safetensors", _check_file)):
        path = folder / file
        if path.is_file():
            continue
        if offline:
            raise PretrainedError(f"{path} is not there, and --offline forbids to download it: "
                                  "connect once without it, or name a folder")
        try:
            fetch(f"{base_url}/{name}/resolve/main/{file}", path, check)
        except DataError as error:
            raise PretrainedError(f"{name} is not to be had: {error}; connect, or copy config.json "
                                  f"and model.safetensors into {folder}") from error
    return folder


def _check_file(path: Path) -> None:
    TensorFile(path).close()


# ---- what a folder holds

def _read_json(path: Path) -> dict:
    if path.exists() and not path.is_file():
        raise PretrainedError(f"{path} is not a file: a pretrained model needs its config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read ({error.strerror}): a pretrained model needs "
                              "its config.json") from error
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is no JSON ({error})") from error
    if not isinstance(data, dict):
        raise PretrainedError(f"{path} is no JSON object")
    return data


def _tensors(path: Path) -> dict[str, tuple[TensorFile, str]]:
    """The file and the full name of every tensor, by its name without the family's prefix."""
    files = [path]
    if path.is_dir():
        files = [path / "model.safetensors"]
        if not files[0].is_file() and (path / INDEX).is_file():
            shards = _read_json(path / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not shards or any(
                    not isinstance(n, str) or Path(n).name != n for n in shards.values()):
                raise PretrainedError(f"{path / INDEX} has no weight_map of files beside it")
            files = [path / name for name in sorted(set(shards.values()))]
    if not os.path.isfile(files[0]):  # a name in the index may be longer than names can be
        raise PretrainedError(f"there is no {files[0]}: other formats than safetensors are not "
                              "read, convert it first")
    prefixes = tuple(family.prefix for family in FAMILIES.values())
    found = {}
    for file in map(TensorFile, files):
        for name in file.shapes:
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            found[name.removeprefix(prefix)] = (file, name)
    return found


def _plan(family: Family, config: dict, found: dict[str, tuple[TensorFile, str]], path: str
          ) -> dict[str, list[tuple[TensorFile, str]]]:
    """Which tensors make each of ours. Raises PretrainedError where one is missing, left over, or
    where a size in the configuration is not that of the tensors."""
    plan, used = {}, set()
    for ours, theirs in _names(family, config):
        for name in theirs:
            if name not in found:
                raise PretrainedError(f"{path} has no tensor {name}, which its configuration needs")
        plan[ours], used = [found[name] for name in theirs], used | set(theirs)
    for name in sorted(found.keys() - used):
        tied = name == "lm_head.weight" and config["tie_weights"]
        if not tied and not name.endswith(family.ignored):
            raise PretrainedError(f"{path} has a tensor {name} that its configuration does not "
                                  "have")
    for table, rows in (("wte.weight", "vocab_size"), ("wpe.weight", "block_size")):
        for file, name in plan.get(table, []):
            wanted = config[rows], config["n_embd"]
            if file.shapes[name] != wanted:
                raise PretrainedError(f"{path} has {name} of shape {file.shapes[name]}, its "
                                      f"configuration says {wanted}")
    return plan


def _names(family: Family, config: dict) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name and theirs of every tensor for that configuration, which may claim any number of
    layers."""
    for ours, theirs in family.tensors.items():
        if ours.endswith(".bias") and not config["bias"]:
            continue
        for i in range(config["n_layer"]) if "{}" in ours else (0,):
            yield ours.format(i), tuple(name.format(i) for name in theirs)
    if not config["tie_weights"]:
        yield "lm_head.weight", ("lm_head.weight",)


def _is_linear(name: str) -> bool:
    return name.startswith("h.") and name.endswith(".weight")


def _tokenizer(folder: Path, kind: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder; GPT-2's where a GPT-2 of that vocabulary comes with no
    tokenizer.json. Warns where one is there that cannot be used."""
    path, found = folder / "tokenizer.json", None
    try:
        if path.exists():
            found = tokenizer_json.read(path)
        elif kind == "gpt2" and vocab_size == 50257:
            found = BPETokenizer()
        if found is not None and found.vocab_size > vocab_size:
            raise ValueError(f"{path} has {found.vocab_size} ids, but the model vocab_size="
                             f"{vocab_size}")
    except ValueError as error:
        warnings.warn(f"{folder} is read without its tokenizer: {error}", TokenizerWarning,
                      stacklevel=4)
        return None
    return found


# ---- our own checkpoints

def _is_ours(path: str | Path) -> bool:
    with TensorFile(path) as file:
        return checkpoint.is_ours(file)


def _own(path: Path) -> Pretrained:
    file = checkpoint.Checkpoint(path)
    try:
        checkpoint.check_kind(path, file.header, "gpt")
        config = file.header["model_config"]
        adapted = [name for name in file.part("model.") if is_adapter(name)]
        if adapted:
            raise PretrainedError(f"{path} has LoRA adapters: merge them with python generate.py "
                                  f"--checkpoint {path} --export FOLDER, and name that folder")
        tokenizer = checkpoint.tokenizer_of(file)
    except ValueError:
        file.close()
        raise
    plan = {name: [(file, f"model.{name}")] for name in file.part("model.")}
    return Pretrained(str(path), config, tokenizer, plan, False)


# ---- out

def export(config: dict, weights: dict, tokenizer: Tokenizer | None, folder: str | Path) -> Path:
    """Writes a folder that transformers opens: config.json, model.safetensors, the tokenizer.

    config holds GPTConfig's fields, weights Tensors by our names. The folder appears when it is
    whole. Raises PretrainedError where an option has no home in GPT2LMHeadModel nor in
    LlamaForCausalLM, where the folder has something in it, or where it cannot be written.
    """
    folder = Path(folder)
    kind = _kind_of(config)
    family = FAMILIES[kind]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PretrainedError(f"{folder} is there already: name a new folder")
    files = {"config.json": family.write(config, tokenizer)} | tokenizer_json.dump(
        tokenizer, config["block_size"])
    files["generation_config.json"] = {k: v for k, v in files["config.json"].items()
                                       if k in ("bos_token_id", "eos_token_id")}
    if tokenizer is not None and "tokenizer.json" not in files:
        warnings.warn(f"{folder} is written without a tokenizer: transformers has none like ours",
                      stacklevel=3)
    shapes, sources = _layout(family, config, weights)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for name, data in files.items():
            (part / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        arrays = (_rows(config, weights, family, *source) for source in sources)
        like = {name: (shape, "F32") for name, shape in shapes.items()}
        write(part / "model.safetensors", like, arrays, {"format": "pt"})
        part.replace(folder)
    except (OSError, TensorFileError) as error:
        why = getattr(error, "strerror", None) or error
        raise PretrainedError(f"{folder} cannot be written ({why})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _kind_of(config: dict) -> str:
    """The family whose options these are. Raises PretrainedError that names what has no home."""
    defaults = {"parallel": False, "qk_norm": False, "sliding_window": None}
    homes = {"gpt2": defaults | {"norm": "layernorm", "position": "learned",
                                 "activation": tuple(ACTIVATIONS.values()),
                                 "n_kv_head": (None, config["n_head"])},
             "llama": defaults | {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"}}
    lacks = {kind: [f"{k}={config[k]}" for k, v in wanted.items()
                    if config[k] not in (v if isinstance(v, tuple) else (v,))]
             for kind, wanted in homes.items()}
    for kind, options in lacks.items():
        if not options:
            return kind
    raise PretrainedError("transformers has no home for this model: GPT2LMHeadModel lacks "
                          f"{', '.join(lacks['gpt2'])}; LlamaForCausalLM lacks "
                          f"{', '.join(lacks['llama'])}: train one that has only the options of "
                          "either")


def _layout(family: Family, config: dict, weights: dict) -> tuple[dict, list]:
    """The shapes of their tensors by name, and for each (our name, its part, of how many)."""
    # GPT-2 has biases everywhere: where ours has none, they are zeros
    names = _names(family, config | {"bias": config["bias"] or family.transposed})
    shapes, sources = {}, []
    for ours, theirs in names:
        for i, name in enumerate(theirs):
            shape = _rows_shape(config, weights, family, ours, i, len(theirs))
            full = name if name.startswith("lm_head") else family.prefix + name
            shapes[full] = shape
            sources.append((ours, i, len(theirs)))
    return shapes, sources


def _span(config: dict, part: int, parts: int) -> slice:
    """Which rows of a matrix are its part: all, or those of q, k or v."""
    if parts == 1:
        return slice(None)
    size = config["n_embd"] // config["n_head"]
    kv = (config["n_kv_head"] or config["n_head"]) * size
    begin = (0, config["n_embd"], config["n_embd"] + kv)[part]
    return slice(begin, begin + (config["n_embd"] if part == 0 else kv))


def _rows_shape(config: dict, weights: dict, family: Family, name: str, part: int, parts: int
                ) -> tuple[int, ...]:
    if name not in weights:  # a bias that ours lacks
        return (weights[name.replace(".bias", ".weight")].shape[0],)
    first, *rest = weights[name].shape
    rows = len(range(first)[_span(config, part, parts)])
    return (*rest, rows) if family.transposed and rest and _is_linear(name) else (rows, *rest)


def _rows(config: dict, weights: dict, family: Family, name: str, part: int, parts: int
          ) -> np.ndarray:
    if name not in weights:
        return np.zeros(_rows_shape(config, weights, family, name, part, parts), np.float32)
    array = device.read(weights[name])[_span(config, part, parts)]
    return array.T if family.transposed and array.ndim == 2 and _is_linear(name) else array
