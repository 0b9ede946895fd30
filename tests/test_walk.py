"""Who takes which windows: all of them are taken once, however many programs there are to share them."""

import pytest
import torch

from timm_flashwin import window_attention

pytest.importorskip("triton")

from timm_flashwin.kernels import launch, launcher  # noqa: E402
from timm_flashwin.kernels.settings import split_in_step  # noqa: E402


@pytest.mark.parametrize("programs", [1, 3, 12, 33, 99])
@pytest.mark.parametrize("num_images", [1, 2, 7, 128])
@pytest.mark.parametrize("num_positions", [1, 4, 12, 64])
def test_programs_in_step_take_every_window_once(num_positions, num_images, programs):
    groups, lanes = split_in_step(num_positions, num_images, programs)
    taken = [
        (position, image)
        for group in range(groups)
        for lane in range(lanes)
        for position in range(group, num_positions, groups)
        for image in range(lane, num_images, lanes)
    ]
    assert groups * lanes <= programs
    assert len(taken) == num_positions * num_images == len(set(taken))


@pytest.mark.parametrize(
    "num_positions, num_images, programs, expected",
    [
        (64, 128, 132, (64, 2)),  # a position for each
        (64, 128, 99, (32, 3)),  # two positions each: one each would leave a third of the programs without any
        (1, 128, 16, (1, 16)),
        (1, 5, 16, (1, 5)),  # no more programs than windows
        (100, 1, 16, (15, 1)),  # seven positions each, as with sixteen
    ],
)
def test_the_busiest_program_has_few_windows_and_none_is_idle(num_positions, num_images, programs, expected):
    assert split_in_step(num_positions, num_images, programs) == expected


@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("window, size", [(4, (11, 8)), ((9, 8), (14, 8))], ids=["one tile", "several tiles"])
def test_results_do_not_depend_on_how_many_programs_share_the_windows(
    window, size, cosine, kernel_device, monkeypatch, request
):  # fmt: skip
    heads, C = 2, 32
    window_size = (window, window) if isinstance(window, int) else window
    N = window_size[0] * window_size[1]
    inputs = [
        torch.randn(3, *size, 3 * C, device=kernel_device),
        torch.randn(heads, N, N, device=kernel_device),
        torch.randn(3 * C, device=kernel_device),
    ] + ([torch.ones(heads, device=kernel_device)] if cosine else [])
    do = torch.randn(3, *size, C, device=kernel_device)

    def run(multiprocessors):
        monkeypatch.setattr(launch, "multiprocessors_of", lambda device: multiprocessors)
        launcher.forget()
        qkv, bias, pad_qkv, *logit_scale = (x.clone().requires_grad_() for x in inputs)
        out = window_attention(qkv, heads, window_size, 2, bias, pad_qkv, None, *logit_scale, impl="triton")
        return out, *torch.autograd.grad(out, [qkv, bias, pad_qkv, *logit_scale], do)

    request.addfinalizer(launcher.forget)
    expected = run(1)
    for multiprocessors in (2, 7, 40):
        out, dqkv, *sums = run(multiprocessors)
        assert torch.equal(out, expected[0]) and torch.equal(dqkv, expected[1])
        for ours, one in zip(sums, expected[2:], strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-4)
