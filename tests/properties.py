"""Any call the two public functions allow, drawn by hypothesis, and what has to hold for it.

tests/test_properties.py draws some, always the same; `scripts/attack.py properties` draws thousands.
"""

import contextlib
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from judge import Projected, rounding, timm_window_attention
from timm.models import swin_transformer, swin_transformer_v2_cr
from torch import Tensor, nn

from timm_flashwin import geometry, reference, window_attention, windowed_sdpa


class Case(NamedTuple):
    """One call: all that decides it, so that a printed case can be run again by `check(Case(...))`."""

    function: str  # "window_attention" or "windowed_sdpa"
    impl: str
    device: str
    dtype: torch.dtype
    B: int
    size: tuple[int, int]  # of the map; for windowed_sdpa the window itself
    window: tuple[int, int]
    shift: tuple[int, int]
    num_masks: int  # of windowed_sdpa, which gets B times as many windows; 0: no mask, and B windows
    num_heads: int
    head_dim: int
    view: str  # how the activations lie in memory: a key of MAP_VIEWS or WINDOW_VIEWS
    do_view: str  # and the gradient of the output: a key of DO_VIEWS
    bias_view: str | None  # a key of BIAS_VIEWS; None: no bias
    bias_dtype: torch.dtype
    has_pad_qkv: bool
    cosine: bool
    amplitude: float  # of q and k: how sharp the softmax is
    needs_grad: tuple[str, ...]  # names of the tensors, as in `make_inputs`
    seed: int


def of_one_qkv_tensor(x: Tensor) -> list[Tensor]:
    return list(x.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4))


def of_a_wider_qkv_tensor(x: Tensor) -> list[Tensor]:
    return [t[..., 3:-2] for t in of_one_qkv_tensor(nn.functional.pad(x, (3, 2)))]


# A view takes a dense tensor and returns one of its shape that lies elsewhere or otherwise.
MAP_VIEWS = {
    "dense": lambda x: x,
    "slice of a wider map": lambda x: torch.cat([x, x], dim=-1)[..., x.shape[-1] :],
    "odd offset": lambda x: nn.functional.pad(x, (1, 2))[..., 1:-2],
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "batch after the map": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "cropped": lambda x: nn.functional.pad(x, (0, 0, 1, 2, 3, 1))[:, 3:-1, 1:-2],
    "every other row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded batch": lambda x: x[:1].expand(x.shape) if len(x) else x,
    "expanded row": lambda x: x[:, :1].expand(x.shape),
}
WINDOW_VIEWS = {  # of q, k and v, which come stacked: [3, B_, num_heads, N, head_dim]
    "dense": list,
    "of one qkv tensor": of_one_qkv_tensor,
    "of a wider qkv tensor": of_a_wider_qkv_tensor,
    "strides of their own": lambda x: [
        x[0],
        x[1].transpose(1, 2).contiguous().transpose(1, 2),
        x[2].mT.contiguous().mT,
    ],
    "v lies otherwise": lambda x: [x[0], x[1], x[2].transpose(1, 2).contiguous().transpose(1, 2)],
    "last dimension not dense": lambda x: list(x.mT.contiguous().mT),
    "expanded heads": lambda x: [t[:, :1].expand(t.shape) for t in x],
    "expanded windows": lambda x: [t[:1].expand(t.shape) if len(t) else t for t in x],
}
DO_VIEWS = {
    "dense": lambda x: x,
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
BIAS_VIEWS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(x.shape),
    "slice": lambda x: nn.functional.pad(x, (1, 3, 2, 0))[:, 2:, 1:-3],
}


# ------------------------------------------------------------------------------------------------------- drawing


amplitudes = st.sampled_from([1.0, 1.0, 0.01, 6.0])


