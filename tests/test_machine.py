"""CPUs, memory and GPUs' peak FLOP/s."""

import math
import os

import pytest

from tinygpt import machine


def test_counts_are_positive_and_at_most_what_there_is():
    assert 1 <= machine.cpu_count() <= len(machine.cpus()) <= os.cpu_count()
    assert 1e8 < machine.memory() < 1e15


@pytest.mark.parametrize(("limit", "quota", "count"), [
    ("max 100000", math.inf, 8), ("150000 100000", 1.5, 2), ("20000 100000", 0.2, 1),
    (None, math.inf, 8)])
def test_a_containers_quota_limits_the_count_of_cpus(limit, quota, count, tmp_path, monkeypatch):
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "cpus", lambda: frozenset(range(8)))
    assert machine.cpu_quota() == quota and machine.cpu_count.__wrapped__() == count


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12), ("NVIDIA H100 PCIe", "float16", 756e12),
    ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12), ("NVIDIA L40S", "bfloat16", 362e12),
    ("NVIDIA L4", "bfloat16", 121e12), ("Radeon", "bfloat16", None), ("", "float32", None)])
def test_peak_flops_of_gpus(name, dtype, peak):
    assert machine.gpu_peak_flops(name, dtype) == peak
