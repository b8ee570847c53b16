"""`cast train`: a dense Hugging Face model in, an exact 2:4 one out."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from cast_train.budget import decay_budget
from cast_train.config import CastConfig, TrainConfig
from cast_train.dataset import TokenBlocks, check_vocabulary, load_tokens
from cast_train.dtensor import local, sum_of_pieces, whole
from cast_train.health import Health, read_metrics
from cast_train.interruption import StopWhenAsked
from cast_train.mask import nm_mask
from cast_train.plot import plot_metrics
from cast_train.run import Run, source_hash
from cast_train.saving import save_model
from cast_train.self_data import with_samples
from cast_train.sparse_model import is_transposed, scope, sparsify
from cast_train.teacher_cache import CachedBlocks, TeacherCache, fill
from cast_train.trainer import CastTrainer, check_resumable, last_checkpoint, training_arguments, uses_bf16
from cast_train.warm_start import warm_start
from conversion.atomic import check_target, new_directory
from conversion.checkpoint import Checkpoint
from conversion.dense_model import context_length, dense_config, dense_model
from conversion.errors import InputError, Interrupted
from conversion.hub import local_model, model_name
from conversion.progress import without_transformers_bars
from conversion.tokenizer import load_tokenizer

Examples = TokenBlocks | CachedBlocks

_REPORT_TOKENS = 8192  # on which the loss before and after the cut is measured


def train(
    source: str | Path,
    data: Sequence[str],
    out: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    overwrite: bool = False,
    cache_dir: Path | None = None,
    teacher_cache: Path | None = None,
    kept_starts: Path | None = None,
) -> dict[str, Any]:
    """Train `source` to 2:4 by the config's method and save it to `out`; return what training.json says.

    While it runs, checkpoints and metrics lie in `<out>.run`; `out` appears when everything is done.

    Args:
        source: directory or hub id of a dense causal LM with safetensors weights.
        data: see `cast_train.dataset.load_tokens`; "self" or "self:COUNT" is text sampled from the model itself.
        out: directory to make.
        config: method (by its class) and budget; blocks longer than the model's context are shortened to it.
        resume: continue a run that was interrupted, if there is one.
        force: train although the decay budget (of CAST) is hopeless.
        overwrite: replace `out` if it exists, when the new one is complete.
        cache_dir: where tokenized text is cached.
        teacher_cache: directory of the teacher's `config.teacher_top_k` most likely tokens, filled by a first run;
            later ones with the same text, seed, teacher and precision, and no more steps, need no teacher.
        kept_starts: directory of warm-started weights, which runs that start alike share.

    Raises:
        InputError: anything given is wrong, or the loss is no longer finite.
        Interrupted: SIGTERM came; a checkpoint was written.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=int(os.environ.get("RANK", 0)) > 0)
    out = Path(out)

    # Load
    directory = local_model(source)
    check_target(out, overwrite, directory)
    dense = Checkpoint(directory)
    tokenizer = load_tokenizer(directory)
    config = config.within_context(context_length(dense))
    if (teacher_cache is None) != (config.teacher_top_k is None):
        raise InputError("the teacher's top k tokens need a directory to be kept in: give both or neither")
    budget_tokens = config.total_steps * config.batch_tokens
    texts = with_samples(data, dense, tokenizer, budget_tokens, config.block_length, cache_dir)
    tokens = load_tokens(texts, tokenizer, cache_dir, needed=budget_tokens)
    check_vocabulary(tokens.largest, dense_config(dense).vocab_size, directory)
    blocks = TokenBlocks(tokens, config.block_length, config.total_steps * config.blocks_per_step, config.seed)
    source_id = source_hash(directory)
    identity = {
        "method": config.method,
        "config": config.model_dump(),
        "data": tokens.fingerprint,
        "source": source_id,
    }
    run = Run.find(out.with_name(out.name + ".run"), identity, resume=resume)
    if resume and not run.begun:
        console.print(f"there is no run in {run.directory} to go on with: starting one")
    if not run.begun:  # what lies there is left of a run that nobody knows any more
        for stray in run.directory.glob("checkpoint-*"):
            shutil.rmtree(stray, ignore_errors=True)
    checkpoint = last_checkpoint(run.directory)
    args = training_arguments(config, run.directory)
    if checkpoint is not None:
        check_resumable(checkpoint, args)
    examples: Examples = blocks
    if teacher_cache is not None:
        examples = cached_blocks(teacher_cache, blocks, dense, config, args, identity)
    student = dense_model(dense, torch.float32)
    teacher = dense_model(dense, torch.float32) if config.runs_teacher else None
    gpus = torch.accelerator.device_count()
    if args.world_size == 1 and gpus > 1:
        console.print(f"training on one of {gpus} GPUs: start with torchrun --nproc-per-node {gpus} to use them all")
    console.print(
        f"{config.total_steps} steps of {config.blocks_per_step} x {config.block_length} tokens from a text of "
        f"{len(tokens.tokens)} tokens"
    )

    # Start from the dense weights, or from one-shot pruned ones
    if checkpoint is None:
        warm_start(student, config, tokens, source_id, kept_starts)
    student = sparsify(student, config)
    trainer = CastTrainer(
        student,
        config,
        teacher,
        args=args,
        train_dataset=examples,
        callbacks=[Health(run.metrics, config.batch_tokens, console)],
    )
    trainer.remove_callback(transformers.PrinterCallback)

    # Measure, and refuse what cannot succeed
    if not run.begun:
        facts: dict[str, Any] = {}
        try:
            if isinstance(config, CastConfig):
                facts = plan_decay(trainer, config, examples, console, force)
            trainer.accelerator.wait_for_everyone()  # have looked for a run before this one is there
            run.begin(**facts)
        except InputError:
            with contextlib.suppress(OSError):
                run.directory.rmdir()  # Trainer has made it; where it is not empty, it stays
            raise
    if isinstance(config, CastConfig):
        trainer.config = config.model_copy(update={"decay": run.facts["decay"]})

    # Train
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint}")
    with without_transformers_bars(), StopWhenAsked(trainer):  # bars of checkpoints
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step = trainer.state.global_step
    if step < config.total_steps:
        raise Interrupted(f"stopped after step {step} of {config.total_steps}, as asked: go on with --resume")

    # Cut, and see what it costs
    before = report_loss(trainer, examples)
    finished = trainer.finish()
    after = report_loss(trainer, examples)
    console.print(f"cross entropy on training text {before['ce']:.4f} before the cut, {after['ce']:.4f} after")

    # Save
    metrics = read_metrics(run.metrics)
    if not metrics:
        raise InputError(f"there are no metrics in {run.directory}: all machines of a run must see the same OUT")
    summary = {
        **identity,
        "source": str(source),
        "data": list(data),
        "text_tokens": len(tokens.tokens),
        "trained_tokens": budget_tokens,
        "seconds": metrics[-1]["seconds"],
        **run.facts,
        "before_cut": before,
        "after_cut": after,
    }
    trainer.accelerator.wait_for_everyone()  # have read the metrics before they are removed
    if trainer.is_world_process_zero():
        assert finished is not None
        with new_directory(out, overwrite, directory) as building:
            save_model(finished, tokenizer, directory, building)
            shutil.copy(run.metrics, building)
            plot_metrics(metrics, building / "training.png", f"Training of {model_name(directory)} by {config.method}")
            (building / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
        run.remove()
        console.print(f"saved {out}")
    return summary


def plan_decay(
    trainer: CastTrainer, config: CastConfig, blocks: Examples, console: Console, force: bool
) -> dict[str, Any]:
    """Measure what decides CAST's decay and whether it suffices; return decay, momentum and budget.

    The pull of the l2 ablation shrinks with the weight, so it has no budget.

    Raises:
        InputError: decay cannot bring the masked weights to zero, unless `force`.
    """
    momentum = measure_momentum(trainer, blocks)
    decay = config.decay_ratio * momentum if config.decay == "auto" else config.decay
    console.print(f"decay {decay:.3g}, momentum on masked weights {momentum:.3g} (root mean square)")
    if config.decay_norm == "l2":
        return {"decay": decay, "momentum": momentum}
    budget = decay_budget(trainer.student, config.model_copy(update={"decay": decay}), momentum)
    console.print(str(budget))
    if not force:
        budget.check()
    return {"decay": decay, "momentum": momentum, "budget": budget.as_dict()}


def cached_blocks(
    directory: Path,
    blocks: TokenBlocks,
    dense: Checkpoint,
    config: TrainConfig,
    args: TrainingArguments,
    identity: dict[str, Any],
) -> CachedBlocks:
    """Return the blocks with the teacher's most likely tokens, after running it where `directory` lacks them.

    Processes share the work, so they must see the same directory.
    """
    bf16 = uses_bf16(config, args.device)
    belongs_to = {"data": identity["data"], "teacher": identity["source"], "seed": config.seed, "bf16": bf16}
    k = config.teacher_top_k or 0
    vocabulary = dense_config(dense).vocab_size
    with args.main_process_first():
        cache = TeacherCache.open(directory, belongs_to, blocks.rows, config.block_length - 1, k, vocabulary)
    if not cache.done.all():
        dtype = torch.bfloat16 if bf16 else torch.float32
        teacher: Any = dense_model(dense, dtype)
        at_once, _ = config.split_step(args.world_size)
        first = args.process_index == 0
        part = (args.process_index, args.world_size)
        fill(cache, blocks, teacher.to(args.device), batch=at_once, bf16=bf16, part=part, progress=first)
    if args.world_size > 1:
        torch.distributed.barrier()  # all parts are done
    return CachedBlocks(blocks, cache)


def measure_momentum(trainer: CastTrainer, blocks: Examples) -> float:
    """Return the root mean square of the momentum on masked weights that the first steps will see.

    From the clipped gradient of one step's batch: the momentum of gradients that are mostly noise has
    (1 - b1) / (1 + b1) of their mean square.
    """
    config, model = trainer.config, trainer.student
    micro = trainer.args.per_device_train_batch_size
    parts = range(0, config.blocks_per_step, micro)
    with _recomputing(model):
        for start in parts:
            inputs = batch(blocks, range(start, start + micro), trainer.args.device)
            with trainer.compute_loss_context_manager():
                loss = trainer.distillation(model, inputs).loss / len(parts)
            loss.backward()
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if not torch.isfinite(norm):
        raise InputError("the gradient of the starting model is not finite, so it cannot be trained")
    squares, count = 0.0, 0
    for _, module in scope(model):
        assert module.weight.grad is not None
        weight, grad = local(module.weight), local(module.weight.grad)
        mask = nm_mask(weight.t()).t() if is_transposed(module) else nm_mask(weight)
        square = torch.linalg.vector_norm(grad * ~mask) ** 2
        squares += sum_of_pieces(square, module.weight).item()
        count += module.weight.numel() // 2
    model.zero_grad(set_to_none=True)
    beta1 = config.betas[0]
    return math.sqrt(squares / count * (1 - beta1) / (1 + beta1))


@contextlib.contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Let gradient checkpointing work on a model in eval mode, that is without dropout: it asks the blocks alone."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    blocks = [layer for layer in layers if layer.gradient_checkpointing]
    dropouts = [(block, block.__dict__["dropout"]) for block in blocks if "dropout" in block.__dict__]  # OPT's own
    try:
        for block in blocks:
            block.training = True
        for block, _ in dropouts:
            block.__dict__["dropout"] = 0.0
        yield
    finally:
        for block in blocks:
            block.training = False
        for block, dropout in dropouts:
            block.__dict__["dropout"] = dropout


@torch.no_grad()
def report_loss(trainer: CastTrainer, blocks: Examples) -> dict[str, float]:
    """Return mean loss, CE and KL over the first few thousand training tokens, without dropout."""
    trainer.student.eval()
    length = trainer.config.block_length
    count = min(len(blocks), max(1, _REPORT_TOKENS // length))
    sums = {"loss": 0.0, "ce": 0.0, "kl": 0.0}
    for i in range(count):
        inputs = batch(blocks, range(i, i + 1), trainer.args.device)
        # not worth compiling for once more
        with trainer.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            losses = trainer.distillation(trainer.student, inputs)
        for name in sums:
            sums[name] += getattr(losses, name).item()
    return {name: total / count for name, total in sums.items()}


def batch(examples: Examples, indexes: range, device: torch.device) -> dict[str, Tensor]:
    """Stack examples into one batch on `device`."""
    rows = [examples[i] for i in indexes]
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
