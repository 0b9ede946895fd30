"""The same call again and again, bit for bit (tests/repeats.py)."""

import argparse

import torch
from attacks.rows import write_row
from benchmarking import pick_device
from properties import fixed_cases
from repeats import Repeated, busy_process


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    failed = 0
    for name, case in fixed_cases(device.type).items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float16,):
            repeated = Repeated(case._replace(dtype=dtype))
            differing = {"one by one": repeated.one_by_one(args.repeats)}
            if on_gpu:
                differing["on streams"] = repeated.on_streams(args.repeats)
                with busy_process(str(device)):
                    differing["beside a busy process"] = repeated.one_by_one(args.repeats)
            failed += sum(differing.values())
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            write_row(args, device, "repeat", label, repeats=args.repeats, differing=differing)
    return int(failed > 0)
