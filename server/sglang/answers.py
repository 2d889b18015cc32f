"""What the routes answer, as the OpenAPI document shows it. What it means is in docs/sglang.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from slipstream.server.http.description import Answer, Problem

Entry = tuple[float | None, int, str | None]
"""Log-probability, token id, text."""


class SGLangFinish(Answer):
    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None
    err_type: str | None = None


class SGLangSpan(Answer):
    version: str
    start: int
    end: int


class SGLangMeta(Answer):
    id: str
    finish_reason: SGLangFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    num_retractions: int
    weight_version: str
    weight_versions: list[SGLangSpan]
    e2e_latency: float | None = None
    output_token_logprobs: list[Entry] | None = None
    output_token_logprobs_length: int | None = None
    output_top_logprobs: list[list[Entry]] | None = None
    output_token_ids_logprobs: list[list[Entry]] | None = None
    input_token_logprobs: list[Entry] | None = None
    input_top_logprobs: list[list[Entry] | None] | None = None
    input_token_ids_logprobs: list[list[Entry] | None] | None = None
    spec_verify_ct: int | None = None
    spec_accept_length: float | None = None
    spec_accept_rate: float | None = None
    spec_num_correct_drafts: int | None = None
    spec_num_proposed_drafts: int | None = None
    spec_correct_drafts_histogram: list[int] | None = None
    spec_accept_token_num: int | None = None
    spec_draft_token_num: int | None = None


class SGLangAnswer(Answer):
    text: str
    output_ids: list[int]
    meta_info: SGLangMeta
    prompt_token_ids: list[int] | None = None
    index: int | None = None
    """In a stream of several answers: which one."""


class SGLangAnswers(RootModel[SGLangAnswer | list[SGLangAnswer]]):
    """A list for several prompts or several answers to one."""


class SGLangModelInfo(Answer):
    model_path: str
    served_model_name: str
    tokenizer_path: str
    is_generation: bool
    preferred_sampling_params: None
    weight_version: str
    load_format: str
    reasoning_parser: None
    tool_call_parser: None
    disaggregation_mode: str
    has_image_understanding: bool
    has_audio_understanding: bool
    model_type: str


class SGLangServerInfo(RootModel[dict[str, Any]]):
    """Its keys are listed in docs/sglang.md."""


class SGLangLoads(Answer):
    timestamp: str
    version: str
    accelerator: str
    num_accelerators: int
    loads: list[dict[str, Any]]


class SGLangOldLoad(Answer):
    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class SGLangOldLoads(RootModel[list[SGLangOldLoad]]):
    pass


class SGLangStatus(Answer):
    status: Literal["ok"]
    message: str


class SGLangAborted(Answer):
    aborted: int
    """How many sequences are ended."""


class SGLangHealth(Answer):
    status: str
    reason: str | None = None


class SGLangOutcome(Answer):
    success: Literal[True]
    message: str
    num_paused_requests: int | None = None


class SGLangLoras(Answer):
    success: Literal[True]
    error_message: Literal[""]
    loaded_adapters: dict[str, str]
    """Folders by name."""


class SGLangFailure(Answer):
    """``success`` is left out where a request is refused before it is read."""

    success: Literal[False] | None = None
    message: str | None = None
    error_message: str | None = None
    """The same: what the routes of LoRAs call it."""
    error: Problem


class SGLangVersion(Answer):
    weight_version: str


class SGLangTensor(RootModel[list[float] | list[list[float]]]):
    pass


class SGLangRank(Answer):
    checksums: dict[str, str]
    per_gpu_checksum: str
    parallelism_info: list[dict[str, Any]]


class SGLangChecked(Answer):
    success: bool
    message: str
    ranks: list[SGLangRank] | None = None
    per_engine_checksum: str | None = None


ANSWERS = (
    *(SGLangAnswers, SGLangAnswer, SGLangModelInfo, SGLangServerInfo, SGLangLoads, SGLangOldLoads, SGLangHealth),
    *(SGLangStatus, SGLangAborted, SGLangOutcome, SGLangFailure, SGLangVersion, SGLangTensor, SGLangChecked),
    SGLangLoras,
)
