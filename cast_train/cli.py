"""`cast permute`, `cast train`, `cast eval` and `cast scaling-law`."""

from pathlib import Path
from typing import Annotated, Any

import typer

_PRUNING = "Pruning"
_BUDGET = "Budget"
_RUNNING = "Running"
_PLANNING = "Planning"


def train(
    source: Annotated[str, typer.Argument(help="Dense model: a Hugging Face directory, or a hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training text: .txt, .jsonl or .parquet file, directory of them, or hub dataset, NAME or "
            "NAME:CONFIG; 'self' samples from the dense model as many tokens as are trained, self:COUNT so many. May "
            "be repeated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make for the 2:4 model.")] = None,
    method: Annotated[
        str,
        typer.Option(help="Trained: cast, srste, gmp or ast. Without training: magnitude, wanda, sparsegpt or admm."),
    ] = "cast",
    preset: Annotated[
        str,
        typer.Option(
            help="Settings to start from: 'quick' (minutes on a CPU) or 'full' (the CAST paper's); docs/training.md "
            "has them in a table."
        ),
    ] = "quick",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_BUDGET)] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Training tokens, instead of --steps.", rich_help_panel=_BUDGET)
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per step.", rich_help_panel=_BUDGET)] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens per training sequence.", rich_help_panel=_BUDGET)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_BUDGET)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="How the learning rate falls: linear, cosine, or constant.", rich_help_panel=_BUDGET),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(help="One-shot start: none, magnitude, wanda, sparsegpt or admm.", rich_help_panel=_PRUNING),
    ] = None,
    shrink: Annotated[
        float | None,
        typer.Option(help="What a warm start multiplies masked weights by; 0 cuts them.", rich_help_panel=_PRUNING),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL term against the dense model, 0 to 1; 0 trains without it.", rich_help_panel=_PRUNING
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the KL term.", rich_help_panel=_PRUNING)
    ] = None,
    decay: Annotated[
        str | None,
        typer.Option(
            help="cast, srste, ast: pull on masked weights (the papers' lambda); 'auto' (cast) measures one.",
            rich_help_panel=_PRUNING,
        ),
    ] = None,
    ramp_end: Annotated[
        float | None,
        typer.Option(
            help="gmp, ast: part of the run after which everything is pruned, or decay stands.",
            rich_help_panel=_PRUNING,
        ),
    ] = None,
    scaling_blocks: Annotated[
        int | None,
        typer.Option(help="cast: column blocks of weight scaling; 0 leaves it out.", rich_help_panel=_PRUNING),
    ] = None,
    decay_norm: Annotated[
        str | None, typer.Option(help="cast: l1, or l2 as an ablation.", rich_help_panel=_PRUNING)
    ] = None,
    second_moment: Annotated[
        str | None,
        typer.Option(help="cast: of the update, or of the gradient as an ablation.", rich_help_panel=_PRUNING),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Arithmetic of the passes: auto, bf16 or fp32.", rich_help_panel=_RUNNING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the training text.", rich_help_panel=_RUNNING)] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between two checkpoints.", rich_help_panel=_RUNNING)
    ] = None,
    log_steps: Annotated[
        int | None, typer.Option(help="Steps between two log lines.", rich_help_panel=_RUNNING)
    ] = None,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp",
            help="Share weights and optimizer state between the devices (FSDP2); start with torchrun.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again for the backward pass, to save memory.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Fuse operations by torch.compile: faster steps on GPUs, after a slower first one.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the dense model's most likely tokens; filled if need be, it saves later runs with the "
            "same text and seed, and no more steps, the dense model.",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    teacher_top_k: Annotated[
        int | None,
        typer.Option(help="--teacher-cache: tokens kept at each position; default 64.", rich_help_panel=_RUNNING),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what the run needs: memory of each GPU, tokens/s, hours. Takes config.json alone.",
            rich_help_panel=_PLANNING,
        ),
    ] = False,
    gpus: Annotated[int, typer.Option(help="--dry-run: number of GPUs.", rich_help_panel=_PLANNING, min=1)] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="--dry-run: a100-40gb, a100, h100-pcie, h100 or h200; default: speed measured here.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="--dry-run: part of the GPU's peak speed that training reaches.",
            rich_help_panel=_PLANNING,
            min=0.01,
            max=1,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting that has no option here, for example micro_batch_tokens=16384, train_embeddings=true, "
            "dense_lr=5 or betas=[0.9,0.95]; docs/training.md has them all. May be repeated.",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=_RUNNING)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.", rich_help_panel=_RUNNING)
    ] = False,
    finetune: Annotated[
        bool,
        typer.Option(
            "--finetune",
            help="SOURCE is 2:4 already: train it on, its zeros kept exactly; instead of a method.",
            rich_help_panel=_PRUNING,
        ),
    ] = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            help="--finetune: train a low-rank update under the mask, folded in at the end; default: all weights.",
            rich_help_panel=_PRUNING,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Train even if decay cannot bring masked weights to zero.", rich_help_panel=_RUNNING
        ),
    ] = False,
) -> None:
    """Train a dense model to exact 2:4 sparsity, with CAST or a method to compare it with.

    Needs a Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite, GPT-2 or OPT model with safetensors weights. Checkpoints
    and metrics lie in OUT.run until OUT is complete. Example:

        cast train HuggingFaceTB/SmolLM2-135M-Instruct --data texts/ --out smollm2-24 --preset quick
    """
    from cast_train.config import CONFIGS, PRESETS, TrainConfig, setting_value
    from cast_train.methods.finetune import FinetuneConfig
    from conversion.errors import InputError

    if preset not in PRESETS:
        raise InputError(f"there is no preset '{preset}': use one of {', '.join(PRESETS)}")
    if finetune and method != "cast":
        raise InputError("--finetune keeps the mask that is there: leave --method out")
    others = {}
    for entry in settings or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--set {entry}: give NAME=VALUE, for example micro_batch_tokens=16384")
        others[name] = setting_value(value)
    named: dict[str, Any] = {
        "steps": steps,
        "tokens": tokens,
        "batch_tokens": batch_tokens,
        "block_length": block_length,
        "lr": lr,
        "schedule": schedule,
        "warm_start": warm_start,
        "shrink": shrink,
        "eta": eta,
        "temperature": temperature,
        "decay": decay,
        "ramp_end": ramp_end,
        "scaling_blocks": scaling_blocks,
        "decay_norm": decay_norm,
        "second_moment": second_moment,
        "lora_rank": lora_rank,
        "precision": precision,
        "seed": seed,
        "save_steps": save_steps,
        "log_steps": log_steps,
        "fsdp": fsdp,
        "teacher_top_k": teacher_top_k or (64 if teacher_cache is not None else None),
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile,
    }
    config = (FinetuneConfig if finetune else CONFIGS.get(method, TrainConfig)).preset(preset, **named | others)
    if dry_run:
        from rich.console import Console

        from cast_train.plan import make_plan, print_plan
        from conversion.hub import local_model

        print_plan(
            make_plan(local_model(source, ["config.json"]), config, gpus=gpus, gpu=gpu, mfu=mfu),
            Console(highlight=False),
        )
        return
    if not data or out is None:
        raise InputError("say what to train on and where to save the result: give --data and --out")
    import transformers

    from cast_train.oneshot.directory import prune_directory
    from cast_train.training import train as train_model

    transformers.utils.logging.set_verbosity_error()
    if isinstance(config, FinetuneConfig):
        from cast_train.finetune import finetune as finetune_model

        finetune_model(source, data, out, config, resume=resume, overwrite=overwrite, teacher_cache=teacher_cache)
    elif method in CONFIGS:
        train_model(
            source,
            data,
            out,
            config,
            resume=resume,
            force=force,
            overwrite=overwrite,
            teacher_cache=teacher_cache,
        )
    else:
        prune_directory(source, data, out, method, config, overwrite)
        print(f"saved {out}")


