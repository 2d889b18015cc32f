"""The bodies of the OpenAI endpoints. What each field does is listed in docs/api.md.

Three kinds of field: those that act; those of the public API that cannot change the answer and are accepted; and
those that would change it and are not supported, which are refused unless they hold the value that means "off".

Lists end at their first error (fail_fast): an error costs a hundred times what an item does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator

from slipstream.engine.messages import LogprobsMode
from slipstream.engine.validation import BIAS_RANGE, RANGES
from slipstream.server.config import MAX_PRIORITY
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.openai.fields import kind_of_stop, unsupported
from slipstream.server.openai.llama_cpp import LlamaCppFields
from slipstream.server.openai.message import Content, Label, Message
from slipstream.server.openai.structured import StructuredFields
from slipstream.server.openai.thinking import ThinkingFields
from slipstream.server.openai.tools import ToolFields
from slipstream.server.openai.truncated import TruncationFields

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_LOGIT_BIAS = 4096
MAX_ALLOWED_TOKEN_IDS = 2**20
MAX_MESSAGES = 4096
MAX_METADATA = 256
MAX_DOCUMENTS = 256
ALL_ROOM = -1
"""As max_tokens, for llama.cpp and programs that are made for it: as many as the context has room for."""
NO_SEED = -1
"""What llama.cpp, vLLM and programs that are made for them take for a seed that nobody has chosen."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
MaxTokens = Annotated[int, Field(ge=ALL_ROOM, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=512)]
RequestId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]


def in_range(field: str) -> Any:
    """A number in the range of the sampling parameter of this name."""
    low, high = RANGES[field]
    return Field(None, ge=low, le=high)


