"""Time whole Swin models, stock and flashwin, inference and training; check every provider before its time counts.

    python scripts/benchmark_model.py [--cases swin_base_patch4_window7_224:128:train] [--providers timm_eager ...]

Inference ("bf16"): weights and images in bfloat16, under inference_mode. Training ("amp_bf16"): float32 weights and
images, autocast to bfloat16, cross entropy, AdamW (fused); stochastic depth as the model has it by default. Rows go to
`results/<device>/model.jsonl`; a row of the same model, batch, task, precision and provider is replaced, others stay.

Providers:
  timm_eager, timm_sdpa              timm's model as it comes; with timm's switch for its experimental SDPA branch on.
  timm_compile, timm_sdpa_compile    torch.compile of the two, default mode, static shapes.
  flashwin, flashwin_compile         timm's model on the kernels, as it comes and under torch.compile.
  timm_reduce_overhead, flashwin_reduce_overhead
                                     torch.compile in its mode of CUDA graphs; only where --providers names it.
  timm_cudagraph, flashwin_cudagraph timm_eager and flashwin replayed from a CUDA graph: inference at batch 1 only. The
                                     copy of the images into the graph's input is timed along.
  timm_aot, flashwin_aot             an AOTInductor package of the two, loaded again: inference only, and only where
                                     --providers names it, since it takes minutes to make.

Protocol: end to end, from an idle device to an idle device, so that the host's launches count as they do for a user.
Providers take turns in one process, in a new order every round, all of them resident. Before that each is built alone,
checked and warmed up, and its own peak of device memory is taken (`peak_mem_gb`, 1e9 bytes): weights, gradients,
optimiser state, inputs and activations, without what the others hold. `ready_s` are the seconds from building the model
to the end of its first step, with all that is compiled on the way: compilers keep caches, so compare what ran first on
empty ones.

Correctness: all providers load the same random weights, drawn so that the attention has a say in the result (with
timm's initial weights a model without bias or mask passes any such test). Their logits must be within 2e-2 of those of
timm_eager in float32, in relative L2: bfloat16 costs 1e-2 at most, a lost bias or mask 6e-2 or more, V2's logit
scales lost to their initial value 4e-2 or more. In inference the logits are those of the timed call itself. In training
the check runs in eval mode, since stochastic depth has no reference, and what is not compiled must also have the
gradients of all relative position biases and logit scales, which see every attention of the model, within 0.1: bfloat16
costs 0.03, a lost mask 0.5 or more. For compiled models that would take a second compilation of the backward;
`benchmark_op.py` checks the gradients of the compiled operator. What fails is reported, not timed and not written; the
exit status is 1 if it was one of ours.
"""

import argparse
import contextlib
import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from benchmarking import (
    EndToEndClock,
    HostClock,
    Progress,
    Timing,
    compile_or_raise,
    default_out,
    format_table,
    interleave,
    merge_rows,
    pick_device,
    provenance,
    relative_error,
    release_memory,
    short_reason,
)
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import timm_flashwin

