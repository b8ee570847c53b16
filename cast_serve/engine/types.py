"""What the server and the engine say to each other."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop, in the OpenAI API's terms.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 takes the most likely token (greedy).
        top_p: nucleus mass in (0, 1].
        seed: makes sampling repeatable; the same seed and prompt give the same tokens whatever else is in the batch.
        stop_token_ids: generation ends when one of these is produced; the token itself is reported with its event.
        logprobs: how many alternatives to report per token, None for no log-probabilities at all.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Attributes:
        token_id: the token.
        logprob: natural log-probability under the model (temperature 1), None unless asked for.
        top_logprobs: the most likely (token_id, logprob) pairs, best first; empty unless asked for.
        finish_reason: set on the last event of a request. "stop": a stop token; "length": max_tokens or the context is
            full.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded and what executes it, as reported by `GET /v1/models/{id}`.

    Attributes:
        pattern: "2:4" or "dense".
        value_dtype: dtype of the kept values ("float32", "bfloat16"), or of the dense weights.
        sparse_layers: linears that the 2:4 kernel executes, counted from the loaded session, not from the config.
        weight_bytes: bytes of all weights as the runtime holds them.
        sparse_weight_bytes: the part of weight_bytes in packed 2:4 linears.
        context_length: most tokens (prompt plus generated) of one request.
        vocab_size: size of the vocabulary.
        kernel: instruction set the kernels chose at run time (cast_serve.kernels.ISAS).
    """

    pattern: str
    value_dtype: str
    sparse_layers: int
    weight_bytes: int
    sparse_weight_bytes: int
    context_length: int
    vocab_size: int
    kernel: str


@dataclass
class EngineStats:
    """A snapshot for /metrics."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    """Sequences in each step since the last snapshot."""
