"""The `timm-flashwin` command: its parsers. Each command is a module of its own, imported when it runs."""

import argparse
import sys
from pathlib import Path

from .console import PROG, CliError, one_line


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if the command failed, 2 if what it was given is wrong."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CliError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return error.status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="timm's Swin Transformers on fused window attention")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="classify the images that ship with the package, by timm's model and by its twin"
    )
    add_device_option(demo)
    demo.set_defaults(run=demo_command)

    classify = commands.add_parser("classify", help="print the most likely classes of images")
    classify.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    classify.add_argument(
        "--model", default="swin_base_flashwin", metavar="NAME", help="any name in timm's registry (%(default)s)"
    )
    weights = classify.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights: .safetensors, or .pth of timm's")
    weights.add_argument("--pretrained", action="store_true", help="weights: those that timm has on the hub")
    add_device_option(classify)
    classify.add_argument("--top-k", type=positive_int, default=5, metavar="K", help="classes per image (%(default)s)")
    classify.set_defaults(run=classify_command)

    models = commands.add_parser("models", help="list the names, timm's model behind each, and its pretrained tags")
    models.add_argument(
        "filter", nargs="?", default="*", metavar="FILTER", help="a glob on the name or on timm's, as 'swinv2_*'"
    )
    models.set_defaults(run=models_command)

    parity = commands.add_parser(
        "parity", help="top-1, top-5, logits and speed of timm's model and of its twin on labelled images"
    )
    parity.add_argument(
        "--model",
        default="swin_base_flashwin",
        metavar="NAME",
        help="timm's name of a Swin, or the twin's; both are evaluated (%(default)s)",
    )
    parity.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="images in one folder a class, as ImageNet's val"
    )
    weights = parity.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights: .safetensors, or .pth of timm's")
    weights.add_argument(
        "--pretrained", action="store_true", help="weights: those that timm has on the hub (the default)"
    )
    parity.add_argument("--amp", action="store_true", help="autocast, as in timm's validate.py; otherwise float32")
    parity.add_argument("--amp-dtype", choices=("float16", "bfloat16"), help="of --amp (float16, as timm's)")
    parity.add_argument("--batch-size", type=positive_int, default=128, metavar="N", help="images (%(default)s)")
    parity.add_argument(
        "--workers", type=count, default=4, metavar="N", help="processes that load images (%(default)s)"
    )
    add_device_option(parity)
    parity.add_argument(
        "--tolerance",
        type=percentage_points,
        default=0.1,
        metavar="PP",
        help="exit with status 1 if top-1 differs by more percentage points (%(default)s)",
    )
    parity.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parity.add_argument("--csv", type=Path, metavar="FILE", help="write the result as CSV, a header and a row")
    parity.set_defaults(run=parity_command)

    doctor = commands.add_parser(
        "doctor", help="versions, what runs on the kernels here, how exact it is beside timm's, and how fast"
    )
    add_device_option(doctor)
    doctor.set_defaults(run=doctor_command)

    run = commands.add_parser(
        "run",
        help="run a script, such as timm's validate.py, with the *_flashwin names registered",
        usage=f"{PROG} run [-h] SCRIPT [ARGUMENT ...]",
        description="Run SCRIPT as `python SCRIPT ARGUMENT ...` does, with the *_flashwin names registered in it and "
        "in the workers that it spawns. Everything behind SCRIPT is the script's own.",
    )
    # One list for both: argparse would take a "--" behind a positional of its own out of the script's arguments.
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGUMENT ...]", help=argparse.SUPPRESS)
    run.set_defaults(run=run_command)
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; "auto": CUDA where there is one'
    )


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def percentage_points(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 100")
    return number


def resolve_device(name: str):
    """The torch.device of the --device option."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # which a device without memory, such as meta, refuses
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise CliError(f"--device {name} cannot be used: {one_line(error)}") from error
    return device


def demo_command(args: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(resolve_device(args.device))


def classify_command(args: argparse.Namespace) -> int:
    from .classify import run_classify

    device = resolve_device(args.device)
    return run_classify(args.images, args.model, args.pretrained, args.checkpoint, args.top_k, device)


def run_command(args: argparse.Namespace) -> int:
    from .run import run_script

    if not args.command:
        raise CliError("run needs the path of a script, e.g. `timm-flashwin run validate.py --help`")
    run_script(args.command[0], args.command[1:])
    return 0


def models_command(args: argparse.Namespace) -> int:
    from .catalogue import run_models

    return run_models(args.filter)


def parity_command(args: argparse.Namespace) -> int:
    import torch

    from .parity import run_parity

    if args.amp_dtype and not args.amp:
        raise CliError(f"--amp-dtype {args.amp_dtype} is given without --amp; add --amp, or leave it out for float32")
    return run_parity(
        args.model,
        args.data_dir,
        checkpoint=args.checkpoint,
        amp_dtype=getattr(torch, args.amp_dtype or "float16") if args.amp else None,
        batch_size=args.batch_size,
        workers=args.workers,
        device=resolve_device(args.device),
        tolerance=args.tolerance,
        json_path=args.json,
        csv_path=args.csv,
    )


def doctor_command(args: argparse.Namespace) -> int:
    from .doctor import run_doctor

    return run_doctor(resolve_device(args.device))
