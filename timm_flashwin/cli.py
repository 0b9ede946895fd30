"""The `timm-flashwin` command. torch and timm are imported by the commands that need them."""

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

PROG = "timm-flashwin"


class CliError(Exception):
    """What the user reads instead of a traceback: one line, and the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


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


def resolve_device(name: str):
    """The torch.device of the --device option."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise CliError(f"--device {name} cannot be used: {one_line(error)}") from error
    return device


def one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


# ------------------------------------------------------------------------------------------------------- demo


def demo_command(args: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(resolve_device(args.device))


# --------------------------------------------------------------------------------------------------- classify


def classify_command(args: argparse.Namespace) -> int:
    """Print the top classes of every image."""
    import torch
    from timm.data import create_transform, resolve_model_data_config

    from .demo import implementation

    for path in (*args.images, *filter(None, [args.checkpoint])):
        if not path.is_file():
            raise CliError(f"{path} is no file")
    device = resolve_device(args.device)
    model = create_classifier(args.model, args.pretrained, args.checkpoint).eval().to(device)
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    label = class_labels(model)

    print(f"{args.model}: {model.num_classes} classes, on {device}; {implementation(model)}")
    for path in args.images:
        image = transform(read_image(path, "L" if config["input_size"][0] == 1 else "RGB"))
        with torch.inference_mode():
            probabilities = model(image.unsqueeze(0).to(device)).float().softmax(-1)[0]
        top = probabilities.topk(min(args.top_k, len(probabilities)))
        print(path)
        for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"  {probability:7.2%}  {label(index)}")
    return 0


def create_classifier(name: str, pretrained: bool, checkpoint: Path | None):
    """timm's model of that name with the weights that the user asked for."""
    import timm

    cfg = pretrained_cfg(name)
    if pretrained:
        return fetch_pretrained(name, cfg)
    model = timm.create_model(name)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    else:
        print(
            f"{PROG}: warning: the weights are random, so the classes mean nothing; "
            "pass --pretrained, or --checkpoint FILE",
            file=sys.stderr,
        )
    return model


def pretrained_cfg(name: str):
    """timm's entry for the name's weights, or None where it has none.

    Raises:
        CliError: timm does not know the name, or not the tag behind its dot.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() gives the names"
        raise CliError(f"--model {name} is unknown to timm; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0] + ".*")]
        raise CliError(f"--model {name}: there are no weights of that tag; there are {', '.join(tags)}") from error


def fetch_pretrained(name: str, cfg):
    """Create the model with its weights from the hub, or from the hub client's cache."""
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    if cfg is None or not cfg.has_weights:
        raise CliError(f"--pretrained: timm has no weights for {name}; pass --checkpoint FILE")
    # The first base is the error class of the HTTP client that this version of the hub client is built on (requests,
    # httpx, ...). What is wrong with the network is an OSError in some of them only.
    fetch_errors = (OSError, HfHubHTTPError.__bases__[0])
    try:
        if cfg.hf_hub_id:
            check_hub(cfg.hf_hub_id)
        return timm.create_model(name, pretrained=True)
    except fetch_errors as error:
        raise CliError(
            f"the weights of {name} could not be fetched ({cfg.hf_hub_id or cfg.url}): {one_line(root_cause(error))}; "
            "check the connection, or pass --checkpoint FILE",
            status=1,
        ) from error


def check_hub(hub_id: str) -> None:
    """Ask the hub once for weights that are not in the cache: the download itself would retry for most of a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = hub_id.partition("@")
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repo, file, revision=revision or None), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision or None))
    except EntryNotFoundError:
        pass  # the hub answers, and timm knows other names of files


def root_cause(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def load_checkpoint(model, path: Path) -> None:
    """Load the file strictly; the classifier takes the number of classes that the file has.

    The state dict is read through timm, as in timm's load_checkpoint, so checkpoints of its train.py work, and EMA
    weights come first.
    """
    from timm.models import load_state_dict

    try:
        state_dict = load_state_dict(str(path), weights_only=True)
        weight = state_dict.get(f"{model.pretrained_cfg.get('classifier')}.weight")
        if weight is not None and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
        model.load_state_dict(state_dict)
    except Exception as error:  # a file from anywhere can be wrong in any way
        raise CliError(
            f"--checkpoint {path} cannot be loaded into {type(model).__name__}: {one_line(error)}"
        ) from error


def read_image(path: Path, mode: str):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's formats raise
        raise CliError(f"{path} cannot be read as an image: {one_line(error)}") from error


def class_labels(model) -> Callable[[int], str]:
    """Class index -> what to print: the name where one is known for this number of classes, else the index."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        descriptions = model.pretrained_cfg.get("label_descriptions") or {}
        return lambda index: descriptions.get(names[index], names[index])
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return ImageNetInfo(subset).index_to_description
    return "class {}".format
