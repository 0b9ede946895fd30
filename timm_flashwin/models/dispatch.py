"""What the attentions of all families share: when the kernels serve a call, and the call itself."""

import torch
from timm.layers import is_exportable, is_scriptable
from torch import Tensor, nn

from ..functional import fallback_reason, log_fallback, relative_position_bias, window_attention, windowed_sdpa

# Hooks on all modules; torch fills these dictionaries and never replaces them.
_GLOBAL_HOOKS = [
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


class FlashAttention:
    """Mixed in before a window attention of timm's: it has that one's state, and this forward.

    A family says what its `head_dim` is, its `scales`, what makes the table of its relative position bias
    (`table_source`) or, where that is None, timm's bias itself (`timms_position_bias`), and which modules timm's code
    passes the attention weights through (`_weight_modules`).
    """

    impl = "auto"  # as in functional.window_attention; an instance may hold its own

    @property
    def num_tokens(self) -> int:
        """Tokens of a window."""
        return self.window_size[0] * self.window_size[1]

    def fallback(self, x: Tensor, mask: Tensor | None = None) -> bool:
        """Whether timm's own code has to serve `x`, the input of the qkv projection, and a `mask` of windows.

        The reason is logged once.

        Raises:
            ValueError: It has to, and `impl="triton"` forbids it.
        """
        reason = self._fallback_reason(x, mask)
        if reason is None:
            return False
        if self.impl == "triton":
            raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto"')
        log_fallback(reason, "fx" if isinstance(x, torch.fx.Proxy) else x.device.type)
        return True

    def _fallback_reason(self, x: Tensor, mask: Tensor | None) -> str | None:
        if isinstance(x, torch.fx.Proxy):
            return "torch.fx traces timm's code"
        if is_exportable() or is_scriptable():
            return "timm.layers.is_exportable() or is_scriptable() asks for it"
        if not all(map(_is_stock_weight_module, self._weight_modules())):
            return "a hook or a module of somebody's own asks for the attention weights, which the kernels never hold"
        if self._drops():
            return "attention dropout is on (attn_drop_rate > 0 in training), which the kernels do not have"
        if mask is not None and (mask.requires_grad or not mask.is_floating_point()):
            return "the mask is to be trained, or is of no float dtype"
        if self.impl != "auto":
            return None  # what else impl="triton" cannot do, it says itself
        return fallback_reason(x.device, x.dtype, self.head_dim, self.num_tokens)

    def _drops(self) -> bool:
        """Whether timm's code would drop attention weights."""
        return type(self.attn_drop) not in (nn.Identity, nn.Dropout) or drops(self.attn_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, shift_size: tuple[int, int] | None = None) -> Tensor:
        """Attend in windows.

        Args:
            x: Windows [B * nW, N, C], as in timm; or the map [B, H, W, C], where `shift_size` is given.
            mask: Additive mask [nW, N, N] for windows, or None. A map needs none.
            shift_size: (sh, sw) of the block: roll, padding, partition, mask and the way back are done in here.

        Returns:
            The shape of `x`.
        """
        if shift_size is None and self.fallback(x, mask):
            return super().forward(x, mask)
        qkv = self._project(x)  # ..., 3 * num_heads * head_dim
        scale, logit_scale = self.scales()
        options = dict(bias=self.position_bias(), scale=scale, logit_scale=logit_scale, impl=self.impl)
        if shift_size is None:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            out = windowed_sdpa(q, k, v, mask=mask, **options).transpose(1, 2).flatten(2)
        else:
            options["pad_qkv"] = self._pad_qkv(x)
            out = window_attention(qkv, self.num_heads, self.window_size, shift_size, **options)
        return self.proj_drop(self.proj(out))  # ..., C

    def position_bias(self) -> Tensor:
        """[num_heads, N, N]."""
        table = self.table_source()
        if table is None:
            return self.timms_position_bias()
        return relative_position_bias(table(), self.window_size, self.impl)

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def projection_bias(self) -> Tensor | None:
        """What `_project` adds, [3 * num_heads * head_dim], and so what it makes of zeros where `qkv_is_plain`."""
        return self.qkv.bias

    def qkv_is_plain(self) -> bool:
        """Whether the qkv projection is a Linear, and nothing else."""
        return type(self.qkv) is nn.Linear and is_untouched(self.qkv)

    def pads(self, x: Tensor) -> bool:
        """Whether timm pads the map `x` [B, H, W, C] to whole windows."""
        return bool(x.shape[1] % self.window_size[0] or x.shape[2] % self.window_size[1])

    def _pad_qkv(self, x: Tensor) -> Tensor | None:
        """The qkv of the zeros timm pads the map with; None for zeros, or where nothing is padded."""
        return self.projection_bias() if self.pads(x) else None


def takes_map(attention: nn.Module, x: Tensor) -> bool:
    """Whether a block may hand `attention` the whole map `x` [B, H, W, C].

    What somebody put in the attention's place, timm's own class included, is called as timm calls it; and so is an
    adapted, sharded or hooked qkv projection of a padded map, which alone knows what it makes of the padding.
    """
    if not isinstance(attention, FlashAttention) or "forward" in attention.__dict__ or attention.fallback(x):
        return False
    return not attention.pads(x) or attention.qkv_is_plain()


def _is_stock_weight_module(module: nn.Module) -> bool:
    """Whether `module` is the softmax or the dropout of timm's attention, and nobody would miss a call of it."""
    is_stock = type(module) in (nn.Identity, nn.Dropout) or type(module) is nn.Softmax and module.dim in (-1, 3)
    return is_stock and _is_bare(module)


def is_untouched(*modules: nn.Module) -> bool:
    """Whether nobody could tell that `modules` are not called, one with a hook on all modules included."""
    return all([_is_bare(module) for module in modules]) and not any(_GLOBAL_HOOKS)


def _is_bare(module: nn.Module) -> bool:
    """Whether the instance has no hook and no `forward` of its own, compiled ones included."""
    own = module.__dict__
    forward_hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    backward_hooks = own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not (forward_hooks or backward_hooks or "forward" in own or own.get("_compiled_call_impl"))


def drops(module: nn.Module) -> bool:
    """Whether `module` is a dropout that drops, or may do so when its rate, being no number, changes."""
    return (
        isinstance(module, nn.Dropout)
        and module.training
        and not (isinstance(module.p, (int, float)) and module.p == 0)
    )
