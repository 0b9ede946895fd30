"""The doctor command: what this machine has, what it will run, how exact that is beside timm's code, and how fast."""

import copy
import importlib.metadata
import platform
import statistics
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from .console import format_table, one_line
from .functional import fallback_reason
from .models.accelerate import accelerate

DIM, NUM_HEADS = 128, 4  # of the first stage of the base models
WARMUP_RUNS, TIMED_RUNS = 5, 20
FAILED = "<-- FAILED"


class Case(NamedTuple):
    """A kind of block: cosine attention is Swin V2's."""

    window: int
    cosine: bool

    def __str__(self) -> str:
        return f"window {self.window}{', cosine' if self.cosine else ''}"

    def block(self, size: tuple[int, int]) -> nn.Module:
        """timm's block with shifted windows for maps of `size`, its weights such that every term counts."""
        block_class = SwinTransformerV2Block if self.cosine else SwinTransformerBlock
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            block = block_class(DIM, size, NUM_HEADS, window_size=self.window, shift_size=self.window // 2)
            for parameter in block.parameters():  # timm starts with biases of 0
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if self.cosine:
                block.attn.logit_scale.uniform_(1, 4)
                block.norm1.weight.add_(1)  # 0 to start with, as norm2's
                block.norm2.weight.add_(1)
            else:
                block.attn.relative_position_bias_table.normal_()
        return block


# The windows of timm's models that have weights; 16 and 24 are Swin V2's.
CASES = Case(7, False), Case(8, True), Case(12, False), Case(16, True), Case(24, True)
DTYPES = torch.bfloat16, torch.float16, torch.float32
# A choice, because each has several kernels, which are compiled when they run here for the first time.
EXACTNESS_CASES = (
    (Case(7, False), torch.bfloat16),
    (Case(7, False), torch.float16),
    (Case(7, False), torch.float32),
    (Case(8, True), torch.bfloat16),
    (Case(12, False), torch.bfloat16),
    (Case(16, True), torch.bfloat16),
)
SPEED_CASES = (  # with batch and height and width of the map
    (Case(7, False), 64, 56),
    (Case(8, True), 32, 64),
    (Case(16, True), 32, 64),
)


def run_doctor(device: torch.device) -> int:
    """Print what there is, what runs, how exact it is and how fast.

    Returns:
        The exit status: 0 if all is well; 1 if a GPU cannot run the kernels, or a result is less exact than it may be.
        The lines that say so are marked.
    """
    print_versions(device)
    well = print_implementations(device)
    well &= print_exactness(device)
    if device.type == "cuda":
        well &= print_speed(device)
    else:
        print(
            f"\nhow fast: nothing is faster on {device.type!r}. The *_flashwin models run timm's own code here, bit "
            "for bit; on a CUDA GPU of compute capability 8.0 or more the same names run on the kernels."
        )
    print("\nall is well" if well else f"\nsomething is wrong: see the lines marked {FAILED}")
    return 0 if well else 1


# ------------------------------------------------------------------------------------------ what there is and runs


def print_versions(device: torch.device) -> None:
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    built_for = toolkit if torch.version.cuda or torch.version.hip else "CPU"
    rows = [
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (for {built_for})"),
        ("triton", version_of("triton", "pytorch-triton-rocm")),
        ("timm", timm.__version__),
        ("timm-flashwin", version_of("timm-flashwin")),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        rows.append((f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.device_count():
        rows.append(("GPU", "none that torch can use"))
    rows.append(("examined here", str(device)))
    print(format_table(rows, "<<"))


def version_of(*distributions: str) -> str:
    """The version of the first of these packages that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def print_implementations(device: torch.device) -> bool:
    """Print what runs in each standard case, and why; returns whether a GPU runs all of them on the kernels."""
    reasons = {
        (case, dtype): fallback_reason(device, dtype, DIM // NUM_HEADS, case.window**2)
        for case in CASES
        for dtype in DTYPES
    }
    notes = {reason: f"[{i}]" for i, reason in enumerate(dict.fromkeys(filter(None, reasons.values())), 1)}
    failed = bool(notes) and device.type == "cuda"
    rows = [("attention", *map(short, DTYPES))]
    for case in CASES:
        cells = [reasons[case, dtype] for dtype in DTYPES]
        rows.append((str(case), *("kernels" if cell is None else f"timm's code {notes[cell]}" for cell in cells)))
    print("\nwhat runs\n" + format_table(rows, "<<<<"))
    for reason, note in notes.items():
        print(f"{note} {reason}{'  ' + FAILED if failed else ''}")
    return not failed


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------ how exact


class Error(NamedTuple):
    """How far one result is from float64, relative in the L2 norm, and how far it may be."""

    result: str
    ours: float
    timms: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.ours <= self.allowed  # not if it is NaN


def print_exactness(device: torch.device) -> bool:
    """Print our error beside timm's; returns whether every result is exact enough."""
    print(
        "\nhow exact: error against float64 of the attention of one block; ours may be twice timm's plus one rounding",
        flush=True,
    )
    rows = [("attention", "dtype", "output", "timm's", "allowed", "worst gradient", "", "timm's", "allowed", "")]
    well = True
    for case, dtype in EXACTNESS_CASES:
        try:
            output, *gradients = attention_errors(case, dtype, device)
        except Exception as error:  # a compiler or a driver can be broken in any way
            rows.append((str(case), short(dtype), *[""] * 7, f"{FAILED}: {one_line(error)}"))
            well = False
            continue
        worst = max(gradients, key=lambda error: (not error.passed, error.ours / error.allowed))
        passed = output.passed and worst.passed
        well &= passed
        numbers = [[f"{value:.1e}" for value in error[1:]] for error in (output, worst)]
        rows.append((str(case), short(dtype), *numbers[0], worst.result, *numbers[1], "" if passed else FAILED))
    print(format_table(rows, "<<>>><>>><"))
    return well


def attention_errors(case: Case, dtype: torch.dtype, device: torch.device, impl: str = "auto") -> list[Error]:
    """Compare timm's attention, and the same on the kernels, with timm's in float64.

    The weights and the inputs are representable in `dtype`, so that all three start from the same numbers. Half
    precision is autocast's: timm's softmax and normalisation are in float32 there.

    Args:
        case: The kind of block. Its windows are shifted, and its map is padded (without cosine: not every timm can
            build a V2 block for a map that has to be).
        dtype: What it computes in: float32, float16 or bfloat16.
        device: Where ours and timm's run; float64 runs on the CPU, which has it everywhere.
        impl: As in `timm_flashwin.window_attention`.

    Returns:
        The output's error first, then the gradient's of the input and of each parameter.
    """
    size = 2 * case.window, 2 * case.window - (0 if case.cosine else 1)
    stock = case.block(size).to(dtype).float()
    flashwin = copy.deepcopy(stock)
    accelerate(flashwin, impl)
    generator = torch.Generator().manual_seed(0)
    x, do = (torch.randn(2, *size, DIM, generator=generator).to(dtype).float() for _ in range(2))
    exact = attend(copy.deepcopy(stock).double(), x.double(), do.double(), None)
    timms, ours = (
        attend(block.to(device), x.to(device), do.to(device), None if dtype == torch.float32 else dtype)
        for block in (stock, flashwin)
    )
    errors = []
    for name, expected in exact.items():
        our_error, timm_error = relative_error(ours[name], expected), relative_error(timms[name], expected)
        allowed = 2 * timm_error + rounding(dtype)
        if name == "logit_scale":
            # One number a head, the small rest of a sum that cancels: it is as exact as the roundings happen to fall.
            allowed = max(allowed, 128 * torch.finfo(dtype).eps)
        errors.append(Error(name, our_error, timm_error, allowed))
    return errors


def attend(block: nn.Module, x: Tensor, do: Tensor, autocast_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The output of the block's attention on the map `x` [B, H, W, C], projections and all, and every gradient."""
    parameters = dict(block.attn.named_parameters())
    x = x.requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        out = block._attn(x)  # what accelerate replaces; the block around it would hide its error
    gradients = torch.autograd.grad(out, (x, *parameters.values()), do.to(out.dtype))
    return {"output": out.detach(), **dict(zip(("input", *parameters), gradients, strict=True))}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


def rounding(dtype: torch.dtype) -> float:
    """The relative error of rounding once; under TF32 to the operands of a product."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return 2**-11
    return torch.finfo(dtype).eps / 2


# ------------------------------------------------------------------------------------------------------- how fast


def print_speed(device: torch.device) -> bool:
    """Print times of whole blocks; returns whether all of them ran. How fast they are is for the user to judge."""
    print(f"\nhow fast: one block of {DIM} channels, AMP bfloat16, ms; medians of {TIMED_RUNS}", flush=True)
    rows = [("attention", "map", "inference", "timm's", "", "training step", "timm's", "", "")]
    well = True
    for case, batch, size in SPEED_CASES:
        shape = f"{batch}x{size}x{size}x{DIM}"
        try:
            cells = [cell for times in block_times(case, batch, size, device) for cell in compared(*times)]
            rows.append((str(case), shape, *cells, ""))
        except Exception as error:  # as above; the GPU's memory may be in use, too
            rows.append((str(case), shape, *[""] * 6, f"{FAILED}: {one_line(error)}"))
            well = False
    print(format_table(rows, "<<>>>>>><"))
    return well


def compared(ours: float, timms: float) -> tuple[str, str, str]:
    return f"{ours:.3f}", f"{timms:.3f}", f"x{timms / ours:.2f}"


def block_times(case: Case, batch: int, size: int, device: torch.device) -> list[tuple[float, float]]:
    """Median ms of (ours, timm's) on maps [batch, size, size, DIM]: inference, and forward with backward."""
    stock = case.block((size, size)).to(device)
    flashwin = copy.deepcopy(stock)
    accelerate(flashwin)
    x = torch.randn(batch, size, size, DIM, device=device, requires_grad=True)
    do = torch.randn_like(x)

    def infer(block: nn.Module) -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
            block(x)

    def train(block: nn.Module) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = block(x)
        torch.autograd.grad(out, (x, *block.parameters()), do.to(out.dtype))

    return [median_ms(step, (flashwin, stock), device) for step in (infer, train)]


def median_ms(
    step: Callable[[nn.Module], None], blocks: tuple[nn.Module, ...], device: torch.device
) -> tuple[float, ...]:  # fmt: skip
    """Median time of `step` with each block, by CUDA events; they take turns, so that a busy moment hits both."""
    times = [[] for _ in blocks]
    with torch.cuda.device(device):
        for run in range(WARMUP_RUNS + TIMED_RUNS):
            for block, own_times in zip(blocks, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step(block)
                end.record()
                end.synchronize()
                if run >= WARMUP_RUNS:
                    own_times.append(start.elapsed_time(end))
    return tuple(statistics.median(own_times) for own_times in times)
