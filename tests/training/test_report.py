"""Log lines, metrics.jsonl and loss.png."""

import json
import math
import os
import re
import sys

import numpy as np
import pytest

from tinygpt.checkpoint import CheckpointError
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.training.config import TrainConfig
from tinygpt.training.report import SPIKE, Report, Work, bits_per_byte

ITER = re.compile(r"iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d{2})ms, mfu (\d+\.\d{2})%(.*)")
STEP = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})(.*)")


@pytest.fixture
def make(tmp_path):
    """Reports in tmp_path, closed afterwards."""
    made = []

    def report(start=0, max_iters=1000, log_interval=1, peak_flops=1e11, loggers=()) -> Report:
        config = TrainConfig(max_iters=max_iters, log_interval=log_interval)
        made.append(Report(tmp_path, start, config, Work(100, 1e9, lambda: peak_flops),
                           loggers))
        return made[-1]

    yield report
    for one in made:
        one.close()


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_log_lines_have_nanogpts_shape(make, capsys):
    report = make()
    report.step(250, 1.65239, 0.5, 1e-3, 0.0601673, compiled=False)
    report.evaluation(250, 1.54401, 1.72196, 1e-3, None)
    step, evaluation = lines(capsys)
    assert step.startswith("iter 250: loss 1.6524, time 60.17ms, mfu 16.62%")  # 1e9/0.06/1e11
    assert evaluation == "step 250: train loss 1.5440, val loss 1.7220"
    assert ITER.fullmatch(step)[5] == ", 1,662 tok/s, ETA 0:45"  # 750 steps of 0.06 s


def test_a_device_of_unknown_peak_has_no_mfu(make, capsys, tmp_path):
    make(peak_flops=None, log_interval=1).step(1, 2.0, 0.5, 1e-3, 0.1, compiled=False)
    assert lines(capsys)[0] == "iter 1: loss 2.0000, time 100.00ms, 1,000 tok/s, ETA 1:40"
    assert records(tmp_path)[0]["mfu"] is None


def test_the_peak_is_measured_for_a_logged_step_only(make, capsys):
    report = make(log_interval=2)
    asked = []
    report.work = Work(100, 1e9, lambda: asked.append(1))
    report.evaluation(0, 4.0, 4.5, 1e-3, None)
    report.step(1, 2.0, 0.5, 1e-3, 0.1, compiled=False)
    assert not asked
    report.step(2, 2.0, 0.5, 1e-3, 0.1, compiled=False)
    assert asked


def test_an_evaluation_logs_bits_per_byte(make, capsys):
    make().evaluation(5, 1.0, 2.0, 1e-3, 1.23456)
    assert STEP.fullmatch(lines(capsys)[0])[4] == ", 1.2346 bits per byte"


def test_every_log_interval_has_a_line_and_a_record(make, capsys, tmp_path):
    report = make(log_interval=3)
    for n in range(1, 11):
        report.step(n, 2.0, 0.5, 1e-3, 0.01, compiled=False)
    assert [int(ITER.fullmatch(line)[1]) for line in lines(capsys)] == [3, 6, 9]
    assert [r["iter"] for r in records(tmp_path)] == [3, 6, 9]


def test_a_step_that_compiles_does_not_count_in_the_averages(make, capsys):
    report = make()
    report.step(1, 2.0, 0.5, 1e-3, 30.0, compiled=True)
    report.step(2, 2.0, 0.5, 1e-3, 0.1, compiled=False)
    second = ITER.fullmatch(lines(capsys)[1])
    assert second[3] == "100.00" and second[4] == "10.00"  # 1e9/0.1/1e11
    assert second[5] == ", 1,000 tok/s, ETA 1:40"


def test_an_eta_of_hours_has_hours(make, capsys):
    make(max_iters=7201).step(1, 2.0, 0.5, 1e-3, 1.0, compiled=False)
    assert lines(capsys)[0].endswith("ETA 2:00:00")