PROVIDERS = (
    "timm_eager",
    "timm_sdpa",
    "timm_compile",
    "timm_sdpa_compile",
    "timm_cudagraph",
    "flashwin",
    "flashwin_compile",
    "flashwin_cudagraph",
    "timm_aot",
    "flashwin_aot",
    "timm_reduce_overhead",
    "flashwin_reduce_overhead",
)
COMPILED = ("_compile", "_reduce_overhead")
ONLY_BY_NAME = ("_aot", "_reduce_overhead")
DEFAULT_CASES = (
    "swin_tiny_patch4_window7_224:256:infer",
    "swin_base_patch4_window7_224:128:infer",
    "swin_base_patch4_window7_224:1:infer",
    "swin_base_patch4_window12_384:64:infer",
    "swinv2_base_window16_256:64:infer",
    "swinv2_base_window12to24_192to384:32:infer",
    "swin_base_patch4_window7_224:128:train",
    "swin_base_patch4_window12_384:32:train",
    "swinv2_base_window16_256:64:train",
    "swinv2_base_window12to24_192to384:16:train",
)
PRECISIONS = {"infer": ("bf16", "fp16", "fp32"), "train": ("amp_bf16", "fp32")}  # the first is what is timed here
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "amp_bf16": torch.float32}
KEY = ("model", "batch", "task", "precision", "provider")
# What only the logits of an attention see: tables in V1, and in V2 and V2-CR the networks and scales in their place.
BIAS_PARAMETERS = ("relative_position_bias_table", "cpb_mlp", "meta_mlp", "logit_scale", ".tau")
CHECKED_IMAGES = 8
LOGITS_TOLERANCE = 2e-2
BIAS_GRAD_TOLERANCE = 1e-1
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is timed: a timm architecture, a batch size, a task and its precision."""

    model: str
    batch: int
    task: str
    img_size: int
    precision: str

    @classmethod
    def parse(cls, text: str, img_size: int | None, precision: str | None = None) -> "Entry":
        """`model:batch` or `model:batch:task`; without `precision` the first of the task's."""
        parts = text.split(":")
        if len(parts) not in (2, 3) or not parts[1].isdecimal():
            raise ValueError(f"{text}: write MODEL:BATCH or MODEL:BATCH:TASK")
        model, batch, task = (*parts, "infer")[:3]
        if not timm.is_model(model) or "." in model:
            raise ValueError(f"{text}: timm has no architecture {model!r} (pretrained tags are not for random weights)")
        if task not in PRECISIONS or int(batch) < 1:
            raise ValueError(f"{text}: the task must be infer or train, and the batch at least 1")
        precision = precision or PRECISIONS[task][0]
        if precision not in PRECISIONS[task]:
            raise ValueError(f"{text}: {task} runs in {', '.join(PRECISIONS[task])}, not in {precision}")
        return cls(model, int(batch), task, img_size or timm.get_pretrained_cfg(model).input_size[-1], precision)

    @property
    def name(self) -> str:
        return f"{self.model}:{self.batch}:{self.task}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return DTYPES[self.precision]

    def takes(self, provider: str, device: torch.device) -> bool:
        """A graph is worth its fixed input and memory where launches are the bottleneck."""
        if provider.endswith("_cudagraph"):
            return self.task == "infer" and self.batch == 1 and device.type == "cuda"
        return self.task == "infer" or not provider.endswith("_aot")


# ------------------------------------------------------------------------------------------------ models and inputs


@contextlib.contextmanager
def sdpa_branch(enable: bool) -> Iterator[None]:
    """timm's Swin reads this process-wide switch when it is built: 0 off, 1 on where tested, 2 also for Swin."""
    level = use_fused_attn() + use_fused_attn(experimental=True)
    set_fused_attn(enable=True, experimental=enable)
    try:
        yield
    finally:
        set_fused_attn(enable=level > 0, experimental=level > 1)


