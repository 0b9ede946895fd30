"""compute-sanitizer over a small call through each kernel: memory errors, races, reads of what nobody wrote."""

import argparse
import os
import shutil
import subprocess
import sys

from attacks.rows import write_row
from benchmarking import pick_device

ERROR_STATUS = 86  # what the sanitizer is told to exit with, apart from what the calls themselves may exit with
LAST_LINES = 20  # of the sanitizer's report, in a row that says it failed
# Our calls alone, without the judge, and with outputs left as torch.empty gives them: a poisoned one counts as written.
CALLS = """
import torch
from timm_flashwin import ops
from properties import fixed_cases, make_inputs, ours_of, run
for case in fixed_cases({device!r}).values():
    inputs, mask, do = make_inputs(case)
    for result in run(ours_of(case, mask), inputs, do).values():
        assert result.isfinite().all()
device = torch.device({device!r})
if ops.linear_gelu_limits(device, torch.bfloat16):
    operands = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((5000, 200), (2048, 200), 2048)]
    assert ops.linear_gelu(*operands).isfinite().all()
"""


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not on PATH; it comes with the CUDA toolkit (its bin folder)")
    # Without PyTorch's cache each tensor is an allocation of its own, whose ends the sanitizer knows.
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTHONPATH=os.pathsep.join(sys.path))
    failed = 0
    for tool in args.tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS)]
        command += [sys.executable, "-c", CALLS.format(device=device.type)]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = {0: "nothing", ERROR_STATUS: "errors"}.get(result.returncode, f"exit status {result.returncode}")
        report = result.stdout.splitlines()[-LAST_LINES:] if result.returncode else []
        write_row(args, device, "sanitize", tool, found=found, report=report)
        failed += result.returncode != 0
    return int(failed > 0)
