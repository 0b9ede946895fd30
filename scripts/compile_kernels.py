"""Compile every kernel for GPUs that need not be there, and print registers, spills and shared memory.

    python scripts/compile_kernels.py [--targets sm_90 gfx942] [--cases w7 w24] [--all-dtypes]

The launch functions themselves run, on small CPU tensors: what is compiled here is what a user of that GPU gets. Only
the last step, the launch, is left out. More shared memory than the target has makes the script fail; so does a register
spill in the standard cases (windows 7 to 24, head_dim 32, float16 and bfloat16).
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from timm_flashwin.kernels import (
    continuous_position,
    gelu,
    launch,
    launcher,
    layer_norm,
    linear_gelu,
    needs_stats,
    relative_position,
    settings,
)

# Shared memory one block may use, in bytes: CUDA programming guide, "Technical Specifications per Compute Capability";
# for gfx942 the 64 KiB LDS of a compute unit (AMD CDNA 3 ISA).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Case(NamedTuple):
    """One shape. Maps are one window past a multiple in size where padding is wanted."""

    window: int
    shift: int
    head_dim: int
    dtype: torch.dtype
    padded: bool = False
    explicit_mask: bool = False
    cosine: bool = False
    standard: bool = False  # a spill fails the check


def make_cases() -> dict[str, Case]:
    """The standard cases first, then those that only have to compile and fit."""
    cases = {}
    for dtype in (torch.float16, torch.bfloat16):
        short = str(dtype).removeprefix("torch.").replace("float", "f")
        for window in (7, 8, 12, 14, 16, 24):
            cases[f"w{window}-{short}"] = Case(window, window // 2, 32, dtype, standard=True)
        cases[f"w7-unshifted-{short}"] = Case(7, 0, 32, dtype, standard=True)
    for window in (8, 12, 24):
        cases[f"w{window}-cos-bf16"] = Case(window, window // 2, 32, torch.bfloat16, cosine=True)
    for window in (7, 12):
        cases[f"w{window}-padded-bf16"] = Case(window, window // 2, 32, torch.bfloat16, padded=True)
        cases[f"w{window}-mask-bf16"] = Case(window, 0, 32, torch.bfloat16, explicit_mask=True)
    for head_dim in (24, 64, 128):
        cases[f"w7-d{head_dim}-bf16"] = Case(7, 3, head_dim, torch.bfloat16)
        cases[f"w12-d{head_dim}-bf16"] = Case(12, 6, head_dim, torch.bfloat16)
    for window in (7, 12):
        cases[f"w{window}-tf32"] = Case(window, window // 2, 32, torch.float32)
        cases[f"w{window}-d128-tf32"] = Case(window, window // 2, 128, torch.float32)
    return cases


class CompileOnlyDriver:
    """Stands where Triton looks for the GPU: says which target it is, and can launch nothing."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches what it compiled by device: every target is a device of its own

    def get_current_stream(self, device):
        return 0


class Row(NamedTuple):
    target: str
    case: str
    kernel: str
    registers: int
    spills: int  # bytes of local memory a thread, or spilled registers on AMD
    shared: int  # bytes a block
    problem: str


