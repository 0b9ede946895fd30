"""The sums of what the programs of the backward leave: kernels/partial_sums.py."""

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import rounding

from timm_flashwin.kernels.partial_sums import Programs, partial_sums_launch

NUM_HEADS, N, HEAD_DIM = 3, 10, 16
C = NUM_HEADS * HEAD_DIM
SHAPES = ((NUM_HEADS, N, N), (3 * C,), (NUM_HEADS,))


def randn(*shape):
    return torch.randn(*shape, device=KERNEL_DEVICE)


def launched(programs, dtype=torch.float32, needed=(True, True, True), logit_scale=None):
    """(partial sums, what becomes of them), the latter in tensors that held NaN."""
    partials = randn(programs[0], NUM_HEADS, N, N), randn(programs[1], 2 * C), randn(programs[2], NUM_HEADS)
    grads = [torch.full(shape, float("nan"), dtype=dtype, device=KERNEL_DEVICE) for shape in SHAPES]
    sizes = tuple(grad.numel() if need else 0 for grad, need in zip(grads, needed, strict=True))
    logit_scale = torch.zeros(NUM_HEADS, device=KERNEL_DEVICE) if logit_scale is None else logit_scale
    partial_sums_launch(sizes, Programs(*programs), torch.float32)(*partials, logit_scale, *grads)
    return partials, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("programs", [(1, 1, 1), (19, 8, 300)])
def test_every_gradient_is_the_sum_over_all_programs(programs, dtype):
    partials, (dbias, dpad_qkv, dlogit_scale) = launched(programs, dtype)
    assert not dpad_qkv[:C].any()  # a padded query has no gradient
    for terms, our in zip(partials, (dbias, dpad_qkv[C:], dlogit_scale), strict=True):
        terms = terms.double()
        bound = torch.finfo(torch.float32).eps * terms.abs().sum(dim=0) + rounding(dtype) * terms.sum(dim=0).abs()
        assert our.dtype == dtype and ((our.double() - terms.sum(dim=0)).abs() <= bound).all()


def test_a_gradient_without_partial_sums_is_zero():
    _, ours = launched((0, 0, 0))
    assert not any(our.any() for our in ours)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_needed_is_not_touched(needed):
    _, ours = launched((2, 2, 2), needed=needed)
    assert [not our.isnan().any() for our in ours] == list(needed)
    assert all(our.isnan().all() for our, need in zip(ours, needed, strict=True) if not need)


def test_a_clamped_logit_scale_has_no_gradient():
    logit_scale = torch.tensor([4.7, 4.6, float("-inf")], device=KERNEL_DEVICE)
    (_, _, partials), (_, _, ours) = launched((5, 5, 5), logit_scale=logit_scale)
    assert ours[0] == 0
    torch.testing.assert_close(ours[1:], partials.sum(dim=0)[1:])
