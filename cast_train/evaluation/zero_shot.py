"""Zero-shot accuracy on lm-eval's tasks, from the hub or from local files."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.errors import InputError

INSTALL = "zero-shot tasks need lm-eval: pip install 'cast-serve[eval]'"


@dataclass(frozen=True)
class Tasks:
    """Which tasks to run.

    Attributes:
        names: lm-eval's names; none takes all of `directory`.
        directory: task YAML files with their data, paths relative to it; None takes lm-eval's own from the hub.
        limit: items of each task, from its start; None takes all.
    """

    names: tuple[str, ...] = ()
    directory: Path | None = None
    limit: int | None = None


def zero_shot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks) -> dict[str, Any]:
    """Run `tasks`, no examples in the prompt, and return plain accuracy (`acc`, as in the paper) of each.

    Returns:
        {"mean": mean acc, "tasks": {name: {"acc", "stderr", "items"}}}; the numbers are lm-eval's own.

    Raises:
        InputError: lm-eval is missing, a task is unknown, its data cannot be had, or it has no accuracy.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(INSTALL) from None

    manager = TaskManager(
        include_path=None if tasks.directory is None else str(tasks.directory.resolve()),
        include_defaults=tasks.directory is None,
    )
    names = list(tasks.names) or manager.all_subtasks
    where = "lm-eval" if tasks.directory is None else str(tasks.directory)
    if not names:
        raise InputError(f"{where} holds no task: give a directory of lm-eval task files")
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(f"there is no task '{unknown[0]}' in {where}: check the name")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8 if model.device.type == "cpu" else 64)
    with _quietly_within(tasks.directory):
        try:
            loaded = manager.load(names)
        except Exception as error:  # whatever the hub, a reader of files or a task's own code raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"the data of {', '.join(names)} could not be loaded ({reason}): see --task-dir") from None
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    # bootstrap_iters=0: the standard error of a mean needs no resampling
    results = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=tasks.limit, bootstrap_iters=0, log_samples=False)
    found = {}
    for name in loaded["tasks"]:
        values, items = results["results"][name], results["n-samples"][name]["effective"]
        if "acc,none" not in values:
            raise InputError(f"task {name} has no metric acc: choose another")
        acc = values["acc,none"]
        found[name] = {"acc": acc, "stderr": math.sqrt(acc * (1 - acc) / max(1, items - 1)), "items": items}
    return {"mean": sum(task["acc"] for task in found.values()) / len(found), "tasks": found}


@contextlib.contextmanager
def _quietly_within(directory: Path | None) -> Iterator[None]:
    """Data paths in task files are relative to the working directory: make that the tasks' own."""
    import datasets

    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if directory is None else contextlib.chdir(directory):
            yield
    finally:
        datasets.enable_progress_bars()
