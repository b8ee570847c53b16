"""What a worker is asked to do, and what it answers: JSON over its standard input and output."""

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Runtime = Literal["engine", "llama.cpp", "vllm"]


@dataclass(frozen=True)
class Job:
    """One candidate's turn in a process of its own. With `windows` it scores text, else it is timed.

    Attributes:
        runtime: "engine" runs an ONNX directory, "llama.cpp" a GGUF file, "vllm" a Hugging Face or packed directory.
        model: the directory or file.
        threads: of the computation.
        prompts: token ids, one prompt for each sequence of the highest concurrency; all have one length.
        long_prompt: token ids whose reading is timed.
        output_tokens: generated for each prompt, whatever they are.
        concurrency: how many prompts are given at once, in this order.
        windows: token ids to score, all of one length; empty does not score.
        dtype: of activations and dense weights, for vLLM.
        repeated_s: seconds over which each timing is repeated if it takes less; the median counts.
    """

    runtime: Runtime
    model: str
    threads: int
    prompts: list[list[int]] = field(default_factory=list)
    long_prompt: list[int] = field(default_factory=list)
    output_tokens: int = 0
    concurrency: list[int] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    dtype: str = ""
    repeated_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Speed:
    """Greedy generation for several prompts at once.

    Attributes:
        seconds: from handing the prompts over to the last token.
        tokens: generated.
        reading_seconds: until every prompt had its first token.
        decoded_tokens: generated after that, when nothing but decoding was done.
    """

    seconds: float
    tokens: int
    reading_seconds: float
    decoded_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, end to end."""
        return self.tokens / self.seconds

    @property
    def decoded_per_s(self) -> float:
        """Output tokens per second once every prompt has been read; 0 if there were none."""
        return self.decoded_tokens / (self.seconds - self.reading_seconds) if self.decoded_tokens else 0.0


@dataclass(frozen=True)
class Turn:
    """What a timed turn gave.

    Attributes:
        speeds: by concurrency.
        prefill_per_s: tokens of the long prompt per second, until the first token after it.
        peak_memory: most bytes that were resident in the process, files mapped into it included.
        load_seconds: until the model could generate.
        about: what the runtime says of itself.
        weight_memory: bytes that became resident while the weights were loaded; None where that is not known.
    """

    speeds: dict[int, Speed]
    prefill_per_s: float
    peak_memory: int
    load_seconds: float
    about: str
    weight_memory: int | None = None

    @classmethod
    def from_json(cls, text: str) -> "Turn":
        fields = json.loads(text)
        fields["speeds"] = {int(users): Speed(**speed) for users, speed in fields["speeds"].items()}
        return cls(**fields)
