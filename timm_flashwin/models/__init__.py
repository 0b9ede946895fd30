"""timm's Swin models on the kernels: the only place that knows timm's classes."""
