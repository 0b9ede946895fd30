"""The promises of configs/: timm's train.py takes every line, and the schedules are those that the files name.

train.py puts whatever a file holds into its options: a misspelt name passes in silence.
"""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import yaml
from timm.data import create_transform
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_flashwin  # noqa: F401  (registers the *_flashwin names)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
IMAGENET = [path for path in CONFIGS if path.stem.endswith("in1k")]
IMAGENET_IMAGES, STEP_IMAGES = 1_281_167, 1024

# `dest` of every option of train.py in timm's repository at version 1.0.29.dev0. No release on PyPI has the script;
# with --timm-scripts the files are compared with the parser itself.
TRAIN_OPTIONS = set(
    """
    aa amp amp_dtype aug_repeats aug_splits batch_size bce_loss bce_pos_weight bce_sum bce_target_thresh bn_eps
    bn_momentum channels_last checkpoint_hist class_map clip_grad clip_mode color_jitter color_jitter_prob
    cooldown_epochs crop_pct cutmix cutmix_minmax data data_dir dataset dataset_download dataset_trust_remote_code
    decay_epochs decay_milestones decay_rate device device_modules dist_bn distill_loss_weight drop drop_block
    drop_connect drop_path epoch_repeats epochs eval_metric experiment fast_norm fuser gaussian_blur_prob gp
    grad_accum_steps grad_checkpointing grayscale_prob head_init_bias head_init_scale hflip img_size in_chans
    initial_checkpoint input_img_mode input_key input_size interpolation jsd_loss kd_distill_type kd_loss_type
    kd_model_name kd_student_feature_dim kd_teacher_feature_dim kd_temperature kd_token_distill_type layer_decay
    layer_decay_min_scale layer_decay_no_opt_scale local_rank log_interval log_wandb lr lr_base lr_base_scale
    lr_base_size lr_cycle_decay lr_cycle_limit lr_cycle_mul lr_k_decay lr_noise lr_noise_pct lr_noise_std mean
    min_lr mixup mixup_mode mixup_off_epoch mixup_prob mixup_switch_prob model model_dtype model_ema model_ema_decay
    model_ema_force_cpu model_ema_warmup model_kwargs momentum naflex_loader naflex_loss_scale naflex_max_seq_len
    naflex_patch_size_probs naflex_patch_sizes naflex_patchify_channels_first naflex_train_seq_lens no_aug no_ddp_bb
    no_prefetcher no_resume_opt num_classes opt opt_betas opt_eps opt_kwargs output patience_epochs pin_mem
    pretrained pretrained_path ratio recount recovery_interval remode reprob resplit resume save_images scale sched
    sched_on_updates seed smoothing split_bn start_epoch std sync_bn synchronize_step target_key task_loss_weight
    torchcompile torchcompile_mode torchscript train_batch_sizes train_batches_per_epoch train_crop_mode
    train_img_sizes train_interpolation train_num_samples train_size_probs train_size_random_mix train_size_schedule
    train_size_schedule_spread train_split tta use_multi_epochs_loader val_interval val_num_samples val_split
    validation_batch_size variable_batch_loss_scale vflip wandb_project wandb_resume_id wandb_tags warmup_epochs
    warmup_lr warmup_prefix weight_decay worker_seeding workers
    """.split()
)


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def schedule(config: dict, images: int, step_images: int):
    """timm's scheduler, as train.py makes it, over an optimizer of little; the epochs; the updates of an epoch."""
    lr = config.get("lr") or config["lr_base"] * step_images / config["lr_base_size"]
    args = Namespace(**{"momentum": 0.9, "lr": lr} | config)
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **optimizer_kwargs(cfg=args))
    updates = images // step_images
    return *create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates), updates


@by_name(CONFIGS)
def test_every_key_is_an_option_of_timms_train_script(path):
    assert set(read(path)) <= TRAIN_OPTIONS


