"""Put an existing timm model on the kernels, and take it off again."""

from dataclasses import dataclass, field

from timm.layers import Mlp
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import nn

from ..functional import IMPLEMENTATIONS
from .dispatch import FlashAttention
from .mlp import FlashMlp
from .patch_embed import FlashPatchProjection, is_patch_projection, patch_projection
from .snapshot import forget
from .swin import FlashSwinTransformerBlock, FlashWindowAttention
from .swin_v2 import FlashSwinTransformerV2Block, FlashSwinV2WindowAttention
from .swin_v2_cr import FlashSwinTransformerV2CrBlock, FlashSwinV2CrWindowAttention

_FLASH_OF = {
    swin_transformer.WindowAttention: FlashWindowAttention,
    swin_transformer.SwinTransformerBlock: FlashSwinTransformerBlock,
    swin_transformer_v2.WindowAttention: FlashSwinV2WindowAttention,
    swin_transformer_v2.SwinTransformerV2Block: FlashSwinTransformerV2Block,
    swin_transformer_v2_cr.WindowMultiHeadAttention: FlashSwinV2CrWindowAttention,
    swin_transformer_v2_cr.SwinTransformerV2CrBlock: FlashSwinTransformerV2CrBlock,
}
# An MLP only inside of a block, a convolution only as the patch projection of a model.
_TIMM_OF = {flash: stock for stock, flash in _FLASH_OF.items()} | {FlashMlp: Mlp, FlashPatchProjection: nn.Conv2d}
_MODULES = ", ".join(dict.fromkeys(stock.__module__ for stock in _FLASH_OF))


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate` did, by qualified module name."""

    replaced: dict[str, str] = field(default_factory=dict)  # name -> class it has now
    already: dict[str, str] = field(default_factory=dict)  # name -> class it had before the call
    skipped: dict[str, str] = field(default_factory=dict)  # name -> why it stayed as it was

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} modules replaced, {len(self.already)} already there, {len(self.skipped)} skipped"
        ]
        lines += [f"  {name}: {cls}" for name, cls in self.replaced.items()]
        lines += [f"  {name}: already {cls}" for name, cls in self.already.items()]
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, impl: str = "auto") -> AccelerateReport:
    """Put every timm Swin attention in `model` on the kernels, with the block around it, in place.

    The patch embedding of a whole model becomes a Linear in inference.

    The modules change their class and nothing else: parameters, buffers, hooks, device, training mode and
    gradient-checkpointing flags are untouched, and the state dict keeps its keys. Subclasses of timm's modules are left
    alone, since their own behaviour cannot be known. A model that is accelerated already takes the new `impl`.

    Args:
        model: A timm Swin V1, S3, V2 or V2-CR, or any module that holds one.
        impl: As in `timm_flashwin.window_attention`.

    Returns:
        What was replaced, what had been before, and what was left alone and why.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `impl` is unknown, or there is nothing to replace.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; allowed are {', '.join(map(repr, IMPLEMENTATIONS))}")
    report = AccelerateReport()
    # Collected first: a wrapper that reacts to attribute changes must not see a half-walked model.
    for name, module in list(model.named_modules()):
        stock = type(module)
        if stock in _FLASH_OF:
            attention = getattr(module, "attn", None)  # blocks have one
            if attention is not None and type(attention) not in (*_FLASH_OF, *_TIMM_OF):
                report.skipped[name] = f"its attention is a {type(attention).__name__}"
                continue
            module.__class__ = _FLASH_OF[stock]
            report.replaced[name] = type(module).__name__
        elif isinstance(module, tuple(_TIMM_OF)) and name not in report.replaced:  # as an MLP is with its block
            report.already[name] = stock.__name__
        elif isinstance(module, tuple(_FLASH_OF)):
            report.skipped[name] = f"{stock.__name__} is a subclass of timm's with a behaviour of its own"
        if type(module) in _TIMM_OF and type(getattr(module, "mlp", None)) is Mlp:
            module.mlp.__class__ = FlashMlp
            report.replaced[f"{name}.mlp".lstrip(".")] = FlashMlp.__name__
            _set_impl(module.mlp, impl)
        if isinstance(module, (FlashAttention, FlashMlp, FlashPatchProjection)):
            _set_impl(module, impl)
    if not report.replaced and not report.already:
        raise ValueError(
            f"{type(model).__name__} holds no Swin attention of timm's to replace"
            + (f"\n{report}" if report.skipped else f"; supported are the models of {_MODULES}")
        )
    for name, module in model.named_modules():
        projection = patch_projection(module)
        if type(projection) is nn.Conv2d and is_patch_projection(projection) and _holds_accelerated(module):
            projection.__class__ = FlashPatchProjection
            report.replaced[f"{name}.patch_embed.proj".lstrip(".")] = FlashPatchProjection.__name__
            _set_impl(projection, impl)
    return report


def _holds_accelerated(module: nn.Module) -> bool:
    return any(type(part) in _TIMM_OF for part in module.modules())


def _set_impl(module: nn.Module, impl: str) -> None:
    module.__dict__.pop("impl", None)
    if impl != type(module).impl:
        module.impl = impl


def restore(model: nn.Module) -> None:
    """Undo `accelerate`, in place: every module is of timm's class again, and holds what it held.

    Raises:
        ValueError: There is nothing to restore, or a module changed its class since (as sharding and parametrizations
            make it), so that this has to be undone first.
    """
    accelerated = [module for module in model.modules() if isinstance(module, tuple(_TIMM_OF))]
    if not accelerated:
        raise ValueError(f"{type(model).__name__} holds no accelerated module to restore")
    changed = {type(module).__name__ for module in accelerated} - {flash.__name__ for flash in _TIMM_OF}
    if changed:
        raise ValueError(f"modules became {', '.join(sorted(changed))} after accelerate(); undo that before restore()")
    for module in accelerated:
        module.__dict__.pop("impl", None)
        forget(module)
        module.__class__ = _TIMM_OF[type(module)]
