"""The campaigns in bench/: a few cases of each pass, and a deliberate fault is found."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults need Linux")

# A resumed run that forgets its best loss; a command whose error message has two lines.
BREAK = {"faults": """
resume = light.RUN.Run.resume
def forget(run):
    resume(run)
    if run.iter_num:
        run.best_val_loss = 9.0
light.RUN.Run.resume = forget
campaign.load_shim()
""", "bad_input": """
command.failure = lambda error, remedy: (2, f"{error}\\nand more")
"""}
BROKEN = """
import sys
sys.path.insert(0, {root!r})
from bench import {script}, campaign, light
from tinygpt import command
{break_it}
light.warm_up()
sys.exit(campaign.main("{script}.py", "", {script}.campaigns, 1))
"""


def run(script, *flags) -> subprocess.CompletedProcess:
    flags = [*flags, "--minutes", 1, "--processes", 1]
    return subprocess.run([sys.executable, str(script), *map(str, flags)], text=True,
                          capture_output=True, timeout=120, env=os.environ | {"DEV": "CPU"})


def tallies(done: subprocess.CompletedProcess) -> dict[str, tuple[int, int]]:
    """Tries and failures by campaign."""
    assert done.returncode in (0, 1), done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith(" ")]
    return {row[0]: (int(row[1]), int(row[2])) for row in rows}


def test_kills_full_disks_and_damaged_files_are_survived():
    names = ("kill-at-a-file-call", "disk-full-or-read-only", "kill-while-tokenizing",
             "tokens-that-shrink", "damaged-checkpoint", "damaged-meta")
    done = run(ROOT / "bench" / "faults.py", "--most", 1, "--only", *names)
    found = tallies(done)
    assert done.returncode == 0, done.stdout
    assert set(found) == {*names, "all"}
    assert all(tries >= 1 and failures == 0 for tries, failures in found.values())


def test_bad_input_is_refused_in_one_line():
    names = ("flags-of-train", "flags-of-generate", "values-in-a-config")
    done = run(ROOT / "bench" / "bad_input.py", "--most", 3, "--only", *names)
    assert done.returncode == 0, done.stdout
    assert all(tally[0] == 3 for name, tally in tallies(done).items() if name != "all")


@pytest.mark.parametrize(("script", "campaign", "cases"), [
    ("faults", "kill-at-a-file-call", 8), ("bad_input", "flags-of-train", 8)])
def test_a_fault_is_found_and_can_be_repeated(tmp_path, script, campaign, cases):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN.format(root=str(ROOT), script=script, break_it=BREAK[script]))
    done = run(broken, "--most", cases, "--only", campaign)
    assert done.returncode == 1, done.stdout
    repeat = next(line for line in done.stdout.splitlines() if "--case" in line).split()
    assert repeat[:2] == ["python", f"bench/{script}.py"]
    if script == "faults":  # which bench/campaign.py repeats in the same way, more slowly
        return
    again = run(broken, *repeat[2:])
    assert tallies(again)[campaign] == (1, 1), again.stdout
