import logging

import pytest
import torch
from conftest import GPU
from torch.fx.experimental.proxy_tensor import make_fx

from timm_flashwin import functional, window_attention, windowed_sdpa


def make_map(dtype=torch.float32, device="cpu"):
    return torch.randn(1, 8, 8, 3 * 32, dtype=dtype, device=device)


def make_windows(device="cpu"):
    return [torch.randn(4, 2, 16, 16, device=device) for _ in range(3)]


BAD_MAPS = {
    "no tensor": (TypeError, "qkv is a list", dict(qkv=[1.0])),
    "integers": (TypeError, "torch.int64", dict(qkv=torch.zeros(1, 8, 8, 96, dtype=torch.long))),
    "rank": (ValueError, "3 dimensions", dict(qkv=torch.zeros(8, 8, 96))),
    "channels": (ValueError, "not 3 \\* num_heads \\* head_dim", dict(qkv=torch.zeros(1, 8, 8, 97))),
    "no heads": (ValueError, "num_heads=0", dict(num_heads=0)),
    "part of a head": (TypeError, "num_heads is 2.0; it must be an int", dict(num_heads=2.0)),
    "part of a token": (TypeError, "window_size\\[1\\] is 4.0; it must be an int", dict(window_size=(4, 4.0))),
    "three sizes": (TypeError, "window_size is \\(4, 4, 4\\); it must be", dict(window_size=(4, 4, 4))),
    "a truth for a shift": (TypeError, "shift_size is True; it must be an int", dict(shift_size=True)),
    "no window": (TypeError, "window_size is None; it must be an int", dict(window_size=None)),
    "eight bits": (TypeError, "torch.float8_e4m3fn; allowed are", dict(qkv=make_map().to(torch.float8_e4m3fn))),
    "window of nothing": (ValueError, "window_size is \\(0, 4\\)", dict(window_size=(0, 4))),
    "negative shift": (ValueError, "shift_size is \\(-1, -1\\)", dict(shift_size=-1)),
    "empty map": (ValueError, "at least 1", dict(qkv=torch.zeros(1, 0, 8, 96))),
    "bias shape": (ValueError, "bias has the shape \\(2, 16, 15\\)", dict(bias=torch.zeros(2, 16, 15))),
    "bias rank": (ValueError, "bias has 2 dimensions", dict(bias=torch.zeros(16, 16))),
    "bias dtype": (TypeError, "bias has the dtype torch.bool", dict(bias=torch.zeros(2, 16, 16, dtype=torch.bool))),
    "bias device": (TypeError, "bias is on meta", dict(bias=torch.zeros(2, 16, 16, device="meta"))),
    "negative scale": (ValueError, "scale is -1.0; it must be 0 or more", dict(scale=-1.0)),
    "pad shape": (ValueError, "pad_qkv has the shape \\(95,\\)", dict(pad_qkv=torch.zeros(95))),
    "impl": (ValueError, "'auto', 'triton', 'reference'", dict(impl="cuda")),
}


def test_sizes_may_be_integers_of_another_type():
    qkv = make_map()
    expected = window_attention(qkv, 2, (4, 4), (2, 2))
    sizes = torch.tensor(4), [torch.tensor(2), 2]
    torch.testing.assert_close(window_attention(qkv, torch.tensor(2), *sizes), expected, rtol=0, atol=0)


def test_sizes_that_are_symbols_are_checked_too():
    trace = make_fx(lambda qkv: window_attention(qkv, 2, 4, 2, impl="reference"), tracing_mode="symbolic")
    graph = trace(torch.randn(2, 8, 8, 3 * 32))
    other = torch.randn(3, 8, 12, 3 * 32)
    torch.testing.assert_close(graph(other), window_attention(other, 2, 4, 2, impl="reference"))


@pytest.mark.parametrize("name", BAD_MAPS)
def test_window_attention_names_what_is_wrong_with_its_input(name):
    error, message, change = BAD_MAPS[name]
    good = dict(qkv=make_map(), num_heads=2, window_size=4, shift_size=2)
    for _ in range(2):  # what was found wrong once is not taken for checked
        with pytest.raises(error, match=message):
            window_attention(**(good | change))


