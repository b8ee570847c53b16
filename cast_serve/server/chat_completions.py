"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from cast_serve.engine.types import SamplingParams
from cast_serve.server.answer import Answer, Choice, Tokens
from cast_serve.server.logprobs import chat_logprobs
from cast_serve.server.protocol import AssistantMessage, ChatChoice, ChatCompletion, ChatRequest, Usage
from cast_serve.server.sse import ChatChunks


class ChatAnswer(Answer[ChatRequest]):
    """Writes the assistant's next message, up to the end of the context unless the request sets a limit."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    chunk_writer = ChatChunks

    async def prompts(self) -> list[tuple[list[int], SamplingParams]]:
        request = self.request
        messages = [message.for_template() for message in request.messages]
        text = self.model.render_chat(messages, request.chat_template_kwargs)
        (ids,) = await self.model.encode([text], special=False)  # the template has written the special tokens
        max_tokens = self.model.room_for(ids, request.max_completion_tokens or request.max_tokens, None, "messages")
        return [(ids, self.sampling(max_tokens, (request.top_logprobs or 0) if request.logprobs else None))]

    def logprobs(self, index: int, tokens: Tokens) -> dict[str, Any] | None:
        return chat_logprobs(self.model.tokenizer, tokens) if self.request.logprobs else None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **self.envelope,
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=choice.text),
                    logprobs=self.logprobs(index, choice.tokens),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )
