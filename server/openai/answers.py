"""The answers of the OpenAI dialect, as the OpenAPI document shows them. What they mean is in docs/api.md."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, RootModel

from slipstream.server.http.description import Answer

FinishReason = Literal["stop", "length", "abort"]
ChatFinishReason = Literal["stop", "length", "abort", "tool_calls", "function_call"]


class PromptTokensDetails(Answer):
    cached_tokens: int


class CompletionTokensDetails(Answer):
    reasoning_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    """At the end of an answer of a model that thinks."""


class SpeculativeDecoding(Answer):
    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    drafter_versions: list[int]


class AnswerMetrics(Answer):
    time_to_first_token_ms: float | None
    generation_time_ms: float
    queue_time_ms: float
    mean_itl_ms: float | None
    tokens_per_second: float | None
    speculative_decoding: SpeculativeDecoding


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Generated(Answer):
    """What answers and chunks of both routes have."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """Another one where the same request may be answered otherwise."""
    metrics: AnswerMetrics | None = None


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprobs]


class FunctionCalled(Answer):
    name: str | None = None
    arguments: str


class ToolCallMade(Answer):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCalled
    index: int | None = None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same."""
    tool_calls: list[ToolCallMade] | None = None
    function_call: FunctionCalled | None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatAnswer(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same."""
    tool_calls: list[ToolCallMade] | None = None
    function_call: FunctionCalled | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(Generated):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionAnswer(Generated):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionChunk(Generated):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    """The model that a LoRA changes."""
    max_model_len: int
    # As Anthropic's clients read them.
    type: Literal["model"]
    display_name: str
    created_at: str


class Models(Answer):
    object: Literal["list"]
    data: list[Model]
    first_id: str
    last_id: str
    has_more: Literal[False]


class Tokens(Answer):
    """Lists with an entry for each text, where there are several."""

    count: int | list[int]
    max_model_len: int
    tokens: list[int] | list[list[int]]
    token_strs: list[str] | list[list[str]] | None


class Text(Answer):
    prompt: str | list[str]
    text: str | list[str]
    """The same."""


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Invoked(RootModel[ChatAnswer | CompletionAnswer | Embeddings]):
    """As the route answers that a body is meant for."""


class InvokedChunk(RootModel[ChatChunk | CompletionChunk]):
    pass


class TokenizerInfo(Answer):
    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class PrunedRollouts(Answer):
    pruned: list[str]
    """Ids of the samples that were aborted."""


ANSWERS: tuple[type[BaseModel], ...] = (
    *(ChatAnswer, ChatChunk, CompletionAnswer, CompletionChunk),
    *(Models, Model, Tokens, Text, TokenizerInfo, Embeddings, PrunedRollouts, Invoked, InvokedChunk),
)
