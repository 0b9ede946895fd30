"""timm's Swin models on the kernels: the only place that changes timm's classes."""
