"""The body of /generate. What each field does is listed in docs/sglang.md.

The same three kinds of field as in the OpenAI dialect: those that act, those that cannot change the answer, and those
that are refused unless they hold the value that means "off". Fields of the body that are not listed are ignored with a
line in the log, and those of ``sampling_params`` refused, as SGLang does.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from slipstream.engine.messages import LogprobsMode
from slipstream.engine.validation import BIAS_RANGE
from slipstream.server.config import MAX_PRIORITY
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body, shown
from slipstream.server.openai.fields import NoMedia, unsupported
from slipstream.server.openai.message import Label
from slipstream.server.openai.schema import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    Count,
    Stop,
    TokenId,
    in_range,
)
from slipstream.server.structured import (
    ANY_OBJECT,
    choice_grammar,
    context_free_grammar,
    json_grammar,
    regex_grammar,
)

DEFAULT_MAX_NEW_TOKENS = 128
ALL_TOKENS = 2**30
"""Other servers' way to say in ``top_k`` that all tokens stay."""
ANY_JSON = "$$ANY$$"
"""Other servers' way to say in ``json_schema`` that any object will do."""
MAX_LORA_CHARS = 4096
MAX_LIST = 2**16
"""Most entries of a field that has one for each prompt."""

RequestName = Annotated[str, Field(min_length=1, max_length=512)]
Salt = Annotated[str, Field(max_length=512)]


def kind_of_many(value: Any) -> str:
    return "one each" if isinstance(value, list) else "just one"


def kind_of_ids(value: Any) -> str:
    """A list of lists, some of which may be null."""
    return "one each" if isinstance(value, list) and value and isinstance(value[0], list | None) else "just one"


def one_or_many(kind: Any) -> Any:
    """A value for all prompts, or a list with one for each."""
    many = Annotated[list[kind], Field(max_length=MAX_LIST, fail_fast=True)]
    return Annotated[Annotated[kind, Tag("just one")] | Annotated[many, Tag("one each")], Discriminator(kind_of_many)]


def ids_or_many(kind: Any) -> Any:
    many = Annotated[list[kind], Field(max_length=MAX_LIST, fail_fast=True)]
    return Annotated[Annotated[kind, Tag("just one")] | Annotated[many, Tag("one each")], Discriminator(kind_of_ids)]


TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
SomeTokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