def truth_of(value: Any) -> Any:
    """0 and 1 for false and true, as vLLM takes them, whose clients send them where completions want a number."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def number_of(value: Any) -> Any:
    """The reverse, as vLLM and SGLang take them: true for one alternative; false for no log-probabilities."""
    return (1 if value else None) if isinstance(value, bool) else value


def kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "a text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "lists of ids"
    return "some texts" if isinstance(first, str) else "token ids"


def kind_of_ids(value: Any) -> str:
    return "lists of ids" if isinstance(value, list) and value and isinstance(value[0], list) else "token ids"


Stop = Annotated[
    Annotated[StopString, Tag("a text")]
    | Annotated[Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)], Tag("a list")],
    Discriminator(kind_of_stop),
]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[Annotated[list[str], Field(min_length=1, fail_fast=True)], Tag("some texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[Annotated[list[TokenIds], Field(fail_fast=True)], Tag("lists of ids")],
    Discriminator(kind_of_prompt),
]

Texts = Annotated[
    Annotated[str, Tag("a text")] | Annotated[Annotated[list[str], Field(min_length=1, fail_fast=True)], Tag("a list")],
    Discriminator(kind_of_stop),
]
AnyTokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
IdsOrLists = Annotated[
    Annotated[AnyTokenIds, Tag("token ids")]
    | Annotated[Annotated[list[AnyTokenIds], Field(fail_fast=True)], Tag("lists of ids")],
    Discriminator(kind_of_ids),
]
AllowedTokenIds = Annotated[
    list[TokenId],
    Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True),
    AfterValidator(lambda tokens: list(dict.fromkeys(tokens))),
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(lambda seed: None if seed == NO_SEED else seed)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class RolloutBody(Body):
    """A batch that is over when its longest answer is."""

    group: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    enough: int | None = Field(None, ge=1, lt=2**31)
    expected_tokens: Count | None = None


class PruneRolloutsBody(Body):
    """Which samples of a group go on."""

    group: Annotated[str, Field(min_length=1, max_length=256)]
    scores: dict[Annotated[str, Field(max_length=256)], Annotated[float, Field(allow_inf_nan=False)]] = Field(
        max_length=65536
    )
    keep: Count
    user: Label | None = None


class Speculation(Body):
    mode: str | None = Field(None, min_length=1)
    max_draft_tokens: int | None = Field(None, ge=1, lt=2**31)


class SamplingBody(TruncationFields):
    """How tokens are sampled, and how they become text."""

    n: int | None = Field(None, ge=1, lt=2**31)
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = in_range("temperature")
    top_p: float | None = in_range("top_p")
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = in_range("min_p")
    frequency_penalty: float | None = in_range("frequency_penalty")
    presence_penalty: float | None = in_range("presence_penalty")
    repetition_penalty: float | None = in_range("repetition_penalty")
    logit_bias: dict[TokenId, Annotated[float, Field(ge=BIAS_RANGE[0], le=BIAS_RANGE[1])]] | None = Field(
        None, max_length=MAX_LOGIT_BIAS
    )
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]] | None = Field(
        None, max_length=MAX_BAD_WORDS, fail_fast=True
    )
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=-1, lt=2**31)
    logprobs_mode: LogprobsMode | None = None
    logprob_token_ids: list[TokenId] | None = Field(None, fail_fast=True)
    skip_special_tokens: bool | None = None

    # Accepted: it cannot change the answer.
    spaces_between_special_tokens: bool | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class GenerationBody(SamplingBody, StructuredFields, LlamaCppFields):
    """The fields that chat and completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: CacheSalt | None = None
    speculation: Speculation | None = None
    rollout: RolloutBody | None = None
    timeout_s: float | None = Field(None, gt=0)
    return_metrics: bool | None = None
    request_id: RequestId | None = None
    user: Label | None = None

    # What SGLang calls request_id, model and include_stop_str_in_output, and its second salt.
    rid: RequestId | None = None
    lora_path: str | None = None
    no_stop_trim: bool | None = None
    extra_key: Label | None = None

    # Accepted: they cannot change the answer.
    metadata: dict[str, Any] | None = Field(None, max_length=MAX_METADATA)
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    session_id: str | None = None
    routed_experts_prompt_start: int | None = None

    # Refused unless off.
    use_beam_search: unsupported(False) = None  # type: ignore[valid-type]
    kv_transfer_params: unsupported({}) = None  # type: ignore[valid-type]
    vllm_xargs: unsupported({}) = None  # type: ignore[valid-type]
    length_penalty: unsupported(1, 1.0) = None  # type: ignore[valid-type]

    # What routers add to bodies that they pass on.
    return_hidden_states: unsupported(False) = None  # type: ignore[valid-type]
    separate_reasoning: unsupported(True) = None  # type: ignore[valid-type]
    stream_reasoning: unsupported(True) = None  # type: ignore[valid-type]
    include_reasoning: unsupported(True) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_shared(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        self.request_id, self.model = self.request_id or self.rid, self.lora_path or self.model
        self.include_stop_str_in_output = self.include_stop_str_in_output or self.no_stop_trim
        if self.extra_key:
            self.cache_salt = repr((self.cache_salt or "", self.extra_key))
        return self


class Prediction(Body):
    """What its sender expects the answer to be."""

    type: Literal["content"]
    content: Content


class TemplateBody(ToolFields):
    """How messages become a prompt; shared by chat and /tokenize."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = Field(None, max_length=MAX_DOCUMENTS, fail_fast=True)

    @model_validator(mode="after")
    def _check_template(self) -> TemplateBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        for index, message in enumerate(self.messages):
            if message.function_call is not None and message.tool_calls:
                raise InvalidRequestError(
                    "function_call is the older name of tool_calls; send only one of them",
                    param=f"messages.{index}.function_call",
                )
            if message.content is None and message.role not in ("assistant", "function"):
                raise InvalidRequestError(
                    f"a {message.role} message needs content",
                    param=f"messages.{index}.content",
                    code="missing_required_parameter",
                )
        return self


ChatMaxTokens = Annotated[MaxTokens, AfterValidator(lambda tokens: None if tokens == ALL_ROOM else tokens)]
"""All the room is what chats have anyway."""


class ChatBody(GenerationBody, TemplateBody, ThinkingFields):
    max_tokens: ChatMaxTokens | None = None
    max_completion_tokens: ChatMaxTokens | None = None
    logprobs: Annotated[bool | None, BeforeValidator(truth_of, bool | Literal[0, 1] | None)] = None
    top_logprobs: int | None = Field(None, ge=-1, lt=2**31)

    include_reasoning: bool | None = None

    # Accepted: it cannot change the answer.
    prediction: Prediction | None = None

    # Refused unless off.
    modalities: unsupported(["text"]) = None  # type: ignore[valid-type]
    audio: unsupported() = None  # type: ignore[valid-type]
    verbosity: unsupported("medium") = None  # type: ignore[valid-type]
    moderation: unsupported() = None  # type: ignore[valid-type]
    web_search_options: unsupported() = None  # type: ignore[valid-type]

    # What clients of vLLM send.
    echo: unsupported(False) = None  # type: ignore[valid-type]
    best_of: unsupported(1) = None  # type: ignore[valid-type]
    mm_processor_kwargs: unsupported({}) = None  # type: ignore[valid-type]

    @property
    def answer_tokens(self) -> int | None:
        """How many tokens an answer may have, by whichever name that came."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        for name in ("top_logprobs", "logprob_token_ids"):
            if getattr(self, name) and not self.logprobs:
                raise InvalidRequestError(f"{name} needs logprobs: true", param=name)
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens differ; send only max_completion_tokens", param="max_tokens"
            )
        if 0 in both:
            param = "max_tokens" if self.max_tokens == 0 else "max_completion_tokens"
            raise InvalidRequestError(f"{param}: at least one token must be asked for", param=param)
        return self


class CompletionBody(GenerationBody):
    prompt: Prompt
    max_tokens: MaxTokens | None = None
    echo: bool | None = None
    logprobs: Annotated[
        Annotated[int, Field(ge=-1, lt=2**31)] | None, BeforeValidator(number_of, bool | int | None)
    ] = None
    add_special_tokens: bool | None = None
    best_of: int | None = Field(None, ge=1, lt=2**31)
    suffix: unsupported("") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError(
                "best_of other than n is not supported by this server", param="best_of", code="unsupported_parameter"
            )
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequestError("logprob_token_ids needs logprobs", param="logprob_token_ids")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequestError("max_tokens may only be 0 with echo or prompt_logprobs", param="max_tokens")
        return self


class TokenizeTextBody(Body):
    model: str | None = None
    prompt: Texts
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeMessagesBody(TemplateBody):
    model: str | None = None
    return_token_strs: bool | None = None


class EmbeddingsBody(TruncationFields):
    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: CacheSalt | None = None
    request_id: RequestId | None = None
    user: Label | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=MAX_METADATA)


class DetokenizeBody(Body):
    model: str | None = None
    tokens: IdsOrLists
    skip_special_tokens: bool | None = None
