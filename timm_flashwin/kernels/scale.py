"""The factor on q @ k^T."""

import triton
import triton.language as tl

MAX_LOGIT_SCALE = tl.constexpr(4.605170185988092)  # reference.MAX_LOGIT_SCALE, log 100
_LEAST = tl.constexpr(1e-30)  # so that the bias can be divided by it


@triton.jit
def load_scale(scale, logit_scale_ptr, head, ACC: tl.constexpr, COSINE: tl.constexpr):
    """`scale`, which is positive, or exp(min(logit_scale, log 100)) of the head."""
    if COSINE:
        logit_scale = tl.load(logit_scale_ptr + head).to(ACC)
        scale = tl.exp(tl.minimum(logit_scale, MAX_LOGIT_SCALE, propagate_nan=tl.PropagateNan.ALL))
    return tl.maximum(scale, _LEAST, propagate_nan=tl.PropagateNan.ALL)
