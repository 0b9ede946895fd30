"""Search the launch settings of each kernel on this GPU: the rows that timm_flashwin/kernels/settings.py is made of.

    python scripts/tune.py [--cases w12 w16] [--kernels forward_tiled backward_dq] [--rounds 3]

From the settings in force the search goes, kernel by kernel, to the fastest neighbour (one field changed, or two that
belong together), as long as that is faster, for --rounds rounds at most. A candidate counts only if the operator's
output and every gradient are right with it (`benchmark_op.Workload.errors`); what does not compile, needs more than the
GPU has or is wrong is left out, with its reason. Candidates of a round are compiled beforehand, in parallel processes
that fill Triton's cache, and then take turns on the clock, the settings in force among them.

Forward kernels are timed in pass "fwd", backward kernels in pass "fwd_bwd". Every candidate's time goes to
`results/<device>/tune.jsonl`; a row of the same case, dtype, kernel and settings is replaced, others stay.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from benchmark_op import HEAD_DIM, Case, Workload, are_allowed, case_parser, operator, parse_cases
from benchmarking import (
    DeviceClock,
    HostClock,
    Progress,
    Timing,
    default_out,
    format_table,
    interleave,
    merge_rows,
    pick_device,
    provenance,
    release_memory,
    short_reason,
)

from timm_flashwin.kernels import ONE_TILE_AREA, launch, launcher
from timm_flashwin.kernels.settings import KERNELS, Settings, settings_for

REGISTERS = 64 * 1024  # of a multiprocessor, of every GPU that Triton compiles for
GAIN = 0.99  # a neighbour replaces the settings in force if it takes less than this share of their time
KEY = ("case", "dtype", "kernel", *Settings._fields)


def kernels_of(case: Case) -> list[str]:
    """The kernels that serve a case, in the order in which they are tuned."""
    if case.N <= ONE_TILE_AREA:
        return ["forward", "backward"]
    return ["forward_tiled", "backward_dq", "backward_dkdv", "backward_dbias"]


def neighbours(kernel: str, settings: Settings) -> list[Settings]:
    """What differs from `settings` in one field, or in two that belong together."""
    found = []
    if kernel not in ("forward", "backward"):  # the tile of those is the window
        found += [
            settings._replace(block_m=block_m, block_n=block_n)
            for block_m, block_n in itertools.product((32, 64, 128), repeat=2)
        ]
    found += [settings._replace(num_warps=warps) for warps in (2, 4, 8)]
    found += [settings._replace(num_stages=stages) for stages in (1, 2, 3, 4)]
    for programs in range(max(1, settings.programs_per_sm - 2), settings.programs_per_sm + 3):
        share = REGISTERS // (programs * settings.num_warps * 32) // 8 * 8  # registers are given out by eights
        for registers in (None, min(share, 255)):
            found.append(settings._replace(programs_per_sm=programs, max_registers=registers))
    return [candidate for candidate in dict.fromkeys(found) if candidate != settings]


@contextlib.contextmanager
def in_force(kernel: str, settings: Settings) -> Iterator[None]:
    """Launch `kernel` with `settings`, and the others with theirs."""

    def choose(name: str, *shape) -> Settings:
        return settings if name == kernel else settings_for(name, *shape)

    with mock.patch.object(launch, "settings_for", choose):
        launcher.forget()
        try:
            yield
        finally:
            launcher.forget()


def make_workload(case: Case, dtype: str, kernel: str, device: torch.device) -> Workload:
    return Workload(case, dtype, "fwd" if kernel.startswith("forward") else "fwd_bwd", device)


def refusal(work: Workload, kernel: str, settings: Settings) -> str | None:
    """Why the settings cannot be taken; None where they compile, fit and give the right results."""
    try:
        with in_force(kernel, settings):
            errors = work.errors(operator(work.case, "triton"))
    except Exception as error:  # a compiler can fail in any way
        return short_reason(error)
    if are_allowed(errors, work.dtype_name):
        return None
    return f"wrong: {', '.join(f'{name} {error:.1e}' for name, error in errors.items())}"


def compile_candidate(case: Case, dtype: str, kernel: str, settings: Settings, device: str) -> None:
    """Fill Triton's cache, in a process of its own; what fails here fails again, and is reported, in `refusal`."""
    work = make_workload(case, dtype, kernel, pick_device(device))
    with contextlib.suppress(Exception), in_force(kernel, settings):
        work.run(operator(case, "triton"))


