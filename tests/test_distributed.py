"""Two processes train a flashwin model as one does: DDP and FSDP2, over gloo on CPUs and over NCCL on two GPUs."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from conftest import GPU
from judge import relative_error
from pairs import blocks, make_pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_flashwin import accelerate

PROCESSES = 2
SMALL = dict(img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(1,), num_classes=3)


def loss_of(model, x):
    return model(x).square().sum(dim=1).mean()


def check_gradients(model, expected, whole=lambda grad: grad):
    for name, parameter in model.named_parameters():
        error = relative_error(whole(parameter.grad), expected[name])
        assert error < 1e-4, f"{name}: {error:.1e}"


def check_ddp(model, x, expected):
    for find_unused_parameters in (False, True):
        model.zero_grad()
        wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
        loss_of(wrapped, x).backward()
        check_gradients(model, expected)


def check_fsdp(model, x, expected):
    model.zero_grad()
    mesh = init_device_mesh(x.device.type, (PROCESSES,))
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh)
    loss_of(model, x).backward()
    check_gradients(model, expected, lambda grad: grad.full_tensor())


def train(rank, device_type, file):
    """One process: the gradients of its half of the batch, averaged over the processes, are those of the batch."""
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    try:
        torch.manual_seed(0)
        _, model = make_pair(**SMALL)
        accelerate(model.to(device_type).eval(), impl="triton")
        x = torch.randn(PROCESSES, 3, 32, 32).to(device_type)
        alone = copy.deepcopy(model)
        loss_of(alone, x).backward()
        expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
        check_ddp(model, x.chunk(PROCESSES)[rank], expected)
        if device_type == "cuda" or hasattr(torch.cpu.Stream, "record_event"):  # not in torch 2.6
            check_fsdp(model, x.chunk(PROCESSES)[rank], expected)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # No orderly shutdown of the interpreter: it has ended with "terminate called without an active exception", probably
    # because a thread of gloo that lets go of a tensor meanwhile is refused the interpreter.
    os._exit(0)


@pytest.mark.skipif(GPU, reason="the kernels run on the CPU where there is no GPU")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(train, ("cpu", tmp_path / "rendezvous"), nprocs=PROCESSES)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="needs two GPUs")
def test_two_gpus_have_the_gradients_of_one(tmp_path, ieee):
    torch.multiprocessing.spawn(train, ("cuda", tmp_path / "rendezvous"), nprocs=PROCESSES)
