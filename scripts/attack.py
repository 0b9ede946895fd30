"""Attacks on the kernels that are too long for the tests. Each is one command, and leaves rows in
`results/<device>/trust.jsonl`: what was tried, how often, and what failed.

    python scripts/attack.py properties --cases 10000     calls that hypothesis draws, against float64
    python scripts/attack.py repeat                       the same call again and again, on several streams, under load
    python scripts/attack.py leak                         memory over thousands of steps
    python scripts/attack.py soak                         AMP training beside timm's model from the same start
    python scripts/attack.py sanitize                     compute-sanitizer over a few shapes

The exit status is 1 if anything failed. On a CPU the kernels run in Triton's interpreter, for small counts.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path


def main() -> int:
    args = parse_args()
    if args.device.split(":")[0] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # has to be set before anything imports triton
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the judge and the strategies
    return importlib.import_module(f"attacks.{args.attack}").run(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu (%(default)s)")
    common.add_argument("--out", type=Path, help="the .jsonl file (results/<device>/trust.jsonl)")
    common.add_argument("--commit", help="what the rows name; by default the checkout's HEAD")
    attacks = parser.add_subparsers(dest="attack", required=True, metavar="ATTACK")

    properties = attacks.add_parser("properties", parents=[common], help="calls that hypothesis draws")
    properties.add_argument("--cases", type=positive_int, default=2000, metavar="N", help="(%(default)s)")
    properties.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    properties.add_argument("--processes", type=positive_int, default=1, metavar="N", help="(%(default)s)")
    properties.add_argument("--minutes", type=positive_int, metavar="N", help="begin nothing after so long (no limit)")

    repeat = attacks.add_parser("repeat", parents=[common], help="one call again and again, bit for bit")
    repeat.add_argument("--repeats", type=positive_int, default=250, metavar="N", help="(%(default)s)")

    leak = attacks.add_parser("leak", parents=[common], help="memory over many steps")
    leak.add_argument("--steps", type=positive_int, default=2000, metavar="N", help="(%(default)s)")

    soak = attacks.add_parser("soak", parents=[common], help="AMP training beside timm's model")
    soak.add_argument("--steps", type=positive_int, default=3000, metavar="N", help="(%(default)s)")
    soak.add_argument("--batch-size", type=positive_int, default=128, metavar="N", help="(%(default)s)")
    soak.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    soak.add_argument("--families", nargs="+", default=["V1", "V2"], choices=["V1", "V2"], help="(V1 V2)")
    soak.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16"], help="(both; on a CPU float16)")
    soak.add_argument("--data-dir", type=Path, help="as in scripts/train_demo.py")

    sanitize = attacks.add_parser("sanitize", parents=[common], help="compute-sanitizer over a few shapes")
    sanitize.add_argument("--tools", nargs="+", default=["memcheck", "racecheck", "initcheck"], metavar="TOOL")
    return parser.parse_args()


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


if __name__ == "__main__":
    sys.exit(main())
