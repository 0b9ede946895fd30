"""The Triton kernels. Nothing outside this folder imports triton, and importing this folder's parent does not either."""
