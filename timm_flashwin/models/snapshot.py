"""Whether a module is as it was: then what was found out about it still holds, and need not be asked again.

To ask takes Python longer than the launch of a kernel. That nothing was touched is seen by comparing lists, which the
interpreter does by itself.
"""

from itertools import chain
from operator import is_

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """A module with all that is in it: classes, attributes, submodules, tensors, and what may change of a parameter in
    place. A hook inside ends it, one on the module itself does not."""

    def __init__(self, module: nn.Module):
        self._modules = list(module.modules())
        self._classes = list(map(type, self._modules))
        attributes = [part.__dict__ for part in self._modules]
        # Views show what the dictionaries hold later on.
        children = [own["_modules"].values() for own in attributes if own["_modules"]]
        self._values = [*[own.values() for own in attributes], *children]
        self._tensors = [own[kind].values() for own in attributes for kind in ("_parameters", "_buffers") if own[kind]]
        self._hooks = [own[kind] for own in attributes[1:] for kind in _HOOKS]
        self._parameters = list(module.parameters())
        self._seen_values = list(map(list, self._values))
        self._seen_tensors = list(chain.from_iterable(self._tensors))
        self._seen_memory = self._memory()

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is the one, and as it was. A copy of it, which may share its parts, is another."""
        if self._modules[0] is not module or list(map(type, self._modules)) != self._classes or any(self._hooks):
            return False
        tensors = list(chain.from_iterable(self._tensors))
        if len(tensors) != len(self._seen_tensors) or not all(map(is_, tensors, self._seen_tensors)):
            return False
        try:
            return list(map(list, self._values)) == self._seen_values and self._memory() == self._seen_memory
        except RuntimeError:  # a tensor among the attributes is another one, and cannot be compared
            return False

    def _memory(self) -> list[tuple]:
        """Who gives a parameter another dtype, device or size in place gives it other memory, or less of it."""
        return [(x.data_ptr(), x.numel(), x.requires_grad) for x in self._parameters]
