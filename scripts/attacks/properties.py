"""Thousands of calls, drawn at random: output and every gradient against float64 (tests/properties.py)."""

import argparse
import collections
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from attacks.rows import write_row
from benchmarking import Progress, pick_device
from hypothesis import HealthCheck, Phase, given, seed, settings
from properties import calls_alike, cases, check

SHOWN = 20  # failures that a row quotes
PORTION = 100  # cases drawn from one seed, by one process
# On a GPU it is the compiler that takes the time: there each drawn case comes with calls that need no other kernels.
ALIKE = {"cuda": 10, "cpu": 1}


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
        try:
            for portion in as_completed(portions, timeout=args.minutes and 60 * args.minutes):
                counted, failed = portion.result()
                counts += counted
                failures += failed
                progress.step(counted["cases"])
                for failure in failed:
                    progress.say(f"FAILED {failure}")
        except TimeoutError:
            pool.shutdown(cancel_futures=True)
    progress.close()
    # hypothesis stops where it runs out of new cases.
    row = dict(case=f"seed {args.seed}", cases=counts.pop("cases"), failed=len(failures), failures=failures[:SHOWN])
    write_row(args, device, "properties", **row, counts=dict(sorted(counts.items())))
    return int(bool(failures))


def attack(device: str, portion_seed: str, most: int) -> tuple[collections.Counter, list[str]]:
    """Draw and check up to `most` cases: what they were, and what failed."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, in the interpreter: infinities are meant
    counts, failures = collections.Counter(), []
    kind = device.split(":")[0]
    alike = min(ALIKE[kind], most)

    @seed(portion_seed)
    @settings(
        max_examples=most // alike,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases(kind).flatmap(lambda case: calls_alike(case, alike)))
    def attack_with(calls):
        counts["drawn apart"] += 1
        for case in calls:
            case = case._replace(device=device)
            counts.update(["cases", f"{case.function} {case.impl}", str(case.dtype).removeprefix("torch.")])
            try:
                counts["judged by the terms"] += bool(check(case))
            except Exception as error:  # collected, so that the first failure does not hide the others
                failures.append(f"{type(error).__name__}: {error} in {case!r}")

    attack_with()
    return counts, failures
