"""The C file, compiled by the system's compiler and by zig: its text against generate.py's, its
tokenizer against ours, what it refuses."""

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

import generate
from gpt import GPT, GPTConfig
from tinygpt import device
from tinygpt.config import SampleConfig
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.export import c_file
from tinygpt.inference.stop import pieces_of
from tinygpt.model.bigram import Bigram, BigramConfig

STRICT = ("-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHARS = "\n !':abcdefghijklmnopqrstuvwxyzABCDE\u00e9\u65e5\U0001f600"
NASTY = ["a", "it's we'll They've 'S ''s 're're", "  two  blanks \n\n\t tabs\t\tand more   ",
         "\u00a0\u2003x\u3000 y\u1680",
         "\u0130stanbul \u01c5 \u02b0 \u00aa\u00ba \u2160\u2167 \u00bd",
         "12345 \u0661\u0662 \u0967 x2y3", "\u65e5\u672c\u8a9e\u306e\u6587", "e\u0301 \u0928\u093f",
         "\U0001f600\U0001f468\u200d\U0001f469", "\ufeff\ufffd\uffff", "a" * 300, " " * 50 + "x",
         "\x01\x7f\x85\u2028\u200b|_-+=", "'", " '", "the the the",
         "\U00016e40\U0001d7d8\U000e0041"]


def compiled(source, *flags, compiler=None):
    """The program that a compiler makes of a C file."""
    program = source.with_name(f"program{len(list(source.parent.iterdir()))}")
    command = compiler or [shutil.which("cc") or shutil.which("gcc")]
    if command[0] is None:
        command = [device.zig(), "cc"]
    subprocess.run([*command, *STRICT, *flags, source, "-o", program, "-lm"], check=True)
    return program


def output(program, *words, status=0):
    done = subprocess.run([program, *map(str, words)], capture_output=True, timeout=300)
    assert done.returncode == status, done.stderr
    return (done.stderr if status else done.stdout).decode()


def small(tokenizer, **options):
    model = GPT(GPTConfig(**dict(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=1,
                                 n_head=2, n_embd=16) | options))
    # likelier tokens and less likely ones
    model.load_state_dict({k: 8 * w.numpy() for k, w in model.state_dict().items()})
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def bpe():
    rng = random.Random(5)
    words = [*NASTY, "then", " walk", "lead", " line", "'s", "\u65e5\u672c", "harbour "]
    return BPETokenizer.train("".join(rng.choices(words, k=3000)), 600)


@pytest.fixture(scope="module")
def exported(bpe, tmp_path_factory):
    """A model of each tokenizer, and its C file."""
    made = {}
    for tokenizer in (bpe, CharTokenizer(CHARS), ByteTokenizer()):
        model = small(tokenizer, position="rope", activation="swiglu")
        path = tmp_path_factory.mktemp("export") / f"{tokenizer.kind}.c"
        c_file.write(model, path, None)
        made[tokenizer.kind] = model, path
    return made


@pytest.fixture(scope="module")
def program(exported):
    return compiled(exported["byte"][1], "-O3")


OPTIONS = [dict(max_new_tokens=60, seed=3, window_hop=5),
           dict(max_new_tokens=30, temperature=1.5, top_k=90, top_p=0.9, min_p=0.01,
                repetition_penalty=1.3, seed=2**40 + 1)]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "filtered"])
def test_the_text_is_that_of_generate(exported, program, options):
    model, path = exported["byte"]
    prompt = "Then walk them so\u00e9"  # longer than the window
    flags = [word for k, v in options.items() for word in (f"--{k}", v)]
    tokens = list(model.stream(list(prompt.encode()), **options))
    expected = "".join(pieces_of(model.tokenizer, tokens, ())) + "\n"
    assert "\ufffd" in expected  # bytes that are no character
    assert output(program, prompt, *flags) == prompt + expected
    for compiler, more in ((None, SANITIZERS), ([device.zig(), "cc"], ["-O3"])):
        other = compiled(path, *more, compiler=compiler)
        assert output(other, *flags, prompt) == prompt + expected


def test_a_text_ends_before_a_stop_string(exported, program):
    model, _ = exported["byte"]
    tokens = list(model.stream(list(b"Then"), max_new_tokens=60))
    text = "".join(pieces_of(model.tokenizer, tokens, ()))
    for stops in ([text[20:23]], [text[30:32] + "?", text[31:34]], [text[25:29], text[26:28]],
                  [text[-1] + "?"], [text[-2:] + text[-2:]], ["\ufffd"], ["no"] * 32):
        expected = "".join(pieces_of(model.tokenizer, tokens, stops))
        flags = [f"--stop={stop}" for stop in stops]
        assert output(program, "Then", "--max_new_tokens=60", *flags) == f"Then{expected}\n"


def test_a_text_ends_at_end_of_text(bpe, tmp_path):
    model = small(bpe)
    weights = {k: w.numpy() for k, w in model.state_dict().items()}
    weights["wte.weight"][bpe.end_of_text] *= 20
    model.load_state_dict(weights)
    tokens = list(model.stream(bpe.encode("lead"), max_new_tokens=40))
    assert bpe.end_of_text in tokens
    c_file.write(model, tmp_path / "model.c", "none")
    found = output(compiled(tmp_path / "model.c"), "lead", "--max_new_tokens=40")
    assert found == "lead" + "".join(pieces_of(model.tokenizer, tokens, ())) + "\n"


