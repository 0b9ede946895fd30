"""Thousands of calls, drawn at random: output and every gradient against float64 (tests/properties.py)."""

import argparse
import collections
import warnings

from attacks.rows import write_row
from benchmarking import Progress, pick_device
from hypothesis import HealthCheck, Phase, given, seed, settings
from properties import cases, check

SHOWN = 20  # failures that a row quotes


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, in the interpreter: infinities are meant
    counts, failures = collections.Counter(), []
    progress = Progress(args.cases)

    @seed(args.seed)
    @settings(
        max_examples=args.cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases(device.type))
    def attack(case):
        progress.step()
        counts.update(["cases", f"{case.function} {case.impl}", str(case.dtype).removeprefix("torch.")])
        try:
            counts["judged by the terms"] += bool(check(case))
        except Exception as error:  # collected, so that the first failure does not hide the others
            failures.append(f"{type(error).__name__}: {error} in {case!r}")
            progress.say(f"FAILED {failures[-1]}")

    attack()
    progress.close()
    # hypothesis stops where it runs out of new cases.
    row = dict(case=f"seed {args.seed}", cases=counts.pop("cases"), failed=len(failures), failures=failures[:SHOWN])
    write_row(args, device, "properties", **row, counts=dict(sorted(counts.items())))
    return int(bool(failures))
