"""The same input gives the same bits, whatever lies in memory and whatever else runs. At length: scripts/attack.py."""

import pytest
import torch
from conftest import KERNEL_DEVICE
from properties import fixed_cases
from repeats import Repeated, busy_process

CASES = fixed_cases(KERNEL_DEVICE)
each_case = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize("name", ["window 7, shifted, padded", "windows of 80 tokens"])
def test_garbage_in_memory_leaves_no_trace_in_any_result(name):
    assert Repeated(CASES[name]).one_by_one(2) == 0


@pytest.mark.gpu
@each_dtype
@each_case
def test_250_repeats_are_the_same_bits(name, dtype):
    assert Repeated(CASES[name]._replace(dtype=dtype)).one_by_one(250) == 0


@pytest.mark.gpu
@each_case
def test_torchs_deterministic_mode_has_nothing_to_say_against_the_kernels(name, poisoned):
    repeated = Repeated(CASES[name])  # raises where an operator is not deterministic
    assert repeated.one_by_one(3) == 0


@pytest.mark.gpu
@each_case
def test_calls_on_concurrent_streams_do_not_disturb_each_other(name):
    assert Repeated(CASES[name]).on_streams(40) == 0


@pytest.mark.gpu
def test_a_busy_neighbour_changes_no_bit():
    with busy_process("cuda"):
        for case in CASES.values():
            assert Repeated(case).one_by_one(50) == 0