HARNESS = """
#define main unused
#include "{name}"
#undef main
int main(int argc, char **argv) {{
  static int32_t ids[1 << 16];
  char *file = read_file(argv[argc - 1], FILE_SIZE), *text = allocate(1 << 20);
  take_model(file);
  take_tokenizer();
  text[fread(text, 1, (1 << 20) - 2, stdin) + 1] = 0;
  for (char *at = text; *at; at += strlen(at) + 1) {{
    const int count = encode(at, ids);
    for (int i = 0; i < count; i++) printf("%d ", ids[i]);
    putchar('\\n');
  }}
  free(text);
  free(file);
  (void)unused;
}}
"""


def nasty_strings(alphabet: str, count: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_the_tokenizer_is_ours(exported, kind):
    model, path = exported[kind]
    characters = "".join(map(chr, np.random.default_rng(2).integers(1, sys.maxunicode, 3000)))
    characters = "".join(c for c in characters if not "\ud800" <= c <= "\udfff")
    texts = (nasty_strings(CHARS, 500) if kind == "char" else
             [*NASTY, *nasty_strings("".join(NASTY) + " '\n" * 20, 2000),
              *nasty_strings(characters + " " * 500, 1000)])
    harness = path.with_name("harness.c")
    harness.write_text(HARNESS.format(name=path.name))
    program = compiled(harness, "-Wno-unused-function", "-O1")
    done = subprocess.run([program, path.with_suffix(".bin")], capture_output=True, check=True,
                          input="\0".join(texts).encode())
    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(texts)
    for text, line in zip(texts, lines, strict=True):
        assert list(map(int, line.split())) == model.tokenizer.encode(text), ascii(text)


@pytest.mark.parametrize("words, says", [
    (["--temperature", "-1"], "temperature=-1 is out of range"), (["--top_k=0"], "top_k=0 is out"),
    (["--top-k", "1.5"], "whole number"), (["--seed", "x"], "seed=x"),
    (["--seed"], "needs a value"),
    (["--top_p", "nan"], "top_p=nan"), (["--tempratur", "1"], "no option --tempratur"),
    (["--stop", ""], "stop is empty"), (["--stop=a"] * 33, "more than 32 times"),
    (["a", "b"], "two prompts"), ([""], "prompt is empty"), ([b"\xff"], "not text in UTF-8"),
    ([b"\xe2\x82"], "not text in UTF-8"), ([b"\xed\xa0\x80"], "not text in UTF-8")])
def test_mistakes(program, words, says):
    done = subprocess.run([program, *words], capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stdout == b""
    assert says.encode() in done.stderr and done.stderr.count(b"\n") == 1


def test_help_has_every_sampling_option(program):
    for name in [*SampleConfig.__dataclass_fields__, "stop"]:
        assert f"--{name} " in output(program, "--help")


def test_what_lacks_its_weights(exported, program, tmp_path):
    moved = shutil.copy(program, tmp_path / "moved")
    assert "byte.bin cannot be read" in output(moved, status=2)
    for change in (b"more", None):
        data = exported["byte"][1].with_suffix(".bin").read_bytes()
        (tmp_path / "byte.bin").write_bytes(data + change if change else data[:-1])
        assert "does not belong to this program" in output(moved, status=2)


def test_a_character_that_the_tokenizer_lacks(exported):
    program = compiled(exported["char"][1])
    assert "it lacks '\u00fc'" in output(program, "a\u00fc", status=2)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small(ByteTokenizer())
    model.save_checkpoint(0, out_dir="run")
    flags = ["--checkpoint", "run/ckpt_0.safetensors", "--export"]
    assert generate.main([*flags, "m.c"]) == 0
    size = (tmp_path / "m.bin").stat().st_size
    assert generate.main([*flags, "wide.c", "--quantize", "none"]) == 0
    assert size < (tmp_path / "wide.bin").stat().st_size
    assert generate.main([*flags, "m.c"]) == 2
    assert "m.c already exists" in capsys.readouterr().err
    (tmp_path / "n.bin").write_bytes(b"mine")
    assert generate.main([*flags, "n.c"]) == 2
    assert "n.bin already exists" in capsys.readouterr().err
    assert (tmp_path / "n.bin").read_bytes() == b"mine" and not (tmp_path / "n.c").exists()


def test_models_that_have_no_c_file(tmp_path):
    bigram = Bigram(BigramConfig(vocab_size=256))
    bigram.tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="bigram model"):
        c_file.write(bigram, tmp_path / "m.c", None)
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ValueError, match="no tokenizer"):
        c_file.write(model, tmp_path / "m.c", None)
    model.tokenizer = bigram.tokenizer
    with pytest.raises(ValueError, match=r"quantize=int4 .*GGUF"):
        c_file.write(model, tmp_path / "m.c", "int4")
    assert not list(tmp_path.iterdir())
