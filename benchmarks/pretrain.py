"""`python -m benchmarks.pretrain OUT --data ...`: a small dense Llama from scratch, to compare 2:4 methods on.

On two cores no run on SmolLM2-135M sees as many tokens for each weight as those of the paper do, 1 to 6. With a million
weights one does within minutes, so `benchmarks.quality` can compare methods on it in the regime they were made for.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Sampler, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from cast_train.dataset import TokenBlocks, load_tokens
from conversion.atomic import check_target, new_directory
from conversion.command import run
from conversion.errors import InputError
from conversion.text import read_documents

HEAD_DIM = 32
STEP_TOKENS = 8192
END = "<|endoftext|>"


class InOrder(Trainer):
    """TokenBlocks are shuffled already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train_tokenizer(documents: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` tokens, of which one ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def pretrain(model: LlamaForCausalLM, blocks: TokenBlocks, lr: float, seed: int) -> dict[str, float]:
    """Train on all blocks once, in the usual way; return Trainer's metrics."""
    per_step = max(1, STEP_TOKENS // len(blocks[0]["input_ids"]))
    steps = len(blocks) // per_step

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=per_step,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 50,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=seed,
        )
        metrics: dict[str, float] = InOrder(model, args, collate, blocks).train().metrics
        return metrics


def main(
    out: Annotated[Path, typer.Argument(help="Model directory to make.")],
    data: Annotated[list[str], typer.Option(help="Training text, as for `cast train`; may be repeated.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.", min=STEP_TOKENS)] = 12_000_000,
    vocabulary: Annotated[int, typer.Option(help="Tokens that the tokenizer, byte-level BPE, knows.", min=257)] = 2048,
    hidden: Annotated[int, typer.Option(help=f"Hidden size, a multiple of {HEAD_DIM}.", min=HEAD_DIM)] = 128,
    layers: Annotated[int, typer.Option(help="Transformer blocks.", min=1)] = 4,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2, max=STEP_TOKENS)] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW; falls to zero by a cosine.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights and the text's order.")] = 0,
) -> None:
    """Train a small dense Llama and its tokenizer from scratch: a quarter of an hour on two cores."""
    check_target(out, False)
    if hidden % HEAD_DIM:
        raise InputError(f"--hidden {hidden} is no multiple of {HEAD_DIM}")
    tokenizer = train_tokenizer(read_documents(data), vocabulary)
    cache = load_tokens(data, tokenizer)
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // HEAD_DIM,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    metrics = pretrain(model, TokenBlocks(cache, context, tokens // context, seed), lr, seed)
    with new_directory(out) as building:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        facts = {"data": data, "text_tokens": len(cache.tokens), "tokens": tokens, "lr": lr, "seed": seed, **metrics}
        (building / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    typer.echo(f"made {out}: {model.num_parameters():,} weights, mean training loss {metrics['train_loss']:.3f}")


if __name__ == "__main__":
    run(lambda: typer.run(main))