class SGLangSamplingParams(Body):
    max_new_tokens: Count | None = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: Count | None = None
    n: int | None = Field(None, ge=1, lt=2**31)
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
    sampling_seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream_interval: int | None = Field(None, ge=1, lt=2**31)

    # Accepted: the tokenizers used here insert no such spaces.
    spaces_between_special_tokens: bool | None = None

    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=MAX_LIST, fail_fast=True)

    # Refused unless off.
    structural_tag: unsupported("") = None  # type: ignore[valid-type]
    stop_regex: unsupported("", []) = None  # type: ignore[valid-type]
    beam_width: unsupported(1) = None  # type: ignore[valid-type]
    custom_params: unsupported({}) = None  # type: ignore[valid-type]
    watermark: unsupported(False) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_unknown(self) -> SGLangSamplingParams:
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                raise InvalidRequestError(
                    f"unknown field {shown(f'sampling_params.{name}')}",
                    param=f"sampling_params.{name}",
                    code="unknown_parameter",
                )
        return self

    def structure(self) -> tuple[str, str]:
        """The grammar that the answer has to follow, and the field that asks for it; empty if none does.

        Raises InvalidRequestError if several do, or one of them is wrong.
        """
        at, found = "sampling_params.", dict[str, str]()
        if self.json_schema not in (None, ""):  # an empty object is the schema of any JSON
            schema = ANY_OBJECT if self.json_schema == ANY_JSON else self.json_schema
            found[at + "json_schema"] = json_grammar(schema, at + "json_schema")
        if self.regex:
            found[at + "regex"] = regex_grammar(self.regex, at + "regex")
        if self.ebnf:
            found[at + "ebnf"] = context_free_grammar(self.ebnf, at + "ebnf")
        if self.choice:
            found[at + "choice"] = choice_grammar(self.choice, at + "choice")
        names = list(found)
        if len(names) > 1:
            raise InvalidRequestError(f"an answer follows one of {', '.join(names)}; send only one", param=names[1])
        if names and self.ignore_eos:
            raise InvalidRequestError(
                f"ignore_eos cannot be combined with {names[0]}: the answer ends where its structure does",
                param=at + "ignore_eos",
            )
        return next(iter((text, name) for name, text in found.items()), ("", ""))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class SGLangGenerateBody(Body):
    text: one_or_many(str) | None = None  # type: ignore[valid-type]
    input_ids: ids_or_many(TokenIds) | None = None  # type: ignore[valid-type]
    sampling_params: one_or_many(SGLangSamplingParams | None) = None  # type: ignore[valid-type]
    rid: one_or_many(RequestName) | None = None  # type: ignore[valid-type]
    return_logprob: one_or_many(bool | None) = None  # type: ignore[valid-type]
    logprob_start_len: one_or_many(Annotated[int, Field(ge=-1, lt=2**31)] | None) = None  # type: ignore[valid-type]
    top_logprobs_num: one_or_many(Count | None) = None  # type: ignore[valid-type]
    token_ids_logprob: ids_or_many(SomeTokenIds | None) = None  # type: ignore[valid-type]
    return_text_in_logprobs: bool | None = None
    logprobs_mode: LogprobsMode | None = None
    """An extension: see docs/sglang.md."""
    return_prompt_token_ids: bool | None = None
    stream: bool | None = None
    incremental_streaming_output: bool | None = None
    """An extension: an option of the whole server in SGLang."""
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: one_or_many(Salt | None) | None = None  # type: ignore[valid-type]
    extra_key: one_or_many(Salt | None) | None = None  # type: ignore[valid-type]
    no_logs: bool | None = None
    """Whether nothing of it may be kept."""
    lora_path: one_or_many(Annotated[str, Field(max_length=MAX_LORA_CHARS)] | None) = None  # type: ignore[valid-type]
    """The name of a LoRA, as there."""

    # Accepted: they cannot change the answer.
    session_id: Label | None = None
    conversation_id: Label | None = None
    routing_key: Label | None = None
    custom_labels: dict[str, str] | None = Field(None, max_length=256)
    log_metrics: bool | None = None
    routed_experts_start_len: Count | None = None
    modalities: list[Any] | None = Field(None, max_length=MAX_LIST)

    # Refused unless off.
    input_embeds: unsupported([]) = None  # type: ignore[valid-type]
    image_data: NoMedia = None
    video_data: NoMedia = None
    audio_data: NoMedia = None
    mm_hashes: unsupported([]) = None  # type: ignore[valid-type]
    mm_content_hashes: unsupported([]) = None  # type: ignore[valid-type]
    use_audio_in_video: unsupported(False) = None  # type: ignore[valid-type]
    video_config: unsupported({}) = None  # type: ignore[valid-type]
    images_config: unsupported({}) = None  # type: ignore[valid-type]
    mm_processor_kwargs: unsupported({}) = None  # type: ignore[valid-type]
    watermark: unsupported(False) = None  # type: ignore[valid-type]
    return_sampling_mask: unsupported(False) = None  # type: ignore[valid-type]
    sampling_logprobs_mode: unsupported() = None  # type: ignore[valid-type]
    return_flat_raw_top_logprobs: unsupported(False) = None  # type: ignore[valid-type]
    return_flat_raw_output_top_logprobs: unsupported(False) = None  # type: ignore[valid-type]
    return_flat_raw_top_logprobs_b64: unsupported(False) = None  # type: ignore[valid-type]
    return_hidden_states: unsupported(False) = None  # type: ignore[valid-type]
    return_routed_experts: unsupported(False) = None  # type: ignore[valid-type]
    return_indexer_topk: unsupported(False) = None  # type: ignore[valid-type]
    return_entropy: unsupported(False) = None  # type: ignore[valid-type]
    return_bytes: unsupported(False) = None  # type: ignore[valid-type]
    session_params: unsupported({}) = None  # type: ignore[valid-type]
    lora_id: unsupported("") = None  # type: ignore[valid-type]
    custom_logit_processor: unsupported("") = None  # type: ignore[valid-type]
    positional_embed_overrides: unsupported() = None  # type: ignore[valid-type]
    bootstrap_host: unsupported() = None  # type: ignore[valid-type]
    bootstrap_port: unsupported() = None  # type: ignore[valid-type]
    bootstrap_room: unsupported() = None  # type: ignore[valid-type]
    bootstrap_pair_key: unsupported() = None  # type: ignore[valid-type]
    decode_tp_size: unsupported() = None  # type: ignore[valid-type]
    disagg_prefill_dp_rank: unsupported() = None  # type: ignore[valid-type]
    routed_dp_rank: unsupported(0) = None  # type: ignore[valid-type]
    data_parallel_rank: unsupported(0) = None  # type: ignore[valid-type]
    background: unsupported(False) = None  # type: ignore[valid-type]
    require_reasoning: unsupported(False) = None  # type: ignore[valid-type]
    max_thinking_tokens: unsupported() = None  # type: ignore[valid-type]
    kv_hints: unsupported({}, []) = None  # type: ignore[valid-type]
    multi_item_delimiter_indices: unsupported([]) = None  # type: ignore[valid-type]
    token_indices_to_pool: unsupported([]) = None  # type: ignore[valid-type]
    weight_version: unsupported() = None  # type: ignore[valid-type]

    @property
    def is_single(self) -> bool:
        """Whether it asks about one prompt, and not about a list of them."""
        return isinstance(self.text, str) or (self.text is None and kind_of_ids(self.input_ids) == "just one")

    @model_validator(mode="after")
    def _check_prompts(self) -> SGLangGenerateBody:
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequestError("give either text or input_ids", param="text")
        return self
