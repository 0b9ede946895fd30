import pytest
import torch
from judge import timm_mask
from timm.models import swin_transformer

from timm_flashwin import geometry

SHAPES = [  # size, window, shift
    ((14, 14), (7, 7), (3, 3)),
    ((15, 20), (7, 7), (3, 3)),
    ((12, 10), (4, 5), (2, 0)),
    ((12, 10), (4, 5), (0, 2)),
    ((9, 13), (3, 5), (1, 4)),
    ((3, 4), (7, 7), (3, 3)),
    ((8, 8), (4, 4), (4, 4)),
    ((8, 12), (4, 4), (6, 5)),
    ((5, 5), (4, 4), (11, 9)),
    ((8, 8), (4, 4), (0, 0)),
]


@pytest.mark.parametrize("size, window_size, shift_size", SHAPES)
def test_shift_mask_is_timms(size, window_size, shift_size):
    mask = geometry.shift_mask(size, window_size, shift_size, dtype=torch.float32)
    expected = timm_mask(size, window_size, shift_size, torch.zeros(()))
    assert torch.equal(mask, torch.zeros_like(mask) if expected is None else expected)


@pytest.mark.parametrize("size, window_size, shift_size", SHAPES)
def test_shift_cut_tells_apart_the_same_tokens_as_region_ids(size, window_size, shift_size):
    ids = geometry.region_ids(size, window_size, shift_size)
    windows = geometry.window_partition(ids[None, :, :, None], window_size).unflatten(1, window_size)[..., 0]
    (cut_window_h, cut_row), (cut_window_w, cut_col) = geometry.shift_cut(size, window_size, shift_size)
    columns = geometry.num_windows(size, window_size)[1]
    for index, region in enumerate(windows):
        below = torch.zeros_like(region, dtype=torch.bool)
        right = below.clone()
        if index // columns == cut_window_h:
            below[cut_row:] = True
        if index % columns == cut_window_w:
            right[:, cut_col:] = True
        ours, theirs = (2 * below + right).flatten(), region.flatten()
        assert torch.equal(ours[:, None] == ours[None], theirs[:, None] == theirs[None])


def test_partition_and_reverse_are_timms():
    x = torch.randn(2, 12, 10, 3)
    windows = geometry.window_partition(x, (4, 5))
    assert torch.equal(windows, swin_transformer.window_partition(x, (4, 5)).flatten(1, 2))
    assert torch.equal(geometry.window_reverse(windows, (4, 5), (12, 10)), x)


def test_padded_size_rounds_up_to_whole_windows():
    assert geometry.padded_size((14, 15), (7, 7)) == (14, 21)
    assert geometry.num_windows((3, 3), (7, 7)) == (1, 1)
