"""The commands and scripts of README.md and docs/, checked or run as they stand, only smaller; the
links, files and flags that the pages name."""

import csv
import re
import shlex
from dataclasses import fields

import pytest
from conftest import ROOT

import generate
import train
from gpt import GPT, GPTConfig, SampleConfig, TrainConfig
from tinygpt import check, evaluate
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.flags import parse_flags
from tinygpt.kernels.training import training

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
COMMANDS = {  # how a command is named after "python", and what its flags are
    "train.py": {"model": GPTConfig, "train": TrainConfig},
    "generate.py": {"what": generate.GenerateConfig, "sample": SampleConfig},
    "-m tinygpt.evaluate": {"evaluate": evaluate.EvaluateConfig},
    "-m tinygpt.check": {"check": check.CheckConfig},
}
SETTINGS = {f.name for classes in COMMANDS.values() for cls in classes.values()
            for f in fields(cls)} | {"preset", "config"}
SMALLER = ("--max_iters", "4", "--eval_interval", "2", "--eval_iters", "1", "--n_layer", "1",
           "--n_embd", "32", "--block_size", "16", "--batch_size", "2", "--vocab_size", "300")


def blocks(page: str, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return [code for name, code in FENCE.findall(PAGES[page]) if name == kind]


def shell_lines(page: str) -> list[str]:
    """Each command of the shell blocks."""
    return [part.strip() for code in blocks(page, "sh") for line in code.splitlines()
            if not line.startswith("#") for part in line.split("&&")]


def spans(page: str) -> list[str]:
    """The pieces of code in the text, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", PAGES[page]))]


def arguments(line: str) -> list[str] | None:
    """What follows "python" in a command, or None where it is another command."""
    words = shlex.split(line) if re.search(r"\bpython3? ", line) else []
    found = [i for i, word in enumerate(words) if re.fullmatch("python3?", word)]
    return words[found[0] + 1:] if found else None


def words_of(line: str) -> tuple[str, list[str]] | None:
    """Which of COMMANDS a line calls, with which words; None where it calls none."""
    words = arguments(line)
    for name in COMMANDS:
        parts = name.split()
        if words and words[:len(parts)] == parts:
            return name, words[len(parts):]
    return None


LINES = [(page, line) for page in PAGES for line in (*shell_lines(page), *spans(page))
         if arguments(line) and "--help" not in line]
BENCH_FLAGS = set(re.findall(r'"--(\w+)"', "".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))))


@pytest.mark.parametrize("page, line", LINES, ids=lambda value: value)
def test_every_command_is_understood(page, line):
    if found := words_of(line):
        name, words = found
        parse_flags(COMMANDS[name], words, "", train.PRESETS if name == "train.py" else None)
        return
    script, *rest = arguments(line)
    if script == "-m":
        assert rest[0] in ("venv", "pytest")
        assert all((ROOT / word).exists() for word in rest[1:] if word.startswith("tests/"))
    else:
        assert (ROOT / script).is_file()
        assert {word[2:] for word in rest if word.startswith("--")} <= BENCH_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_every_file_exists(page):
    known = SETTINGS | BENCH_FLAGS | {"help"}
    for span in spans(page):
        for flag in re.findall(r"(?<!\S)--([\w-]+)", span):
            assert flag.removeprefix("no_") in known, span
        if re.fullmatch(r"(tinygpt|bench|tests|docs)/[\w./]*", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"\w+\.(py|c|h|csv)", span):
            places = ("", "bench", "tests", "tests/*", "tinygpt", "tinygpt/*", "tinygpt/*/*")
            assert any(list(ROOT.glob(f"{place}/{span}".strip("/"))) for place in places), span


def test_every_setting_is_among_the_options():
    listed = {flag for span in spans("docs/options.md")
              for flag in re.findall(r"(?<!\S)--(\w+)", span)}
    assert SETTINGS - listed == {"text"}  # TEXT of evaluate is no flag


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", FENCE.sub("", PAGES[page])):
        if target.startswith("http"):
            continue
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.is_file(), target
        assert path.suffix != ".png" or path.stat().st_size <= 100 * 1024, target
        if anchor:
            titles = re.findall(r"^#+ (.*)", PAGES[str(path.relative_to(ROOT))], re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(PAGES["README.md"].splitlines()) <= 200
    assert all(f"]({page})" in PAGES["README.md"] for page in PAGES if page != "README.md")


def test_the_set_up_commands_name_files_that_exist():
    named = re.findall(r"-r (\S+)", PAGES["README.md"] + PAGES["CONTRIBUTING.md"])
    assert sorted(set(named)) == ["requirements-dev.txt", "requirements.txt"]
    assert all((ROOT / name).is_file() for name in named)
    test_command = next(line for line in shell_lines("CONTRIBUTING.md") if "-m pytest" in line)
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_the_first_run_and_its_sample_run_as_written(command):
    assert "python train.py" in shell_lines("README.md")
    done = command("train.py", *SMALLER)
    assert done.returncode == 0, done.stderr
    sample = next(span for span in spans("README.md") if span.startswith("python generate.py"))
    done = command("generate.py", *words_of(sample)[1], "--max_new_tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:")


def test_the_six_tasks_run_as_written(tmp_path, text, monkeypatch, capsys):
    """In one process, in the order of the README, on a tiny GPT-2 in place of the real one."""
    monkeypatch.chdir(tmp_path)
    for name in ("mytext.txt", "other.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    tiny = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=32,
                         activation="gelu_tanh"))
    tiny.tokenizer = ByteTokenizer()
    tiny.save_checkpoint(0, out_dir=tmp_path / "gpt2")
    mains = {"train.py": train.main, "generate.py": generate.main,
             "-m tinygpt.evaluate": evaluate.main}
    more = [SMALLER, ("--max_iters", "6"), ("--max_new_tokens", "8"),
            ("--init_from", "gpt2/ckpt_0.safetensors", *SMALLER[:6], "--block_size", "8"), (), ()]
    tasks = [words_of(line) for line in shell_lines("README.md") if words_of(line)][1:7]
    for (name, words), extra in zip(tasks, more, strict=True):
        assert mains[name]([*words, *extra]) == 0, capsys.readouterr().err
    assert (tmp_path / "my-gpt2" / "model.safetensors").is_file()
    assert "Once" in (out := capsys.readouterr().out) and "bits_per_byte" in out


def test_the_script_runs_as_written(tmp_path, text_file, monkeypatch, gpt2_files, capsys):
    code = blocks("README.md", "python")[0]
    for old, new in (("max_iters=2000, eval_interval=100", "max_iters=2, eval_interval=2, "
                      "eval_iters=1"), ("mytext.txt", str(text_file)), ("=100)", "=5)")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "ROMEO:" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "best.safetensors").is_file()


def test_the_training_loop_runs_as_written(text_file, capsys):
    code = blocks("docs/scripting.md", "python")[0]
    for old, new in (("range(100)", "range(3)"), ("mytext.txt", str(text_file)),
                     ("with Tensor.train()", "with training()")):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "docs/scripting.md", "exec"), {"training": training})
    losses = [2 * float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6 and sum(losses[4:]) < sum(losses[:2])


def test_the_examples_for_contributors_are_the_code_as_it_is():
    examples = re.findall(r"^ *```python\n *# (\S+)\n(.*?)^ *```", PAGES["CONTRIBUTING.md"],
                          re.S | re.M)
    assert len(examples) == PAGES["CONTRIBUTING.md"].count("```python")
    for file, code in examples:
        source = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        lines = [line.strip() for line in code.splitlines()]
        assert any(source[i:i + len(lines)] == lines for i in range(len(source))), code


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.csv")), ids=lambda path: path.name)
def test_every_line_of_the_measurements_is_a_row(path):
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert rows and {len(row) for row in rows} == {len(header)}
