"""All trained methods on transformers.Trainer: schedule, distillation, and checkpoints that survive being killed."""

import contextlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

from cast_train.config import TrainConfig
from cast_train.distillation import IGNORE_INDEX, DistillationLoss, TeacherTop, distillation_loss
from cast_train.hidden_states import before_head, last_hidden_state
from cast_train.masked_adam import MaskedAdam
from cast_train.methods import trained_method
from cast_train.methods.finetune import FinetuneConfig
from cast_train.schedule import lr_factor
from cast_train.sharding import asked_for_fsdp, gather, scatter, shard, skeleton
from cast_train.sparse_model import finalize, is_transposed, scope
from conversion.errors import InputError

_COMPLETE = "complete"  # a checkpoint without this file was being written when the run was killed


class CastTrainer(Trainer):
    """A Trainer whose model, already sparsified, learns 2:4 by its config's method and from its dense self.

    Args:
        model: what `sparsify` returned.
        config: method and budget; a decay must be a number by now.
        teacher: the dense starting model, frozen; None trains on cross entropy alone.
        args: from `training_arguments`, or your own.
        others: as in transformers.Trainer. Examples need "input_ids"; "labels" (-100 is left out) default to those;
            "attention_mask" and "position_ids" go to both models; "teacher_ids", "teacher_log_probs" and "teacher_tail"
            (see TeacherTop) stand for a teacher. All tokens of a step that have a label count alike.
    """

    def __init__(
        self, model: PreTrainedModel, config: TrainConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        args: TrainingArguments | None = kwargs.get("args")
        if args is not None and args.n_gpu > 1:
            args._n_gpu = 1  # Trainer's DataParallel would multiply the batch, and knows nothing of the loss here
        self.skeleton: PreTrainedModel | None = None
        if args is not None and args.fsdp:
            self.skeleton = skeleton(model)
            shard(model, args.device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        super().__init__(model=model, **kwargs)
        self.student = model
        self.config = config
        self.bf16 = uses_bf16(config, self.args.device)
        self.teacher: PreTrainedModel | None = None
        if teacher is not None and config.eta > 0:
            teacher.requires_grad_(False).eval()
            self.teacher = teacher.to(torch.bfloat16 if self.bf16 else torch.float32)  # type: ignore[arg-type]
            if self.skeleton is None:
                self.teacher.to(self.args.device)  # type: ignore[arg-type]
            else:  # sharded like the student: whole, a 7 B teacher would take 13.5 GB of every device
                shard(self.teacher, self.args.device)
        if self.bf16 and self.args.device.type == "cpu" and config.block_length <= 1024:
            # torch's fused attention costs 7 % of a step more than the plain one here (SmolLM2-135M, 2 x 256 tokens)
            for each in (model, self.teacher):
                if each is not None:
                    each.set_attn_implementation("eager")
        if config.compile:
            for each in (model, self.teacher):
                if each is not None:
                    compile_blocks(each)
        self.add_callback(_StartOptimizer())
        self.model_accepts_loss_kwargs = True  # Trainer counts the labels of a step, where examples have some
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._micro_batch = (-1, 0)  # step and number

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # accelerate shards on accelerators only; FSDP2 runs on CPUs as well
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.student, self.config)
            self.optimizer = trained_method(self.config).optimizer(groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        config = self.config
        if num_training_steps != config.total_steps:
            raise InputError(
                f"the trainer would do {num_training_steps} steps and the config says {config.total_steps}: set "
                "max_steps"
            )
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: lr_factor(
                    min(step, config.total_steps), config.total_steps, config.warmup_ratio, config.schedule
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(dataset)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self.bf16:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        losses = self.distillation(model, inputs)
        first, last = self._blocks(len(inputs["input_ids"]))
        if not torch.isfinite(losses.loss):
            raise InputError(
                f"the loss became {losses.loss.item()} at step {self.state.global_step}, on blocks {first} to {last} "
                "of the run: lower the learning rate, or look at that text; the last checkpoint is kept"
            )
        loss = losses.loss
        if num_items_in_batch is None:  # as many in every micro-batch: Trainer divides by the accumulation steps
            weight: Tensor | float = 1.0
        else:
            weight = self._share(inputs["labels"], num_items_in_batch)
            loss = loss * weight
            if model.training:
                weight = weight * self.current_gradient_accumulation_steps
        if model.training:
            self._add(loss=losses.loss.detach() * weight, ce=losses.ce * weight, kl=losses.kl * weight)
        return (loss, {}) if return_outputs else loss

    def _share(self, labels: Tensor, items: Tensor | int) -> Tensor:
        """Return the part of a step's `items` that these labels have, times the processes whose gradients are averaged.

        So a step's gradient is the mean over its tokens, however they are spread over micro-batches.
        """
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        count = (labels[:, 1:] != IGNORE_INDEX).sum()
        return count * processes / torch.as_tensor(items, device=count.device).clamp(min=1)

    def _blocks(self, size: int) -> tuple[int, int]:
        """Count this process's micro-batches; return the run's first and last block in the present one."""
        step = self.state.global_step
        number = self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0
        self._micro_batch = (step, number)
        in_step = (number * self.args.world_size + self.args.process_index) * size
        first = step * self.config.blocks_per_step + in_step
        return first, first + size - 1

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        _masked_adam(self.optimizer).mask_gradients()
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):  # else the weights, and the next checkpoint, would not be finite either
            raise InputError(
                f"the gradient became {float(norm)} at step {self.state.global_step}: lower the learning rate; the "
                "last checkpoint is kept"
            )
        return norm

    def distillation(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> DistillationLoss:
        """Run student (through its wrapper, so that DDP and FSDP see it) and teacher on one micro-batch."""
        ids = inputs["input_ids"]
        places = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
        if "attention_mask" in inputs and "labels" not in inputs and not inputs["attention_mask"].all():
            raise InputError("examples with an attention mask need labels, -100 where a token is not to be learned")
        # logits_to_keep=1: the model's own head sees one position only; the loss applies it in chunks
        output = model(input_ids=ids, **places, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        teacher_hidden = teacher_head = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = last_hidden_state(self.teacher, ids, **places)
            teacher_head = self.teacher.get_output_embeddings().weight
        top = None
        if "teacher_ids" in inputs:
            top = TeacherTop(inputs["teacher_ids"], inputs["teacher_log_probs"], inputs["teacher_tail"])
        return distillation_loss(
            before_head(self.student, output.hidden_states[-1]),
            head,
            inputs.get("labels", ids),
            teacher_hidden,
            teacher_head,
            eta=self.config.eta,
            temperature=self.config.temperature,
            teacher_top=top,
        )

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._summed:
            for name, total in self._sums.items():
                logs[name] = self.accelerator.reduce(total / self._summed, "mean").item()
            self._sums, self._summed = {}, 0
            logs.update(_masked_adam(self.optimizer).health())
        super().log(logs, start_time)

    def finish(self) -> PreTrainedModel | None:
        """Cut the student to exact 2:4 and return it as a plain model; with FSDP, None in all processes but the first.

        The student itself then computes the same, whether plain or still sharded.
        """
        if self.skeleton is None:
            return finalize(self.student)
        gather(self.student, self.skeleton)
        if self.is_world_process_zero():
            finalize(self.skeleton)
        scatter(self.skeleton, self.student)
        return self.skeleton if self.is_world_process_zero() else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each of the formats' writers has its own
            shutil.rmtree(checkpoint, ignore_errors=True)
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the checkpoint of step {self.state.global_step} could not be written ({reason}): make room on the "
                "disk and go on with --resume from the one before"
            ) from error
        self.accelerator.wait_for_everyone()  # have written their parts
        if self.args.should_save:
            (checkpoint / _COMPLETE).touch()


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the forward pass of every transformer block; they share what is compiled for the first.

    Parameters and their names stay as they are. The loss, the optimizer and the collectives stay uncompiled.
    """
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = torch.compile(module.forward)


def parameter_groups(model: PreTrainedModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups: in scope (rows as groups), in scope transposed, and the rest.

    The rest are embeddings, weight scales, norms and biases, which train at dense_lr times the learning rate.
    """
    transposed = {id(module.weight): is_transposed(module) for _, module in scope(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if transposed.get(id(p)) is False], "sparse": True},
        {"params": [p for p in trainable if transposed.get(id(p)) is True], "sparse": True, "transposed": True},
        {"params": [p for p in trainable if id(p) not in transposed], "lr": config.lr * config.dense_lr},
    ]
    return [{**group, "mask_interval": config.mask_interval} for group in groups if group["params"]]


def _masked_adam(optimizer: Any) -> MaskedAdam:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


class _StartOptimizer(TrainerCallback):
    """Masks the weights of methods whose forward is masked, after a checkpoint was loaded and before the first step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _masked_adam(kwargs["optimizer"]).start()


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether the passes run in bf16: as configured, or where the processor multiplies it natively."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def training_arguments(config: TrainConfig, directory: Path) -> TrainingArguments:
    """Translate the config for transformers.Trainer; checkpoints go to `directory`.

    Runs on the accelerator, or one of them, if there is any; under torchrun or `accelerate launch`, on all.

    Raises:
        InputError: a step's blocks cannot be shared evenly by the devices, or sharding was asked for without processes.
    """
    use_cpu = not torch.accelerator.is_available()
    args = TrainingArguments(output_dir=str(directory), use_cpu=use_cpu)
    micro, accumulation = config.split_step(args.world_size)
    sharding: dict[str, Any] = {}
    if config.fsdp or asked_for_fsdp():
        if isinstance(config, FinetuneConfig) and config.lora_rank:
            raise InputError("low-rank updates are not sharded: launch without FSDP")
        if args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise InputError(
                "sharding needs a process for each device: start with 'torchrun --nproc-per-node N' or 'accelerate "
                "launch', or leave out --fsdp"
            )
        sharding = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "state_dict_type": "SHARDED_STATE_DICT",
                "auto_wrap_policy": "NO_WRAP",  # CastTrainer has wrapped the model
            },
            # else each device would hold all gradients, whole, while they are accumulated
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        }
    return TrainingArguments(
        output_dir=str(directory),
        use_cpu=use_cpu,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=config.total_steps,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=2,  # while one is written, the one before it must exist
        seed=config.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
        report_to="none",
        include_num_input_tokens_seen="no",
        **sharding,
    )


def check_resumable(checkpoint: Path, args: TrainingArguments) -> None:
    """InputError if a checkpoint was written sharded and is to be continued unsharded, or the other way round.

    The number of devices may change: sharded checkpoints are cut anew when they are read.
    """
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded and not args.fsdp:
        raise InputError(f"{checkpoint} was written by a sharded run: continue it under torchrun with --fsdp")
    if args.fsdp and not sharded:
        raise InputError(f"{checkpoint} was written by a run that was not sharded: continue it without --fsdp")


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove half-written ones."""
    complete = []
    for checkpoint in directory.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).is_file():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
