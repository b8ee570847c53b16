"""The plan against what is really held: parameters, optimizer and teacher exactly, the passes within a tolerance."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from cast_train.config import CONFIGS, TrainConfig
from cast_train.devices import ACCELERATORS, peak_flops
from cast_train.distillation import TeacherTop, distillation_loss
from cast_train.flops import token_flops
from cast_train.methods.finetune import FinetuneConfig
from cast_train.plan import bytes_kept_by_forward, loss_memory, make_plan, print_plan
from cast_train.sparse_model import sparsify
from cast_train.trainer import CastTrainer, training_arguments
from conversion.errors import InputError
from tests.cast_train.tiny import BUDGET, config
from tests.conversion.models import CONFIGS as FAMILIES


def write_config(directory: Path, family: str = "llama", **changes: Any) -> Path:
    directory.mkdir()
    fields = FAMILIES[family].to_dict() | changes
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def settings(method: str = "cast", **changes: Any) -> TrainConfig:
    fields = config(batch_tokens=64, micro_batch_tokens=32, steps=4).model_dump()
    known = {name: fields[name] for name in CONFIGS[method].model_fields if name in fields}
    return CONFIGS[method](**known | ({} if method == "gmp" else {"decay": 1e-2}) | changes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["cast", "ast", "srste", "gmp"])
def test_what_is_held_all_the_time_is_exact(tmp_path: Path, family: str, method: str) -> None:
    directory = write_config(tmp_path / "model", family)
    chosen = settings(method, precision="bf16")
    planned = make_plan(directory, chosen, gpu="h100", mfu=0.4)

    model_config = AutoConfig.from_pretrained(directory)
    student, teacher = (AutoModelForCausalLM.from_config(model_config) for _ in range(2))
    trainer = CastTrainer(sparsify(student, chosen), chosen, teacher, args=training_arguments(chosen, tmp_path))
    optimizer: Any = trainer.create_optimizer()
    optimizer.start()
    ids = torch.randint(90, (2, 16))
    trainer.distillation(student, {"input_ids": ids}).loss.backward()
    gradients = sum(p.grad.nbytes for p in student.parameters())
    optimizer.step()
    state = {"mask": 0, "others": 0}
    for values in optimizer.state.values():
        for name, tensor in values.items():
            state["mask" if name == "mask" else "others"] += tensor.nbytes
    assert trainer.teacher is not None
    assert planned.memory["weights"] == sum(p.nbytes for p in student.parameters())
    assert planned.memory["gradients"] == gradients
    assert planned.memory["optimizer"] == state["others"]
    assert planned.memory["masks"] == state["mask"]
    assert planned.memory["teacher"] == sum(p.nbytes for p in trainer.teacher.parameters())
    assert planned.memory["communication"] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_within_ten_percent(tmp_path: Path, family: str, bf16: bool) -> None:
    directory = write_config(tmp_path / "model", family, num_hidden_layers=5)
    chosen = settings(precision="bf16" if bf16 else "fp32")
    planned = make_plan(directory, chosen, gpu="h100", mfu=0.4)
    assert planned.micro_batch == 32
    assert planned.accumulation == 2
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    held = bytes_kept_by_forward(sparsify(student, chosen).train(), torch.ones(2, 16, dtype=torch.int64), bf16=bf16)
    assert planned.memory["activations"] == pytest.approx(held, rel=0.1)
    fewer = make_plan(directory, settings(gradient_checkpointing=True), gpu="h100", mfu=0.4)
    assert fewer.memory["activations"] < 0.5 * planned.memory["activations"]


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensors made while it is on, not of those given; `peak` is the most at once."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._storages: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._storages = {c: entry for c, entry in self._storages.items() if not _expired(entry[0])}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._given:
                    weak = storage._weak_ref()  # type: ignore[attr-defined]
                    self._storages.setdefault(storage._cdata, (weak, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def _expired(weak: int) -> bool:
    return bool(torch.UntypedStorage._expired(weak))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eta": 0.0},
        {"train_embeddings": False},
        {"precision": "bf16"},
        {"temperature": 2.0},
        {"teacher_top_k": 8},
        {"teacher_top_k": 8, "train_embeddings": False},
    ],
)
def test_the_loss_is_within_fifteen_percent(changes: dict[str, Any]) -> None:
    model_config = FAMILIES["llama"].__class__(
        vocab_size=4000, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    chosen = settings(block_length=64, **changes)
    student = sparsify(AutoModelForCausalLM.from_config(model_config), chosen)
    bf16 = chosen.precision == "bf16"
    hidden = torch.randn(2, 64, 64).requires_grad_()
    head = student.get_output_embeddings().weight
    teacher = (torch.randn(2, 64, 64), torch.randn(4000, 64)) if chosen.runs_teacher else ()
    top = None
    if chosen.teacher_top_k is not None:
        ids = torch.arange(8).expand(2, 63, 8)
        top = TeacherTop(ids, torch.full(ids.shape, -3.0), torch.full((2, 63), -1.0))
    if bf16:
        teacher = tuple(tensor.bfloat16() for tensor in teacher)
    labels = torch.randint(4000, (2, 64))
    with PeakMemory(hidden, head, *teacher) as memory, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        distillation_loss(
            hidden,
            head,
            labels,
            *teacher,
            eta=chosen.eta,
            temperature=chosen.temperature,
            teacher_top=top,
            chunk_tokens=126,
        )
    planned = loss_memory(student, chosen, blocks=2, bf16=bf16)
    assert planned == pytest.approx(memory.peak, rel=0.15)


def test_a_teacher_on_disk_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "model")
    live, cached, alone = (
        make_plan(directory, settings(**changes), gpus=2, gpu="h100", mfu=0.4)
        for changes in ({"fsdp": True}, {"fsdp": True, "teacher_top_k": 8}, {"fsdp": True, "eta": 0.0})
    )
    assert "teacher" not in cached.memory
    assert cached.memory["communication"] == alone.memory["communication"] < live.memory["communication"]
    assert (cached.flops_per_token, cached.host_memory) == (alone.flops_per_token, alone.host_memory)


def test_the_masks_of_low_rank_updates_are_float32(tmp_path: Path) -> None:
    chosen = FinetuneConfig(**{**BUDGET, "lora_rank": 2})
    planned = make_plan(write_config(tmp_path / "model"), chosen, gpu="h100", mfu=0.4)
    student = sparsify(AutoModelForCausalLM.from_config(FAMILIES["llama"]), chosen)
    masks = [buffer for name, buffer in student.named_buffers() if name.endswith(".mask")]
    assert planned.memory["masks"] == sum(mask.nbytes for mask in masks)


def test_sharding_divides_and_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_7b = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    llama_7b |= {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "head_dim": 128}
    directory = write_config(tmp_path / "7b", "llama", **llama_7b, tie_word_embeddings=False)
    full = CONFIGS["cast"].preset("full")
    alone = make_plan(directory, full, gpus=8, gpu="h100", mfu=0.4)
    shared = make_plan(directory, full.model_copy(update={"fsdp": True}), gpus=8, gpu="h100", mfu=0.4)
    assert alone.parameters == 6_738_415_616  # LLaMA-2-7B
    for name in ("weights", "gradients", "optimizer", "masks", "teacher"):
        assert shared.memory[name] == pytest.approx(alone.memory[name] / 8, rel=1e-3)
    assert shared.steps == 7500
    assert shared.tokens == 7500 * 2**20
    assert shared.tokens_per_s == pytest.approx(8 * 0.4 * 989e12 / shared.flops_per_token)
    assert shared.hours == pytest.approx(shared.tokens / shared.tokens_per_s / 3600)
    print_plan(alone, Console(width=100))
    assert "does not fit" in capsys.readouterr().out


def test_flops_of_a_token_are_those_of_its_products() -> None:
    """Against torch's own counter, over a forward and backward pass of student and teacher."""
    from torch.utils.flop_counter import FlopCounterMode

    chosen = settings(block_length=16)
    model_config = FAMILIES["llama"]
    student, teacher = (AutoModelForCausalLM.from_config(model_config, attn_implementation="eager") for _ in range(2))
    ids = torch.randint(90, (2, 16))
    with FlopCounterMode(display=False) as counter:
        student(input_ids=ids).logits.sum().backward()
        with torch.no_grad():
            teacher(input_ids=ids)
    expected = counter.get_total_flops() / ids.numel()
    # the eager attention counted here computes the whole square, of which causal attention needs half
    half = 4 * model_config.num_hidden_layers * 2 * 16 * model_config.hidden_size
    assert token_flops(student, chosen).total == pytest.approx(expected - half, rel=0.02)


def test_speed_can_be_measured_here(tmp_path: Path) -> None:
    planned = make_plan(write_config(tmp_path / "model"), settings())
    assert planned.flops_per_s > 0
    assert "measured" in planned.speed_from
    assert planned.capacity is None


def test_bad_questions_are_refused(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "model")
    with pytest.raises(InputError, match="use one of"):
        make_plan(directory, settings(), gpu="gtx", mfu=0.5)
    with pytest.raises(InputError, match="together"):
        make_plan(directory, settings(), gpu="h100")
    with pytest.raises(InputError, match="cannot be shared by 3 devices"):
        make_plan(directory, settings(), gpus=3, gpu="h100", mfu=0.4)


def test_devices_are_known_by_their_drivers_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == ACCELERATORS["h100"].flops
    assert peak_flops("NVIDIA H100 PCIe") == ACCELERATORS["h100-pcie"].flops
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None
