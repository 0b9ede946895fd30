"""Windows, cyclic shift, padding and region ids on an NHWC map: pure functions, the one place that knows the geometry.

A Swin block (timm/models/swin_transformer.py, `SwinTransformerBlock._attn`; Liu et al. 2021, section 3.2) rolls the
map by `-shift_size`, zero-pads it at the bottom and right to whole windows, and cuts it into windows. Everything
here speaks of coordinates in that rolled and padded map unless it says otherwise.
"""

import torch

# What timm adds to a logit whose two tokens were not neighbours before the cyclic shift. Finite on purpose: logits of
# the V2 family are large enough that a masked key may still win, and then it must.
MASK_VALUE = -100.0


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes ten times as long on the host."""
    return -(-a // b)


def num_windows(size: tuple[int, int], window_size: tuple[int, int]) -> tuple[int, int]:
    """How many windows, padding included, cover a map of `size` (H, W) along each axis."""
    return cdiv(size[0], window_size[0]), cdiv(size[1], window_size[1])


def padded_size(size: tuple[int, int], window_size: tuple[int, int]) -> tuple[int, int]:
    """(Hp, Wp): `size` rounded up to whole windows."""
    rows, cols = num_windows(size, window_size)
    return rows * window_size[0], cols * window_size[1]


def window_partition(x: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """Cut `x` [B, Hp, Wp, C] into windows [B * nW, N, C], N = Wh * Ww, windows and tokens in row-major order."""
    B, Hp, Wp, C = x.shape
    Wh, Ww = window_size
    x = x.reshape(B, Hp // Wh, Wh, Wp // Ww, Ww, C)
    return x.transpose(2, 3).reshape(-1, Wh * Ww, C)  # B*nW, N, C


def window_reverse(windows: torch.Tensor, window_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Undo `window_partition`: windows [B * nW, N, C] to the map [B, Hp, Wp, C] of `size` (Hp, Wp)."""
    Hp, Wp = size
    Wh, Ww = window_size
    x = windows.reshape(-1, Hp // Wh, Wp // Ww, Wh, Ww, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, Hp, Wp, windows.shape[-1])  # B, Hp, Wp, C


def relative_position_index(window_size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Which row of a relative position bias table a query token i and a key token j take: [N, N], int64.

    The table has a row for each distance (dy, dx) = i - j, from (-(Wh - 1), -(Ww - 1)) to (Wh - 1, Ww - 1), row-major;
    timm/models/swin_transformer.py, `get_relative_position_index`.
    """
    Wh, Ww = window_size
    tokens = torch.arange(Wh * Ww, device=device)
    y, x = tokens // Ww, tokens % Ww
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + Wh - 1) * (2 * Ww - 1) + dx + Ww - 1  # N, N


def distance_rows(pairs: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """The coordinates of every distance of two tokens, in the order of the table, out of those of every pair.

    Args:
        pairs: [N * N, 2], where the first coordinate follows from the two tokens' rows, the second from their columns.

    Returns:
        [(2 * Wh - 1) * (2 * Ww - 1), 2]. The differences to the last row (column) are 0 and below, those to the first
        0 and above.
    """
    Wh, Ww = window_size
    pairs = pairs.view(Wh, Ww, Wh, Ww, 2)  # row and column of the query, then of the key
    rows = torch.cat([pairs[:-1, 0, -1, 0, 0], pairs[:, 0, 0, 0, 0]])  # 2*Wh - 1
    columns = torch.cat([pairs[0, :-1, 0, -1, 1], pairs[0, :, 0, 0, 1]])  # 2*Ww - 1
    return torch.cartesian_prod(rows, columns)


def region_ids(
    size: tuple[int, int],
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    device: torch.device | None = None,
) -> torch.Tensor:
    """The region of every token of the rolled and padded map: [Hp, Wp], int64.

    Two tokens of one window were neighbours before the shift exactly where their ids are equal. timm numbers nine
    regions, cut at Hp-Wh and Hp-sh (and the same in w). The cut at Hp-Wh is a window border, so inside a window it
    tells nothing apart, and one comparison an axis is enough. A shift of 0 cuts nothing.
    """
    Hp, Wp = padded_size(size, window_size)
    rows = torch.arange(Hp, device=device) >= Hp - shift_size[0]
    cols = torch.arange(Wp, device=device) >= Wp - shift_size[1]
    return 2 * rows.long()[:, None] + cols.long()[None, :]  # Hp, Wp


def shift_cut(
    size: tuple[int, int], window_size: tuple[int, int], shift_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where `region_ids` changes, per axis: the window the cut runs through, and the first row (column) behind it.

    No window lies at a cut's index where an axis is not shifted, or shifted by more than the map.
    """
    padded = padded_size(size, window_size)
    h, w = (divmod(p - s, n) for p, s, n in zip(padded, shift_size, window_size, strict=True))
    return h, w


def shift_mask(
    size: tuple[int, int],
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The additive mask of a shifted block: [nW, N, N], 0 inside a region and `MASK_VALUE` across two."""
    ids = region_ids(size, window_size, shift_size, device)
    ids = window_partition(ids[None, :, :, None], window_size).squeeze(-1)  # nW, N
    mask = torch.zeros(ids.shape[0], ids.shape[1], ids.shape[1], device=device, dtype=dtype)
    return mask.masked_fill(ids[:, :, None] != ids[:, None, :], MASK_VALUE)  # nW, N, N