@st.composite
def cases(draw, device: str) -> Case:
    """Calls small enough for the device: Triton's interpreter takes a hundredth of a second for every window's head."""
    on_gpu = device == "cuda"
    function = draw(st.sampled_from(["window_attention", "windowed_sdpa"]))
    impl = draw(st.sampled_from(["triton", "triton", "triton", "reference"]))
    dtypes = [torch.float32, torch.float16]
    if on_gpu or impl == "reference":  # the interpreter computes bfloat16 products wrongly
        dtypes.append(torch.bfloat16)
    dtype = draw(st.sampled_from(dtypes))
    side = st.integers(1, 10) | (st.integers(11, 24) if on_gpu else st.sampled_from([7, 8]))
    window = draw(st.tuples(side, side))
    max_logits, max_programs = (10_000_000, 4000) if on_gpu else (14_000, 16)
    budget = max(1, min(max_programs, max_logits // (window[0] * window[1]) ** 2))  # of windows times heads

    def count(most: int, least: int = 1) -> int:
        nonlocal budget
        n = draw(st.integers(least, max(1, min(most, budget))))
        budget //= max(n, 1)
        return n

    B = count(40 if on_gpu else 4, least=0)
    num_heads = count(32 if on_gpu else 4)
    if function == "window_attention":
        rows, cols = count(5), count(5)
        size = tuple(
            n * length - draw(st.integers(0, length - 1)) for n, length in zip((rows, cols), window, strict=True)
        )
        shift = tuple(draw(st.sampled_from([0, length // 2]) | st.integers(0, length + 2)) for length in window)
        num_masks, views = 0, MAP_VIEWS
    else:
        size, shift, views = window, (0, 0), WINDOW_VIEWS
        num_masks = count(4) * draw(st.booleans())
    has_pad_qkv = function == "window_attention" and draw(st.booleans())
    cosine = draw(st.booleans())
    bias_view = draw(st.none() | st.sampled_from(list(BIAS_VIEWS)))
    names = ["qkv"] if function == "window_attention" else ["q", "k", "v"]
    names += ["bias"] * (bias_view is not None) + ["pad_qkv"] * has_pad_qkv + ["logit_scale"] * cosine
    return Case(
        function=function,
        impl=impl,
        device=device,
        dtype=dtype,
        B=B,
        size=size,
        window=window,
        shift=shift,
        num_masks=num_masks,
        num_heads=num_heads,
        head_dim=draw(st.sampled_from([16, 32]) | st.integers(8, 40) | st.integers(8, 128)),
        view=draw(st.sampled_from(list(views))),
        do_view=draw(st.sampled_from(list(DO_VIEWS))),
        bias_view=bias_view,
        bias_dtype=draw(st.sampled_from([torch.float32, dtype])),
        has_pad_qkv=has_pad_qkv,
        cosine=cosine,
        amplitude=draw(amplitudes),
        needs_grad=draw(st.just(tuple(names)) | st.sets(st.sampled_from(names)).map(lambda s: tuple(sorted(s)))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@st.composite
def calls_alike(draw, case: Case, count: int) -> list[Case]:
    """`case` and `count` - 1 other calls that the kernels compiled for it serve: other numbers, fewer images, gradient
    and bias lying otherwise.

    Triton compiles anew for arguments that are 1 or a multiple of 16 where they were not.
    """
    calls = [case]
    batches = [B for B in range(case.B + 1) if (B == 1, B % 16 == 0) == (case.B == 1, case.B % 16 == 0)]
    for _ in range(count - 1):
        other = case._replace(
            B=draw(st.sampled_from(batches)),
            do_view=draw(st.sampled_from(list(DO_VIEWS))),
            amplitude=draw(amplitudes),
            seed=draw(st.integers(0, 2**31 - 1)),
        )
        if case.bias_view is not None:
            other = other._replace(bias_view=draw(st.sampled_from(list(BIAS_VIEWS))))
        calls.append(other)
    return calls


def fixed_cases(device: str) -> dict[str, Case]:
    """A small call through each kernel and each of its branches: for attacks that run the same call many times."""
    common = dict(
        impl="triton", device=device, dtype=torch.float16, num_masks=0, num_heads=2, head_dim=32, view="dense",
        do_view="dense", bias_view="dense", bias_dtype=torch.float32, amplitude=1.0, seed=0,
    )  # fmt: skip
    of_map = dict(common, function="window_attention", B=2, has_pad_qkv=True)
    of_map["needs_grad"] = ("qkv", "bias", "pad_qkv")
    cosine = dict(of_map, cosine=True, needs_grad=("qkv", "bias", "pad_qkv", "logit_scale"))
    of_windows = dict(common, function="windowed_sdpa", B=1, shift=(0, 0), has_pad_qkv=False, cosine=False)
    of_windows.update(num_masks=2, view="of one qkv tensor", needs_grad=("q", "k", "v", "bias"))
    return {
        "window 7, shifted, padded": Case(**of_map, size=(7, 10), window=(7, 7), shift=(3, 3), cosine=False),
        "window 8, cosine": Case(**cosine, size=(8, 8), window=(8, 8), shift=(4, 4)),
        "window 10, shifted, padded": Case(**of_map, size=(8, 10), window=(10, 10), shift=(5, 5), cosine=False),
        "window 9x8, cosine": Case(**cosine, size=(9, 8), window=(9, 8), shift=(0, 4)),
        "windows of 49 tokens": Case(**of_windows, size=(7, 7), window=(7, 7)),
        "windows of 80 tokens": Case(**of_windows, size=(10, 8), window=(10, 8)),
    }


def make_inputs(case: Case) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """(what may get a gradient, by name; the mask; the gradient of the output)."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(case.device, dtype)

    (Wh, Ww), heads, head_dim = case.window, case.num_heads, case.head_dim
    N, C = Wh * Ww, case.num_heads * case.head_dim
    inputs, mask = {}, None
    if case.function == "window_attention":
        qkv = normal(case.B, *case.size, 3 * C)
        qkv[..., : 2 * C] *= case.amplitude
        inputs["qkv"] = MAP_VIEWS[case.view](qkv.to(case.dtype))
        do = normal(case.B, *case.size, C, dtype=case.dtype)
    else:
        B_ = case.B * max(case.num_masks, 1)
        qkv = normal(3, B_, heads, N, head_dim)
        qkv[:2] *= case.amplitude
        inputs.update(zip("qkv", WINDOW_VIEWS[case.view](qkv.to(case.dtype)), strict=True))
        do = normal(B_, heads, N, head_dim, dtype=case.dtype)
        mask = 3 * normal(case.num_masks, N, N) if case.num_masks else None
    if case.bias_view is not None:
        inputs["bias"] = BIAS_VIEWS[case.bias_view](normal(heads, N, N, dtype=case.bias_dtype))
    if case.has_pad_qkv:
        inputs["pad_qkv"] = normal(3 * C, dtype=case.dtype)
    if case.cosine:
        inputs["logit_scale"] = normal(heads) * 2 + 2
    inputs = {name: x.detach().requires_grad_(name in case.needs_grad) for name, x in inputs.items()}
    return inputs, mask, DO_VIEWS[case.do_view](do)


# ------------------------------------------------------------------------------------------------------- judging


def check(case: Case) -> set[str]:
    """Assert that output and gradients are what the judge demands (tests/judge.py): an error of at most twice timm's
    plus one rounding of the result. Where the terms of a sum cancel, or timm happens to be lucky, it may instead be one
    rounding of the terms to the dtype, and four to float32, in which they are computed: of the exponential, the sum of
    a row, its reciprocal and the product of the two, which are the same for many terms and do not average out.

    Returns:
        The names of the results which took the latter.
    """
    inputs, mask, do = make_inputs(case)
    with poisoned():
        ours = run(ours_of(case, mask), inputs, do)
    doubles = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    exact = run(exact_of(case, mask), doubles, do.double())
    timms = run(timms_of(case, mask), inputs, do) if case.B else exact  # timm's code takes no empty batch
    with torch.no_grad():
        terms = norms_of_terms(case, doubles, mask, do.double())
    by_terms = set()
    for name, expected in exact.items():
        our = ours[name]
        like = do if name == "out" else inputs[name]
        assert our.shape == like.shape and our.dtype == like.dtype, f"{name}: {our.shape}, {our.dtype}"
        assert torch.isfinite(our).all(), f"{name} is not finite"
        our_error, timm_error = ((x.double() - expected).norm().item() for x in (our, timms[name]))
        if our_error > 2 * timm_error + rounding(our.dtype) * expected.norm().item():
            allowed = (rounding(case.dtype) + 4 * rounding(torch.float32)) * terms[name]
            assert our_error <= allowed, (
                f"{name}: off by {our_error:.2e}, and timm by {timm_error:.2e}; its norm is {expected.norm():.2e}, and "
                f"the rounding of its terms allows {allowed:.2e}"
            )
            by_terms.add(name)
    return by_terms


@contextlib.contextmanager
def poisoned():
    """As the fixture of this name in conftest.py; it warns of nondeterministic operators instead of raising."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(function, inputs: dict[str, Tensor], do: Tensor) -> dict[str, Tensor]:
    """The output and, by the inputs' names, the gradients that are wanted (0 where there is none)."""
    out = function(**inputs)
    results = {"out": out.detach()}
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    if wanted:
        grads = torch.autograd.grad(out, list(wanted.values()), do, allow_unused=True)
        results.update({n: torch.zeros_like(wanted[n]) if g is None else g for n, g in zip(wanted, grads, strict=True)})
    return results


def ours_of(case: Case, mask):
    if case.function == "windowed_sdpa":
        return lambda **inputs: windowed_sdpa(**inputs, mask=mask, impl=case.impl)
    return lambda **inputs: window_attention(
        num_heads=case.num_heads, window_size=case.window, shift_size=case.shift, impl=case.impl, **inputs
    )


def exact_of(case: Case, mask):
    def map_attention(qkv, bias=None, pad_qkv=None, logit_scale=None):
        geometry_of_case = case.num_heads, case.window, case.shift
        return reference.window_attention(qkv, *geometry_of_case, bias, pad_qkv, case.head_dim**-0.5, logit_scale)

    def sdpa(q, k, v, bias=None, logit_scale=None):
        return reference.windowed_sdpa(q, k, v, bias, mask, case.head_dim**-0.5, logit_scale)

    return map_attention if case.function == "window_attention" else sdpa


def timms_of(case: Case, mask):
    N, C = case.window[0] * case.window[1], case.num_heads * case.head_dim
    no_bias = torch.zeros(case.num_heads, N, N, device=case.device)

    def map_attention(qkv, bias=no_bias, pad_qkv=None, logit_scale=None):
        pad_qkv = qkv.new_zeros(3 * C) if pad_qkv is None else pad_qkv
        return timm_window_attention(qkv, case.num_heads, case.window, case.shift, bias, pad_qkv, logit_scale)

    def sdpa(q, k, v, bias=no_bias, logit_scale=None):
        return timm_windowed_sdpa(q, k, v, bias, mask, logit_scale)

    return map_attention if case.function == "window_attention" else sdpa


def timm_windowed_sdpa(q, k, v, bias, mask, logit_scale):
    """windowed_sdpa by timm's own code, projections taken out; half precision as under autocast."""
    B_, num_heads, N, head_dim = q.shape
    C = num_heads * head_dim
    if logit_scale is None:
        attention = swin_transformer.WindowAttention(C, num_heads, window_size=(1, N))
        attention.fused_attn = False
        attention._get_rel_pos_bias = lambda: bias.unsqueeze(0)
    else:
        attention = swin_transformer_v2_cr.WindowMultiHeadAttention(C, num_heads, (1, N))
        attention._relative_positional_encodings = lambda: bias.unsqueeze(0)
        del attention.logit_scale
        attention.logit_scale = logit_scale
    attention.proj = nn.Identity()
    attention.qkv = Projected(torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).flatten(2))  # B_, N, 3C
    half = q.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(q.device.type, dtype=q.dtype if half else None, enabled=half):
        out = attention(q.new_empty(B_, N, C), mask=mask)
    return out.unflatten(-1, (num_heads, head_dim)).transpose(1, 2).to(q.dtype)


def norms_of_terms(case: Case, inputs: dict[str, Tensor], mask, do: Tensor) -> dict[str, float]:
    """What the roundings inside a result scale with: its L2 norm with every term of every sum taken positive.

    P weighs in with its condition, one plus the size of its logits: a rounding of q moves a logit by as much.
    """
    bias, padded = inputs.get("bias"), None
    if case.function == "window_attention":
        q, k, v, do, mask, padded = windows_of(case, inputs, do)
    else:
        q, k, v = (inputs[name] for name in "qkv")
    scale, norm_q, norm_k = case.head_dim**-0.5, 1.0, 1.0
    if case.cosine:
        scale = inputs["logit_scale"].clamp(max=reference.MAX_LOGIT_SCALE).exp()[:, None, None]
        norm_q, norm_k = (x.norm(dim=-1, keepdim=True).clamp_min(reference.NORM_EPS) for x in (q, k))
        q, k = q / norm_q, k / norm_k
    logits, size = q @ k.mT * scale, q.abs() @ k.abs().mT * scale  # B_, num_heads, N, N
    for addend in (bias, None if mask is None else mask.double().repeat(len(q) // len(mask), 1, 1).unsqueeze(1)):
        if addend is not None:
            logits, size = logits + addend, size + addend.abs()
    p = logits.softmax(-1)
    p = p * (1 + size + (p * size).sum(-1, keepdim=True))
    dp = do.abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    through_norm = 2 if case.cosine else 1
    terms = dict(
        out=p @ v.abs(),
        q=through_norm * (ds @ k.abs() * scale) / norm_q,
        k=through_norm * (ds.mT @ q.abs() * scale) / norm_k,
        v=p.mT @ do.abs(),
        bias=ds.sum(0),
        logit_scale=(ds * size).sum((0, 2, 3)),
    )
    terms["qkv"] = torch.stack([terms[name] for name in "qkv"])
    if padded is not None:
        terms["pad_qkv"] = (terms["qkv"] * padded[:, None, :, None]).sum((1, 3))
    return {name: x.norm().item() for name, x in terms.items()}


def windows_of(case: Case, inputs: dict[str, Tensor], do: Tensor):
    """(q, k, v, do, mask, 1 where a token is padding and else 0) of a map call, in windows."""
    Hp, Wp = geometry.padded_size(case.size, case.window)
    rows, cols = torch.arange(Hp, device=do.device), torch.arange(Wp, device=do.device)
    beyond = (rows >= case.size[0])[:, None, None] | (cols >= case.size[1])[:, None]  # Hp, Wp, 1

    def windows(x, padding):
        x = torch.roll(x, [-s for s in case.shift], dims=(1, 2))
        x = nn.functional.pad(x, (0, 0, 0, Wp - case.size[1], 0, Hp - case.size[0]))
        return geometry.window_partition(torch.where(beyond, padding, x), case.window)

    zero = do.new_zeros(())
    qkv = windows(inputs["qkv"], inputs.get("pad_qkv", zero)).unflatten(-1, (3, case.num_heads, -1))
    do = windows(do, zero).unflatten(-1, (case.num_heads, -1)).transpose(1, 2)
    padded = geometry.window_partition(beyond[None].double(), case.window)[..., 0].repeat(case.B, 1)
    mask = geometry.shift_mask(case.size, case.window, case.shift, do.device, do.dtype) if any(case.shift) else None
    return *qkv.permute(2, 0, 3, 1, 4), do, mask, padded
