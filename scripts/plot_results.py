"""Draw the measured rows: the operator's time over its floor, ours beside every peer's, by case.

    python scripts/plot_results.py [--results results/nvidia_h200] [--dtype bf16]

Reads `op.jsonl` and writes `op.png` into the same folder. Needs the extra `plots` (matplotlib). The picture has no
background of its own, and greys and hues that are readable on white and on black.
"""

import argparse
import json
from pathlib import Path

from benchmark_op import CASES, PASSES
from benchmarking import ROOT
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

GREY = "#808080"
STYLES = {  # provider -> label, marker, colour; ours last, so that it lies on top
    "timm_eager": ("timm, eager", "o", "#b0a18f"),
    "timm_sdpa": ("timm with SDPA", "s", "#b0a18f"),
    "timm_compile": ("timm, compiled", "o", "#3f8fd2"),
    "timm_sdpa_compile": ("timm with SDPA, compiled", "s", "#3f8fd2"),
    "flex_compile": ("FlexAttention, compiled", "^", "#9467bd"),
    "flashwin": ("flashwin", "D", "#e8590c"),
}
PANELS = dict(zip(PASSES, ("forward", "forward + backward"), strict=True))


def read_rows(path: Path, dtype: str) -> dict[tuple[str, str, str], dict]:
    """(case, pass, provider) -> row."""
    if not path.is_file():
        raise SystemExit(f"there is no {path}; scripts/benchmark_op.py measures it")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["case"], row["pass"], row["provider"]): row for row in rows if row["dtype"] == dtype}
    if not found:
        raise SystemExit(f"{path} has no rows of {dtype}")
    return found


def label(case) -> str:
    kind = f"window {case.window}" + (f", shift {case.shift}" if case.shift else "") + (", cosine" * case.cosine)
    return f"{case.B} x {case.H}x{case.W} x {case.C}\n{kind}"


def plot_operator(rows: dict[tuple[str, str, str], dict], path: Path) -> None:
    """One row a case, one panel a pass; the floor is 1."""
    cases = [case for case in CASES if any((case.name, pass_name, "flashwin") in rows for pass_name in PANELS)]
    figure, axes = plt.subplots(1, len(PANELS), sharey=True, figsize=(11, 0.5 * len(cases) + 1.5))
    for ax, (pass_name, title) in zip(axes, PANELS.items(), strict=True):
        for provider, (name, marker, colour) in STYLES.items():
            measured = [
                (rows[key]["ms"] / rows[key]["floor_ms"], y)
                for y, case in enumerate(cases)
                if (key := (case.name, pass_name, provider)) in rows
            ]
            if measured:
                ax.scatter(*zip(*measured, strict=True), marker=marker, c=colour, s=42, label=name)
        ax.axvline(1, color=GREY, linewidth=1)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_title(title, color=GREY)
        ax.set_xlabel("time / floor (a device copy of the same bytes)", color=GREY)
        ax.grid(axis="x", color=GREY, alpha=0.3)
        ax.tick_params(colors=GREY)
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks(range(len(cases)), [label(case) for case in cases], fontsize=8)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False, labelcolor=GREY, fontsize=8)
    device, versions = next((row["device"], row) for row in rows.values())
    figure.suptitle(f"{device}, torch {versions['torch']}, triton {versions['triton']}", color=GREY, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150, transparent=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "nvidia_h200", metavar="DIR")
    parser.add_argument("--dtype", default="bf16")
    args = parser.parse_args()
    path = args.results / "op.png"
    plot_operator(read_rows(args.results / "op.jsonl", args.dtype), path)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
