"""The same call again and again, bit for bit: one after the other, on several streams at once, beside a busy process.

Used by test_repeatability.py and, at length, by `scripts/attack.py repeat`.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import torch
from properties import Case, make_inputs, ours_of, run

STREAMS = 4
BUSY = """
import torch
a = torch.randn(4096, 4096, device={device!r}, dtype=torch.float16)
print("ready", flush=True)
while True:
    for _ in range(100):
        a = (a @ a).clamp(-1, 1)
    torch.cuda.synchronize()
"""


class Repeated:
    """A call, its first results, and how many of later ones are others."""

    def __init__(self, case: Case):
        self.case = case
        self.inputs, mask, self.do = make_inputs(case)
        self.call = ours_of(case, mask)
        self.first = self._results()

    def _results(self) -> dict[str, torch.Tensor]:
        return run(self.call, self.inputs, self.do)

    def _differ(self, results: dict[str, torch.Tensor]) -> bool:
        return not all(torch.equal(results[name], first) for name, first in self.first.items())

    def one_by_one(self, repeats: int) -> int:
        differing = 0
        for i in range(repeats):
            self._leave_garbage(float(i % 2))
            differing += self._differ(self._results())
        return differing

    def _leave_garbage(self, value: float) -> None:
        """Fill memory that the next call will be given: what it leaves unwritten is not the same by luck."""
        for tensor in [torch.empty_like(x) for x in self.first.values() for _ in range(3)]:
            tensor.fill_(value)

    def on_streams(self, repeats: int) -> int:
        """Calls that are queued on several streams before the first of them is awaited."""
        streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        differing = 0
        for _ in range(0, repeats, STREAMS):
            torch.cuda.synchronize()
            results = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(self._results())
            torch.cuda.synchronize()
            differing += sum(map(self._differ, results))
        return differing


@contextlib.contextmanager
def busy_process(device: str) -> Iterator[None]:
    """A second process that multiplies matrices on the device all the time."""
    process = subprocess.Popen([sys.executable, "-c", BUSY.format(device=device)], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the process that was to keep the device busy did not start")
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
