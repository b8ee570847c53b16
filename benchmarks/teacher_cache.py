"""`python -m benchmarks.teacher_cache`: what keeping only the teacher's k most likely tokens costs in KL."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cast_train.dataset import TokenBlocks, load_tokens
from cast_train.distillation import TeacherTop, distillation_loss
from cast_train.hidden_states import last_hidden_state
from cast_train.teacher_cache import top_k
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.tokenizer import load_tokenizer

COUNTS = (1, 4, 16, 64, 256)


@torch.no_grad()
def measure(teacher_dir: Path, student_dir: Path, text: Path, tokens: int, length: int) -> list[dict[str, Any]]:
    """Return for each k the teacher's mass in its top k, the KL seen through it, and the part of the true KL missed."""
    teacher, student = (dense_model(Checkpoint(each), torch.float32) for each in (teacher_dir, student_dir))
    corpus = load_tokens([str(text)], load_tokenizer(teacher_dir), progress=False)
    blocks = TokenBlocks(corpus, length, max(1, tokens // length), seed=0)
    head, teacher_head = (each.get_output_embeddings().weight for each in (student, teacher))
    sums: dict[int, list[float]] = {k: [0.0, 0.0] for k in COUNTS}
    true = 0.0
    for index in range(len(blocks)):
        ids = blocks[index]["input_ids"][None]
        hidden, teacher_hidden = last_hidden_state(student, ids), last_hidden_state(teacher, ids)
        true += distillation_loss(hidden, head, ids, teacher_hidden, teacher_head).kl.item() / len(blocks)
        logits = teacher_hidden[0, :-1] @ teacher_head.t()
        for k, sum_ in sums.items():
            top, log_probs, tail = top_k(logits, k)
            stored = TeacherTop(top[None], log_probs.half()[None], tail.half()[None])  # as on disk
            sum_[0] += log_probs.exp().sum(1).mean().item() / len(blocks)
            sum_[1] += distillation_loss(hidden, head, ids, teacher_top=stored).kl.item() / len(blocks)
    return [
        {
            "k": k,
            "bytes_per_token": 4 * k + 2,
            "mass": mass,
            "kl": kl,
            "true_kl": true,
            "kl_error": true - kl,
            "relative_error": 1 - kl / true,
            "tokens": len(blocks) * (length - 1),
        }
        for k, (mass, kl) in sums.items()
    ]


def main(
    teacher: Annotated[Path, typer.Argument(help="Dense model directory.")],
    student: Annotated[Path, typer.Argument(help="Sparse model directory.")],
    data: Annotated[Path, typer.Option(help="Text: .txt, .jsonl or .parquet file.")],
    tokens: Annotated[int, typer.Option(help="Tokens to compare on.")] = 2048,
    block_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Compare KL(teacher || student) through the top k tokens with the true one."""
    results = measure(teacher, student, data, tokens, block_length)
    table = Table("k", "bytes/token", "teacher's mass", "KL", "KL error", "of the true KL", box=None)
    for row in results:
        numbers = (f"{row['mass']:.4f}", f"{row['kl']:.4f}", f"{row['kl_error']:.4f}", f"{row['relative_error']:.1%}")
        table.add_row(str(row["k"]), str(row["bytes_per_token"]), *numbers)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
