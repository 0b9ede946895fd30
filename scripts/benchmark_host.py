"""Time what the host does in one call of an operator, at batch 1, where the GPU is done before the host is.

    python scripts/benchmark_host.py

A sample is 100 calls one after the other, without waiting for the device; rows are microseconds of one call. The steps
of `window_attention` are timed from the inside out, each with all that is inside it, so that the difference of two rows
is what a step adds. Rows go to `results/<device>/host.jsonl`; a row of the same name is replaced.

  triton_launcher    the compiled kernel, called with addresses and numbers
  launch             `launcher.Launch`: addresses of the tensors, and which kernel they need
  launch_forward     the call's description, and the launch that was built for it
  operator           the output's memory; whether anybody looks on; autocast
  window_attention   the public function: its arguments checked, the implementation chosen
  ..._grad, ..._backward    the same under autograd, and its gradients of qkv and bias
  ..._dispatched     the same through PyTorch's dispatcher, the way of a profiler or a tensor subclass
  layer_norm, relative_position_bias    the other operators of a block
  torch_*            for scale: what PyTorch's own operators take
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarking import Progress, default_out, format_table, interleave, merge_rows, pick_device, provenance
from torch.nn import functional as F

from timm_flashwin import functional, ops

CALLS = 100  # in a sample
MAP, NUM_HEADS, WINDOW, SHIFT = (1, 14, 14, 512), 16, (7, 7), (3, 3)  # third stage of swin_base at 224


class QueueClock:
    """Milliseconds of the host for one call."""

    def __call__(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) * 1e3 / CALLS


def make_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    B, H, W, C = MAP
    N, head_dim = WINDOW[0] * WINDOW[1], C // NUM_HEADS

    def randn(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device, dtype=dtype)

    x, qkv, weight = randn(B, H, W, C), randn(B, H, W, 3 * C), randn(C, dtype=torch.float32)
    bias, table = randn(NUM_HEADS, N, N), randn((2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1), NUM_HEADS)
    q, k, v = randn(3, 4, NUM_HEADS, N, head_dim)
    geometry = NUM_HEADS, WINDOW, SHIFT, head_dim**-0.5

    from timm_flashwin.kernels import launch

    call, operands = launch.call_on_map(qkv, bias, None, None, *geometry)
    out = torch.empty_like(x)
    launch.launch_forward(call, operands, out, None)
    built = launch._forward(call)
    (compiled,) = built._compiled.values()
    stream = torch.cuda.current_stream(device).cuda_stream
    addresses = [tensor.data_ptr() + offset for tensor, offset in zip((*operands, out), built._bytes, strict=True)]

    def launch_forward():
        launch.launch_forward(*launch.call_on_map(qkv, bias, None, None, *geometry), out, None)

    def attention(qkv=qkv, bias=bias):
        return functional.window_attention(qkv, NUM_HEADS, WINDOW, SHIFT, bias, impl="triton")

    leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    result, do = attention(*leaves), torch.randn_like(x)
    dispatched = torch.ops.timm_flashwin.window_attention
    return {
        "triton_launcher": lambda: compiled(stream, *addresses, *built._numbers),
        "launch": lambda: built(*operands, out),
        "launch_forward": launch_forward,
        "operator": lambda: ops.window_attention(qkv, bias, None, None, *geometry, False),
        "window_attention": attention,
        "window_attention_dispatched": lambda: dispatched(qkv, bias, None, None, *geometry, False),
        "window_attention_grad": lambda: attention(*leaves),
        "window_attention_backward": lambda: torch.autograd.grad(result, leaves, do, retain_graph=True),
        "relative_position_bias": lambda: functional.relative_position_bias(table, WINDOW, impl="triton"),
        "layer_norm": lambda: ops.add_layer_norm(x, None, None, weight, weight, 1e-5, x.dtype),
        "torch_empty": lambda: torch.empty_like(x),
        "torch_add": lambda: x + x,
        "torch_layer_norm": lambda: F.layer_norm(x, (C,)),
        "torch_sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds (default 30)")
    parser.add_argument("--out", type=Path, help="JSON Lines file (default results/<device>/host.jsonl)")
    parser.add_argument("--commit", help="what the rows say was measured (default: git's HEAD)")
    args = parser.parse_args()
    device = pick_device("cuda")
    common = dict(dtype="bf16", B=MAP[0], H=MAP[1], W=MAP[2], C=MAP[3], window=WINDOW[0], shift=SHIFT[0])
    common |= provenance(device, args.commit)

    calls = make_calls(device)
    progress = Progress(args.repeats + 3)
    with torch.no_grad():
        inference = {name: call for name, call in calls.items() if not name.endswith(("_grad", "_backward"))}
        timings = interleave(QueueClock(), inference, args.repeats, 3, progress.step)
    training = {name: call for name, call in calls.items() if name not in inference}
    timings |= interleave(QueueClock(), training, args.repeats, 3)
    progress.close()
    rows = [
        dict(call=name, us=round(t.ms * 1e3, 2), us_p20=round(t.ms_p20 * 1e3, 2), us_p80=round(t.ms_p80 * 1e3, 2))
        for name, t in timings.items()
    ]
    merge_rows(args.out or default_out(device, "host.jsonl"), [row | common for row in rows], ("call",))
    table = [[row["call"], *(f"{row[column]:.1f}" for column in ("us", "us_p20", "us_p80"))] for row in rows]
    print(format_table(["call", "us", "p20", "p80"], table))


if __name__ == "__main__":
    main()
