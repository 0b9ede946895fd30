"""The promises about the hub, kept with the real client and a hub on this machine (local_hub.py).

timm's weights come from timm's repositories, a wrong file is never taken for weights, and what a user saves or pushes
loads everywhere, in timm without this package too.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import timm_flashwin

SMALL = dict(img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
V1 = "swin_tiny_patch4_window7_224.ms_in1k"
FAMILIES = [V1, "swin_s3_tiny_224.ms_in1k", "swinv2_tiny_window8_256.ms_in1k", "swinv2_cr_tiny_ns_224.sw_in1k"]

CUT = "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k"
TEXT = "swin_small_patch4_window7_224.ms_in1k"
ONE_TENSOR_LESS = "swin_small_patch4_window7_224.ms_in22k_ft_in1k"
OTHER_MODEL = "swin_base_patch4_window7_224.ms_in1k"
NO_FILE = "swin_base_patch4_window7_224.ms_in22k_ft_in1k"
NO_REPOSITORY = "swin_base_patch4_window12_384.ms_in1k"
REFUSED = {  # what is served as these weights -> the error that it has to be
    CUT: ("SafetensorError", "incomplete metadata"),
    TEXT: ("SafetensorError", "header"),
    ONE_TENSOR_LESS: ("RuntimeError", 'Missing key(s) in state_dict: "norm.weight"'),
    OTHER_MODEL: ("RuntimeError", "size mismatch for patch_embed.proj.weight"),
    NO_FILE: ("EntryNotFoundError", f"timm/{NO_FILE}/resolve/main/pytorch_model.bin"),
    NO_REPOSITORY: ("RepositoryNotFoundError", f"timm/{NO_REPOSITORY}/resolve/main/model.safetensors"),
}

# Importing torch takes seconds, so one process creates several models: for each, which tensors differ from a file.
CREATE = """
import importlib, json, sys
import timm, torch
from safetensors.torch import load_file

modules, wanted = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
answers = []
for name, kwargs, file in wanted:
    try:
        state = timm.create_model(name, pretrained=True, **kwargs).state_dict()
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
    else:
        expected = load_file(file)
        answers.append(sorted(
            key for key in state.keys() | expected.keys()
            if key not in state or key not in expected or not torch.equal(state[key], expected[key])
        ))
print(json.dumps([answers, "timm_flashwin" in sys.modules]))
"""

PUSH = """
import json, sys
import timm, timm_flashwin
from safetensors.torch import load_file

name, kwargs, file, repository = json.loads(sys.argv[1])
model = timm.create_model(name, **kwargs)
model.load_state_dict(load_file(file))
timm.models.push_to_hf_hub(model, repository, model_args=kwargs)
"""


def twin(name: str) -> str:
    architecture, _, tag = name.partition(".")
    return f"{architecture}_flashwin.{tag}"


def run(program: str, question: list, environment: dict[str, str]) -> str:
    """What the program prints, in a process of its own: the client reads its settings at import."""
    command = [sys.executable, "-c", program, json.dumps(question)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def create(wanted: list[tuple[str, dict, Path]], environment: dict[str, str], plugin: bool = True) -> list[list[str]]:
    """For every (name, kwargs, file): the tensors in which the pretrained model differs from the file, or the error."""
    question = [["timm_flashwin"] * plugin, [(name, kwargs, str(file)) for name, kwargs, file in wanted]]
    answers, imported = json.loads(run(CREATE, question, environment).splitlines()[-1])
    assert imported == plugin
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the hub serves."""
    folder = tmp_path_factory.mktemp("served")
    files = {name: folder / "timm" / name / "model.safetensors" for name in (*FAMILIES, *REFUSED)}
    for name, file in files.items():
        if name != NO_REPOSITORY:
            file.parent.mkdir(parents=True)
    for name in FAMILIES:
        save_file(timm.create_model(name, **SMALL).state_dict(), files[name])
    whole = load_file(files[V1])
    files[CUT].write_bytes(files[V1].read_bytes()[:-1000])
    files[TEXT].write_text("<html>This is an answer, and no weights.</html>")
    save_file({key: tensor for key, tensor in whole.items() if key != "norm.weight"}, files[ONE_TENSOR_LESS])
    save_file(timm.create_model(V1, **SMALL | {"embed_dim": 24}).state_dict(), files[OTHER_MODEL])
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    with LocalHub(folder) as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub, folder, cache) -> dict[str, list[str]]:
    """What came of every name of timm's, and of "10 classes"."""
    wanted = {name: (twin(name), SMALL, folder / "timm" / name / "model.safetensors") for name in FAMILIES}
    wanted["10 classes"] = (twin(V1), SMALL | {"num_classes": 10}, wanted[V1][2])
    wanted |= {name: (twin(name), SMALL, wanted[V1][2]) for name in REFUSED}
    return dict(zip(wanted, create(list(wanted.values()), hub.environment(cache)), strict=True))


