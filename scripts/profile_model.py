"""Say where a whole model's step goes, timm's and its flashwin twin's side by side, and how far each is from a floor.

    python scripts/profile_model.py [--model swin_base_patch4_window7_224] [--batch 128] [--task infer|train]

Models, inputs and steps are those that `benchmark_model.py` times, eager; whether their results are right, it checks.
Rows go to `results/<device>/profile.jsonl`, one a category and one of the whole step; a row of the same model, batch,
image size, task, precision, provider and category is replaced, others stay.

The time of a step (`step_ms`) is taken end to end without the profiler, timm and flashwin in turns. Then torch.profiler
records a few steps, and the time of every kernel goes to the operator that launched it: the innermost one on the host.
An operator in the backward belongs to the forward operator whose node runs it (the two share autograd's sequence
number). Categories:

  linears            the GEMMs of all Linears, with bias and bias gradient; those in V2's position bias, too. With
                     flashwin's inference also the GELU where it is part of one.
  patch_convolution  the convolution of the patch embedding.
  attention          a block's way from the normed map and back, but for its Linears: the flashwin operators, or roll,
                     padding, partition, products, bias, mask, softmax, casts, and the way back.
  norms              layer norms; with flashwin's also the residual add and the casts that are part of them.
  activations        GELU; with flashwin its backward makes its output again.
  residual_adds      the adds after the two branches, stochastic depth, dropout; in the backward the sums of the
                     gradients that meet where the branches part.
  copies             outside of the attention: casts (also those of inputs and weights of all Linears), the gather of
                     patch merging, changes of layout.
  pooling_and_loss   the mean over the last map, cross entropy, and their gradients.
  optimizer          all of its step; training only.
  other              what no rule knows; the operators are printed.
  gaps               the time of the step in which no kernel ran: the device waited for the host, or for a launch.

The floor of a step: `linears` and `patch_convolution` as they were measured in it, and for the rest the bytes below at
the speed of a device copy, measured in the same run (its reads and writes both count). An operator reads every input
and writes every output once, in the dtype they have in timm's model; the sizes are read off that model as it runs.

                     inference                          training adds
  attention          qkv, output (4 C a token)          qkv, gradients of output and qkv (7 C a token)
  norms              input, output                      input, gradients of output and input
  activations        input, output                      input, gradients of output and input
  residual_adds      two inputs, output; twice a block  two gradients, their sum; twice a block
  copies             patch merging: its map, twice      the same
  optimizer          -                                  AdamW: the parameters seven times (4 reads, 3 writes)

Not counted: weights, biases, masks, statistics and padding; casts, pooling, loss and gaps altogether. Operators that
are fused (a residual add with the norm after it, GELU with a GEMM) move less: it is the floor of launching them one by
one.

Limits. Compiled models fuse across the categories, and are not profiled. A kernel that runs beside another counts in
full, so that the categories may add up to more than the device was busy; it is printed where they do. Gaps are the
difference of two measurements, and small ones may come out negative. Linears that are no `aten::linear` (quantised,
sharded) are not found. On a CPU, to try the script, it is the host's own time in every operator that is profiled, the
step is the profiled one, and gaps are the time in Python, autograd and views.
"""

import argparse
import bisect
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from benchmark_model import GB, PRECISIONS, Entry, Inference, Runner, Training, draw_images, draw_weights
from benchmark_op import CASES, copy_floor
from benchmarking import (
    DeviceClock,
    EndToEndClock,
    HostClock,
    Timing,
    default_out,
    format_table,
    interleave,
    merge_rows,
    pick_device,
    provenance,
)
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PROVIDERS = ("timm_eager", "flashwin")
CATEGORIES = (
    "linears",
    "patch_convolution",
    "attention",
    "norms",
    "activations",
    "residual_adds",
    "copies",
    "pooling_and_loss",
    "optimizer",
    "other",
    "gaps",
)
MEASURED_FLOOR = ("linears", "patch_convolution")  # their floor is the time they took
KEY = ("model", "batch", "img_size", "task", "precision", "provider", "category")
COPY_CASE = CASES[0]  # copies 205 MB in bf16

