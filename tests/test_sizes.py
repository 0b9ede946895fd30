"""More elements than 32 bits count, and more programs than a grid's second axis has: on a GPU with room for them.

A large call is compared with small ones on parts of it.
"""

import subprocess
import sys

import pytest
import torch

from timm_flashwin import functional, window_attention, windowed_sdpa

pytestmark = pytest.mark.gpu
each_kernel = pytest.mark.parametrize("window", [(8, 8), (9, 8)], ids=["one tile", "several tiles"])
PAST_31_BITS = 2**31


@pytest.fixture(autouse=True)
def given_back():
    yield
    torch.cuda.empty_cache()


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, and {free:.0f} are")


def run(qkv, window, shift=(0, 0), do=None):
    """Output and gradient; one head of 32 channels."""
    qkv = qkv.detach().requires_grad_()
    out = window_attention(qkv, qkv.shape[-1] // 96, window, shift, impl="triton")
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out) if do is None else do)
    return out.detach(), grad


def randn(*shape):
    return torch.empty(shape, device="cuda", dtype=torch.float16).normal_()


@each_kernel
def test_a_batch_past_31_bits_is_right_to_its_last_image(window):
    needs_memory(20)
    H, W = 8 * window[0], 8 * window[1]
    B = PAST_31_BITS // (H * W * 96) + 5
    qkv = randn(B, H, W, 96)
    assert qkv[:-4].numel() > PAST_31_BITS
    for large, small in zip(run(qkv, window, (4, 4)), run(qkv[-4:].clone(), window, (4, 4)), strict=True):
        torch.testing.assert_close(large[-4:], small)


@each_kernel
def test_a_map_past_31_bits_is_right_in_its_last_windows(window):
    needs_memory(20)
    H, W = 576 * window[0], 608 * window[1]
    qkv = randn(1, H, W, 96)
    assert qkv.numel() > PAST_31_BITS
    corner = (slice(None), slice(-2 * window[0], None), slice(-2 * window[1], None))
    for large, small in zip(run(qkv, window), run(qkv[corner].clone(), window), strict=True):
        torch.testing.assert_close(large[corner], small)


@each_kernel
def test_a_small_part_of_a_map_past_31_bits_is_read_in_its_place(window):
    needs_memory(10)
    side = 8 * window[0]
    wide = randn(1, side, side, PAST_31_BITS // side**2 + 96)
    part = wide[..., -96:]
    assert part.stride(1) * side > PAST_31_BITS
    for strided, packed in zip(run(part, window), run(part.clone(), window), strict=True):
        torch.testing.assert_close(strided, packed)


@pytest.mark.parametrize("N", [4, 72], ids=["one tile", "several tiles"])
def test_a_million_windows_are_each_right(N):
    needs_memory(20)
    windows = 2**20 + 3
    q, k, v = (x.requires_grad_() for x in randn(3, windows, 1, N, 8).unbind(0))
    out = windowed_sdpa(q, k, v, impl="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    few = [x.detach()[-5:].clone().requires_grad_() for x in (q, k, v)]
    expected = windowed_sdpa(*few, impl="triton")
    for large, small in zip((out, *grads), (expected, *torch.autograd.grad(expected.sum(), few)), strict=True):
        torch.testing.assert_close(large[-5:], small)


@each_kernel
def test_a_million_windows_of_a_batch_of_maps_are_each_right(window):
    needs_memory(20)
    qkv = randn(1024, 32 * window[0], 32 * window[1], 24)
    out = window_attention(qkv, 1, window, (4, 4), impl="triton")
    few = window_attention(qkv[-2:].clone(), 1, window, (4, 4), impl="triton")
    torch.testing.assert_close(out[-2:], few)


@pytest.mark.parametrize("N", [4, 72], ids=["one tile", "several tiles"])
def test_more_heads_than_a_grids_second_axis_has_are_each_right(N):
    needs_memory(10)
    num_heads = 65_536 + 3
    q, k, v = (x.requires_grad_() for x in randn(3, 1, num_heads, N, 8).unbind(0))
    bias = randn(num_heads, N, N).requires_grad_()
    out = windowed_sdpa(q, k, v, bias, impl="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    few = [x.detach()[:, -3:].clone().requires_grad_() for x in (q, k, v)] + [bias.detach()[-3:].clone()]
    expected = windowed_sdpa(*few, impl="triton")
    for large, small in zip((out, *grads[:3]), (expected, *torch.autograd.grad(expected.sum(), few[:3])), strict=True):
        torch.testing.assert_close(large[:, -3:], small)


def test_the_position_bias_of_heads_past_31_bits_is_right_to_its_last_head():
    needs_memory(12)
    num_heads = PAST_31_BITS // 576**2 + 3
    table = randn(47 * 47, num_heads)
    bias = functional.relative_position_bias(table, 24, impl="triton")
    assert bias[:-2].numel() > PAST_31_BITS
    assert torch.equal(bias[-2:], functional.relative_position_bias(table[:, -2:].clone(), 24, impl="reference"))


IN_A_PROCESS_OF_ITS_OWN = """
import torch
from timm_flashwin import windowed_sdpa
q, k, v = (torch.empty(1, {num_heads}, 576, {head_dim}, device="cuda", dtype=torch.float16).normal_() for _ in range(3))
bias = torch.randn({num_heads}, 1, 576, device="cuda", dtype=torch.float16).repeat(1, 576, 1) if {has_bias} else None
out = windowed_sdpa(q, k, v, bias, impl="triton")[:, -2:]
bias = bias[-2:] if {has_bias} else None
expected = windowed_sdpa(q[:, -2:], k[:, -2:], v[:, -2:], bias, impl="reference")
torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
"""


@pytest.mark.parametrize(
    "num_heads, head_dim, has_bias",
    [(PAST_31_BITS // 576**2 + 3, 8, True), (PAST_31_BITS // (576 * 128) + 3, 128, False)],
    ids=["bias", "q"],
)
def test_one_window_past_31_bits_is_right_to_its_last_head(num_heads, head_dim, has_bias):
    """In a process of its own: after an illegal address nothing else would run in this one."""
    needs_memory(30)
    code = IN_A_PROCESS_OF_ITS_OWN.format(num_heads=num_heads, head_dim=head_dim, has_bias=has_bias)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_more_windows_than_31_bits_count_are_all_computed(poisoned):
    needs_memory(40)
    qkv = randn(1, 256, 256, 24).expand(PAST_31_BITS // 256**2 + 1, 256, 256, 24)
    out = window_attention(qkv, 1, 1, impl="triton")  # a window of one token is its own value
    for image in (0, -1):
        assert torch.equal(out[image], qkv[image, ..., 16:])