def draw_weights(entry: Entry) -> dict[str, Tensor]:
    """Random weights from one seed: timm's own, but with queries, keys, values and biases of the size of trained ones.

    timm's initial values make an attention that hardly differs from a mean, and a model that hears little of it.
    """
    torch.manual_seed(0)
    model = timm.create_model(entry.model, img_size=entry.img_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_(std=2.0)
            elif name.endswith(("cpb_mlp.0.weight", "cpb_mlp.0.bias", "meta_mlp.fc1.weight", "meta_mlp.fc1.bias")):
                parameter.normal_()
            elif name.endswith(("cpb_mlp.2.weight", "meta_mlp.fc2.weight")):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("logit_scale"):
                parameter.normal_(mean=math.log(10.0), std=0.3)
            elif name.endswith("attn.qkv.weight"):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith(("attn.qkv.bias", "attn.q_bias", "attn.v_bias")):
                parameter.normal_(std=0.5)
            elif name.endswith("attn.proj.weight"):
                parameter.normal_(std=2.0 * parameter.shape[1] ** -0.5)
            elif name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(1.0)  # V2 starts from 0: its blocks would be the identity, with no gradient inside
            elif name.endswith("head.fc.weight"):
                parameter.normal_(std=0.02)  # as in V1 and V2; V2-CR starts from 0
    return model.state_dict()


def draw_images(entry: Entry, device: torch.device) -> tuple[Tensor, Tensor]:
    """(images, labels). Coarse images: the features of white noise are nearly the same for all of them."""
    generator = torch.Generator().manual_seed(1)
    cells = max(2, entry.img_size // 32)
    coarse = torch.randn(entry.batch, 3, cells, cells, generator=generator)
    images = F.interpolate(coarse.to(device), size=(entry.img_size, entry.img_size), mode="bicubic")
    labels = torch.randint(1000, (entry.batch,), generator=generator).to(device)
    return images.contiguous(), labels


def build_model(
    provider: str,
    entry: Entry,
    weights: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The provider's model with `weights`, in eval mode."""
    ours = provider.startswith("flashwin")
    sdpa = provider.startswith("timm_sdpa")
    with sdpa_branch(sdpa):
        model = timm.create_model(entry.model + ("_flashwin" if ours else ""), img_size=entry.img_size)
    if sdpa and not any(getattr(module, "fused_attn", False) for module in model.modules()):
        raise NotImplementedError(f"timm has no SDPA branch in {entry.model}")
    if ours and device.type == "cuda":
        timm_flashwin.accelerate(model, impl="triton")  # the kernels or an error, never the fallback under their name
    model.load_state_dict(weights)
    return model.to(dtype).to(device).eval()  # cast first: float32 weights on the device would count as memory


# ------------------------------------------------------------------------------------------------------ references


class Reference:
    """timm_eager in float32 on some of the images: logits and, in training, gradients of the biases."""

    def __init__(self, entry: Entry, weights: dict[str, Tensor], images: Tensor, labels: Tensor):
        self.images, self.labels = images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]
        if entry.task == "infer":  # the same rounded weights and images as everybody's
            self.images = self.images.to(entry.dtype).float()
            weights = {name: x.to(entry.dtype).float() for name, x in weights.items()}
        model = build_model("timm_eager", entry, weights, images.device)
        if entry.task == "infer":
            with torch.no_grad():
                self.logits = model(self.images)
        else:
            self.logits, self.bias_grads = logits_and_bias_grads(model, self.images, self.labels)


def logits_and_bias_grads(model: nn.Module, images: Tensor, labels: Tensor, amp: bool = False) -> tuple[Tensor, Tensor]:
    """(logits, the gradients of all `BIAS_PARAMETERS` as one vector)."""
    parameters = [p for name, p in model.named_parameters() if any(part in name for part in BIAS_PARAMETERS)]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    grads = torch.autograd.grad(loss, parameters)
    return logits.detach(), torch.cat([grad.flatten() for grad in grads])


# ------------------------------------------------------------------------------------------------------- providers


def compiled(provider: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    mode = "reduce-overhead" if provider.endswith("_reduce_overhead") else None
    return torch.compile(model, dynamic=False, mode=mode)


class Inference:
    """One provider in inference: `step()` is what is timed."""

    def __init__(self, provider: str, entry: Entry, weights: dict[str, Tensor], images: Tensor, labels: Tensor):
        self.images = images.to(entry.dtype)
        self.model = build_model(provider, entry, weights, images.device, entry.dtype)
        self.captures = provider.endswith(("_cudagraph", "_reduce_overhead"))
        self.call: Callable[[Tensor], Tensor] = self.model
        if provider.endswith(COMPILED):
            self.call = compiled(provider, self.model)
        elif self.captures:
            self.call = self._capture()
        elif provider.endswith("_aot"):
            self.call = self._package()

    def step(self) -> Tensor:
        with torch.inference_mode():
            return self.call(self.images)

    def errors(self, reference: Reference) -> dict[str, float]:
        return {"logits": relative_error(self.step()[:CHECKED_IMAGES], reference.logits)}

    def healthy(self) -> bool:
        """Whether the result is still finite after the timing."""
        return bool(torch.isfinite(self.step()).all())

    @torch.inference_mode()
    def _capture(self) -> Callable[[Tensor], Tensor]:
        static_images = self.images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a capture may not compile kernels or create library handles
            for _ in range(3):
                self.model(static_images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            static_logits = self.model(static_images)

        def replay(images: Tensor) -> Tensor:
            static_images.copy_(images)
            graph.replay()
            return static_logits

        return replay

    def _package(self) -> Callable[[Tensor], Tensor]:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            program = torch.export.export(self.model, (self.images,))
            path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
            return torch._inductor.aoti_load_package(path)


class Training:
    """One provider in training: `step()`, a whole step with its optimiser, is what is timed."""

    def __init__(self, provider: str, entry: Entry, weights: dict[str, Tensor], images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels
        self.amp = entry.precision == "amp_bf16"
        self.model = build_model(provider, entry, weights, images.device)
        self.captures = provider.endswith("_reduce_overhead")
        self.compiled = provider.endswith(COMPILED)
        self.call = compiled(provider, self.model) if self.compiled else self.model
        # A small rate: random labels must not drive the weights to where arithmetic is on NaN.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)
        self.loss: Tensor | None = None

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            self.loss = F.cross_entropy(self.call(self.images), self.labels)
        self.loss.backward()
        self.optimizer.step()

    def errors(self, reference: Reference) -> dict[str, float]:
        """In eval mode; leaves the model in train mode, for `step`."""
        errors = {}
        if self.compiled:
            with torch.no_grad(), self._autocast():
                logits = self.call(reference.images)
        else:
            logits, bias_grads = logits_and_bias_grads(self.model, reference.images, reference.labels, self.amp)
            errors["bias gradients"] = relative_error(bias_grads, reference.bias_grads)
        errors["logits"] = relative_error(logits, reference.logits)
        self.model.train()
        return errors

    def healthy(self) -> bool:
        """Whether the loss is still finite after the timing."""
        return self.loss is not None and bool(torch.isfinite(self.loss))

    def _autocast(self):
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.amp)


Runner = Inference | Training


# ------------------------------------------------------------------------------------------------------ measurement


class OwnMemory:
    """The peak of device memory of one provider, without what was there before it; None off CUDA."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()

    def restart(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self, shared: int) -> float | None:
        """`shared`: bytes of inputs that were there before, and that the provider needs as well."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self.before + shared) / GB


def allocate_workspaces(device: torch.device) -> None:
    """cuBLAS keeps workspaces from its first products on: they must not count as the first provider's memory."""
    linear = nn.Linear(64, 64, device=device, dtype=torch.bfloat16)
    linear(torch.ones(64, 64, device=device, dtype=torch.bfloat16)).sum().backward()


class Prepared(NamedTuple):
    """A provider that is built, checked and warm."""

    runner: Runner
    errors: dict[str, float]
    peak_gb: float | None  # of memory
    ready_s: float


def prepare(
    provider: str, entry: Entry, weights: dict[str, Tensor], images: Tensor, labels: Tensor, reference: Reference
) -> Prepared:
    memory = OwnMemory(images.device)
    memory.restart()
    start = time.perf_counter()
    runner = (Inference if entry.task == "infer" else Training)(provider, entry, weights, images, labels)
    errors = runner.errors(reference)  # waits for the device
    runner.step()
    ready_s = time.perf_counter() - start
    for _ in range(2):
        runner.step()
    if not runner.captures:  # a graph allocates at its capture and never again: there the peak is that of the capture
        memory.restart()
    for _ in range(2):
        runner.step()
    # Inference casts the images for itself.
    shared = images.nbytes + labels.nbytes if entry.task == "train" else 0
    return Prepared(runner, errors, memory.peak_gb(shared), ready_s)


def check(provider: str, entry: Entry, errors: dict[str, float], progress: Progress) -> bool:
    """Print the errors; whether all are within bounds."""
    bounds = {"logits": LOGITS_TOLERANCE, "bias gradients": BIAS_GRAD_TOLERANCE}
    right = all(error < bounds[name] for name, error in errors.items())
    measured = ", ".join(f"{name} {error:.1e} of {bounds[name]:.0e}" for name, error in errors.items())
    progress.say(f"{entry.name}  {provider}: {'correct' if right else 'WRONG'}, {measured}")
    return right


def benchmark(
    entry: Entry, providers: list[str], args: argparse.Namespace, device: torch.device, clock, progress: Progress
) -> dict[str, tuple[Timing, Prepared]]:
    """Of the providers that are right."""
    weights = draw_weights(entry)
    images, labels = draw_images(entry, device)
    reference = Reference(entry, weights, images, labels)
    right: dict[str, Prepared] = {}
    for provider in providers:
        progress.doing(f"{entry.name} {provider}")
        try:
            prepared = prepare(provider, entry, weights, images, labels, reference)
            if check(provider, entry, prepared.errors, progress):
                right[provider] = prepared
            del prepared  # where it was wrong, its memory must not count as the next one's
        except Exception as error:  # whatever it is, it is this provider's, and the others can still be timed
            progress.say(f"{entry.name}  {provider}: FAILED, {short_reason(error)}")
        progress.step()

    progress.doing(f"{entry.name} timing")
    calls = {provider: prepared.runner.step for provider, prepared in right.items()}
    timings = interleave(clock, calls, args.repeats, args.warmup, progress.step)
    for provider, prepared in right.items():
        if not prepared.runner.healthy():
            progress.say(f"{entry.name}  {provider}: WRONG, not finite after {args.repeats} steps")
            del timings[provider]
    return {provider: (timing, right[provider]) for provider, timing in timings.items()}


def make_rows(entry: Entry, measured: dict[str, tuple[Timing, Prepared]], common: dict) -> list[dict]:
    """One row a provider."""
    rows = []
    for provider, (timing, prepared) in measured.items():
        what = {"model": entry.model, "batch": entry.batch, "img_size": entry.img_size, "task": entry.task}
        times = {k: round(v, 4) for k, v in timing._asdict().items()}
        img_per_s = round(entry.batch / timing.ms * 1e3, 1)
        peak = prepared.peak_gb if prepared.peak_gb is None else round(prepared.peak_gb, 3)
        rows.append(
            {**what, "precision": entry.precision, "provider": provider, **times}
            | {"img_per_s": img_per_s, "peak_mem_gb": peak, "ready_s": round(prepared.ready_s, 1)}
            | common
        )
    return rows


# ----------------------------------------------------------------------------------------------------------- tables


def groups_of(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Entry -> provider -> row."""
    groups: dict[str, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['model']}:{row['batch']}:{row['task']}", {})[row["provider"]] = row
    return groups


def summary(rows: list[dict]) -> str:
    """Every provider of every entry, against timm_eager."""
    lines = []
    for entry, group in groups_of(rows).items():
        eager = group.get("timm_eager")
        for provider, row in group.items():
            peak = row["peak_mem_gb"]
            lines.append(
                [
                    entry,
                    provider,
                    f"{row['ms']:.2f}",
                    f"{row['ms_p20']:.2f}-{row['ms_p80']:.2f}",
                    f"{row['img_per_s']:.0f}",
                    "-" if peak is None else f"{peak:.2f}",
                    f"{row['ready_s']:.0f}",
                    f"{eager['ms'] / row['ms']:.2f}" if eager else "-",
                ]
            )
    return format_table(["entry", "provider", "ms", "p20-p80", "img/s", "peak GB", "ready s", "x timm_eager"], lines)


def comparison(rows: list[dict]) -> str:
    """Like with like: eager with eager, compiled with the best compiled, graph with graph."""
    rivals = {
        "flashwin": ("timm_eager",),
        "flashwin_compile": ("timm_compile", "timm_sdpa_compile"),
        "flashwin_cudagraph": ("timm_cudagraph",),
        "flashwin_aot": ("timm_aot",),
        "flashwin_reduce_overhead": ("timm_compile", "timm_sdpa_compile", "timm_reduce_overhead"),
    }
    lines = []
    for entry, group in groups_of(rows).items():
        for ours, theirs in rivals.items():
            best = min((group[p] for p in theirs if p in group), key=lambda row: row["ms"], default=None)
            if ours not in group or best is None:
                continue
            own, others = group[ours]["peak_mem_gb"], best["peak_mem_gb"]
            memory = f"{own / others:.2f}" if own is not None and others else "-"
            lines.append([entry, ours, best["provider"], f"{best['ms'] / group[ours]['ms']:.2f}", memory])
    return format_table(["entry", "ours", "against", "speed-up", "memory ratio"], lines)


# ---------------------------------------------------------------------------------------------------------- command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=list(DEFAULT_CASES),
        metavar="MODEL:BATCH[:TASK]",
        help=f"timm's names; the task is infer (default) or train; default: {' '.join(DEFAULT_CASES)}",
    )
    default = [provider for provider in PROVIDERS if not provider.endswith(ONLY_BY_NAME)]
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=default, metavar="PROVIDER")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default 3)")
    parser.add_argument("--out", type=Path, help="JSON Lines file (default results/<device>/model.jsonl)")
    parser.add_argument("--commit", help="what the rows say was measured (default: git's HEAD)")
    parser.add_argument("--device", default="cuda")
    # For trying the script: images small enough for a CPU.
    parser.add_argument("--img-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        args.entries = [Entry.parse(text, args.img_size) for text in args.cases]
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = parse_arguments()
    device = pick_device(args.device)
    compile_or_raise()
    torch.backends.cudnn.benchmark = True  # as timm's train.py and validate.py have it
    out = args.out or default_out(device, "model.jsonl")
    common = provenance(device, args.commit)
    clock = EndToEndClock() if device.type == "cuda" else HostClock()
    print(f"end to end: the host's launches count\n{common}\nrows go to {out}", flush=True)
    allocate_workspaces(device)

    plan = [(entry, [p for p in dict.fromkeys(args.providers) if entry.takes(p, device)]) for entry in args.entries]
    progress = Progress(sum(len(providers) + args.warmup + args.repeats for _, providers in plan))
    rows, ours_missing = [], []
    for entry, providers in plan:
        measured = benchmark(entry, providers, args, device, clock, progress)
        new = make_rows(entry, measured, common)
        merge_rows(out, new, KEY)  # entry by entry: what is measured survives whatever happens next
        rows += new
        ours_missing += [f"{entry.name} {p}" for p in providers if p.startswith("flashwin") and p not in measured]
        release_memory(device)
    progress.close()

    print(summary(rows), comparison(rows), sep="\n\n")
    if ours_missing:
        print("flashwin failed or was wrong: " + "; ".join(ours_missing))
    return 1 if ours_missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
