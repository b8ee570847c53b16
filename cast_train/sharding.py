"""FSDP2: a model's parameters, gradients and optimizer state cut over the devices, each tensor along its rows.

Rows stay whole, and with them the groups of four that the mask is made of: a mask computed from a device's own piece
is the mask of the whole weight. FSDP1, which cuts one flat vector anywhere, would break both.
"""

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from cast_train.dtensor import local, whole
from cast_train.scaling import ScaledLinear
from cast_train.sparse_model import is_transposed, scope
from conversion.errors import InputError


def asked_for_fsdp() -> bool:
    """Tell whether `accelerate launch` was told to shard; InputError if it was told to do so by FSDP1."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would load weights in process 0 only
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "FSDP version 1 flattens the weights and cuts groups of four apart, so masks would be wrong: launch with "
            "--fsdp_version 2"
        )
    return True


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Cut `model` in place over all processes; the blocks are gathered one by one when they are needed.

    Each piece is moved to `device` when its block is cut, so the whole model never lies there.

    Raises:
        InputError: a weight stored [in, out] (GPT-2) cannot be cut without cutting groups of four.
    """
    world = dist.get_world_size()
    placement = _placement(model, world)
    mesh = init_device_mesh(device.type, (world,))
    # torch warns of in-place changes to the model's outputs, of which there are none here
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    # Not resharded after the forward pass: the loss needs lm_head, which is applied outside of it.
    fully_shard(model, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=False)
    return model


def _placement(model: PreTrainedModel, world: int) -> Callable[[nn.Parameter], Shard | None]:
    """Choose the axis each parameter is cut along: 0, but 1 for weights in scope whose groups run along axis 0."""
    across: dict[int, Shard] = {}
    for name, module in scope(model):
        if is_transposed(module):
            inputs, outputs = module.weight.shape
            if outputs % world:  # FSDP2 cuts only axis 0 unevenly
                raise InputError(
                    f"'{name}' stores its weight as [in, out] = {[inputs, outputs]}: cut by inputs its groups of four "
                    f"would not stay whole, and its outputs cannot be shared evenly by {world} devices; use another "
                    "number of devices, or train without --fsdp"
                )
            across[id(module.weight)] = Shard(1)
    return lambda parameter: across.get(id(parameter))


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model, not yet sharded, whose parameters have no data; what is tied stays tied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def gather(model: PreTrainedModel, into: PreTrainedModel) -> None:
    """Collect a sharded model's weights, one at a time, on the CPU of process 0: there `into` (its skeleton) gets them.

    All processes must call it. Device memory needed: the largest tensor.
    """
    _reshard(model)
    gathered: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        full = whole(parameter)
        if dist.get_rank() == 0:
            gathered[name] = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
    if dist.get_rank() == 0:
        # by identity: tied parameters stand under several names and must become one again
        by_id = {id(parameter): gathered[name] for name, parameter in into.named_parameters()}
        for module in into.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, by_id[id(parameter)])


@torch.no_grad()
def scatter(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give a sharded model the weights of a finished one that lies whole on process 0; its scales, folded, become 1.

    All processes must call it.
    """
    _reshard(model)
    scales = {id(module.scale) for module in model.modules() if isinstance(module, ScaledLinear)}
    finished = dict(plain.named_parameters()) if dist.get_rank() == 0 else {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if id(parameter) in scales:
            local(parameter).fill_(1.0)
            continue
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if dist.get_rank() == 0:
            full.copy_(finished[name])
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))


def _reshard(model: nn.Module) -> None:
    """Make all parameters pieces again: after a forward pass without gradients the root's are still whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