def _resources(compiled, target: GPUTarget) -> tuple[int, int]:
    """(registers a thread, spills)."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        fields = ("vgpr_count", "vgpr_spill_count")
        return tuple(int(re.search(rf"\.{field}:\s+(\d+)", assembly).group(1)) for field in fields)
    return _cubin_resources(compiled.asm["cubin"])


@functools.cache  # half of the kernels are the same in many cases
def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"\b{field}:(\d+)", usage.stdout).group(1)) for field in ("REG", "STACK"))


def _run(case: Case) -> None:
    """Forward and backward of one case, and the gather of its bias, through the launch functions."""
    num_heads, B = 4, 2
    N, C = case.window**2, num_heads * case.head_dim
    bias = torch.zeros(num_heads, N, N)
    logit_scale = torch.zeros(num_heads) if case.cosine else None
    if case.explicit_mask:
        grads = q, k, v = torch.zeros(3, B, num_heads, N, case.head_dim, dtype=case.dtype)
        call, operands = launch.call_on_windows(q, k, v, bias, torch.zeros(1, N, N), logit_scale, 1.0)
    else:
        size = 2 * case.window + (1 if case.padded else 0)
        qkv, pad = torch.zeros(B, size, size, 3 * C, dtype=case.dtype), torch.zeros(3 * C, dtype=case.dtype)
        geometry = (case.window, case.window), (case.shift, case.shift)
        call, operands = launch.call_on_map(qkv, bias, pad, logit_scale, num_heads, *geometry, 1.0)
        grads = (qkv,)
    out = torch.zeros(*call.shape[:3], C, dtype=case.dtype)
    stats = None
    if needs_stats(N, case.head_dim, case.dtype):
        stats = torch.zeros(B * call.num_positions, num_heads, N, 2)
    launch.launch_forward(call, operands, out, stats)
    shared_grads = launch.SharedGrads(torch.zeros_like(bias), torch.zeros(3 * C), logit_scale)
    launch.launch_backward(call, operands, out, out, stats, grads, shared_grads)
    table = torch.zeros((2 * case.window - 1) ** 2, num_heads, dtype=case.dtype)
    if case.standard and case.dtype == torch.bfloat16 and case.window in (7, 12):  # each of the two that read it
        call, operands = launch.call_on_map(qkv, table, pad, logit_scale, num_heads, *geometry, 1.0)
        launch.launch_forward(call, operands, out, stats)
    bias = torch.zeros(num_heads, N, N, dtype=case.dtype)
    relative_position.launch_relative_position_bias(table, bias, (case.window, case.window))
    relative_position.launch_relative_position_bias_backward(bias, table, (case.window, case.window))
    weights = [torch.zeros(shape, dtype=case.dtype) for shape in ((512, 2), (512,), (num_heads, 512), (num_heads,))]
    for coordinates, bounded in ((torch.zeros(len(table), 2), True), (torch.zeros(N * N, 2), False)):
        continuous_position.launch_continuous_position_table(
            coordinates, *weights, table, (case.window, case.window), bounded
        )
        if case.cosine or case.window == 7:  # it takes long to compile, and hardly depends on the window
            continuous_position.launch_continuous_position_table_backward(
                table, coordinates, *weights[:3], table, weights, (case.window, case.window), bounded
            )
    x, y, C = torch.zeros_like(out, dtype=torch.float32), out, out.shape[-1]  # as under autocast
    weight, scale = torch.zeros(C), torch.zeros(out.shape[0], dtype=case.dtype)
    layer_norm.launch_add_layer_norm(x, y, scale, weight, weight, x, y, 1e-5)
    layer_norm.launch_layer_norm_backward(x, y, x, scale, weight, x, y, 1e-5)
    layer_norm.launch_layer_norm_add(x, y, scale, weight, weight, x, 1e-5, torch.float32)
    gelu.launch_gelu_backward(out, out, out, out)


def _compiled_linear_gelu(case: Case):
    """Each length of its products, beside the windows of as many shapes; it is of sm_90 alone."""
    in_features = {7: 96, 8: 128, 12: 192, 14: 256, 16: 384, 24: 512}[case.window]
    return linear_gelu.compile_linear_gelu(in_features, 4 * in_features, case.dtype, not case.padded)


def compile_case(target_name: str, name: str) -> list[Row]:
    """Compile all kernels of one case for one target."""
    target, shared_limit = TARGETS[target_name]
    case = make_cases()[name]
    triton.runtime.driver.set_active(CompileOnlyDriver(target))
    settings.target_arch.cache_clear()
    settings.settings_for.cache_clear()
    launcher.forget()
    compiled_kernels = []

    def warmup(kernel, grid):
        return lambda *args, **kwargs: compiled_kernels.append(kernel.warmup(*args, grid=grid, **kwargs))

    triton.runtime.JITFunction.__getitem__ = warmup
    torch.backends.cuda.matmul.allow_tf32 = True
    _run(case)
    if target_name == "sm_90" and case.dtype != torch.float32:
        compiled_kernels.append(_compiled_linear_gelu(case))
    rows = []
    for compiled in compiled_kernels:
        registers, spills = _resources(compiled, target)
        shared = compiled.metadata.shared
        problem = ""
        if shared > shared_limit:
            problem = f"shared memory over the limit of {shared_limit}"
        elif spills and case.standard:
            problem = "spills"
        rows.append(Row(target_name, name, compiled.metadata.name, registers, spills, shared, problem))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=list(make_cases()), help="names or parts of names")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    cases = [name for name in make_cases() if any(part in name for part in args.cases)]
    jobs = [(target, name) for target in args.targets for name in cases]

    print(f"triton {triton.__version__}, {len(cases)} cases for {', '.join(args.targets)}")
    print(f"{'target':8}{'case':20}{'kernel':40}{'registers':>10}{'spills':>8}{'shared':>8}")
    failed = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        for rows in pool.map(compile_case, *zip(*jobs, strict=True)):
            for row in rows:
                failed += bool(row.problem)
                print(
                    f"{row.target:8}{row.case:20}{row.kernel:40}{row.registers:10}{row.spills:8}{row.shared:8}"
                    f"  {row.problem}",
                    flush=True,
                )
    print(f"{failed} problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
