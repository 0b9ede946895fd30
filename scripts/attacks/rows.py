"""Where the attacks write what they found."""

import argparse

import torch
from benchmarking import default_out, merge_rows, provenance


def write_row(args: argparse.Namespace, device: torch.device, attack: str, case: str, **found) -> None:
    """Print a row, and put it into `results/<device>/trust.jsonl` (or --out) in the place of an older one of `case`."""
    row = dict(attack=attack, case=case, **found, **provenance(device, args.commit))
    path = args.out or default_out(device, "trust.jsonl")
    merge_rows(path, [row], key=("attack", "case"))
    print(", ".join(f"{name}: {value}" for name, value in row.items()))
