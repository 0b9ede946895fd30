"""Whether a module is as it was: then what was found out about it still holds, and need not be asked again.

To ask takes Python longer than the launch of a kernel. That nothing was touched is seen by comparing lists, which the
interpreter does by itself for the most part.
"""

import weakref
from itertools import chain
from operator import is_, itemgetter

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
# What every module has beside its mode and its parts: dictionaries that stay, and flags of its hooks.
_IN_EVERY_MODULE = vars(nn.Module()).keys() - {"training", "_modules"}
# The attribute of a module that holds its snapshot. In a dictionary of modules it might keep them alive: what a module
# holds may lead back to it.
_PLACE = "_flashwin_snapshot"


class Snapshot:
    """A module and all that is in it as they were, and what was `found` out about them since.

    It sees classes, attributes, submodules, tensors but for their values, and hooks, save those of the module itself. A
    class that is patched it does not see.
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
        self._attributes = [part.__dict__ for part in self._parts]
        attributes = [module.__dict__, *self._attributes]
        self._getters = [itemgetter(*own.keys() - _IN_EVERY_MODULE - {_PLACE}) for own in attributes]
        self._hooks = [own[kind] for own in self._attributes for kind in _HOOKS]
        self._has_hooks = any(self._hooks)
        # Views show what the dictionaries hold later on. What has no parts or tensors does nothing with any it may get.
        self._children = [own["_modules"].values() for own in attributes if own["_modules"]]
        self._tensors = [own[kind].values() for own in attributes for kind in _TENSORS if own[kind]]
        self._values = self._current_values(module)
        self._seen = self._state(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is the one, and as it was. A copy of it, which may share its parts, is another."""
        if self._module() is not module or self._seen is None or any(self._hooks) is not self._has_hooks:
            return False
        try:
            values, state = self._current_values(module), self._state(module)
        except Exception:  # as above, or an attribute is gone
            return False
        return state == self._seen and len(values) == len(self._values) and all(map(is_, values, self._values))

    def _current_values(self, module: nn.Module) -> list:
        """Of attributes. They are compared as objects: some cannot be compared otherwise, or only by the GPU."""
        values = [self._getters[0](module.__dict__)]
        values += [get(own) for get, own in zip(self._getters[1:], self._attributes, strict=True)]
        return list(chain.from_iterable(values))

    def _state(self, module: nn.Module) -> tuple:
        own = module.__dict__
        return (
            type(module),
            len(own) - (_PLACE in own),
            list(map(type, self._parts)),
            list(map(len, self._attributes)),
            list(chain.from_iterable(self._children)),
            list(map(len, self._hooks)) if self._has_hooks else None,
            # What is known of a tensor: itself it would be kept alive, and with a weak reference to it it could not be
            # swapped for another. The address of its memory tells the device, too.
            [
                x is not None and (type(x), x.data_ptr(), x.dtype, x.numel(), x.requires_grad)
                for x in chain.from_iterable(self._tensors)
            ],
        )

    def __reduce__(self):
        return type(None), ()  # copied or pickled, it is none: a copy of a module starts without


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