# ------------------------------------------------------------------------------------------------- timm's weights


@pytest.mark.parametrize("name", FAMILIES)
def test_pretrained_weights_are_those_of_timms_own_repository(name, online, hub):
    assert online[name] == []
    asked = dict.fromkeys(request for request in hub.requests if name in request)
    assert list(asked) == [f"{method} /timm/{name}/resolve/main/model.safetensors" for method in ("HEAD", "GET")]


def test_nothing_but_timms_repositories_is_asked_for(online, hub):
    of_models = [request.split()[1] for request in hub.requests if "/resolve/" in request]
    assert of_models and all(path.startswith("/timm/") and "flashwin" not in path for path in of_models)


def test_other_number_of_classes_resets_the_head_and_nothing_else(online):
    assert online["10 classes"] == ["head.fc.bias", "head.fc.weight"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_weights_of_this_model_is_an_error_and_no_random_model(name, online):
    error, message = REFUSED[name]
    assert len(online[name]) == 2, "a model was created"
    assert online[name][0].endswith(error) and message in online[name][1]


def test_offline_the_cache_serves_what_was_fetched_and_names_what_was_not(online, hub, folder, cache):
    before = list(hub.requests)
    wanted = [(twin(name), SMALL, folder / "timm" / name / "model.safetensors") for name in (*FAMILIES, NO_REPOSITORY)]
    *cached, missing = create(wanted, hub.environment(cache, HF_HUB_OFFLINE="1"))
    assert cached == [[]] * len(FAMILIES)
    assert missing[0] == "LocalEntryNotFoundError" and "local cache" in missing[1]
    assert hub.requests == before


# ---------------------------------------------------------------------------------------------- a user's weights


def created_by_tag(name: str, **kwargs):
    return timm.create_model(name, **kwargs)


def created_with_a_cfg(name: str, **kwargs):
    """As newer scripts of timm's do: they resolve the cfg first, and hand it over."""
    return timm.create_model(name.partition(".")[0], pretrained_cfg=timm.get_pretrained_cfg(name), **kwargs)


def created_with_a_cfg_dict(name: str, **kwargs):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    return timm.create_model("swin_tiny_flashwin", pretrained_cfg=cfg, **kwargs)


@pytest.mark.parametrize("how", [created_by_tag, created_with_a_cfg, created_with_a_cfg_dict])
def test_a_model_says_the_name_that_timm_has_for_its_architecture(how):
    model = how(twin(V1), **SMALL)
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["tag"], cfg["hf_hub_id"]) == (*V1.split("."), f"timm/{V1}")
    assert model.default_cfg is cfg
    registered = timm.get_pretrained_cfg(twin(V1))
    assert registered.architecture == twin(V1).partition(".")[0]  # timm's registry keeps its own account
    features = how(twin(V1), features_only=True, **SMALL)
    assert features.pretrained_cfg["architecture"] == cfg["architecture"]


def test_an_architecture_of_the_users_own_is_left_as_it_is():
    cfg = dict(architecture="mine", num_classes=5)
    model = timm.create_model("swin_tiny_flashwin", pretrained_cfg=cfg, **SMALL)
    assert model.pretrained_cfg["architecture"] == "mine"


def test_saved_and_pushed_models_load_in_timm_without_this_package(hub, tmp_path):
    """And with it: timm's own model, which accelerate() takes."""
    finetuned = SMALL | {"num_classes": 10}
    wanted = []
    for name, how in ((V1, created_with_a_cfg), (FAMILIES[2], created_by_tag), (FAMILIES[3], created_with_a_cfg)):
        model = how(twin(name), **finetuned)
        save_for_hf(model, tmp_path / name, model_args=finetuned, safe_serialization="both")
        wanted.append((f"local-dir:{tmp_path / name}", {}, tmp_path / name / "model.safetensors"))
    pushed = [twin(V1), finetuned, str(wanted[0][2]), "me/pushed"]
    run(PUSH, pushed, hub.environment(tmp_path / "cache"))
    wanted.append(("hf-hub:me/pushed", {}, wanted[0][2]))

    assert create(wanted, hub.environment(tmp_path / "cache"), plugin=False) == [[]] * 4
    for name, _, file in wanted[:3]:
        model = timm.create_model(name, pretrained=True)
        assert model.num_classes == 10 and timm_flashwin.accelerate(model).replaced
        assert all((model.state_dict()[key] == tensor).all() for key, tensor in load_file(file).items())
