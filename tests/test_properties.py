"""Whatever call is allowed, its result is right: see properties.py."""

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import HealthCheck, example, given, settings
from properties import Case, cases, check

# The gradient of pad_qkv adds up 51 weights that are all rounded alike: of thousands of calls the one furthest off.
EQUAL_WEIGHTS = Case(
    function="window_attention", impl="triton", device=KERNEL_DEVICE, dtype=torch.float32, B=1, size=(5, 1),
    window=(7, 8), shift=(5, 2), num_masks=0, num_heads=1, head_dim=16, view="cropped", do_view="transposed",
    bias_view=None, bias_dtype=torch.float32, has_pad_qkv=True, cosine=False, amplitude=0.01, needs_grad=("pad_qkv",),
    seed=913,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(KERNEL_DEVICE))
@example(EQUAL_WEIGHTS)
def test_every_call_that_is_allowed_is_as_exact_as_timms(case):
    check(case)
