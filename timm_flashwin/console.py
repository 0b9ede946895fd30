"""How the commands speak to the user: errors and warnings of one line, and tables."""

import sys
import textwrap
from collections.abc import Iterable, Sequence

PROG = "timm-flashwin"


class CliError(Exception):
    """What the user reads instead of a traceback: one line, and the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def warn(message: str) -> None:
    print(f"{PROG}: warning: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def format_table(rows: Iterable[Sequence[str]], align: str) -> str:
    """Lines with columns as wide as they need, two spaces apart.

    Args:
        rows: The cells of each line, the header's first.
        align: One character a column: "<" for text, ">" for numbers.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
