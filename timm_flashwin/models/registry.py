"""Names in timm's registry: every Swin of timm's has its `<arch>_flashwin` twin, with all its pretrained tags.

A twin is timm's own model, built by timm's own entry point with timm's own weights (the hub ids are written out in the
cfgs below, because timm would complete them with our names), and then accelerated. What it says of itself in its
`pretrained_cfg` is timm's too, the architecture's name included: `timm.models.save_for_hf` and `push_to_hf_hub` write
that name into the config.json, and timm alone, where this package is not installed, has to find it.
"""

import timm
import torch
from timm.layers import is_exportable, is_scriptable
from timm.models import DefaultCfg, generate_default_cfgs, get_arch_pretrained_cfgs, model_entrypoint, register_model
from torch import nn

from ..functional import log_fallback
from .accelerate import accelerate

SUFFIX = "_flashwin"

ALIASES = {
    "swin_tiny_flashwin": "swin_tiny_patch4_window7_224",
    "swin_small_flashwin": "swin_small_patch4_window7_224",
    "swin_base_flashwin": "swin_base_patch4_window7_224",
    "swin_large_flashwin": "swin_large_patch4_window7_224",
    "swin_base_384_flashwin": "swin_base_patch4_window12_384",
    "swin_large_384_flashwin": "swin_large_patch4_window12_384",
    "swinv2_tiny_flashwin": "swinv2_tiny_window16_256",
    "swinv2_small_flashwin": "swinv2_small_window16_256",
    "swinv2_base_flashwin": "swinv2_base_window16_256",
    "swinv2_large_flashwin": "swinv2_large_window12to16_192to256",
}

_MODULES = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")  # of timm.models

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks for the cfgs of this module's names


def flashwin_names() -> dict[str, str]:
    """Registered name -> timm's architecture, short names included."""
    architectures = [arch for module in _MODULES for arch in timm.list_models(module=module)]
    return {arch + SUFFIX: arch for arch in architectures} | ALIASES


def _entrypoint(name: str, arch: str):
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        model = model_entrypoint(arch)(pretrained=pretrained, **kwargs)
        if model.pretrained_cfg["architecture"] in default_cfgs:  # it was given a cfg of ours, as timm's scripts do
            model.pretrained_cfg["architecture"] = arch
        if is_exportable() or is_scriptable():  # asked for at construction, through create_model
            log_fallback("exportable=True or scriptable=True asks for it", "cpu")
        elif any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):  # feature_cls="fx"
            log_fallback("torch.fx traces timm's code", "fx")
        else:
            accelerate(model)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's `{arch}` with its window attention on the kernels."
    return create


def register_all() -> None:
    """Register every name that timm does not know yet."""
    for name, arch in flashwin_names().items():
        if timm.is_model(name):
            continue
        cfgs = get_arch_pretrained_cfgs(arch)
        default_cfgs.update(generate_default_cfgs({name + full[len(arch) :]: cfg for full, cfg in cfgs.items()}))
        globals()[name] = register_model(_entrypoint(name, arch))
