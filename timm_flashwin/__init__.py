"""timm-flashwin: timm's Swin Transformers on fused window-attention kernels. The import registers their names."""

from .functional import window_attention, windowed_sdpa
from .models.accelerate import accelerate, restore
from .models.registry import register_all

__version__ = "0.1.0"
__all__ = ["accelerate", "restore", "window_attention", "windowed_sdpa"]

register_all()
