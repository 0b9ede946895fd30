"""Time windowed attention against what PyTorch offers today; check every provider before its time counts.

    python scripts/benchmark_op.py [--cases w7 b32_96x96_c128_w12_s6] [--providers timm_eager flashwin]

What is timed: from the qkv map [B, H, W, 3C] and the gathered bias [num_heads, N, N] (float32) to the output map
[B, H, W, C]. Cases named `_cos` are the cosine attention of the V2 family: they have a third input, logit_scale
[num_heads] (float32), and every provider's normalisation of q and k is timed along. Pass "fwd" is that, under no_grad;
pass "fwd_bwd" adds the gradients of all inputs for a random `do`. Rows go to `results/<device>/op.jsonl`; a row of the
same case, dtype, pass and provider is replaced, others stay.

Providers:
  copy_floor         a device copy of as many bytes as the operator must move: reads 3C, writes C a token. The backward
                     reads 4C and writes 3C, so the floor of fwd_bwd is 11/4 of it (`floor_ms`; no row of its own).
  timm_eager         timm's block between its qkv and proj Linears, with timm's own functions and mask; norms and
                     softmax in float32, products in the dtype of the map, as under autocast.
  timm_sdpa          the same through `scaled_dot_product_attention`, as in timm's fused branch. timm's V2 has none: in
                     cosine cases SDPA takes the unit q, times the logit scale, and the unit k.
  timm_compile, timm_sdpa_compile    the two under torch.compile, default mode, static shapes.
  flex_compile       `flex_attention`, bias and mask as a score_mod, compiled along with partition and rolls; q and k
                     of cosine cases as for timm_sdpa.
  flashwin           `timm_flashwin.window_attention` on the kernels; flashwin_compile: the same inside torch.compile.
The mask of timm's is built beforehand, as it is a buffer in a model. timm rolls and partitions C channels ahead of its
qkv Linear; between the maps of this benchmark there are 3C to roll. The eager providers pay for that more than in a
model, the compiled ones fuse it: compare with the best of them, and see `benchmark_model.py` for whole models.

Protocol: providers take turns in one process, in a new order every round, after warm-up rounds. Each sample starts from
a flushed L2 and behind a sleeping kernel that hides the host's launches: the sample is device time only, for every
provider alike (`benchmarking.DeviceClock`). float32 runs with `torch.backends.cuda.matmul.allow_tf32 = True`.

Correctness: before anything is timed, each provider's result at the very shape to be timed is compared with the fp64
reference on some images. `do` is zero on the others, so that the bias gradient is theirs alone. What fails is reported,
not timed and not written; the exit status is 1 if it was one of ours.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarking import (
    DeviceClock,
    HostClock,
    Progress,
    Timing,
    compile_or_raise,
    default_out,
    format_table,
    interleave,
    merge_rows,
    pick_device,
    provenance,
    relative_error,
    release_memory,
    short_reason,
)
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from timm_flashwin import geometry, reference
from timm_flashwin.functional import window_attention

HEAD_DIM = 32  # of every Swin of timm's
PROVIDERS = (
    "copy_floor",
    "timm_eager",
    "timm_sdpa",
    "timm_compile",
    "timm_sdpa_compile",
    "flex_compile",
    "flashwin",
    "flashwin_compile",
)
PASSES = ("fwd", "fwd_bwd")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative L2 error allowed: a few roundings of the dtype; float32 products may be TF32, with the mantissa of fp16.
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 2e-3}
SCALE_GRAD_SLACK = 3  # dlogit_scale is one number a head, a sum over all pairs of tokens in which most cancels
KEY = ("case", "dtype", "pass", "provider")
BACKWARD_FLOOR = 11 / 4  # (4C + 7C) / 4C bytes

Function = Callable[..., Tensor]  # (qkv map, bias; in cosine cases logit_scale) -> output map
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (q, k, v, bias, logit_scale) -> out


@dataclasses.dataclass(frozen=True)
class Case:
    B: int
    H: int
    W: int
    C: int
    window: int
    shift: int
    cosine: bool = False

    @property
    def name(self) -> str:
        suffix = "_cos" if self.cosine else ""
        return f"b{self.B}_{self.H}x{self.W}_c{self.C}_w{self.window}_s{self.shift}{suffix}"

    @property
    def num_heads(self) -> int:
        return self.C // HEAD_DIM

    @property
    def N(self) -> int:
        return self.window**2


CASES = [
    Case(128, 56, 56, 128, 7, 0),  # swin_base at 224, its four stages; shifted where it shifts
    Case(128, 56, 56, 128, 7, 3),
    Case(128, 28, 28, 256, 7, 3),
    Case(128, 14, 14, 512, 7, 3),
    Case(128, 7, 7, 1024, 7, 0),
    Case(32, 96, 96, 128, 12, 6),  # swin_base at 384, first stage
    Case(64, 64, 64, 128, 8, 4),  # windows of the V2 family
    Case(64, 64, 64, 128, 16, 8),
    Case(16, 96, 96, 128, 24, 12),
    Case(64, 64, 64, 128, 8, 4, cosine=True),  # and its attention
    Case(64, 64, 64, 128, 16, 8, cosine=True),
    Case(16, 96, 96, 128, 24, 12, cosine=True),
]


# ---------------------------------------------------------------------------------------------------- providers


def in_windows(case: Case, attend: Attend) -> Function:
    """timm's way from map to windows and back around `attend`; the maps here need no padding."""
    window, shift = (case.window, case.window), (case.shift, case.shift)

    def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        if case.shift:
            qkv = torch.roll(qkv, shifts=(-case.shift, -case.shift), dims=(1, 2))
        windows = window_partition(qkv, window).view(-1, case.N, 3 * case.C)  # B*nW, N, 3C
        windows = windows.reshape(-1, case.N, 3, case.num_heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k, v = windows.unbind(0)  # B*nW, num_heads, N, head_dim
        out = attend(q, k, v, bias, logit_scale).transpose(1, 2).reshape(-1, case.window, case.window, case.C)
        out = window_reverse(out, window, case.H, case.W)  # B, H, W, C
        return torch.roll(out, shifts=shift, dims=(1, 2)) if case.shift else out

    return forward


def timm_mask(case: Case, device: torch.device) -> Tensor | None:
    """The mask [nW, N, N] timm keeps as a buffer, from timm's own code; None in an unshifted block."""
    block = SwinTransformerBlock(
        case.C, (case.H, case.W), case.num_heads, window_size=case.window, shift_size=case.shift, device=device
    )
    return block.attn_mask


def unit(x: Tensor) -> Tensor:
    """Each head's vector over its norm: taken in float32, handed to the product in the dtype of `x`, as by autocast."""
    return F.normalize(x.float(), dim=-1).to(x.dtype)


def factor_of(logit_scale: Tensor) -> Tensor:
    """What timm's V2 multiplies cosines by: [num_heads, 1, 1]."""
    return logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()[:, None, None]


def scaled_q_and_k(q: Tensor, k: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """(q, k, scale) as a fused attention that knows no cosines takes them: the factor of each head goes into q."""
    if logit_scale is None:
        return q, k, HEAD_DIM**-0.5
    return (F.normalize(q.float(), dim=-1) * factor_of(logit_scale)).to(q.dtype), unit(k), 1.0


def timm_eager(case: Case, device: torch.device) -> Function:
    """timm's `WindowAttention.forward` without the two Linears: of V1, plain branch, or in cosine cases of V2."""
    mask, scale = timm_mask(case, device), HEAD_DIM**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        if logit_scale is None:
            attn = (q * scale) @ k.transpose(-2, -1)
        else:
            attn = (unit(q) @ unit(k).transpose(-2, -1)) * factor_of(logit_scale)
        attn = attn + bias.unsqueeze(0)  # float32 from here, as in autocast: the bias is
        if mask is not None:
            attn = attn.view(-1, mask.shape[0], case.num_heads, case.N, case.N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, case.num_heads, case.N, case.N)
        return attn.softmax(dim=-1).to(v.dtype) @ v

    return in_windows(case, attend)


def timm_sdpa(case: Case, device: torch.device) -> Function:
    """timm's `WindowAttention.forward` of V1 without the two Linears, fused branch."""
    mask = timm_mask(case, device)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, scale = scaled_q_and_k(q, k, logit_scale)
        attn_mask = bias.unsqueeze(0)
        if mask is not None:
            num_win = mask.shape[0]
            shape = (q.shape[0] // num_win, num_win, case.num_heads, case.N, case.N)
            expanded = mask.view(1, num_win, 1, case.N, case.N).expand(shape)
            attn_mask = attn_mask + expanded.reshape(-1, case.num_heads, case.N, case.N)
        # The cast is autocast's: without it q and the mask would differ in dtype.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask.to(q.dtype), scale=scale)

    return in_windows(case, attend)


def flex(case: Case, device: torch.device) -> Function:
    """`flex_attention` with the bias gathered and the regions compared inside the kernel: no mask tensor."""
    size, window, shift = (case.H, case.W), (case.window, case.window), (case.shift, case.shift)
    regions = geometry.region_ids(size, window, shift, device).int()[None, :, :, None]
    regions = geometry.window_partition(regions, window).squeeze(-1)  # nW, N
    num_win = regions.shape[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, scale = scaled_q_and_k(q, k, logit_scale)

        def score_mod(score, b, h, q_idx, kv_idx):
            score = score + bias[h, q_idx, kv_idx]
            if case.shift:
                same = regions[b % num_win, q_idx] == regions[b % num_win, kv_idx]
                score = torch.where(same, score, score + geometry.MASK_VALUE)
            return score

        return flex_attention(q, k, v, score_mod=score_mod, scale=scale)

    return in_windows(case, attend)


def operator(case: Case, impl: str) -> Function:
    """`timm_flashwin.window_attention` of the case by one implementation."""

    def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        return window_attention(
            qkv, case.num_heads, case.window, case.shift, bias, logit_scale=logit_scale, impl=impl
        )  # fmt: skip

    return forward


def flashwin(case: Case, device: torch.device) -> Function:
    """Ours. On a GPU the kernels or an error: never the fallback under the kernels' name."""
    return operator(case, "triton" if device.type == "cuda" else "auto")


def copy_floor(case: Case, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Copy 2C a token: as many bytes as reading 3C and writing C."""
    source = torch.randn(case.B, case.H, case.W, 2 * case.C, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def make_function(provider: str, case: Case, device: torch.device) -> Function:
    """Static shapes for all that is compiled: a kernel for any shape would be slower."""
    makers = {"timm": timm_eager, "timm_eager": timm_eager, "timm_sdpa": timm_sdpa, "flex": flex, "flashwin": flashwin}
    function = makers[provider.removesuffix("_compile")](case, device)
    return torch.compile(function, dynamic=False) if provider.endswith("_compile") else function


# ------------------------------------------------------------------------------------------------------ workload


class Workload:
    """The inputs of one case, dtype and pass, and what providers do with them."""

    def __init__(self, case: Case, dtype_name: str, pass_name: str, device: torch.device):
        self.case, self.dtype_name, self.pass_name, self.device = case, dtype_name, pass_name, device
        self.backward = pass_name == "fwd_bwd"
        self.dtype = DTYPES[dtype_name]
        generator = torch.Generator(device).manual_seed(0)
        like = dict(device=device, generator=generator)
        self.qkv = torch.randn(case.B, case.H, case.W, 3 * case.C, **like).to(self.dtype)
        self.bias = torch.randn(case.num_heads, case.N, case.N, **like)
        self.do = torch.randn(case.B, case.H, case.W, case.C, **like).to(self.dtype)
        self.inputs = [self.qkv, self.bias]
        if case.cosine:  # around timm's initial value
            self.inputs.append(math.log(10.0) + 0.3 * torch.randn(case.num_heads, **like))
        for x in self.inputs:
            x.requires_grad_(self.backward)
        # The first images and the last: an index that overflows does so at the end.
        self.checked = sorted({i % case.B for i in (0, 1, case.B - 2, case.B - 1)})
        self._expected = None

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.dtype_name} {self.pass_name}"

    def run(self, function: Function, do: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is timed: (out,) in pass "fwd", out and the gradients of `inputs` in pass "fwd_bwd"."""
        if not self.backward:
            with torch.no_grad():
                return (function(*self.inputs),)
        out = function(*self.inputs)
        return out, *torch.autograd.grad(out, self.inputs, self.do if do is None else do)

    def expected(self) -> tuple[Tensor, ...]:
        """What `run` returns, of the checked images in float64, from the same rounded inputs; made once."""
        if self._expected is None:
            window, shift = (self.case.window,) * 2, (self.case.shift,) * 2
            rounded = [self.qkv.detach()[self.checked], *(x.detach() for x in self.inputs[1:])]
            inputs = [x.double().requires_grad_(self.backward) for x in rounded]
            qkv, bias, logit_scale = inputs if self.case.cosine else (*inputs, None)
            scale = None if self.case.cosine else HEAD_DIM**-0.5
            out = reference.window_attention(qkv, self.case.num_heads, window, shift, bias, None, scale, logit_scale)
            grads = torch.autograd.grad(out, inputs, self.do[self.checked].double()) if self.backward else ()
            self._expected = (out.detach(), *grads)
        return self._expected

    def errors(self, function: Function) -> dict[str, float]:
        """Relative L2 errors by name; infinite where any image, checked or not, holds something not finite."""
        do = torch.zeros_like(self.do)
        do[self.checked] = self.do[self.checked]
        expected = self.expected()
        self.run(function, do)  # compiles and allocates what stays, so that the next call's memory is the poisoned one
        self._poison()
        actual = self.run(function, do)
        errors = {}
        for name, got, want in zip(("out", "dqkv", "dbias", "dlogit_scale"), actual, expected, strict=False):
            finite = bool(torch.isfinite(got).all())
            got = got[self.checked] if name in ("out", "dqkv") else got
            errors[name] = relative_error(got, want) if finite else float("inf")
        return errors

    def _poison(self) -> None:
        """Leave blocks full of NaN to the allocator: who skips a token must not find an old, right result there."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        shaped = (self.do, self.qkv, self.bias, self.do, self.qkv)
        blocks = [torch.full_like(x, float("nan"), requires_grad=False) for x in shaped]
        del blocks


def are_allowed(errors: dict[str, float], dtype_name: str) -> bool:
    """Whether what `Workload.errors` found is small enough for the dtype; NaN is not."""
    slack = {"dlogit_scale": SCALE_GRAD_SLACK}
    return all(error < TOLERANCE[dtype_name] * slack.get(name, 1) for name, error in errors.items())


def prepare(work: Workload, provider: str, progress: Progress) -> Callable[[], object] | None:
    """The call to time, checked and compiled; None, with the reason printed, where it fails or is wrong."""
    if provider == "copy_floor":
        return copy_floor(work.case, work.device, work.dtype)
    try:
        function = make_function(provider, work.case, work.device)
        errors = work.errors(function)
    except Exception as error:  # whatever it is, it is this provider's, and the others can still be timed
        progress.say(f"{work.name}  {provider}: FAILED, {short_reason(error)}")
        return None
    measured = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not are_allowed(errors, work.dtype_name):
        progress.say(
            f"{work.name}  {provider}: WRONG, {measured}; allowed is {TOLERANCE[work.dtype_name]:.0e}, "
            f"{SCALE_GRAD_SLACK} times that for dlogit_scale"
        )
        return None
    progress.say(f"{work.name}  {provider}: correct, {measured}")
    return lambda: work.run(function)


def benchmark(work: Workload, args: argparse.Namespace, clock, progress: Progress) -> dict[str, Timing]:
    """Check all providers, then time those that are right; copy_floor always, since the others are measured by it."""
    calls = {}
    for provider in dict.fromkeys(["copy_floor", *args.providers]):
        progress.doing(f"{work.name} {provider}")
        call = prepare(work, provider, progress)
        if call is not None:
            calls[provider] = call
        progress.step()
    progress.doing(f"{work.name} timing")
    return interleave(clock, calls, args.repeats, args.warmup, progress.step)


def make_rows(work: Workload, timings: dict[str, Timing], common: dict) -> list[dict]:
    """One row a provider that was measured."""
    floor_ms = timings["copy_floor"].ms * (BACKWARD_FLOOR if work.backward else 1)
    rows = []
    for provider, timing in timings.items():
        if provider == "copy_floor" and work.backward:
            continue
        case = {"case": work.case.name, **dataclasses.asdict(work.case), "num_heads": work.case.num_heads}
        case = {k: case[k] for k in ("case", "B", "H", "W", "C", "num_heads", "window", "shift", "cosine")}
        what = {"dtype": work.dtype_name, "pass": work.pass_name, "provider": provider}
        times = {k: round(v, 5) for k, v in {**timing._asdict(), "floor_ms": floor_ms}.items()}
        rows.append(case | what | times | common)
    return rows


# --------------------------------------------------------------------------------------------------------- table


def summary(rows: list[dict], providers: list[str]) -> str:
    """Milliseconds of every provider, ours against the floor, and ours against the best of the others."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["pass"]), {})[row["provider"]] = row
    columns = [p for p in providers if p != "copy_floor"]
    stock = [p for p in columns if not p.startswith("flashwin")]
    lines = []
    for (case, dtype, pass_name), group in groups.items():
        floor_ms = next(iter(group.values()))["floor_ms"]
        cells = [f"{group[p]['ms']:.3f}" if p in group else "-" for p in columns]
        best = min((group[p] for p in stock if p in group), key=lambda row: row["ms"], default=None)
        ours = group.get("flashwin")
        over_floor = f"{ours['ms'] / floor_ms:.2f}" if ours else "-"
        speed_up = f"{best['ms'] / ours['ms']:.2f}" if ours and best else "-"
        best_name = best["provider"] if best else "-"
        lines.append([case, dtype, pass_name, f"{floor_ms:.3f}", *cells, over_floor, best_name, speed_up])
    header = ["case", "dtype", "pass", "floor", *columns, "flashwin x floor", "best stock", "flashwin speed-up"]
    return format_table(header, lines)


# ------------------------------------------------------------------------------------------------------- command


def is_meant(case: Case, text: str) -> bool:
    """Whether `text` names `case`: as a part of its name, but as a whole name that case alone."""
    return text == case.name if text in (each.name for each in CASES) else text in case.name


def case_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that choose cases and dtypes, and say where they run and where the rows go."""
    parser = argparse.ArgumentParser(
        description=description, epilog="cases: " + ", ".join(case.name for case in CASES)
    )  # fmt: skip
    parser.add_argument(
        "--cases", nargs="+", default=[""], metavar="NAME", help="names, or parts of names; all by default"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--commit", help="what the rows say was measured (default: git's HEAD)")
    parser.add_argument("--device", default="cuda")
    # For trying a script: a case small enough for a CPU.
    parser.add_argument("--shape", nargs=6, type=int, action="append", help=argparse.SUPPRESS)
    parser.add_argument("--cosine", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse_cases(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What a `case_parser` parses, with the cases meant as `selected`."""
    args = parser.parse_args()
    if args.shape:
        args.selected = [Case(*shape, cosine=args.cosine) for shape in args.shape]
    else:
        args.selected = [case for case in CASES if any(is_meant(case, text) for text in args.cases)]
    if not args.selected:
        parser.error(f"no case's name holds any of {', '.join(args.cases)}; {parser.epilog}")
    for case in args.selected:
        if case.C % HEAD_DIM or case.H % case.window or case.W % case.window:
            parser.error(f"{case.name}: C must be a multiple of {HEAD_DIM}, H and W of the window")
    return args


def parse_arguments() -> argparse.Namespace:
    parser = case_parser(__doc__.splitlines()[0])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), metavar="PROVIDER")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--repeats", type=int, default=50, help="timed rounds (default 50)")
    parser.add_argument("--warmup", type=int, default=10, help="rounds before them (default 10)")
    parser.add_argument("--out", type=Path, help="JSON Lines file (default results/<device>/op.jsonl)")
    return parse_cases(parser)


def main() -> int:
    args = parse_arguments()
    device = pick_device(args.device)
    compile_or_raise()
    torch.backends.cuda.matmul.allow_tf32 = True
    out = args.out or default_out(device, "op.jsonl")
    common = provenance(device, args.commit)
    if device.type == "cuda":
        clock = DeviceClock(device)
        print("device time: each sample starts from a flushed L2, behind a sleep that hides the host's launches")
    else:
        clock = HostClock()
    print(f"{common}\nrows go to {out}", flush=True)

    workloads = [(c, d, p) for c in args.selected for d in args.dtypes for p in args.passes]
    per_workload = len(dict.fromkeys(["copy_floor", *args.providers])) + args.warmup + args.repeats
    progress = Progress(len(workloads) * per_workload)
    rows, ours_missing = [], []
    for case, dtype_name, pass_name in workloads:
        work = Workload(case, dtype_name, pass_name, device)
        timings = benchmark(work, args, clock, progress)
        new = make_rows(work, timings, common)
        merge_rows(out, new, KEY)  # case by case: what is measured survives whatever happens next
        rows += new
        ours_missing += [f"{work.name} {p}" for p in args.providers if p.startswith("flashwin") and p not in timings]
        del work, timings
        release_memory(device)
    progress.close()

    print(summary(rows, args.providers))
    if device.type == "cuda":
        print(
            f"sleep before each sample: {clock.sleep_ms:.2f} ms; samples that hold host time all the same: {clock.late}"
        )
    if ours_missing:
        print("flashwin failed or was wrong: " + "; ".join(ours_missing))
    return 1 if ours_missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