BLOCKS = (
    swin_transformer.SwinTransformerBlock,
    swin_transformer_v2.SwinTransformerV2Block,
    swin_transformer_v2_cr.SwinTransformerV2CrBlock,
)
TIMMS_ATTENTION = (
    (swin_transformer.SwinTransformerBlock, "_attn"),
    (swin_transformer_v2.SwinTransformerV2Block, "_attn"),
    (swin_transformer_v2_cr.SwinTransformerV2CrBlock, "_shifted_window_attn"),
    # Of an attention that flashwin computes: where its dropout draws for every pair of tokens.
    (swin_transformer_v2_cr.WindowMultiHeadAttention, "_relative_positional_encodings"),
)
PATCH_MERGINGS = (
    swin_transformer.PatchMerging,
    swin_transformer_v2.PatchMerging,
    swin_transformer_v2_cr.PatchMerging,
)


# ------------------------------------------------------------------------------------------------------ attribution

ATTENTION_RANGE = "profile_model: attention"
ENGINE = "autograd::engine::evaluate_function: "  # + the node's name; torch's range around all that a node causes
BACKWARD_FUNCTION, USER_SCOPE = 1, 7  # of at::RecordScope
LINEARS = ("aten::linear", "_GeluLinear")  # the latter is models/mlp.py's, the GELU and the Linear after it
OURS = "timm_flashwin::"
ADDS = ("aten::add", "aten::add_")

WAYS = ("", "_backward")
OUR_ATTENTION = ("window_attention", "windowed_sdpa", "relative_position_bias", "continuous_position_table")

# Operators that say it all, wherever they are found among the callers of a kernel's operator.
DECISIVE = {
    "aten::addmm": "linears",
    "aten::mm": "linears",
    "aten::convolution": "patch_convolution",
    "aten::native_layer_norm": "norms",
    "aten::gelu": "activations",
    # By these names also where a whole block is one node, whose backward calls the backward operators itself.
    **dict.fromkeys((OURS + name + way for name in ("add_layer_norm", "layer_norm_add") for way in WAYS), "norms"),
    **dict.fromkeys((OURS + name + way for name in OUR_ATTENTION for way in WAYS), "attention"),
    OURS + "gelu_backward": "activations",
    OURS + "linear_gelu": "linears",
    "aten::dropout": "residual_adds",
    "aten::mean": "pooling_and_loss",
    "aten::adaptive_avg_pool2d": "pooling_and_loss",
    "aten::cross_entropy_loss": "pooling_and_loss",
    "aten::ones_like": "pooling_and_loss",  # the gradient of the loss
}
COPIES = (
    "aten::copy_",
    "aten::_foreach_copy_",
    "aten::cat",
    "aten::_to_copy",
    "aten::clone",
    "aten::contiguous",
    "aten::constant_pad_nd",
)
# Those that mean something only outside of the others.
PLAIN = {
    **dict.fromkeys(COPIES, "copies"),
    **dict.fromkeys((*ADDS, "aten::addcmul", "aten::mul", "aten::div_", "aten::bernoulli_"), "residual_adds"),
    **dict.fromkeys(("aten::new_ones", "aten::fill_"), "residual_adds"),  # what stochastic depth is asked to scale
    "aten::layer_norm": "norms",  # around the decisive ones, and around autocast's casts in front of them
    "aten::conv2d": "patch_convolution",
    "aten::sum": "linears",  # the bias gradients, where a whole block is one node
}
# They launch nothing, and are seen only where it is the host's time that is profiled.
VIEWS = (
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::as_strided",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::flatten",
    "aten::matmul",
    "aten::narrow",
    "aten::new_empty",
    "aten::numpy_T",
    "aten::pad",
    "aten::permute",
    "aten::promote_types",
    "aten::reshape",
    "aten::slice",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::to",
    "aten::unflatten_dense_tensors",
    "aten::view",
    "detach",
    "_FusedBlock",  # a whole block, beside what it is made of
)


