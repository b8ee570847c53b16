"""Which tokens the next step computes: continuous batching with chunked prefill.

Requests are admitted first come, first served, when the cache has room for their prompt. A step computes one token of
every sequence that is decoding, and fills the rest of its token budget with chunks of prompts. Sequences take cache
blocks as they grow. When none is left, the youngest sequence gives its blocks back and waits at the head of the queue,
to be computed again from its prompt and what it has generated: the oldest always goes on, so every request finishes.
"""

from collections import deque
from dataclasses import dataclass, field

from cast_serve.engine.generation import Generation
from cast_serve.engine.kv_cache import BlockAllocator, blocks_for
from cast_serve.engine.sampler import Sampler
from cast_serve.engine.types import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One request: its tokens so far (prompt, then generated), and how many of them the cache holds."""

    tokens: list[int]
    params: SamplingParams
    generation: Generation
    sampler: Sampler
    prompt_tokens: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True)
class Chunk:
    """The next `tokens` tokens of a sequence, to be computed in one step."""

    sequence: Sequence
    tokens: int

    @property
    def last(self) -> bool:
        """True if the chunk reaches the sequence's end, so that its logits give the next token."""
        return self.tokens == self.sequence.uncomputed


class Scheduler:
    """Used by one thread only."""

    def __init__(self, allocator: BlockAllocator, max_batch_size: int, step_tokens: int) -> None:
        assert step_tokens >= max_batch_size, "every decoding sequence needs a token of the budget"
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._allocator = allocator
        self._max_batch_size = max_batch_size
        self._step_tokens = step_tokens

    def schedule(self) -> list[Chunk]:
        """Choose the next step; the blocks that it writes are taken. Empty only if nothing runs or waits."""
        for sequence in list(self.running):
            if sequence in self.running:  # not evicted for an older one
                self._grow(sequence)
        while self.waiting and len(self.running) < self._max_batch_size and self._admit():
            pass

        decoding = sum(sequence.uncomputed == 1 for sequence in self.running)
        budget = self._step_tokens - decoding
        chunks = []
        for sequence in self.running:
            tokens = 1
            if sequence.uncomputed > 1:
                tokens = min(sequence.uncomputed, budget)
                budget -= tokens
            if tokens > 0:
                chunks.append(Chunk(sequence, tokens))
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has finished, failed or been cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def _grow(self, sequence: Sequence) -> None:
        """Take the blocks that the sequence's tokens need, from younger ones if none is free."""
        missing = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while missing > self._allocator.free:
            youngest = self.running.pop()
            self._free(youngest)
            youngest.computed = 0
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return
        sequence.blocks += self._allocator.take(missing)

    def _admit(self) -> bool:
        """Let the first waiting sequence in if, with it, all running ones could still grow by a block."""
        sequence = self.waiting[0]
        needed = blocks_for(len(sequence.tokens))
        if self.running and needed + len(self.running) > self._allocator.free:
            return False
        self.waiting.popleft()
        sequence.blocks = self._allocator.take(needed)
        self.running.append(sequence)
        return True

    def _free(self, sequence: Sequence) -> None:
        self._allocator.give_back(sequence.blocks)
        sequence.blocks = []