def tune_kernel(work: Workload, kernel: str, args: argparse.Namespace, clock, pool, progress: Progress):
    """Search from the settings in force.

    Returns:
        (settings in force, settings found, {settings: their last Timing}).
    """
    case = work.case
    start = best = settings_for(kernel, case.N, HEAD_DIM, work.dtype, case.cosine, work.device)
    timings: dict[Settings, Timing] = {}
    for _ in range(args.rounds):
        candidates = [s for s in neighbours(kernel, best) if s not in timings]
        if not candidates:
            break
        progress.doing(f"{work.name} {kernel}: {len(candidates)} candidates")
        if pool is not None:
            jobs = [
                pool.submit(compile_candidate, case, work.dtype_name, kernel, candidate, args.device)
                for candidate in candidates
            ]
            for job in jobs:
                job.result()
        calls = {}
        for settings in (best, *candidates):
            reason = refusal(work, kernel, settings)
            if reason is None:
                calls[settings] = lambda settings=settings: run_with(work, kernel, settings)
            else:
                progress.say(f"{work.name}  {kernel} {describe(settings)}: left out, {reason}")
        new = interleave(clock, calls, args.repeats, args.warmup)
        timings |= new
        progress.step()
        fastest = min(new, key=lambda settings: new[settings].ms)
        if fastest == best or new[fastest].ms > GAIN * new[best].ms:
            break
        best = fastest
    return start, best, timings


def run_with(work: Workload, kernel: str, settings: Settings) -> None:
    with in_force(kernel, settings):
        work.run(operator(work.case, "triton"))


def describe(settings: Settings) -> str:
    return f"Settings({', '.join(f'{name}={value}' for name, value in settings._asdict().items())})"


def parse_arguments() -> argparse.Namespace:
    parser = case_parser(__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL")
    parser.add_argument("--rounds", type=int, default=3, help="steps of the search for each kernel (default 3)")
    parser.add_argument("--repeats", type=int, default=20, help="timed turns of a candidate (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="turns before them (default 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: all cores)")
    parser.add_argument("--out", type=Path, help="JSON Lines file (default results/<device>/tune.jsonl)")
    return parse_cases(parser)


def main() -> int:
    args = parse_arguments()
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    out = args.out or default_out(device, "tune.jsonl")
    common = provenance(device, args.commit)
    on_gpu = device.type == "cuda"
    clock = DeviceClock(device) if on_gpu else HostClock()
    searches = [
        (case, dtype, kernel)
        for case in args.selected
        for dtype in args.dtypes
        for kernel in kernels_of(case)
        if kernel in args.kernels
    ]
    progress = Progress(len(searches) * args.rounds)
    lines = []
    with contextlib.ExitStack() as stack:
        pool = None
        if on_gpu:  # the interpreter compiles nothing
            spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, mp_context=spawn))
        for case, dtype, kernel in searches:
            work = make_workload(case, dtype, kernel, device)
            start, best, timings = tune_kernel(work, kernel, args, clock, pool, progress)
            what = {"case": case.name, "dtype": dtype, "pass": work.pass_name, "kernel": kernel}
            rows = [
                what | s._asdict() | {k: round(v, 5) for k, v in timing._asdict().items()} | common
                for s, timing in timings.items()
            ]
            merge_rows(out, rows, KEY)  # search by search: what is measured survives whatever happens next
            if timings:
                times = [f"{timings[s].ms:.4f}" if s in timings else "-" for s in (start, best)]
                lines.append([f"{case.name} {dtype}", kernel, *times, describe(best)])
            del work
            release_memory(device)
    progress.close()
    print(format_table(["case", "kernel", "in force, ms", "found, ms", "settings found"], lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
