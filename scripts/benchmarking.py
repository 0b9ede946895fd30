"""What the benchmark scripts share: clocks, interleaved sampling, error measures, result files, tables, progress."""

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU so far


class Timing(NamedTuple):
    """Median and 20/80 percentiles over the repeats, in milliseconds."""

    ms: float
    ms_p20: float
    ms_p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(samples, dtype=torch.float64).quantile(quantiles).tolist())


# ------------------------------------------------------------------------------------------------------- clocks


class DeviceClock:
    """Device time of one call, from a cold L2, without the host's share.

    A sample queues three things before the call: a write of 256 MiB, which empties the L2 of the inputs; a kernel that
    sleeps; a start event. While the device sleeps the host launches all of the call's kernels, so that the time between
    the events is the device's alone. A sample whose launches took longer than the sleep shows it (the start event is
    over before the host is done); it is taken again after a longer sleep. Every provider gets the same treatment.
    """

    def __init__(self, device: torch.device, sleep_ms: float = 0.5, max_sleep_ms: float = 50.0):
        self.sleep_ms, self.max_sleep_ms = sleep_ms, max_sleep_ms
        self.late = 0  # samples that hold host time, because the longest sleep was not enough
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._cycles_per_ms = self._calibrate()

    def _calibrate(self, cycles: int = 20_000_000) -> float:
        torch.cuda._sleep(cycles)  # the clock rate rises under load: the first one only wakes the device
        return cycles / self._between_events(lambda: torch.cuda._sleep(cycles))[0]

    def _between_events(self, call: Callable[[], object]) -> tuple[float, bool]:
        """(milliseconds on the device, whether the device had to wait for the host)."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        waited = start.query()
        end.synchronize()
        return start.elapsed_time(end), waited

    def __call__(self, call: Callable[[], object]) -> float:
        while True:
            torch.cuda.synchronize()
            self._flush.zero_()
            torch.cuda._sleep(int(self.sleep_ms * self._cycles_per_ms))
            ms, waited = self._between_events(call)
            if not waited:
                return ms
            if self.sleep_ms >= self.max_sleep_ms:
                self.late += 1
                return ms
            self.sleep_ms = min(1.5 * self.sleep_ms, self.max_sleep_ms)


class EndToEndClock:
    """What a user waits for: from an idle device to an idle device, the host's launches included."""

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class HostClock:
    """For devices without events: enough to try the scripts on a CPU, not for results."""

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


def interleave(
    clock: Callable[[Callable[[], object]], float],
    calls: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every call once a round, in a new random order each round, so that drift and neighbours hit all alike."""
    shuffled, order = list(calls), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # a collection inside a sample would be charged to whoever is timed just then
    try:
        for i in range(warmup + repeats):
            order.shuffle(shuffled)
            for name in shuffled:
                ms = clock(calls[name])
                if i >= warmup:
                    samples[name].append(ms)
            after_round()
    finally:
        gc.enable()
    return {name: Timing.of(samples[name]) for name in calls}


# ------------------------------------------------------------------------------------------------------- checks


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite where anything is not finite, so NaN never passes."""
    if not (torch.isfinite(actual).all() and torch.isfinite(expected).all()):
        return float("inf")
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def short_reason(error: Exception, width: int = 300) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:width]


def release_memory(device: torch.device) -> None:
    """Forget what was compiled and hand cached memory back, so that one case does not weigh on the next."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ results


def pick_device(name: str) -> torch.device:
    """The device to run on; raises SystemExit with a hint where it is not there."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("no GPU found; `--device cpu` tries the code path, and its times mean nothing")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # streams, events and memory statistics are those of the current device
    return device


def compile_or_raise() -> None:
    """Past its limit on recompilations dynamo runs a function eagerly: that must not pass for a compiled result."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def default_out(device: torch.device, file_name: str) -> Path:
    """`results/<device>/<file_name>`, e.g. `results/nvidia_h200/op.jsonl`."""
    return ROOT / "results" / device_name(device).lower().replace(" ", "_") / file_name


def provenance(device: torch.device, commit: str | None) -> dict[str, str | None]:
    """What every row says about where it comes from."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "torch": torch.__version__,
        "triton": triton_version,
        "timm": timm.__version__,
        "device": device_name(device),
        "commit": commit or _head_commit(),
    }


def _head_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def merge_rows(path: Path, rows: Iterable[dict], key: Sequence[str]) -> None:
    """Write `rows` into the JSON Lines file `path`: a row with the same `key` fields is replaced, others stay."""
    merged = {}
    if path.exists():
        for line in path.read_text().splitlines():
            if line.strip():
                row = json.loads(line)
                merged[tuple(row[field] for field in key)] = row
    for row in rows:
        merged[tuple(row[field] for field in key)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # replaced in one step: a run that is killed leaves the old file whole
    partial.write_text("".join(json.dumps(row) + "\n" for row in merged.values()))
    os.replace(partial, path)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    def aligned(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join(map(aligned, lines))


class Progress:
    """A bar on stderr, and messages on stdout that leave it whole. In a log file: a line now and then."""

    def __init__(self, total: int):
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(total=total, dynamic_ncols=True, smoothing=0.05, mininterval=0.1 if self._interactive else 30)

    def doing(self, what: str) -> None:
        self._bar.set_description(what, refresh=self._interactive)

    def step(self, steps: int = 1) -> None:
        self._bar.update(steps)

    def say(self, message: str) -> None:
        if self._interactive:
            tqdm.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        self._bar.close()
