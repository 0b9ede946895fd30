"""The models command: the names that the import registers, and where their weights come from."""

from fnmatch import fnmatchcase

import timm

from .console import CliError, format_table
from .models.registry import flashwin_names


def run_models(pattern: str) -> int:
    """Print every name with its timm twin and its pretrained tags, the default tag first.

    Args:
        pattern: A glob; a line is printed where the name or timm's matches it.

    Returns:
        The exit status, 0.

    Raises:
        CliError: Nothing matches.
    """
    rows = [
        (name, arch, ", ".join(pretrained_tags(name)) or "-")
        for name, arch in sorted(flashwin_names().items())
        if fnmatchcase(name, pattern) or fnmatchcase(arch, pattern)
    ]
    if not rows:
        raise CliError(f"no name matches {pattern!r}; it is a glob, such as 'swinv2_*' or '*384*'")
    print(format_table([("name", "timm's model", "pretrained tags"), *rows], "<<<"))
    return 0


def pretrained_tags(name: str) -> list[str]:
    """The tags that timm has weights of, its default first."""
    tags = [full.partition(".")[2] for full in timm.list_pretrained(name + ".*")]
    default = timm.get_pretrained_cfg(name).tag
    return sorted(tags, key=lambda tag: tag != default)
