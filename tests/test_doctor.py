"""The promises of `timm-flashwin doctor`: what it says is so, it sees what is wrong, and its status tells."""

import pytest
import timm
import torch

import timm_flashwin
from timm_flashwin import doctor
from timm_flashwin.cli import main
from timm_flashwin.doctor import Case, attention_errors

CPU = torch.device("cpu")
SMALL, SMALL_COSINE = Case(4, cosine=False), Case(4, cosine=True)


def marked(out: str) -> list[str]:
    return [line for line in out.splitlines() if doctor.FAILED in line and "see the lines" not in line]


def test_on_a_cpu_it_says_that_timms_code_runs_and_that_nothing_is_faster(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for version in (torch.__version__, timm.__version__, timm_flashwin.__version__):
        assert version in out
    assert out.count("timm's code [1]") == len(doctor.CASES) * len(doctor.DTYPES)
    assert "[1] the tensors are on the CPU" in out and "nothing is faster on 'cpu'" in out
    assert out.rstrip().endswith("all is well") and not marked(out)
    lines = [line.split() for line in out.splitlines() if line.startswith("window 7 ") and "code" not in line]
    assert len(lines) == 3 and all(line[3] == line[4] for line in lines)  # bit for bit: ours errs as timm's does
    bfloat16, float16, float32 = (float(line[4]) for line in lines)  # each computed in its dtype
    assert bfloat16 > 1e-3 > float16 > 1e-4 and float32 < 1e-6


@pytest.mark.gpu
def test_on_a_gpu_all_runs_on_the_kernels_and_is_exact(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "timm's code" not in out and not marked(out)
    how_fast = out.partition("how fast: ")[2]
    assert how_fast.count(" x") >= 2 * len(doctor.SPEED_CASES)


@pytest.mark.parametrize("case", [SMALL, SMALL_COSINE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=doctor.short)
def test_the_kernels_pass_and_are_what_is_examined(case, dtype, kernel_device, ieee):
    kernels, timms_code = (
        attention_errors(case, dtype, torch.device(kernel_device), impl) for impl in ("triton", "reference")
    )
    assert all(error.passed for error in kernels), kernels
    assert [error.ours for error in kernels] != [error.ours for error in timms_code]


def lose_bias(attn, block):
    attn.relative_position_bias_table.zero_()


def lose_mask(attn, block):
    block.attn_mask = None


def lose_shift(attn, block):
    block.shift_size = (0, 0)


def lose_the_bias_of_padding(attn, block):
    attn.qkv.register_forward_hook(lambda module, args, out: out * (args[0] != 0).any(-1, keepdim=True))


def lose_scale(attn, block):
    attn.logit_scale.fill_(2.3)


def scale_one_gradient(attn, block):
    attn.qkv.bias.register_hook(lambda gradient: gradient * 1.02)


def make_nan(attn, block):
    attn.proj.bias[5] = float("nan")


@pytest.mark.parametrize(
    ("damage", "case"),
    [
        (lose_bias, SMALL),
        (lose_mask, SMALL),
        (lose_mask, SMALL_COSINE),
        (lose_shift, SMALL),
        (lose_the_bias_of_padding, SMALL),
        (lose_scale, SMALL_COSINE),
        (scale_one_gradient, SMALL),
        (make_nan, SMALL),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=doctor.short)
def test_it_sees(damage, case, dtype, monkeypatch):
    def accelerate(block, impl):
        with torch.no_grad():
            damage(block.attn, block)

    monkeypatch.setattr(doctor, "accelerate", accelerate)
    assert not all(error.passed for error in attention_errors(case, dtype, CPU))


def test_the_failing_line_is_marked_and_the_status_is_1(monkeypatch, capsys):
    def accelerate(block, impl):
        if block.window_size == (12, 12):
            torch.nn.init.zeros_(block.attn.relative_position_bias_table)
        if block.window_size == (16, 16):
            raise RuntimeError("the compiler\ngave up")

    monkeypatch.setattr(doctor, "accelerate", accelerate)
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    first, second = marked(out)
    assert first.startswith("window 12 ") and first.endswith(doctor.FAILED)
    assert second.startswith("window 16, cosine ") and second.endswith(f"{doctor.FAILED}: the compiler gave up")
    assert "all is well" not in out


def test_speed_is_timms_time_over_ours_of_the_same_steps(monkeypatch, capsys):
    """With everything but the clock, which is a GPU's."""
    steps = []

    def median_ms(step, blocks, device):
        for block in blocks:
            step(block)
        steps.append([type(block).__name__ for block in blocks])
        return 2.0, 5.0

    monkeypatch.setattr(doctor, "median_ms", median_ms)
    monkeypatch.setattr(doctor, "SPEED_CASES", [(SMALL, 1, 8), (SMALL_COSINE, 1, 8)])
    assert doctor.print_speed(CPU)
    assert capsys.readouterr().out.count("2.000   5.000  x2.50") >= 2
    swin, swin_v2 = (["FlashSwinTransformer" + name, "SwinTransformer" + name] for name in ("Block", "V2Block"))
    assert steps == [swin, swin, swin_v2, swin_v2]


def test_a_gpu_that_cannot_run_the_kernels_is_not_well(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "fallback_reason", lambda *call: "Triton cannot be used (no compiler)")
    assert not doctor.print_implementations(torch.device("cuda"))
    assert marked(capsys.readouterr().out) == [f"[1] Triton cannot be used (no compiler)  {doctor.FAILED}"]
