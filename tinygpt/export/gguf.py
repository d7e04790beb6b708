"""Writes a model as GGUF, the file format of llama.cpp and of the programs built on it."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from tinygpt.data.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.huggingface import tokenizer_json
from tinygpt.huggingface.pretrained import architecture_of, hub_tensors
from tinygpt.model import lora

ARCHITECTURES = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA,
                 "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
MATRICES = {"none": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
            "fp16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
            "int8": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
            "int4": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0)}


def write(model, path: str | Path, quantize: str = "none") -> Path:
    """Writes a GPT in the shape of one of ARCHITECTURES, with its tokenizer, atomically; returns
    the path.

    quantize says how the matrices are stored: "none" as F32, "fp16" as F16, "int8" as Q8_0 and
    "int4" as Q4_0, which have a scale for every 32 weights of a row; where a row is no multiple of
    32, as F16. Norms,
    biases and the position table are F32. LoRA adapters are merged into the model. Raises
    ValueError, which names the option, where no architecture has such a model, and where the file
    cannot be written.
    """
    if model.kind != "gpt":
        raise ValueError(f"GGUF has no {model.kind} model: export a GPT")
    if quantize not in MATRICES:
        raise ValueError(f"GGUF files of quantize={quantize!r} are not written: choose one of "
                         f"{', '.join(MATRICES)}")
    architecture = architecture_of(asdict(model.config))
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{architecture} models are not written as GGUF: train one with the "
                         f"options of {' or '.join(ARCHITECTURES)}")
    for option, value in (("rope_scaling", "none"), ("sliding_window", None)):
        if getattr(model.config, option) != value:
            raise ValueError(f"models with {option}={getattr(model.config, option)} are not "
                             "written as GGUF: export a folder, and convert it with llama.cpp")
    lora.merge(model)
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    writer = GGUFWriter(part, architecture)
    _add_config(writer, model.config, path.stem)
    writer.add_file_type(MATRICES[quantize][1])
    _add_tokenizer(writer, model.tokenizer, model.config.vocab_size)
    try:
        _write_tensors(writer, model, architecture, MATRICES[quantize][0])
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return path


def _add_config(writer: GGUFWriter, config, name: str) -> None:
    """The sizes of the model; config is its GPTConfig."""
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.position == "rope":
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(config.rope_theta)
    if config.activation == "gelu":
        warnings.warn("llama.cpp approximates GELU by tanh, and the model was trained with the "
                      "exact one: its logits differ a little", stacklevel=3)


def _add_tokenizer(writer: GGUFWriter, tokenizer, vocab_size: int) -> None:
    """The tokenizer; ids of the model that it lacks become unused tokens."""
    if isinstance(tokenizer, BPETokenizer):
        model = tokenizer_json.dump(tokenizer, 0)["tokenizer.json"]["model"]
        vocab = model["vocab"]
        tokens = sorted(vocab, key=vocab.get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(tokenizer.end_of_text)
        writer.add_eos_token_id(tokenizer.end_of_text)
        writer.add_add_bos_token(False)
    elif isinstance(tokenizer, ByteTokenizer) or (isinstance(tokenizer, CharTokenizer)
                                                  and tokenizer.chars.isascii()):
        # RWKV's takes the longest token each time, and has no end of text
        tokens = [f"\\x{tokenizer.decode_bytes([i])[0]:02x}" for i in range(tokenizer.vocab_size)]
        writer.add_tokenizer_model("rwkv")
    else:
        writer.add_tokenizer_model("none")
        warnings.warn("the file has no tokenizer: llama.cpp takes BPE, bytes and ASCII characters",
                      stacklevel=3)
        return
    unused = range(len(tokens), vocab_size)
    writer.add_token_list(tokens + [f"[UNUSED{i}]" for i in unused])
    writer.add_token_types([TokenType.CONTROL if token == END_OF_TEXT else TokenType.NORMAL
                            for token in tokens] + [TokenType.UNUSED for _ in unused])


def _write_tensors(writer: GGUFWriter, model, architecture: str,
                   matrices: GGMLQuantizationType) -> None:
    kinds = {}
    for name, array in _tensors(model, architecture):
        kinds[name] = kind = _type(name, array.shape, matrices)
        size = math.prod(gguf.quant_shape_to_byte_shape(array.shape, kind))
        writer.add_tensor_info(name, array.shape, array.dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in _tensors(model, architecture):
        writer.write_tensor_data(gguf.quantize(array, kinds[name]))
    writer.close()


def _tensors(model, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors as llama.cpp names and orders them, one at a time."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.n_layer)
    heads = {"attn_q": config.n_head, "attn_k": config.kv_heads}
    for theirs, array in hub_tensors(asdict(config), model.state_dict()):
        name = names.get_name(theirs, (".weight", ".bias"))
        if architecture == "gpt2" and array.ndim == 2 and name.startswith("blk."):
            array = array.T  # (C, N) in the hub
        if architecture == "llama" and (part := name.split(".")[-2]) in heads:
            array = _interleaved(array, heads[part])
        yield name, np.ascontiguousarray(array)


def _interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order for RoPE on the pairs (2i, 2i + 1), from that for pairs
    (i, i + D/2)."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _type(name: str, shape: tuple[int, ...],
          matrices: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor where the matrices are to be of that type."""
    if len(shape) == 1 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[matrices]
    return matrices if shape[-1] % block == 0 else GGMLQuantizationType.F16
