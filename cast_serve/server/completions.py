"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from cast_serve.engine.types import SamplingParams
from cast_serve.server.answer import Answer, Choice, Tokens
from cast_serve.server.logprobs import completion_logprobs
from cast_serve.server.protocol import Completion, CompletionChoice, CompletionRequest, Usage
from cast_serve.server.sse import CompletionChunks

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


class CompletionAnswer(Answer[CompletionRequest]):
    """Continues prompts; choice `i` belongs to prompt `i // n`."""

    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    chunk_writer = CompletionChunks

    async def prompts(self) -> list[tuple[list[int], SamplingParams]]:
        texts = [prompt for prompt in self.request.prompt if isinstance(prompt, str)]
        encoded = iter(await self.model.encode(texts, special=True))
        return [self._prompt(next(encoded) if isinstance(prompt, str) else prompt) for prompt in self.request.prompt]

    def _prompt(self, ids: list[int]) -> tuple[list[int], SamplingParams]:
        max_tokens = self.model.room_for(ids, self.request.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
        return ids, self.sampling(max_tokens, self.request.logprobs)

    def prefix(self, index: int) -> str:
        if not self.request.echo:
            return ""
        prompt = self.request.prompt[index // self.request.n]
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)

    def logprobs(self, index: int, tokens: Tokens) -> dict[str, Any] | None:
        return None if self.request.logprobs is None else completion_logprobs(self.model.tokenizer, tokens)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Completion:
        return Completion(
            **self.envelope,
            choices=[
                CompletionChoice(
                    index=index,
                    text=self.prefix(index) + choice.text,
                    logprobs=self.logprobs(index, choice.tokens),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )
