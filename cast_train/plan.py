"""`cast train --dry-run`: what a run needs and how long it takes, from config.json alone, before anything is loaded.

Memory of a device = its part of the parameters and of what is kept for each of them (exact)
    + what the forward pass keeps for the backward pass (counted on one and two layers without data)
    + the buffers of the loss and of communication (by size).
Not counted: the runtime's own memory, fragmentation, and scratch that is smaller than what has been freed by then.
Time = useful operations / (operations per second of all devices).
"""

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cast_train.config import TrainConfig
from cast_train.devices import ACCELERATORS
from cast_train.distillation import ACCELERATOR_LOGITS, distillation_loss
from cast_train.flops import token_flops
from cast_train.hidden_states import last_hidden_state
from cast_train.methods.finetune import FinetuneConfig
from cast_train.sparse_model import is_transposed, scope, sparsify
from conversion.errors import InputError
from conversion.model_config import read_config

_MEASURED_TOKENS = 256  # in the step that this device's speed is taken from


@dataclass(frozen=True)
class Plan:
    """A run on paper.

    Attributes:
        parameters: of the dense model; in_scope: those that become 2:4.
        gpus: devices, one a process; fsdp: whether they share the parameters instead of holding all each.
        memory: bytes on one device, by what they are for.
        capacity: bytes that the device has, if it was named.
        host_memory: bytes that each process holds in its host's memory while it loads the models.
        micro_batch: tokens that a device runs at once; accumulation: how often for one step.
        steps, tokens: of the whole run.
        flops_per_token: useful operations of student and teacher; flops_per_s: one device's; speed_from: says whence.
    """

    parameters: int
    in_scope: int
    gpus: int
    fsdp: bool
    memory: dict[str, int]
    capacity: float | None
    host_memory: int
    micro_batch: int
    accumulation: int
    steps: int
    tokens: int
    flops_per_token: float
    flops_per_s: float
    speed_from: str

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def tokens_per_s(self) -> float:
        """Over all devices, while they train; communication counts as hidden behind computation."""
        return self.gpus * self.flops_per_s / self.flops_per_token

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_s / 3600

    def as_dict(self) -> dict[str, Any]:
        computed = {"total_memory": self.total_memory, "tokens_per_s": self.tokens_per_s, "hours": self.hours}
        return asdict(self) | computed


def make_plan(
    directory: Path, config: TrainConfig, *, gpus: int = 1, gpu: str | None = None, mfu: float | None = None
) -> Plan:
    """Plan the training of the model whose config.json lies in `directory`.

    Args:
        config: method and budget.
        gpus: number of devices.
        gpu: one of `cast_train.devices.ACCELERATORS`, for its memory and peak speed; None measures the speed here.
        mfu: part of that peak which useful operations reach; needed with `gpu`.

    Raises:
        InputError: an argument is wrong, or the model's family is not supported.
    """
    if gpu is not None and gpu not in ACCELERATORS:
        raise InputError(f"there is no data of a GPU '{gpu}': use one of {', '.join(ACCELERATORS)}")
    if (gpu is None) != (mfu is None):
        raise InputError("give a GPU and the part of its peak speed that training reaches (MFU) together, or neither")
    model_config: PretrainedConfig = AutoConfig.for_model(**read_config(directory))
    config = config.within_context(model_config.max_position_embeddings)
    blocks, accumulation = config.split_step(gpus)
    bf16 = config.precision != "fp32"
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(model_config)
        shapes = [p.shape for p in dense.parameters()]
        student = sparsify(dense, config)
    memory = kept_memory(student, shapes, config, gpus, bf16=bf16)
    memory["activations"] = activation_memory(model_config, config, blocks, bf16=bf16)
    memory["loss"] = loss_memory(student, config, blocks, bf16=bf16)
    memory["communication"] = communication_memory(student, config, gpus, bf16=bf16)
    if gpu is not None and mfu is not None:
        speed, origin = mfu * ACCELERATORS[gpu].flops, f"{mfu:.0%} of the peak of {gpu}, as given"
    else:
        speed, origin = measured_speed(model_config, config, bf16=bf16), "measured on one block on this device"
    return Plan(
        parameters=sum(shape.numel() for shape in shapes),
        in_scope=_numel(module.weight for _, module in scope(student)),
        gpus=gpus,
        fsdp=config.fsdp,
        memory=memory,
        capacity=None if gpu is None else ACCELERATORS[gpu].memory,
        host_memory=4 * sum(shape.numel() for shape in shapes) * (2 if config.runs_teacher else 1),
        micro_batch=blocks * config.block_length,
        accumulation=accumulation,
        steps=config.total_steps,
        tokens=config.total_steps * config.batch_tokens,
        flops_per_token=token_flops(student, config).total,
        flops_per_s=speed,
        speed_from=origin,
    )


