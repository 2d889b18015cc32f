"""Bodies of the generating routes that vLLM's server has besides OpenAI's, and of those of TRL's own server.

Fields that neither of them knows are ignored there, and here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from slipstream.server.config import MAX_PRIORITY
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import LooseBody
from slipstream.server.openai.fields import unsupported
from slipstream.server.openai.message import Message
from slipstream.server.openai.schema import (
    MAX_MESSAGES,
    CacheSalt,
    ChatBody,
    RequestId,
    SamplingBody,
    StreamOptions,
    TokenIds,
    kind_of_prompt,
)
from slipstream.server.openai.structured import StructuredFields, StructuredOutputs

VLLM_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What parameters are that a request leaves out: those of its files do not count, since trainers compute with these."""


class NoBody(LooseBody):
    """Nothing is to be said; what is said is ignored."""


class VllmSampling(SamplingBody, StructuredFields):
    """vLLM's SamplingParams."""

    model_config = LooseBody.model_config

    logprobs: int | None = Field(None, ge=-1, lt=2**31)
    stream_interval: int | None = Field(None, ge=1, lt=2**31)

    # Accepted: they are about the inside of another engine.
    detokenize: bool | None = None
    output_kind: int | None = None
    flat_logprobs: bool | None = None
    skip_clone: bool | None = None
    skip_reading_prefix_cache: unsupported(False) = None  # type: ignore[valid-type]
    routed_experts_prompt_start: int | None = None

    # Refused unless off.
    prompt_logprob_token_ids: unsupported([]) = None  # type: ignore[valid-type]
    prompt_logprob_start: unsupported(0) = None  # type: ignore[valid-type]
    extra_args: unsupported({}) = None  # type: ignore[valid-type]
    thinking_token_budget: unsupported() = None  # type: ignore[valid-type]
    repetition_detection: unsupported() = None  # type: ignore[valid-type]
    trace_decode_token_ids: unsupported([]) = None  # type: ignore[valid-type]
    watermarking: unsupported(False) = None  # type: ignore[valid-type]

    @property
    def given(self) -> dict[str, Any]:
        """What it says, by field."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    def with_defaults(self) -> VllmSampling:
        return self.model_copy(update={name: value for name, value in VLLM_DEFAULTS.items() if name not in self.given})


class TokensInBody(LooseBody):
    """``/inference/v1/generate``: token ids in, token ids out."""

    token_ids: TokenIds
    sampling_params: VllmSampling
    model: str | None = None
    request_id: RequestId | None = None
    output_mode: Literal["tokens", "text"] | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)

    # Accepted: they say something of the rendering, and of what is not supported.
    token_offsets: list[Any] | None = None
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None

    # Refused unless off.
    features: unsupported() = None  # type: ignore[valid-type]
    content_parts: unsupported([]) = None  # type: ignore[valid-type]
    kv_transfer_params: unsupported({}) = None  # type: ignore[valid-type]
    ec_transfer_params: unsupported({}) = None  # type: ignore[valid-type]


class VllmRenderBody(ChatBody):
    """As for a chat, but fields that nobody knows are ignored."""

    model_config = LooseBody.model_config


class TrlSampling(VllmSampling):
    """What ``/generate/`` and ``/chat/`` share. ``generation_kwargs`` overrides fields beside it."""

    logprobs: int | None = Field(0, ge=-1, lt=2**31)
    generation_kwargs: VllmSampling | None = None
    structured_outputs_regex: str | None = None
    guided_decoding_regex: str | None = None
    """What the same was called before."""

    @property
    def resolved(self) -> VllmSampling:
        kwargs = {} if self.generation_kwargs is None else self.generation_kwargs.given
        fields = {name: getattr(self, name) for name in VllmSampling.model_fields} | kwargs
        regex = self.guided_decoding_regex if self.structured_outputs_regex is None else self.structured_outputs_regex
        if regex is not None:
            fields["structured_outputs"] = StructuredOutputs(json=None, regex=regex)
        return VllmSampling.model_construct(**fields).with_defaults()


Prompts = Annotated[
    Annotated[Annotated[list[str], Field(min_length=1, fail_fast=True)], Tag("some texts")]
    | Annotated[Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)], Tag("lists of ids")],
    Discriminator(lambda value: "some texts" if kind_of_prompt(value) in ("some texts", "a text") else "lists of ids"),
]


class TrlGenerateBody(TrlSampling):
    prompts: Prompts
    images: list[None] | None = Field(None, fail_fast=True)


class TrlChatBody(TrlSampling):
    messages: Annotated[
        list[Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]],
        Field(min_length=1, fail_fast=True),
    ]
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, fail_fast=True)


class TrlScoreBody(LooseBody):
    """``/get_sequence_logprobs/``: how likely a model finds what others have said."""

    sequences: Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    prompt_lengths: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
    top_logprobs: int = Field(100, ge=1, lt=2**31)
    temperature: unsupported(1, 1.0) = None  # type: ignore[valid-type]
    response_format: Literal["json", "binary"] | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> TrlScoreBody:
        if len(self.sequences) != len(self.prompt_lengths):
            raise InvalidRequestError(
                f"prompt_lengths: there are {len(self.sequences)} sequences and {len(self.prompt_lengths)} lengths",
                param="prompt_lengths",
            )
        for index, (sequence, length) in enumerate(zip(self.sequences, self.prompt_lengths, strict=True)):
            if length > len(sequence):
                raise InvalidRequestError(
                    f"prompt_lengths.{index}: the sequence has {len(sequence)} tokens, and not {length}",
                    param=f"prompt_lengths.{index}",
                )
        return self
