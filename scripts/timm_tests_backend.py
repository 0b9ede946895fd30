"""The plugin as timm's own tests load one: `TORCH_BACKEND=timm_tests_backend`, with this folder on PYTHONPATH.

timm's tests import the module of that name before they list the models. The names would be enough for most of them;
some list the models of timm's own modules, and so are told which of these a name belongs to.
"""

from timm.models import _registry

from timm_flashwin.models.registry import flashwin_names

for _name, _arch in flashwin_names().items():
    _registry._module_to_models[_registry._model_to_module[_arch]].add(_name)