def test_an_evaluation_of_the_moving_average_is_marked(make, tmp_path, capsys):
    report = make()
    report.evaluation(7, 4.0, 4.5, 1e-5, None, ema=True)
    assert capsys.readouterr().out == (
        "step 7: train loss 4.0000, val loss 4.5000, of the weights' moving average\n")
    assert records(tmp_path)[0]["ema"] is True


def test_metrics_hold_what_was_logged(make, tmp_path, capsys):
    report = make()
    report.evaluation(0, 4.0, 4.5, 1e-5, 3.25)
    report.step(1, 3.5, 0.75, 2e-5, 0.25, compiled=False)
    evaluation, step = records(tmp_path)  # at once, not only at the end
    assert evaluation.pop("time") > 1.6e9
    assert evaluation == {"iter": 0, "train_loss": 4.0, "val_loss": 4.5, "lr": 1e-5,
                          "bits_per_byte": 3.25}
    assert step == {"iter": 1, "loss": 3.5, "grad_norm": 0.75, "lr": 2e-5, "ms": 250.0,
                    "tokens_per_second": 400.0, "mfu": 1e9 / 0.25 / 1e11}


def test_a_resumed_run_drops_the_records_that_it_takes_again(make, tmp_path, capsys):
    first = make()
    for n in range(1, 8):
        first.step(n, 8.0 - n, 0.5, 1e-3, 0.01, compiled=False)
    first.close()
    second = make(start=4)
    assert [r["iter"] for r in records(tmp_path)] == [1, 2, 3, 4]
    second.step(5, 9.0, 0.5, 1e-3, 0.01, compiled=False)
    assert [r["iter"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert records(tmp_path)[-1]["loss"] == 9.0


@pytest.mark.parametrize("cut", [b'{"iter": 3, "lo', b"{", b'{"iter": 3, "loss": 1.0}', b"\n"])
def test_a_cut_off_last_line_does_no_harm(make, tmp_path, capsys, cut):
    whole = [{"iter": 1, "loss": 3.0}, {"iter": 2, "loss": 2.0}]
    text = "".join(json.dumps(r) + "\n" for r in whole).encode()
    (tmp_path / "metrics.jsonl").write_bytes(text + cut)
    report = make(start=2)
    assert records(tmp_path) == whole
    report.step(3, 1.5, 0.5, 1e-3, 0.01, compiled=False)
    assert [r["iter"] for r in records(tmp_path)] == [1, 2, 3]


def test_no_record_of_another_run_is_kept_by_a_new_one(make, tmp_path, capsys):
    """A run that was killed before its first checkpoint leaves its first evaluation."""
    make().evaluation(0, 4.0, 4.5, 1e-5, None)
    report = make(start=0)
    report.evaluation(0, 3.0, 3.5, 1e-5, None)
    assert [r["train_loss"] for r in records(tmp_path)] == [3.0]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"a": 1}', '{"iter": null}', "\udcff"])
def test_a_damaged_line_loses_no_other(make, tmp_path, capsys, damage):
    whole = [{"iter": 1, "loss": 3.0}, {"iter": 2, "loss": 2.0}]
    lines = [json.dumps(whole[0]), damage, json.dumps(whole[1])]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    make(start=2)
    assert records(tmp_path) == whole


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_raises_one_line(make):
    report = make()
    report.file.close()
    report.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(CheckpointError, match="No space left"):
        report.evaluation(0, 4.0, 4.5, 1e-5, None)


def test_lines_are_printed_where_only_the_bar_has_a_terminal(make, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    make().step(1, 2.0, 0.5, 1e-3, 0.01, compiled=False)
    assert ITER.fullmatch(lines(capsys)[0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    make().step(1, 2.0, 0.5, 1e-3, 0.01, compiled=False)
    assert not lines(capsys)


def test_a_spike_is_reported(make, capsys):
    report = make(log_interval=1000)
    for n in range(1, 50):
        report.step(n, 2.0 + 0.1 * (-1) ** n, 0.5, 1e-3, 0.01, compiled=False)
    assert lines(capsys) == []
    report.step(50, 2.0 * SPIKE + 0.5, 0.5, 1e-3, 0.01, compiled=False)
    (line,) = lines(capsys)
    average = re.fullmatch(r"iter 50: loss spike, 3\.5000 over an average of (\d\.\d{4})", line)
    assert float(average[1]) == pytest.approx(2.0, abs=0.05)


def test_a_falling_loss_is_no_spike(make, capsys):
    report = make(log_interval=10**6)
    for n, loss in enumerate(np.geomspace(11, 0.1, 300), 1):
        report.step(n, loss, 0.5, 1e-3, 0.01, compiled=False)
    assert lines(capsys) == []


def test_the_plot_is_a_png_that_is_redrawn_at_every_evaluation(make, tmp_path, capsys):
    report = make(log_interval=1)
    report.evaluation(0, 5.0, 5.5, 1e-5, None)
    report.draw()
    assert not (tmp_path / "loss.png").exists()  # there is nothing to see yet
    pictures = []
    for n in (1, 10):
        report.step(n, 4.0, 0.5, 1e-5, 0.01, compiled=False)
        report.evaluation(n, 4.0 - n / 10, 4.5, 1e-5, None)
        report.draw()
        picture = (tmp_path / "loss.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
        pictures.append(picture)
    assert pictures[0] != pictures[1]
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}


@pytest.mark.parametrize("failing", ["matplotlib.figure", "savefig", "the disk"])
def test_a_picture_that_cannot_be_drawn_is_one_remark(make, tmp_path, capsys, monkeypatch,
                                                      failing):
    if failing == "the disk":
        (tmp_path / "loss.png").mkdir()
    elif failing == "savefig":
        def fail(*args, **options):
            raise RuntimeError("no font\nat all")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    else:
        monkeypatch.setitem(sys.modules, failing, None)  # as if it were not installed
    report = make()
    for n in (1, 2):
        report.step(n, 4.0, 0.5, 1e-5, 0.01, compiled=False)
        report.draw()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loss.png is not drawn (") and "the run continues" in line
    assert [r["iter"] for r in records(tmp_path)] == [1, 2]


def test_a_logger_that_fails_is_left_out(make, tmp_path, capsys):
    class Broken:
        def log(self, iter_num, figures):
            raise ConnectionError("the server is gone")

        def close(self):
            raise ConnectionError("the server is gone")

    report = make(loggers=[Broken()])
    for n in (1, 2):
        report.step(n, 4.0, 0.5, 1e-5, 0.01, compiled=False)
    report.close()
    assert capsys.readouterr().err == (
        "Broken failed and is not used any more (the server is gone); the run continues\n")
    assert [r["iter"] for r in records(tmp_path)] == [1, 2]


def test_the_bar_has_the_remaining_time_once(make, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    report = make(log_interval=10**6)
    for n in (1, 2, 3):
        report.step(n, 2.0, 0.5, 1e-3, 0.5, compiled=False)
    shown = str(report.bar)
    assert shown.count("ETA 8:18") == 1 and "<" not in shown and "3/1000" in shown


def test_remarks_go_to_stderr_and_lines_to_stdout(make, capsys):
    report = make()
    report.remark("for a person")
    report.line("for a program")
    assert capsys.readouterr() == ("for a program\n", "for a person\n")


def test_bits_per_byte_is_the_loss_over_log_2_and_bytes():
    assert bits_per_byte(math.log(2), 1.0) == 1.0
    assert bits_per_byte(3.0, 2.5) == pytest.approx(3.0 / math.log(2) / 2.5, rel=1e-15)
    assert bits_per_byte(math.log(256), ByteTokenizer().token_lengths().mean()) == pytest.approx(8)
    assert bits_per_byte(3.0, None) is None
