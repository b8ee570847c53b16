"""What a load test asks for and what it saw: the types of bench.json. All times are seconds, all sizes bytes."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["dense", "sparse"]
MIN_REQUESTS = 4
"""Fewest requests at any concurrency in a round: a single user's speed is what people ask for first."""
ROLES: tuple[Role, Role] = ("dense", "sparse")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoadPlan(_Record):
    """What one load process does to one server; it reads this from its standard input."""

    port: int
    model: str
    prompts: list[list[int]]
    """Token ids. Request i of a level sends prompt i modulo their number."""
    output_tokens: int
    requests: dict[int, int]
    """Numbers of requests by concurrency, in the order to run them."""
    warmup_users: int
    """Concurrent unrecorded requests before the first level."""
    timeout_s: float = 300.0
    """Longest silence of the server within a request before it counts as an error."""


class RequestSample(_Record):
    """One request as its client saw it."""

    concurrency: int
    start_s: float
    """When it was sent, on a clock that all samples of one round share."""
    end_to_end_s: float
    ttft_s: float | None = None
    """From sending to the first token; None if none came."""
    gaps_s: list[float] = Field(default_factory=list)
    """Between one streamed token and the next."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last token - first token) / (tokens - 1)."""
        if self.completion_tokens < 2 or not self.gaps_s:
            return None
        return sum(self.gaps_s) / (self.completion_tokens - 1)


class Memory(_Record):
    """A server's memory, by the kernel's count and by its own."""

    resident: int
    peak_resident: int
    unique: int | None
    """Pages no other process shares (USS); None where the system does not tell."""
    proportional: int | None
    """Shared pages divided among their users (PSS); None where the system does not tell."""
    reported: int | None
    """cast:resident_memory_bytes of /metrics."""


class Level(_Record):
    """All requests of one concurrency in one round."""

    concurrency: int
    samples: list[RequestSample]
    resident: int
    """The server's largest resident memory when one of these requests ended."""

    @property
    def succeeded(self) -> list[RequestSample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second, from the first request sent to the last one answered."""
        start = min(sample.start_s for sample in self.samples)
        end = max(sample.start_s + sample.end_to_end_s for sample in self.samples)
        return sum(sample.completion_tokens for sample in self.succeeded) / (end - start)


class Round(_Record):
    """One server under load at every concurrency, the other one idle."""

    index: int
    role: Role
    levels: list[Level]
    memory: Memory
    server_cpu: float
    """Cores the loaded server kept busy, on average."""
    idle_server_cpu: float
    """Cores the other server kept busy meanwhile; near zero, or it disturbed the measurement."""
    other_cpu: float
    """Cores that everything else on the machine, the load generator included, kept busy."""


class ServedModel(BaseModel):
    """One server: what it says it runs (GET /v1/models/{id}), and what starting it cost."""

    directory: str
    id: str
    pattern: str
    value_dtype: str
    sparse_layers: int
    weight_bytes: int
    sparse_weight_bytes: int
    context_length: int
    kernel: str
    disk_bytes: int
    start_s: float
    """From starting the process to the first answer of /health."""


class Machine(_Record):
    cpu: str
    cores: int
    memory_bytes: int
    system: str
    versions: dict[str, str]


class Settings(_Record):
    concurrencies: list[int] = Field(default=[1, 4, 8], min_length=1)
    prompt_tokens: int = Field(default=128, ge=1)
    output_tokens: int = Field(default=64, ge=2)
    requests_per_user: int = Field(default=2, ge=1)
    rounds: int = Field(default=5, ge=1)
    prompt_source: str = "random token ids, seed 0"
    threads: int | None = None
    """Threads of each server; None leaves the server its default."""

    def requests_at(self, concurrency: int) -> int:
        """Requests of one model in one round at this concurrency."""
        return max(MIN_REQUESTS, concurrency * self.requests_per_user)


class BenchResult(_Record):
    version: int = 1
    date: datetime
    device: str
    machine: Machine
    settings: Settings
    models: dict[Role, ServedModel]
    rounds: list[Round]

    def rounds_of(self, role: Role) -> list[Round]:
        """The rounds of one server in order of their pair, so that both lists match element by element."""
        return sorted((r for r in self.rounds if r.role == role), key=lambda r: r.index)

    def levels_of(self, role: Role, concurrency: int) -> list[Level]:
        return [level for round_ in self.rounds_of(role) for level in round_.levels if level.concurrency == concurrency]
