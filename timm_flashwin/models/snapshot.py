"""Whether a module is as it was: then what was found out about it still holds, and need not be asked again.

To ask takes Python longer than the launch of a kernel. That nothing was touched is seen by comparing lists, which the
interpreter does by itself for the most part.
"""

import weakref
from itertools import chain
from operator import itemgetter

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_IN_EVERY_MODULE = vars(nn.Module()).keys()
# Attributes of other types than these may keep much alive, and may be no easy matter to compare.
_SIMPLE = (bool, int, float, str, tuple, type(None))
# The attribute of a module that holds its snapshot. In a dictionary of modules it might keep them alive: what a module
# holds may lead back to it.
_PLACE = "_flashwin_snapshot"


class Snapshot:
    """A module and all that is in it as they were, and what was `found` out about them since.

    It sees classes, attributes, submodules, hooks but those of the module itself, and tensors but for their values. It
    does not see a class that is patched, nor what changes inside of an attribute, such as a list. A submodule that is
    replaced it keeps until it is asked again.
    """

    def __init__(self, module: nn.Module):
        self.found = {}
        self._module = weakref.ref(module)
        try:
            self._look(module)
        except Exception:  # a tensor without memory, as sparse ones; a module unlike others, as scripted ones
            self._seen = None

    def _look(self, module: nn.Module) -> None:
        self._parts = list(module.modules())[1:]
        # Of the module neither a reference nor its __dict__, or nobody but the garbage collector would free it.
        own, attributes = module.__dict__, [part.__dict__ for part in self._parts]
        self._own_values = itemgetter(*own.keys() - {_PLACE})
        self._is_simple = _is_simple(own)
        # Views show what the dictionaries hold later on. What has no parts or tensors does nothing with any it may get.
        self._simple = [each.values() for each in attributes if _is_simple(each)]
        self._others = [each.values() for each in attributes if not _is_simple(each)]
        self._hooks = [each[kind] for each in attributes for kind in _HOOKS]
        self._has_hooks = any(self._hooks)
        self._children = [each["_modules"].values() for each in (own, *attributes) if each["_modules"]]
        self._tensors = [each[kind].values() for each in (own, *attributes) for kind in _TENSORS if each[kind]]
        self._seen = self._state(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is the one, and as it was. A copy of it, which may share its parts, is another."""
        if self._module() is not module or self._seen is None or any(self._hooks) is not self._has_hooks:
            return False
        try:
            return self._state(module) == self._seen
        except Exception:  # as above; an attribute is gone, or cannot be compared with what it was
            return False

    def _state(self, module: nn.Module) -> tuple:
        own = module.__dict__
        own_values = self._own_values(own)
        return (
            type(module),
            list(map(type, self._parts)),
            len(own) - (_PLACE in own),
            own_values if self._is_simple else list(map(id, own_values)),
            list(map(list, self._simple)),
            [list(map(id, values)) for values in self._others],
            list(map(id, chain.from_iterable(self._children))),
            list(map(len, self._hooks)) if self._has_hooks else None,
            # Not the tensors, which would be kept alive, nor weak references, with which none could be swapped: what
            # matters of them. The address tells the device, too.
            [
                x is not None and (type(x), x.data_ptr(), x.dtype, x.numel(), x.requires_grad, x.is_neg())
                for x in chain.from_iterable(self._tensors)
            ],
        )

    def __reduce__(self):
        return type(None), ()  # in a copy or a pickle of the module None is in its place


def snapshot_of(module: nn.Module) -> Snapshot:
    """`module` as it is: the snapshot that it has for as long as nothing in it changes, or else a new one."""
    snapshot = module.__dict__.get(_PLACE)
    if snapshot is None or not snapshot.holds(module):
        forget(module)  # before, not after: what is in the old one may be large
        snapshot = module.__dict__[_PLACE] = Snapshot(module)
    return snapshot


def forget(module: nn.Module) -> None:
    """Remove the snapshot that `module` has, if it has one."""
    module.__dict__.pop(_PLACE, None)


def _is_simple(attributes: dict) -> bool:
    return all([name in _IN_EVERY_MODULE or type(value) in _SIMPLE for name, value in attributes.items()])
