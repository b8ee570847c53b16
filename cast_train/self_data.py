"""Training text sampled from the dense teacher itself: distillation without data (after LLM-QAT, arXiv:2305.17888)."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cast_train.dataset import check_eos, check_vocabulary, default_cache
from cast_train.run import source_hash
from conversion.atomic import write_text
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_config, dense_model
from conversion.errors import InputError
from conversion.progress import shown_progress

SELF = "self"
LONGEST = 1024
"""Tokens of a sampled sequence at most: samples of small models wander off."""
_VERSION = 1
_CPU_SEQUENCES = 32
_KV_CACHE_BYTES = 8 << 30  # what the keys and values of one batch may take on an accelerator


def with_samples(
    data: Sequence[str],
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    block_length: int,
    cache_dir: Path | None = None,
) -> list[str]:
    """Return `data` with "self" (`tokens` tokens) or "self:COUNT" replaced by files of sampled text.

    InputError if COUNT is no positive number.
    """
    entries: list[str] = []
    for entry in data:
        name, colon, count = entry.partition(":")
        if name != SELF:
            entries.append(entry)
            continue
        if colon and not (count.isdecimal() and int(count)):
            raise InputError(f"--data {entry}: give a number of tokens, for example self:1000000")
        wanted = int(count) if colon else tokens
        entries += map(str, sample_text(checkpoint, tokenizer, wanted, min(block_length, LONGEST), cache_dir))
    return entries


def sample_text(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    cache_dir: Path | None = None,
) -> list[Path]:
    """Sample at least `tokens` tokens from a model, at temperature 1, and return the .jsonl files that hold them.

    A sequence has `length` tokens: BOS where the tokenizer sets one, a first token drawn uniformly from all but special
    ones, then the model's own. An EOS ends a document, and the model goes on with the next. Files are one batch each
    and stay in the cache, so an interrupted call goes on where it was, and a longer one extends a shorter one. Under
    torchrun the batches are shared among the processes.

    InputError if the tokenizer has no EOS token, or makes tokens that the model does not know.
    """
    check_eos(tokenizer)
    check_vocabulary(_ordinary(tokenizer)[-1], dense_config(checkpoint).vocab_size, checkpoint.directory)
    device = _device()
    sequences = _sequences(checkpoint, length, device)
    key = [str(_VERSION), source_hash(checkpoint.directory), tokenizer.get_vocab(), length, sequences, device.type]
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    directory = (cache_dir or default_cache()) / f"{SELF}-{fingerprint}"
    directory.mkdir(parents=True, exist_ok=True)
    parts = [directory / f"{number:06}.jsonl" for number in range(math.ceil(tokens / (sequences * length)))]
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    missing = [number for number, part in enumerate(parts) if number % world_size == rank and not part.exists()]
    if missing:
        model = dense_model(checkpoint, torch.float32 if device.type == "cpu" else torch.bfloat16)
        model.to(device)  # type: ignore[arg-type]
        with shown_progress("sampling text", len(missing) * sequences * length, rank == 0) as advance:
            for number in missing:
                documents = _documents(_sample(model, tokenizer, sequences, length, seed=number), tokenizer)
                write_text(parts[number], "".join(json.dumps({"text": text}) + "\n" for text in documents))
                advance(sequences * length)
    while not all(part.exists() for part in parts):  # other processes are at theirs
        time.sleep(1)
    return parts


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int, seed: int
) -> list[list[int]]:
    """Return `sequences` lists of `length` token ids."""
    ordinary = torch.tensor(_ordinary(tokenizer))
    chosen = torch.randint(len(ordinary), (sequences, 1), generator=torch.Generator().manual_seed(seed))
    start = ordinary[chosen]
    prefix = tokenizer("")["input_ids"]  # BOS, for tokenizers that set one
    if prefix and prefix[0] == tokenizer.bos_token_id:
        start = torch.cat([torch.full_like(start, prefix[0]), start], dim=1)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - start.shape[1],
        eos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = start.to(model.device)
        generate: Any = model.generate
        ids = generate(start, attention_mask=torch.ones_like(start), generation_config=config)
    rows: list[list[int]] = ids.tolist()
    return rows


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all tokens that are not special, in ascending order."""
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def _documents(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Split rows of tokens at EOS, and decode; special tokens inside a document stay as their text."""
    documents: list[list[int]] = []
    for row in rows:
        documents.append([])
        for token in row[row[0] == tokenizer.bos_token_id :]:
            if token == tokenizer.eos_token_id:
                documents.append([])
            else:
                documents[-1].append(token)
    texts = [str(tokenizer.decode(document)) for document in documents]
    return [text for text in texts if text.strip()]


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))


def _sequences(checkpoint: Checkpoint, length: int, device: torch.device) -> int:
    """Sequences in a batch: on an accelerator as many as the keys and values of have room, up to 1024."""
    if device.type == "cpu":
        return _CPU_SEQUENCES
    config = checkpoint.config
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    width = config.get("head_dim") or hidden // heads
    per_token = 2 * 2 * layers * (config.get("num_key_value_heads") or heads) * width  # keys and values, bf16
    return max(1, min(1024, _KV_CACHE_BYTES // (per_token * length)))
