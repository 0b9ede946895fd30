"""Launching past Triton's own way: with what that would hand over, and not past a profiler's hooks."""

import pytest
import torch

from timm_flashwin import ops

triton = pytest.importorskip("triton")

from timm_flashwin.kernels import launcher  # noqa: E402

GRID, STREAM, ARGUMENTS = (3, 2, 1), 77, (1024, 5, 0.5, True)
has_known_run = pytest.mark.skipif(not launcher._HAS_KNOWN_RUN, reason="this Triton launches in its own way alone")


class Loaded(triton.compiler.CompiledKernel):
    """Triton's way from `compiled[grid](...)` to the launch, which is written down."""

    run = None  # in some versions a property, which could not be set

    def __init__(self):
        self.name, self.src, self.module, self.function, self.packed_metadata = "kernel", None, None, 11, (1, 2)
        self.calls = []
        self.run = lambda *arguments: self.calls.append(arguments)

    def _init_handles(self):
        pass


class Notes:
    """A hook with an attribute that Triton's chains of hooks have as well."""

    def __init__(self):
        self.calls = []

    def __call__(self, data):
        self.calls.append(data)


@pytest.fixture(params=["chain", "function"])
def add_hook(request, monkeypatch):
    """Set a hook, alone or in a chain that was empty; the hook is returned."""
    chain_type = getattr(triton.knobs, "HookChain", None)
    if request.param == "chain" and chain_type is None:
        pytest.skip("this Triton has no chains of hooks")
    hooks = triton.knobs.runtime
    if request.param == "chain":
        monkeypatch.setattr(hooks, "launch_enter_hook", chain_type())

    def add() -> Notes:
        notes = Notes()
        if request.param == "chain":
            hooks.launch_enter_hook.add(notes)
        else:
            monkeypatch.setattr(hooks, "launch_enter_hook", notes)
        return notes

    return add


def test_a_launch_has_what_tritons_own_has_but_for_the_hooks():
    compiled = Loaded()
    compiled[GRID](*ARGUMENTS, stream=STREAM)
    launcher.runner(compiled, GRID)(STREAM, *ARGUMENTS)
    tritons, ours = compiled.calls
    between = 6, 9 if launcher._HAS_KNOWN_RUN else 6  # metadata for the hooks, and the hooks
    assert ours[: between[0]] == tritons[: between[0]] == (*GRID, STREAM, 11, (1, 2))
    assert ours[between[1] :] == tritons[between[1] :]
    assert ours[-len(ARGUMENTS) :] == ARGUMENTS
    if launcher._HAS_KNOWN_RUN:
        assert ours[between[0] : between[1]] == (None, None, None)


@has_known_run
def test_hooks_that_come_later_are_handed_over(add_hook):
    compiled = Loaded()
    launch = launcher.runner(compiled, GRID)
    add_hook()
    launch(STREAM, *ARGUMENTS)
    (*_, metadata, enter, _), rest = compiled.calls[0][:9], compiled.calls[0][9:]
    assert metadata is not None and enter is triton.knobs.runtime.launch_enter_hook and rest == ARGUMENTS


@pytest.mark.gpu
@has_known_run
def test_a_hook_sees_every_launch(add_hook):
    x, weight = torch.randn(4, 8, device="cuda"), torch.ones(8, device="cuda")

    def normed():
        return ops.add_layer_norm(x, None, None, weight, weight, 1e-5, x.dtype)[1]

    expected = [normed() for _ in range(2)][1]
    notes = add_hook()
    assert torch.equal(normed(), expected)
    assert [data.get()["name"] for data in notes.calls] == ["add_layer_norm_kernel"]
