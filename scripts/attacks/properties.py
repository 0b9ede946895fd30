"""Thousands of calls, drawn at random: output and every gradient against float64 (tests/properties.py)."""

import argparse
import collections
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from attacks.rows import write_row
from benchmarking import Progress, pick_device
from hypothesis import HealthCheck, Phase, given, seed, settings
from properties import cases, check

SHOWN = 20  # failures that a row quotes
PORTION = 100  # cases drawn from one seed, by one process


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    counts, failures = collections.Counter(), []
    progress = Progress(args.cases)
    # Spawned: a process that was forked from one with a CUDA context cannot have its own.
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        portions = [
            pool.submit(attack, str(device), f"{args.seed}.{first}", min(PORTION, args.cases - first))
            for first in range(0, args.cases, PORTION)
        ]
        for portion in as_completed(portions):
            counted, failed = portion.result()
            counts += counted
            failures += failed
            progress.step(counted["cases"])
            for failure in failed:
                progress.say(f"FAILED {failure}")
    progress.close()
    # hypothesis stops where it runs out of new cases.
    row = dict(case=f"seed {args.seed}", cases=counts.pop("cases"), failed=len(failures), failures=failures[:SHOWN])
    write_row(args, device, "properties", **row, counts=dict(sorted(counts.items())))
    return int(bool(failures))


def attack(device: str, portion_seed: str, most: int) -> tuple[collections.Counter, list[str]]:
    """Draw and check up to `most` cases: what they were, and what failed."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, in the interpreter: infinities are meant
    counts, failures = collections.Counter(), []

    @seed(portion_seed)
    @settings(
        max_examples=most,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases(device.split(":")[0]))
    def attack_with(case):
        case = case._replace(device=device)
        counts.update(["cases", f"{case.function} {case.impl}", str(case.dtype).removeprefix("torch.")])
        try:
            counts["judged by the terms"] += bool(check(case))
        except Exception as error:  # collected, so that the first failure does not hide the others
            failures.append(f"{type(error).__name__}: {error} in {case!r}")

    attack_with()
    return counts, failures
