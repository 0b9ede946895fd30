"""The Triton kernels: the only folder that imports triton, and imported itself only when a kernel is needed."""