BAD_WINDOWS = {
    "rank": (ValueError, "q has 3 dimensions", dict(q=torch.zeros(4, 16, 16))),
    "k shape": (ValueError, "k has the shape \\(4, 2, 15, 16\\)", dict(k=torch.zeros(4, 2, 15, 16))),
    "v dtype": (TypeError, "v has the dtype torch.float64", dict(v=torch.zeros(4, 2, 16, 16, dtype=torch.double))),
    "mask shape": (ValueError, "mask has the shape \\(2, 16, 15\\)", dict(mask=torch.zeros(2, 16, 15))),
    "mask count": (ValueError, "mask is for 3 windows", dict(mask=torch.zeros(3, 16, 16))),
    "mask of truth values": (TypeError, "torch.bool", dict(mask=torch.zeros(2, 16, 16, dtype=torch.bool))),
    "mask to train": (ValueError, "mask requires a gradient", dict(mask=torch.zeros(2, 16, 16, requires_grad=True))),
    "negative scale": (ValueError, "scale is -1.0; it must be 0 or more", dict(scale=-1.0)),
    "no tokens": (ValueError, "only B_ may be 0", dict(zip("qkv", [torch.zeros(4, 2, 0, 16)] * 3, strict=True))),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_windowed_sdpa_names_what_is_wrong_with_its_input(name):
    error, message, change = BAD_WINDOWS[name]
    q, k, v = make_windows()
    with pytest.raises(error, match=message):
        windowed_sdpa(**(dict(q=q, k=k, v=v) | change))


@pytest.mark.parametrize(
    "message, window_size, head_dim, dtype",
    [
        ("up to 576 tokens, not 625", 25, 16, torch.float32),
        ("head_dim 8 to 128, not 4", 4, 4, torch.float32),
        ("head_dim 8 to 128, not 136", 4, 136, torch.float32),
        ("not torch.float64" if GPU else "bfloat16", 4, 16, torch.float64 if GPU else torch.bfloat16),
    ],
)
def test_triton_says_what_it_cannot_do_and_auto_does_it_otherwise(message, window_size, head_dim, dtype, kernel_device):
    qkv = torch.randn(1, 25, 25, 3 * head_dim, dtype=dtype, device=kernel_device)
    with pytest.raises(ValueError, match=message):
        window_attention(qkv, 1, window_size, impl="triton")
    auto, expected = (window_attention(qkv, 1, window_size, impl=impl) for impl in ("auto", "reference"))
    assert torch.equal(auto, expected)


@pytest.mark.gpu
def test_triton_refuses_a_cpu_tensor_where_there_is_a_gpu():
    with pytest.raises(ValueError, match="the tensors are on 'cpu'"):
        window_attention(make_map(), 2, 4, impl="triton")


def test_fallback_is_logged_once_with_its_reason(caplog):
    functional.log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, logger="timm_flashwin"):
        for _ in range(3):
            window_attention(make_map(), 2, 4)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "window attention runs in plain PyTorch: the tensors are on the CPU, and the kernels run on GPUs"
    ]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_computes_in_its_dtype_and_keeps_the_bias(impl, kernel_device):
    dtype = torch.float16
    qkv = make_map(device=kernel_device).requires_grad_()
    bias = torch.randn(2, 16, 16, device=kernel_device, requires_grad=True)
    with torch.autocast(kernel_device, dtype):
        out = window_attention(qkv, 2, 4, 2, bias, impl=impl)
    assert out.dtype == dtype
    assert torch.equal(out, window_attention(qkv.to(dtype), 2, 4, 2, bias, impl=impl))
    out.float().square().sum().backward()
    assert qkv.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32

    windows = make_windows(kernel_device)
    with torch.autocast(kernel_device, dtype):
        assert windowed_sdpa(*windows, impl=impl).dtype == dtype


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_scale_replaces_the_default(impl, kernel_device):
    qkv = make_map(device=kernel_device)
    default, given, other = (window_attention(qkv, 2, 4, scale=scale, impl=impl) for scale in (None, 16**-0.5, 1.0))
    assert torch.equal(default, given) and not torch.equal(default, other)


@pytest.mark.parametrize("window_size", [4, 9], ids=["one tile", "several tiles"])
def test_scale_0_leaves_the_bias_alone(window_size, kernel_device):
    qkv, bias = make_map(device=kernel_device), torch.randn(2, window_size**2, window_size**2, device=kernel_device)
    ours, reference = (
        window_attention(qkv, 2, window_size, bias=bias, scale=0, impl=i) for i in ("triton", "reference")
    )
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)  # TF32 at its worst


@pytest.mark.parametrize("window_size", [4, 9], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("of", [lambda t: t[::2], lambda t: t[:1].expand(2)], ids=["every other one", "one for all"])
def test_a_logit_scale_of_any_stride_is_read_in_its_order(of, window_size, kernel_device):
    qkv, bias = make_map(device=kernel_device), torch.randn(2, window_size**2, window_size**2, device=kernel_device)
    logit_scale = of(torch.tensor([0.1, 3.0, 2.0], device=kernel_device))
    ours, reference = (
        window_attention(qkv, 2, window_size, bias=bias, logit_scale=logit_scale, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-2)  # TF32 at its worst


def test_reference_takes_an_empty_batch():
    assert window_attention(torch.zeros(0, 8, 8, 96), 2, 4, 2).shape == (0, 8, 8, 32)
    assert windowed_sdpa(*(torch.zeros(0, 2, 16, 16),) * 3, mask=torch.zeros(2, 16, 16)).shape == (0, 2, 16, 16)