def kept_memory(
    student: PreTrainedModel, teacher: Iterable[torch.Size], config: TrainConfig, gpus: int, *, bf16: bool
) -> dict[str, int]:
    """Return the bytes that lie on a device all the time: with FSDP, the largest part that any device gets.

    `teacher` are the shapes of the teacher's parameters.
    """
    parts = gpus if config.fsdp else 1
    sparse = [_part(module.weight.shape, parts, is_transposed(module)) for _, module in scope(student)]
    weights = [_part(p.shape, parts) for p in student.parameters()]
    trained = [_part(p.shape, parts) for p in student.parameters() if p.requires_grad]
    # the straight-through methods keep the dense weight beside the masked one
    dense = 4 * sum(sparse) if config.method in ("srste", "ast") else 0
    memory = {
        "weights": 4 * sum(weights),
        "gradients": 4 * sum(trained),
        "optimizer": 8 * sum(trained) + dense,
        # a low-rank update multiplies by its mask in float32
        "masks": (4 if isinstance(config, FinetuneConfig) and config.lora_rank else 1) * sum(sparse),
    }
    if config.runs_teacher:
        memory["teacher"] = (2 if bf16 else 4) * sum(_part(shape, parts) for shape in teacher)
    return memory


def activation_memory(model_config: PretrainedConfig, config: TrainConfig, blocks: int, *, bf16: bool) -> int:
    """Return the bytes that the student's forward pass keeps for the backward pass, for `blocks` blocks of text.

    Two models of one and two transformer blocks are run without data; the rest is arithmetic.
    """
    one, two = (_kept_by_forward(_with_layers(model_config, n), config, blocks, bf16=bf16) for n in (1, 2))
    layers = model_config.num_hidden_layers
    if config.gradient_checkpointing:  # each layer keeps its input (float32), and one layer at a time all the rest
        kept_inputs = layers * blocks * config.block_length * model_config.hidden_size * 4
        return one + kept_inputs
    return one + (layers - 1) * (two - one)