@contextlib.contextmanager
def marked_attention() -> Iterator[None]:
    """Put a profiler range around timm's own way from a block's norm before the attention to the norm or add after it.

    The operators of flashwin say by their names what they are.
    """
    with contextlib.ExitStack() as stack:
        for owner, name in TIMMS_ATTENTION:
            marked = record_function(ATTENTION_RANGE)(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, marked))
        yield


def callers(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    """The event, and what it is nested in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


class Attribution:
    """The category of any host event of a profile that was recorded under `marked_attention`."""

    def __init__(self, events: list[FunctionEvent]):
        # Per thread, in the order in which they started: operators, and the number of the node that comes next.
        self._operators: dict[int, list[FunctionEvent]] = {}
        self._opening: dict[int, set[int]] = {}  # per thread: the first number inside of each attention range
        seen = set()
        for event in sorted(events, key=lambda event: event.time_range.start):
            if event.sequence_nr < 0 or event.scope == BACKWARD_FUNCTION or event.name.startswith(ENGINE):
                continue
            self._operators.setdefault(event.thread, []).append(event)
            attention = next((caller.id for caller in callers(event) if caller.name == ATTENTION_RANGE), None)
            if attention is not None and attention not in seen:
                seen.add(attention)
                self._opening.setdefault(event.thread, set()).add(event.sequence_nr)

    def category(self, event: FunctionEvent) -> str:
        own = list(callers(event))
        names = [caller.name for caller in own]
        if any(name.startswith("Optimizer.") for name in names):
            return "optimizer"
        engine = next((i for i, name in enumerate(names) if name.startswith(ENGINE)), None)
        if engine is None:
            return self._by_names(names)
        node = own[engine]
        operator = self._operator_of(node)
        if operator is None and node.sequence_nr >= 0:
            return "other"  # by its own name a product of the attention would pass for one of a Linear
        forward = [caller.name for caller in callers(operator)]
        if engine and names[engine - 1] in ADDS:
            # Not the node's own: the engine adds its gradient to one that was there. The branches of a block part in
            # front of a norm (V1) or of the attention (V2), which begins with a Linear in flashwin.
            opens = node.sequence_nr in self._opening.get(node.fwd_thread, ())
            inside = ATTENTION_RANGE in forward and "aten::linear" not in forward and not opens
            return "attention" if inside else "residual_adds"
        return self._by_names(forward + names[:engine])

    def _operator_of(self, node: FunctionEvent) -> FunctionEvent | None:
        """What made the node: the last operator that started before there was a node of this number.

        An operator in place on a view makes several nodes, and so more numbers than one.
        """
        operators = self._operators.get(node.fwd_thread, [])
        after = bisect.bisect_right(operators, node.sequence_nr, key=lambda operator: operator.sequence_nr)
        return operators[after - 1] if after else None

    def _by_names(self, names: list[str]) -> str:
        decisive = next((DECISIVE[name] for name in names if name in DECISIVE), None)
        if any(name in LINEARS for name in names):
            casts = decisive is None and any(name in COPIES for name in names)
            return "copies" if casts else decisive or "linears"
        if ATTENTION_RANGE in names:
            return "attention"
        return decisive or next((PLAIN[name] for name in names if name in PLAIN), "other")


# -------------------------------------------------------------------------------------------------------- profiling


class Profile(NamedTuple):
    """Means of one step, in milliseconds."""

    ms: dict[str, float]  # of every category but the gaps
    launches: dict[str, float]  # kernels, copies and fills; on a CPU operators
    busy_ms: float  # in which a kernel (on a CPU: an operator) ran; overlapping ones counted once
    step_ms: float | None  # all of it, as the profiler saw it; None on a GPU, where the profiler keeps the host busy
    unknown: dict[str, float]  # operator -> milliseconds of what no rule knows


def profile_steps(step: Callable[[], object], device: torch.device, steps: int) -> Profile:
    """Profile `steps` steps, which have to be warmed up."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with marked_attention():
        with profile(activities=activities):  # the first one of a process starts the tracer, and is not counted
            step()
        with profile(activities=activities) as recorded:
            for _ in range(steps):
                with record_function("profile_model: step"):
                    step()
            if cuda:
                torch.cuda.synchronize()
    events = recorded.events()
    return (device_profile if cuda else host_profile)(events, steps)


def device_profile(events: list[FunctionEvent], steps: int) -> Profile:
    """From the times of the kernels."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    total = sum(kernel.time_range.elapsed_us() for kernel in kernels)
    if not total:
        raise SystemExit("the profiler saw no kernel: is CUPTI there, and is no other profiler attached to the GPU?")
    host = [event for event in events if event.device_type == DeviceType.CPU]
    attribution = Attribution(host)
    us, launches, unknown = Counter(), Counter(), Counter()
    for event in host:
        if event.kernels:
            category = attribution.category(event)
            duration = sum(kernel.duration for kernel in event.kernels)
            us[category] += duration
            launches[category] += len(event.kernels)
            if category == "other":
                unknown[event.name] += duration
    unlinked = total - sum(us.values())
    if unlinked > 1e-6 * total:
        us["other"] += unlinked
        launches["other"] += len(kernels) - sum(launches.values())
        unknown["(kernels without an operator)"] = unlinked
    busy_ms = covered_us([(kernel.time_range.start, kernel.time_range.end) for kernel in kernels]) / 1e3 / steps
    return Profile(in_ms(us, steps), per_step(launches, steps), busy_ms, None, in_ms(unknown, steps))


def host_profile(events: list[FunctionEvent], steps: int) -> Profile:
    """From the host's own time in every operator."""
    attribution = Attribution(events)
    us, launches, unknown = Counter(), Counter(), Counter()
    span = 0.0
    for event in events:
        if event.cpu_parent is None:
            span += event.cpu_time_total
        category = attribution.category(event)
        if is_bookkeeping(event, category):
            continue
        us[category] += event.self_cpu_time_total
        launches[category] += 1
        if category == "other":
            unknown[event.name] += event.self_cpu_time_total
    busy_ms = sum(us.values()) / 1e3 / steps
    return Profile(in_ms(us, steps), per_step(launches, steps), busy_ms, span / 1e3 / steps, in_ms(unknown, steps))


def is_bookkeeping(event: FunctionEvent, category: str) -> bool:
    """Whether it is a range, a node of autograd's or a view: what launches nothing on a GPU."""
    ranges = event.scope in (BACKWARD_FUNCTION, USER_SCOPE) or event.name.startswith(ENGINE)
    return ranges or (category == "other" and event.name in VIEWS)


def in_ms(us: Counter, steps: int) -> dict[str, float]:
    return {name: value / 1e3 / steps for name, value in us.items()}


def per_step(counts: Counter, steps: int) -> dict[str, float]:
    return {name: count / steps for name, count in counts.items()}


def covered_us(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of (start, end)."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


# ------------------------------------------------------------------------------------------------------------ floor


def bytes_moved(model: nn.Module, step: Callable[[], object], train: bool) -> dict[str, int]:
    """Category -> bytes that a step of timm's `model` has to read and write: the table above.

    Runs one `step`. The attention's qkv and output are those of the map, without the padding of its windows.
    """
    total: Counter[str] = Counter()
    handles: list = []

    def hook(module: nn.Module, function: Callable[[Tensor, Tensor], None]) -> None:
        handles.append(module.register_forward_hook(lambda _, inputs, output: function(inputs[0], output)))

    def elementwise(category: str) -> Callable[[Tensor, Tensor], None]:
        def count(x: Tensor, y: Tensor) -> None:
            total[category] += x.nbytes + y.nbytes + train * (2 * x.nbytes + y.nbytes)

        return count

    def count_gather(x: Tensor, y: Tensor) -> None:
        total["copies"] += 2 * x.nbytes * (1 + train)

    def count_block(attention: nn.Module) -> None:
        def count(x: Tensor, y: Tensor) -> None:
            total["residual_adds"] += 2 * 3 * y.nbytes * (1 + train)
            tokens = y.numel() // y.shape[-1]
            total["attention"] += tokens * row_bytes[attention] * (4 + 7 * train)

        return count

    row_bytes: dict[nn.Module, int] = {}  # of a token's output, as it comes to proj

    def note_row(attention: nn.Module, x: Tensor) -> None:
        row_bytes[attention] = x.shape[-1] * x.element_size()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            hook(module, elementwise("norms"))
        elif isinstance(module, nn.GELU):
            hook(module, elementwise("activations"))
        elif isinstance(module, PATCH_MERGINGS):
            hook(module, count_gather)
        elif isinstance(module, BLOCKS):
            hook(module.attn.proj, lambda x, y, attention=module.attn: note_row(attention, x))
            hook(module, count_block(module.attn))
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    if train:
        total["optimizer"] = 7 * sum(parameter.nbytes for parameter in model.parameters())
    return dict(total)


def copy_speed(device: torch.device, repeats: int) -> float:
    """Bytes a millisecond, read and written, of a device copy."""
    clock = DeviceClock(device) if device.type == "cuda" else HostClock()
    copy = copy_floor(COPY_CASE, device, torch.bfloat16)
    nbytes = COPY_CASE.B * COPY_CASE.H * COPY_CASE.W * 2 * COPY_CASE.C * torch.bfloat16.itemsize
    return 2 * nbytes / interleave(clock, {"copy": copy}, repeats, warmup=3)["copy"].ms


# ------------------------------------------------------------------------------------------------------------- rows


def make_rows(
    entry: Entry, provider: str, measured: Profile, timing: Timing | None, moved: dict[str, int], speed: float, common
) -> list[dict]:
    """One row a category, and one of the whole step (`category` "step").

    timing: The step's, without the profiler; None to take the profiler's (on a CPU).
    moved, speed: `bytes_moved`, and `copy_speed`.
    """
    step_ms = timing.ms if timing else measured.step_ms
    what = {
        "model": entry.model,
        "batch": entry.batch,
        "img_size": entry.img_size,
        "task": entry.task,
        "precision": entry.precision,
        "provider": provider,
    }
    times = measured.ms | {"gaps": step_ms - measured.busy_ms}
    rows, floor_ms = [], 0.0
    for category in CATEGORIES:
        if category == "optimizer" and entry.task == "infer":
            continue
        ms = times.get(category, 0.0)
        own_floor = ms if category in MEASURED_FLOOR else moved.get(category, 0) / speed
        floor_ms += own_floor
        rows.append(
            {"category": category, "ms": ms, "share": ms / step_ms, "launches": measured.launches.get(category, 0)}
            | {"floor_ms": own_floor, "floor_bytes": moved.get(category)}
        )
    whole = {"category": "step", "ms": step_ms, "share": 1.0, "launches": sum(measured.launches.values())}
    rows.append(whole | {"floor_ms": floor_ms, "floor_bytes": sum(moved.values())})
    shared = {
        "step_ms_p20": timing and timing.ms_p20,
        "step_ms_p80": timing and timing.ms_p80,
        "busy_ms": measured.busy_ms,
        "copy_gb_per_s": speed * 1e3 / GB,
        "timed": "kernels" if timing else "host time of operators",
    }
    return [what | rounded(row | shared) | common for row in rows]


def rounded(row: dict) -> dict:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}


def comparison(rows: list[dict]) -> str:
    """timm and flashwin side by side."""
    by_provider = {provider: [row for row in rows if row["provider"] == provider] for provider in PROVIDERS}
    lines = []
    for pair in zip(*by_provider.values(), strict=True):
        cells = [pair[0]["category"]]
        for row in pair:
            cells += [f"{row['ms']:.3f}", f"{row['share']:.1%}", f"{row['launches']:.0f}", f"{row['floor_ms']:.3f}"]
        lines.append(cells)
    columns = ("ms", "share", "launches", "floor ms")
    return format_table(["category", *(f"{p} {c}" if c == "ms" else c for p in PROVIDERS for c in columns)], lines)


def distances(rows: list[dict]) -> str:
    """Each step against its floor."""
    lines = []
    for row in rows:
        if row["category"] == "step":
            gemm_ms = sum(
                other["ms"]
                for other in rows
                if other["provider"] == row["provider"] and other["category"] in MEASURED_FLOOR
            )
            lines.append(
                f"{row['provider']}: {row['ms']:.3f} ms is {row['ms'] / row['floor_ms']:.2f} times its floor of "
                f"{row['floor_ms']:.3f} ms ({gemm_ms:.3f} ms of Linears and patch convolution as measured, "
                f"{row['floor_bytes'] / GB:.2f} GB at {row['copy_gb_per_s']:.0f} GB/s)"
            )
    return "\n".join(lines)


def remarks(provider: str, measured: Profile) -> Iterator[str]:
    """What a reader of the numbers should know."""
    for name, ms in sorted(measured.unknown.items(), key=lambda item: -item[1]):
        yield f"{provider}: no category for {name}, {ms:.4f} ms a step"
    together = sum(measured.ms.values())
    if together > 1.01 * measured.busy_ms:
        yield f"{provider}: kernels overlap; {together:.3f} ms of them in {measured.busy_ms:.3f} ms"


# ---------------------------------------------------------------------------------------------------------- command


def make_runner(provider: str, entry: Entry, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Runner:
    runner = (Inference if entry.task == "infer" else Training)(provider, entry, weights, images, labels)
    runner.model.train(entry.task == "train")
    for _ in range(3):
        runner.step()
    return runner


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_base_patch4_window7_224", help="timm's name (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default %(default)s)")
    parser.add_argument("--img-size", type=int, help="default: the model's")
    parser.add_argument("--task", choices=PRECISIONS, default="infer", help="default %(default)s")
    parser.add_argument(
        "--precision",
        choices=sorted({precision for allowed in PRECISIONS.values() for precision in allowed}),
        help="; ".join(f"{task}: {', '.join(allowed)}" for task, allowed in PRECISIONS.items())
        + "; default: the first",
    )
    parser.add_argument("--steps", type=int, default=3, help="profiled steps (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON Lines file (default results/<device>/profile.jsonl)")
    parser.add_argument("--commit", help="what the rows say was measured (default: git's HEAD)")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.steps < 1 or args.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    try:
        args.entry = Entry.parse(f"{args.model}:{args.batch}:{args.task}", args.img_size, args.precision)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_arguments()
    entry, device = args.entry, pick_device(args.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as timm's train.py and validate.py have it
    out = args.out or default_out(device, "profile.jsonl")
    common = provenance(device, args.commit)
    profiled = "kernels" if cuda else "host time of operators on the CPU, where flashwin runs timm's code: no result"
    print(f"profiled on {common['device']}: {profiled}\n{common}\nrows go to {out}", flush=True)

    weights = draw_weights(entry)
    images, labels = draw_images(entry, device)
    runners = {provider: make_runner(provider, entry, weights, images, labels) for provider in PROVIDERS}
    timings: dict[str, Timing] = {}
    if cuda:
        calls = {provider: runner.step for provider, runner in runners.items()}
        timings = interleave(EndToEndClock(), calls, args.repeats, warmup=3)
    stock = runners["timm_eager"]
    moved = bytes_moved(stock.model, stock.step, train=entry.task == "train")
    speed = copy_speed(device, args.repeats)
    rows = []
    for provider, runner in runners.items():
        measured = profile_steps(runner.step, device, args.steps)
        rows += make_rows(entry, provider, measured, timings.get(provider), moved, speed, common)
        for remark in remarks(provider, measured):
            print(remark)
    merge_rows(out, rows, KEY)
    print(f"{entry.name} {entry.precision}, image size {entry.img_size}", comparison(rows), distances(rows), sep="\n\n")


if __name__ == "__main__":
    main()
