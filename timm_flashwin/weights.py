"""timm's model of a name, with weights from the hub or from a file, and one line about what is wrong with them."""

import difflib
from pathlib import Path

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

from .console import CliError, one_line


def create_model(name: str, pretrained: bool, checkpoint: Path | None) -> nn.Module:
    """timm's model of that name with the weights that the user asked for, or random ones where it is neither.

    Raises:
        CliError: timm does not know the name, or the weights cannot be had or do not fit.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise CliError(f"--checkpoint {checkpoint} is no file")
    cfg = pretrained_cfg(name)
    if pretrained:
        return fetch_pretrained(name, cfg)
    model = timm.create_model(name)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def pretrained_cfg(name: str):
    """timm's entry for the name's weights, or None where it has none.

    Raises:
        CliError: timm does not know the name, or not the tag behind its dot.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() gives the names"
        raise CliError(f"--model {name} is unknown to timm; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0] + ".*")]
        raise CliError(f"--model {name}: there are no weights of that tag; there are {', '.join(tags)}") from error


def fetch_pretrained(name: str, cfg) -> nn.Module:
    """Create the model with its weights from the hub, or from the hub client's cache."""
    if cfg is None or not cfg.has_weights:
        raise CliError(f"--pretrained: timm has no weights for {name}; pass --checkpoint FILE")
    # The first base is the error class of the HTTP client that this version of the hub client is built on (requests,
    # httpx, ...). What is wrong with the network is an OSError in some of them only.
    fetch_errors = (OSError, HfHubHTTPError.__bases__[0])
    try:
        if cfg.hf_hub_id:
            check_hub(cfg.hf_hub_id)
        return timm.create_model(name, pretrained=True)
    except SafetensorError as error:
        raise CliError(
            f"the weights of {name} in the hub client's cache are damaged: {one_line(error)}; "
            f"delete {HF_HUB_CACHE} or what it has of {cfg.hf_hub_id}, or pass --checkpoint FILE",
            status=1,
        ) from error
    except fetch_errors as error:
        raise CliError(
            f"the weights of {name} could not be fetched ({cfg.hf_hub_id or cfg.url}): {one_line(root_cause(error))}; "
            "check the connection, or pass --checkpoint FILE",
            status=1,
        ) from error


def check_hub(hub_id: str) -> None:
    """Ask the hub once for weights that are not in the cache: the download itself would retry for most of a minute."""
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


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load the file strictly; the classifier takes the number of classes that the file has.

    The state dict is read through timm, as in timm's load_checkpoint, so checkpoints of its train.py work, and EMA
    weights come first.
    """
    try:
        state_dict = load_state_dict(str(path), weights_only=True)
        weight = state_dict.get(f"{model.pretrained_cfg.get('classifier')}.weight")
        if weight is not None and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
        model.load_state_dict(state_dict)
    except Exception as error:  # a file from anywhere can be wrong in any way
        raise CliError(
            f"--checkpoint {path} cannot be loaded into {type(model).__name__}: "
            f"{type(error).__name__}: {one_line(error)}; it has to be .safetensors, or a .pth of such a state dict"
        ) from error