def loss_memory(student: PreTrainedModel, config: TrainConfig, blocks: int, *, bf16: bool) -> int:
    """Return the bytes that the chunked loss holds at its peak (see `cast_train.distillation`)."""
    vocabulary, hidden = student.get_output_embeddings().weight.shape
    tokens = blocks * (config.block_length - 1)
    logits = min(tokens, max(16, ACCELERATOR_LOGITS // vocabulary)) * vocabulary
    head = vocabulary * hidden
    trained_head = head if config.train_embeddings else 0
    width = 2 if bf16 else 4
    copy = 2 * logits if bf16 else 0  # of logits or their gradient, in the products' dtype
    if config.eta > 0:
        softened = 0 if config.temperature == 1 else 1
        # of student and teacher, and their difference; of a teacher's most likely tokens, of what it makes of the rest
        at_kl = (3 + softened if config.runs_teacher else 2) * 4 * logits
        at_gradients = (2 + softened) * 4 * logits + copy + width * trained_head
        # hidden states of student and teacher where a token is predicted
        rows = tokens * hidden * (4 + (width if config.runs_teacher else 0))
    else:
        at_kl = 4 * logits + copy
        at_gradients = 4 * logits + copy + width * trained_head
        rows = tokens * hidden * 4
    gradients = 4 * (tokens * hidden + trained_head)
    cast_head = 2 * head if bf16 else 0
    return max(at_kl, at_gradients) + rows + gradients + cast_head


def communication_memory(student: PreTrainedModel, config: TrainConfig, gpus: int, *, bf16: bool) -> int:
    """Return the bytes of what is gathered or reduced.

    FSDP2: the parameters outside the blocks, whole while a step lasts, with their gradients; and two blocks (one in
    use, one under way), of student and teacher. DDP: its buckets, a copy of all gradients.
    """
    if gpus == 1:
        return 0
    trained = [p for p in student.parameters() if p.requires_grad]
    if not config.fsdp:
        return 4 * _numel(trained)
    names = set(student._no_split_modules or ())
    blocks = [module for module in student.modules() if type(module).__name__ in names]
    inside = {id(p) for block in blocks for p in block.parameters()}
    block = max(_numel(block.parameters()) for block in blocks)
    outside = _numel(p for p in student.parameters() if id(p) not in inside)
    outside_trained = _numel(p for p in trained if id(p) not in inside)
    student_bytes = 4 * (outside + outside_trained) + 2 * 4 * 2 * block
    teacher_bytes = (2 if bf16 else 4) * (outside + 2 * block) if config.runs_teacher else 0
    return student_bytes + teacher_bytes


def measured_speed(model_config: PretrainedConfig, config: TrainConfig, *, bf16: bool) -> float:
    """Return the operations per second of this device, from a few steps of the model cut down to one block."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    length = min(config.block_length, _MEASURED_TOKENS)
    with torch.device(device):
        shortened = _with_layers(model_config, 1)
        student = sparsify(AutoModelForCausalLM.from_config(shortened), config).train()
        teacher = AutoModelForCausalLM.from_config(shortened).requires_grad_(False) if config.runs_teacher else None
        ids = torch.randint(shortened.vocab_size, (max(1, _MEASURED_TOKENS // length), length))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            _loss(student, teacher, ids, config).backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
        student.zero_grad()
    flops = token_flops(student, config.model_copy(update={"block_length": length})).total
    return ids.numel() * flops / statistics.median(seconds[2:])


def print_plan(plan: Plan, console: Console) -> None:
    console.print(
        f"{plan.parameters / 1e9:.3g} B parameters, {plan.in_scope / 1e9:.3g} B of them become 2:4; "
        f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}" + (", FSDP2" if plan.fsdp else "")
    )
    table = Table("memory of one GPU", "GB", box=None)
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / 1e9:.3f}")
    limit = "" if plan.capacity is None else f" of {plan.capacity / 1e9:.0f}"
    table.add_row("together", f"{plan.total_memory / 1e9:.3f}{limit}")
    console.print(table)
    if plan.capacity is not None and plan.total_memory > 0.95 * plan.capacity:
        console.print("This does not fit: shard it (--fsdp) over more GPUs, or recompute (--gradient-checkpointing).")
    console.print(f"host memory of each process while it loads: {plan.host_memory / 1e9:.3g} GB")
    console.print(
        f"{plan.steps} steps of {plan.tokens // plan.steps} tokens, in {plan.accumulation} x {plan.gpus} micro-batches "
        f"of {plan.micro_batch}: {plan.tokens / 1e9:.3g} B tokens"
    )
    console.print(f"{plan.flops_per_token / 1e9:.3g} GFLOP a token, {plan.flops_per_s / 1e12:.3g} TFLOP/s a GPU")
    console.print(f"({plan.speed_from}): {plan.tokens_per_s:.4g} tokens/s, {plan.hours:.3g} hours")


def _loss(student: PreTrainedModel, teacher: PreTrainedModel | None, ids: Tensor, config: TrainConfig) -> Tensor:
    teacher_hidden = teacher_head = None
    if teacher is not None:
        teacher_hidden = last_hidden_state(teacher, ids)
        teacher_head = teacher.get_output_embeddings().weight
    hidden = last_hidden_state(student, ids)
    head = student.get_output_embeddings().weight
    return distillation_loss(hidden, head, ids, teacher_hidden, teacher_head, eta=config.eta).loss


def _kept_by_forward(model_config: PretrainedConfig, config: TrainConfig, blocks: int, *, bf16: bool) -> int:
    """Run the student's forward pass on tensors without data and return the bytes it keeps for the backward pass."""
    with FakeTensorMode():
        student = sparsify(AutoModelForCausalLM.from_config(model_config), config).train()
        ids = torch.zeros(blocks, config.block_length, dtype=torch.int64)
        return bytes_kept_by_forward(student, ids, bf16=bf16)


def bytes_kept_by_forward(student: nn.Module, ids: Tensor, *, bf16: bool) -> int:
    """Return the bytes, parameters apart, that autograd holds after a forward pass over ids [batch, length]."""
    own = {t.untyped_storage()._cdata for t in (*student.parameters(), *student.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16),
    ):
        student(input_ids=ids, logits_to_keep=1, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _with_layers(model_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    fields = model_config.to_dict() | {"num_hidden_layers": layers}
    fields.pop("layer_types", None)
    shortened: PretrainedConfig = type(model_config).from_dict(fields)
    return shortened


def _part(shape: torch.Size, parts: int, transposed: bool = False) -> int:
    """Elements in the largest piece of a parameter that `parts` devices share along its rows (or columns)."""
    rows = shape[1] if transposed and shape[1] % parts == 0 else shape[0]
    return -(-rows // parts) * (shape.numel() // rows)


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
