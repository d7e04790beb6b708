"""A model as one HTML page, which needs nothing besides a browser: `page/` put together.

The page opens from a disk and fetches nothing. In it are the model as WebAssembly with its weights,
the tokenizer, and what is known of the model and its training. Without a module it is the page of a
server: the same, but it asks the server that it came from, and holds conversations, as a page does
that was exported for them.
"""

import base64
import gzip
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from tinygrad import dtypes

from tinygpt import checkpoint
from tinygpt.config import SampleConfig
from tinygpt.data.tokenizer import (
    BPETokenizer,
    HFTokenizer,
    Tokenizer,
    begin_of_text,
    end_of_text,
)
from tinygpt.export import program, wasm
from tinygpt.export.characters import ranges

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("tokenizer.js", "backends.js", "charts.js", "text.js", "about.js", "page.js")
BLOCK = 3 << 20  # bytes of compressed weights in one element of the page
PRECISIONS = {dtypes.uint8: "int4", dtypes.int8: "int8", dtypes.float16: "float16",
              dtypes.bfloat16: "bfloat16", dtypes.float32: "float32"}  # of the output layer
TOKENS = 200  # that a page writes at first
CURVE = 300  # points of the loss curve at most


def write(model, path: Path, quantize: str | None, source: str, prompt: str,
          chat: dict | None = None) -> None:
    """Writes the page of a GPT that was loaded from source; it begins with a prompt.

    quantize is "int8", which None is too, "fp16" or "none". With what `describe_chat` returns as
    chat, the page holds conversations too. Raises ValueError where the model is no GPT, is too
    large for a browser, or has no tokenizer.
    """
    program.quantize(model, quantize)
    metadata = describe(model, source, prompt, SampleConfig(max_new_tokens=TOKENS))
    metadata["chat"] = chat
    checkpoint.write_atomically(path, page(metadata, wasm.build(model)))


def describe(model, source: str, prompt: str, sample: SampleConfig) -> dict:
    """What a page knows of its model, as JSON values: name, config, parameters, precision,
    tokenizer, whether that has a chat template, training (None where the checkpoint is not of a
    run), prompt and sample."""
    head = (model.lm_head or model.wte).weight.dtype
    return {"name": Path(source).stem, "config": asdict(model.config),
            "parameters": model.config.num_params(),
            "precision": PRECISIONS[head],
            "tokenizer": describe_tokenizer(model.tokenizer),
            "has_template": getattr(model.tokenizer, "chat_template", None) is not None,
            "training": training(Path(source)),
            "prompt": prompt, "sample": asdict(sample)}


def describe_chat(tokenizer: Tokenizer, system: str | None) -> dict:
    """What a page needs to hold conversations in the plain format, which begin with a system
    message. Raises ValueError for a tokenizer that has a template of its own."""
    if getattr(tokenizer, "chat_template", None) is not None:
        raise ValueError("a chat template does not run in a browser: leave out --chat, or use "
                         "--serve, whose page holds conversations")
    return {"begin": begin_of_text(tokenizer), "end": end_of_text(tokenizer),
            "system": system or ""}


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """`to_json()` of a tokenizer, and for bpe the letters and numbers of Unicode as ranges of a
    regular expression in JavaScript. Of a tokenizer.json, which only a server reads, the kind."""
    if isinstance(tokenizer, HFTokenizer):
        return {"kind": tokenizer.kind}
    data = tokenizer.to_json()
    if isinstance(tokenizer, BPETokenizer):
        for name, pattern in (("letters", r"\p{L}"), ("numbers", r"\p{N}")):
            data[name] = "".join(rf"\u{{{first:x}}}-\u{{{last:x}}}"
                                 for first, last in ranges(pattern))
    return data


def training(path: Path) -> dict | None:
    """Of the run that wrote a checkpoint: its step, tokens of data, loss curve [[step, loss], ...]
    and evaluations [[step, training loss, validation loss], ...], in nats per token."""
    try:
        header = checkpoint.load_metadata(path)
    except checkpoint.CheckpointError:  # GPT-2, or another model in Hugging Face's layout
        return None
    records = [r for r in _records(path.parent / "metrics.jsonl")
               if r["iter"] <= header["iter_num"]]
    steps = [[r["iter"], round(r["loss"], 4)] for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    return {"step": header["iter_num"], "data": header.get("data"),
            "loss": steps[::max(1, len(steps) // CURVE)],
            "evaluations": [[r["iter"], r["train_loss"], r["val_loss"]] for r in evaluations],
            "bits_per_byte": evaluations[-1].get("bits_per_byte") if evaluations else None}


def _records(log: Path) -> list[dict]:
    """The lines of a metrics.jsonl, or none where there is no such file or it is damaged."""
    try:
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def page(metadata: dict, module: wasm.Module | None = None) -> bytes:
    """The page, in ASCII, of the model that metadata describes (see `describe`).

    With a module the model runs in the browser. Without one every token comes from the page's own
    server, by POST v1/completions with OpenAI's stream, where these fields are used: prompt (a list
    of ids), max_tokens, stream, seed, temperature, top_k, top_p, min_p, repetition_penalty,
    logprobs (10), and vLLM's return_tokens_as_token_ids, with which tokens and top_logprobs name a
    token "token_id:7". Conversations are sent to v1/chat/completions.
    """
    talks = module is None or metadata.get("chat") is not None
    script = "\n".join(map(_read, SCRIPTS + ("conversation.js",) * talks))
    style = _read("page.css") + _read("conversation.css") * talks
    policy = ("default-src 'none'; "
              f"script-src '{_sha256(script)}' 'wasm-unsafe-eval' blob:; worker-src blob:; "
              f"style-src '{_sha256(style)}'; connect-src {'none' if module else 'self'!r}")
    parts = {"policy": policy, "style": style, "script": script, "metadata": _json(metadata),
             "conversation": _read("conversation.html") * talks,
             "model": _model(module) if module else ""}
    text = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("index.html"))
    return text.encode("ascii")


def _model(module: wasm.Module) -> str:
    """The elements with the module: its layout, its code, and its weights, compressed and cut into
    blocks, since browsers limit the length of one string."""
    data = gzip.compress(module.weights, mtime=0)
    blocks = [data[start:start + BLOCK] for start in range(0, len(data), BLOCK)]
    return "\n".join([
        f'<script type="application/json" id="layout">{_json(module.layout)}</script>',
        *(f'<script type="text/plain" class="{name}">{base64.b64encode(block).decode()}</script>'
          for name, block in [("code", module.code), *(("weights", b) for b in blocks)]),
        f'<script type="text/plain" id="worker">{_read("worker.js")}</script>'])


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _json(value) -> str:
    """JSON in which no "<" can end the element around it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _sha256(text: str) -> str:
    """What names an element with that text in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
