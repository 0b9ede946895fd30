"""Memory over many steps of forward and backward: its high-water mark has to be flat once every shape has been seen."""

import argparse
import gc
import itertools

import torch
from attacks.rows import write_row
from benchmarking import Progress, pick_device
from properties import fixed_cases, make_inputs, ours_of
from properties import run as run_case


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    calls = []
    for case in fixed_cases(device.type).values():
        inputs, mask, do = make_inputs(case)
        calls.append((ours_of(case, mask), inputs, do))

    for call in calls:  # compile, and let caches fill
        run_case(*call)
    high_water(device)
    for call in calls:
        run_case(*call)
    before = high_water(device)
    progress = Progress(args.steps)
    for call in itertools.islice(itertools.cycle(calls), args.steps):
        run_case(*call)
        progress.step()
    progress.close()
    growth = high_water(device) - before
    write_row(args, device, "leak", "operator", steps=args.steps, high_water_bytes=before, growth_bytes=growth)
    return int(growth > 0)


def high_water(device: torch.device) -> int:
    """The most bytes that were allocated since the last time; without such a count, what live tensors hold."""
    gc.collect()
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    storages = {x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