def permute(
    source: Annotated[str, typer.Argument(help="Dense model: a Hugging Face directory, or a hub id.")],
    data: Annotated[list[str], typer.Option(help="Calibration text, as for 'cast train'. May be repeated.")],
    out: Annotated[Path, typer.Option(help="Directory to make for the permuted model.")],
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of the text to take.", min=1)] = 24_576,
    seed: Annotated[int, typer.Option(help="Of the choice of text.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Put a dense model's channels in an order in which 2:4 takes less away; it computes what it did.

    Train or prune what comes out instead of SOURCE, with any method. Adapters (LoRA) made for SOURCE do not fit it.
    Example:

        cast permute dense/ --data train.jsonl --out permuted/

        cast train permuted/ --data train.jsonl --out sparse/
    """
    import transformers

    from cast_train.config import TrainConfig
    from cast_train.permutation.directory import permute_directory

    transformers.utils.logging.set_verbosity_error()
    config = TrainConfig.preset("quick", calibration_tokens=calibration_tokens, seed=seed)
    permute_directory(source, data, out, config, overwrite)


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Models to score, dense or packed: directories, or hub ids.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out text: .txt, .jsonl or .parquet file, or hub dataset as NAME:CONFIG:SPLIT."),
    ] = None,
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
    tasks run in lm-eval (pip install 'cast-serve\\[eval]'), no examples in the prompt; accuracy is plain acc. Examples:

        cast eval dense/ sparse/ --data heldout.jsonl --teacher dense/

        cast eval sparse/ --tasks piqa,sciq --limit 500
    """
    from cast_train.evaluation.evaluate import evaluate as score
    from cast_train.evaluation.evaluate import print_results, write_results
    from cast_train.evaluation.zero_shot import Tasks
    from conversion.errors import InputError

    if json is not None and not json.parent.is_dir():
        raise InputError(f"there is no directory {json.parent} to write {json.name} to: make it first")
    if task_dir is not None and not task_dir.is_dir():
        raise InputError(f"there is no directory {task_dir}: give one of lm-eval task files")
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    chosen = Tasks(names, task_dir, limit) if names or task_dir else None
    results = score(models, data, context, tokens, teacher=teacher, tasks=chosen)
    print_results(results)
    if json is not None:
        write_results(results, json)


def scaling_law(
    records: Annotated[
        list[Path],
        typer.Argument(
            help="Outputs of 'cast eval --json' on trained models (and the dense ones), or JSON lists of "
            '{"name", "parameters", "tokens", "perplexity"}; dense models have no tokens.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make: scaling-law.json and scaling-law.png.")],
    method: Annotated[str, typer.Option(help="Whose runs to fit, where evaluations hold several methods.")] = "cast",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Fit loss over model size and training tokens to finished runs, and predict the tokens that match dense.

    L(N, D) = E + A / N^alpha + B / D^beta needs at least 6 runs, of 3 sizes and 3 token counts; runs of one size are
    fitted by L(D) = E + B / D^beta, which needs 4. Example:

        cast eval dense/ run-*/ --data heldout.jsonl --json quality.json

        cast scaling-law quality.json --out scaling
    """
    from cast_train.run_records import read_records
    from cast_train.scaling_law import fit_scaling_law
    from cast_train.scaling_report import write_report
    from conversion.atomic import check_target

    check_target(out, overwrite)
    found = read_records(records, method)
    print(write_report(fit_scaling_law(found.runs), found.dense, out, overwrite=overwrite))
