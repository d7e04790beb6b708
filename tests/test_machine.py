"""CPUs, memory and peak FLOP/s."""

import os

import pytest

from tinygpt import machine


def test_counts_are_positive_and_at_most_what_there_is():
    assert 1 <= machine.cpu_count() <= len(machine.cpus()) <= os.cpu_count()
    assert 1e8 < machine.memory() < 1e15
    assert 1e9 < machine.cpu_peak_flops() < 1e16


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12), ("NVIDIA H100 PCIe", "float16", 756e12),
    ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12), ("NVIDIA L40S", "bfloat16", 362e12),
    ("NVIDIA L4", "bfloat16", 121e12), ("Radeon", "bfloat16", None), ("", "float32", None)])
def test_peak_flops_of_gpus(name, dtype, peak):
    assert machine.gpu_peak_flops(name, dtype) == peak