@by_name(CONFIGS)
def test_every_value_is_what_it_looks_like(path):
    """YAML reads 1e-3, without a point, as text."""

    def check(value):
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                check(inner)
        elif isinstance(value, str):
            with pytest.raises(ValueError):
                float(value)

    check(read(path))


@by_name(CONFIGS)
def test_plugin_brings_the_model_and_timm_has_its_weights(path):
    config = read(path)
    assert config["device_modules"] == ["timm_flashwin"]
    assert config["model"].partition(".")[0].endswith("_flashwin") and timm.is_model(config["model"])
    cfg = timm.get_pretrained_cfg(config["model"])  # raises where there is no such tag
    if config.get("pretrained"):
        assert cfg.tag == config["model"].partition(".")[2] and cfg.hf_hub_id.endswith(cfg.tag)
    assert config.get("interpolation", cfg.interpolation) == cfg.interpolation


@by_name(CONFIGS)
def test_optimizer_and_augmentation_are_timms(path):
    config = read(path)
    assert config["opt"] in list_optimizers()
    policy = config.get("aa")
    transform = create_transform(224, is_training=True, auto_augment=policy, re_prob=config.get("reprob", 0.0))
    assert ("RandAugment" in str(transform)) == (policy is not None)


@by_name(IMAGENET)
def test_imagenet_schedules_last_as_long_as_the_published_ones_and_meet_their_ends(path):
    config = read(path)
    scheduler, epochs, updates = schedule(config, IMAGENET_IMAGES, STEP_IMAGES)
    finetune = bool(config.get("pretrained"))
    assert (epochs, config["warmup_epochs"]) == ((30, 5) if finetune else (300, 20))
    peak, start, end = (4e-5, 4e-8, 4e-7) if finetune else (1e-3, 1e-6, 1e-5)
    assert (config["warmup_lr"], config["min_lr"], config["lr_base_scale"]) == (start, end, "linear")

    def lr(update: int) -> float:
        scheduler.step_update(update)
        return scheduler.optimizer.param_groups[0]["lr"]

    warmup, last = config["warmup_epochs"] * updates, epochs * updates
    assert lr(warmup) == pytest.approx(peak) and lr(warmup // 2) == pytest.approx(peak / 2, rel=0.01)
    assert lr(last - 1) == pytest.approx(end, rel=0.01)


@by_name(IMAGENET)
def test_imagenet_files_state_a_step_of_1024_images_on_8_gpus_and_their_source(path):
    config, text = read(path), path.read_text()
    assert 8 * config["batch_size"] * config.get("grad_accum_steps", 1) == STEP_IMAGES
    assert "microsoft/Swin-Transformer" in text and "arXiv 2" in text and f"--config {path.name}" in text


def test_fashion_mnist_model_is_built_from_its_file():
    config = read(next(path for path in CONFIGS if path.stem == "fashion_mnist"))
    model = timm.create_model(
        config["model"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
        drop_path_rate=config["drop_path"],
        **config["model_kwargs"],
    )
    assert model(torch.zeros(1, config["in_chans"], config["img_size"], config["img_size"])).shape == (1, 10)
    _, epochs, _ = schedule(config, 60_000, config["batch_size"])
    assert epochs == config["epochs"]


# ------------------------------------------------------------------------------------------ timm's script


@pytest.fixture
def train_script(timm_scripts) -> ModuleType:
    """timm's train.py as a module of its own: its parsers are made at import, and change with the file they read."""
    spec = importlib.util.spec_from_file_location("timm_train_script", timm_scripts / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@by_name(CONFIGS)
def test_timms_own_parser_reads_the_file(path, train_script, monkeypatch):
    options = {action.dest: action for action in train_script.parser._actions}
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    args, _ = train_script._parse_args()
    for name, value in read(path).items():
        option = options[name]
        assert getattr(args, name) == value
        if option.nargs == 0:
            assert isinstance(value, bool), name
        elif value is not None and option.type is not None:
            for one in value if isinstance(value, list) else [value]:
                assert option.type(one) == one, name
            assert isinstance(value, list) == (option.nargs == "+"), name
