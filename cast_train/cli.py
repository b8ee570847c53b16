"""`cast train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    source: Annotated[str, typer.Argument(help="Dense model: a Hugging Face directory, or a hub id.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Training text: .txt, .jsonl or .parquet file, directory of them, or hub dataset id; may be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make for the 2:4 model.")],
    method: Annotated[
        str, typer.Option(help="cast, or one-shot pruning to compare with: magnitude, wanda or sparsegpt.")
    ] = "cast",
    preset: Annotated[
        str, typer.Option(help="Settings to start from: 'quick' (minutes on a CPU) or 'full' (the paper's).")
    ] = "quick",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens, instead of --steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    decay: Annotated[str | None, typer.Option(help="Pull on masked weights (the paper's lambda), or 'auto'.")] = None,
    eta: Annotated[float | None, typer.Option(help="Weight of the KL term against the dense model, 0 to 1.")] = None,
    schedule: Annotated[str | None, typer.Option(help="How the learning rate falls: linear or cosine.")] = None,
    warm_start: Annotated[str | None, typer.Option(help="One-shot start: none, magnitude, wanda or sparsegpt.")] = None,
    shrink: Annotated[
        float | None, typer.Option(help="What a warm start multiplies masked weights by; 0 cuts them.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per step.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens per training sequence.")] = None,
    precision: Annotated[str | None, typer.Option(help="Arithmetic of the passes: auto, bf16 or fp32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the training text.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    log_steps: Annotated[int | None, typer.Option(help="Steps between two log lines.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if decay cannot bring masked weights to zero.")
    ] = False,
) -> None:
    """Train a dense model to exact 2:4 sparsity with CAST.

    Needs a Llama, Mistral, Qwen2, Qwen3, GPT-2 or OPT model with safetensors weights. Checkpoints and metrics lie in
    OUT.run until OUT is complete. Example:

        cast train HuggingFaceTB/SmolLM2-135M-Instruct --data texts/ --out smollm2-24 --preset quick
    """
    from cast_train.config import PRESETS, CastConfig
    from conversion.errors import InputError

    if preset not in PRESETS:
        raise InputError(f"there is no preset '{preset}': use one of {', '.join(PRESETS)}")
    config = CastConfig.preset(
        preset,
        steps=steps,
        tokens=tokens,
        lr=lr,
        decay=decay,
        eta=eta,
        schedule=schedule,
        warm_start=warm_start,
        shrink=shrink,
        batch_tokens=batch_tokens,
        block_length=block_length,
        precision=precision,
        seed=seed,
        save_steps=save_steps,
        log_steps=log_steps,
    )
    import transformers

    from cast_train.oneshot.directory import prune_directory
    from cast_train.training import train as train_model

    transformers.utils.logging.set_verbosity_error()
    if method != "cast":
        prune_directory(source, data, out, method, config, overwrite)
        print(f"saved {out}")
        return
    train_model(source, data, out, config, resume=resume, force=force, overwrite=overwrite)


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Model directories to score, dense or packed.")],
    data: Annotated[Path | None, typer.Option(help="Held-out text: .txt, .jsonl or .parquet file.")] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens per window; default: 1024, or the models' context if that is shorter.", min=2),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of the text to score.", min=2)] = 50_176,
    teacher: Annotated[
        Path | None, typer.Option(help="The dense model: also measure KL and top-1 agreement with it on the text.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks by lm-eval's names, with commas; from the hub, or --task-dir.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(help="Directory of lm-eval task files and their data, to need no hub; all its tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most items of each task; default: all.", min=1)] = None,
    json: Annotated[Path | None, typer.Option(help="File to write the results to.")] = None,
) -> None:
    """Measure perplexity on held-out text, agreement with the dense model, and zero-shot accuracy.

    Documents are joined by a blank line and cut into windows that do not overlap, the same for every model. Zero-shot
    tasks run in lm-eval (pip install 'cast-serve[eval]'), no examples in the prompt; accuracy is plain acc. Examples:

        cast eval dense/ sparse/ --data heldout.jsonl --teacher dense/

        cast eval sparse/ --tasks piqa,sciq --limit 500
    """
    from cast_train.evaluation.evaluate import evaluate as score
    from cast_train.evaluation.evaluate import print_results, write_results
    from cast_train.evaluation.zero_shot import Tasks
    from conversion.errors import InputError

    if task_dir is not None and not task_dir.is_dir():
        raise InputError(f"there is no directory {task_dir}: give one of lm-eval task files")
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    chosen = Tasks(names, task_dir, limit) if names or task_dir else None
    results = score(models, data, context, tokens, teacher=teacher, tasks=chosen)
    print_results(results)
    if json is not None:
        write_results(results, json)
