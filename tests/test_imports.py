"""Which room of the house imports from which, and how its text looks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# two of them by python -m, and what all share
COMMANDS = ("train", "generate", "tinygpt.evaluate", "tinygpt.check", "tinygpt.command",
            "tinygpt.terminal")
# the rooms of the house, and those that each one knows besides itself
KNOWS = {
    "machine": set(),  # which all rooms know
    "kernels": set(),
    "tinygpt": {"kernels", "data"},  # config, device, checkpoint, ...
    "data": {"kernels", "tinygpt"},
    "inference": {"kernels", "tinygpt", "data"},
    "model": {"kernels", "tinygpt", "data", "inference"},
    "training": {"kernels", "tinygpt", "data", "model"},
    "huggingface": {"kernels", "tinygpt", "data", "model"},
    "export": {"kernels", "tinygpt", "data", "inference", "model", "huggingface"},
    "gpt": {"kernels", "tinygpt", "data", "inference", "model", "training", "huggingface"},
}
SOURCES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"):
           path for path in [*ROOT.glob("*.py"), *ROOT.glob("tinygpt/**/*.py")]}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from package import module` imports the module
            found |= {name if name in SOURCES else node.module for alias in node.names
                      for name in [f"{node.module}.{alias.name}"]}
    return found


def ours(module: str) -> set[str]:
    """The modules of this project that a module imports."""
    return {name for name in imports(SOURCES[module]) if name in SOURCES}


def room(module: str) -> str:
    """"commands", "gpt", a folder of tinygpt, or "tinygpt" for the files that lie in none."""
    if module in COMMANDS:
        return "commands"
    folder = SOURCES[module].relative_to(ROOT).parts[:-1]
    if module == "tinygpt.machine":  # below the kernels, and all others
        return "machine"
    return folder[-1] if len(folder) == 1 else folder[1] if folder else module


def test_the_house_is_as_designed():
    assert {m for m in SOURCES if "." not in m} == {"gpt", "train", "generate", "tinygpt"}
    assert not any(part in ("utils", "util", "helpers", "common", "misc")
                   for module in SOURCES for part in module.split("."))


@pytest.mark.parametrize("module", sorted(m for m in SOURCES if room(m) != "commands"))
def test_a_file_imports_only_what_its_room_knows(module):
    here = room(module)
    for name in ours(module):
        assert room(name) in KNOWS[here] | {here, "machine"}, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in SOURCES if m.startswith("tinygpt.kernels")))
def test_kernels_import_tinygrad_numpy_and_what_is_below_them_only(module):
    for name in imports(SOURCES[module]):
        top = name.split(".")[0]
        assert (top in sys.stdlib_module_names or top in ("tinygrad", "numpy")
                or name == "tinygpt.machine" or name.startswith("tinygpt.kernels")), (
                    f"{module} imports {name}")


def test_the_machine_is_described_by_the_standard_library():
    for name in imports(SOURCES["tinygpt.machine"]):
        assert name.split(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", sorted(
    m for m in SOURCES if room(m) != "kernels" and m != "tinygpt.device"))
def test_private_interfaces_of_tinygrad_are_imported_in_kernels_and_device_only(module):
    public = {"tinygrad", "tinygrad.helpers", "tinygrad.nn.state"}
    for name in imports(SOURCES[module]):
        assert name in public or not name.startswith("tinygrad."), name


def test_no_cycles():
    """A package's own modules do not count as imports of the package."""
    graph = {m: {n for n in ours(m) if n != m and not m.startswith(n + ".")} for m in SOURCES}
    while graph:
        leaves = {m for m, below in graph.items() if not below & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {m: below for m, below in graph.items() if m not in leaves}


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id == "os" and node.attr in ("environ", "getenv", "putenv", "environb")
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in ("environ", "getenv") for alias in node.names)
    return isinstance(node, ast.Name) and node.id == "getenv"


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"tinygpt.device"}))
def test_the_environment_is_read_in_device_and_main_only(module):
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef)
             and node.name == "main"]
    allowed = {id(node) for main in mains for node in ast.walk(main)}
    for node in ast.walk(tree):
        assert not reads_environment(node) or id(node) in allowed, f"{module}:{node.lineno}"


def test_functions_are_short_and_no_except_is_bare():
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length < 60, f"{module}.{node.name} has {length} lines"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), module


def test_no_file_is_unpickled_or_executed():
    for module, path in SOURCES.items():
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & {"pickle", "torch", "transformers", "dill", "joblib", "shelve",
                            "marshal"}, module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("exec", "eval"), f"{module}:{node.lineno}"


def tracked() -> list[Path]:
    """The files that git has, or would have."""
    try:
        done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                              cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git, or its folder, is not here")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_text_is_ascii_and_python_fits_in_100_columns():
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" in raw:
            continue  # a picture
        assert raw.isascii(), f"{path}: a character that is not ASCII"
        if path.suffix == ".py":
            for number, line in enumerate(raw.decode().split("\n"), 1):
                assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"
                assert line == line.rstrip(), f"{path}:{number} ends in blanks"


def test_every_module_says_what_it_is():
    for module, path in SOURCES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module
