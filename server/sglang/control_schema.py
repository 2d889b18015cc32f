"""The bodies of the control routes. Fields that are not listed are ignored with a line in the log, as SGLang does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body, LooseBody
from slipstream.server.openai.fields import unsupported
from slipstream.server.openai.schema import Count
from slipstream.server.sglang.schema import MAX_LIST

DEFAULT_GROUP = "weight_update_group"
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Version = Annotated[str, Field(min_length=1, max_length=512)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Selector = unsupported("target", "all")
"""Whose weights are meant: a drafter's are not sent, and must not be taken for the target's."""
Memory = Literal["weights", "kv_cache", "cuda_graph"]


class SGLangEmptyBody(LooseBody):
    """Nothing is to be said."""


class SGLangPauseBody(LooseBody):
    mode: Literal["abort", "retract", "in_place"] | None = None


class SGLangContinueBody(LooseBody):
    # Accepted: what is kept for later steps is kept.
    torch_empty_cache: bool | None = None


class SGLangAbortBody(LooseBody):
    rid: str | None = None
    abort_all: bool | None = None

    # Accepted: it only names a reason.
    abort_message: str | None = None


class SGLangMemoryBody(LooseBody):
    tags: list[Memory] | None = Field(None, max_length=16)


class UpdateFields(LooseBody):
    """What all updates share."""

    weight_version: Version | None = None
    flush_cache: bool | None = None
    abort_all_requests: bool | None = None

    # Accepted: there is nothing to be given back.
    torch_empty_cache: bool | None = None


class SGLangDiskBody(UpdateFields):
    model_path: Text
    keep_pause: bool | None = None

    # Accepted: they cannot change what is served.
    recapture_cuda_graph: bool | None = None
    token_step: int | None = None

    # Refused unless off.
    load_format: unsupported("auto", "safetensors", "gguf") = None  # type: ignore[valid-type]
    is_async: unsupported(False) = None  # type: ignore[valid-type]
    manifest: unsupported({}) = None  # type: ignore[valid-type]


class SGLangTensorBody(UpdateFields):
    serialized_named_tensors: Annotated[list[str], Field(min_length=1, max_length=1)]
    """One, since there is one device."""
    selector: Selector = None  # type: ignore[valid-type]
    load_format: unsupported("flattened_bucket", "direct", "auto") = None  # type: ignore[valid-type]


class SGLangDistributedBody(UpdateFields):
    names: Annotated[list[Name], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    dtypes: Annotated[list[Name], Field(max_length=MAX_LIST, fail_fast=True)]
    shapes: Annotated[
        list[Annotated[list[Count], Field(max_length=16, fail_fast=True)]], Field(max_length=MAX_LIST, fail_fast=True)
    ]
    group_name: Name | None = None
    selector: Selector = None  # type: ignore[valid-type]
    load_format: unsupported("auto", "flattened_bucket") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_lengths(self) -> SGLangDistributedBody:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise InvalidRequestError(
                f"names, dtypes and shapes: as many of each, not {len(self.names)}, {len(self.dtypes)} and "
                f"{len(self.shapes)}",
                param="names",
            )
        return self


class SGLangGroupBody(LooseBody):
    master_address: Annotated[str, Field(min_length=1, max_length=256)]
    master_port: Annotated[int, Field(ge=1, le=65535)] | Annotated[str, Field(pattern=r"^\d{1,5}$")]
    """Some trainers send a text."""
    rank_offset: Annotated[int, Field(ge=0, lt=2**31)]
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    group_name: Name | None = None
    backend: Literal["nccl", "gloo"] | None = None


class SGLangLeaveBody(LooseBody):
    group_name: Name | None = None


class SGLangSessionBody(LooseBody):
    selector: Selector = None  # type: ignore[valid-type]


class SGLangTensorNameBody(LooseBody):
    name: Name
    truncate_size: Annotated[int, Field(ge=1, le=MAX_LIST)] | None = None


class SGLangCheckBody(LooseBody):
    action: Literal["snapshot", "compare", "checksum"] | None = None
    skip_tensor_list: list[Name] | None = Field(None, max_length=MAX_LIST, fail_fast=True)
    """Parts of names of tensors that are not looked at."""
    selector: Selector = None  # type: ignore[valid-type]

    # Refused unless off: what is served is what is compared.
    allow_quant_error: unsupported(False) = None  # type: ignore[valid-type]


class SGLangLoraBody(LooseBody):
    lora_name: Name
    lora_path: Text
    pinned: bool | None = None


class SGLangSharedLoraBody(LooseBody):
    lora_name: Name
    config_dict: dict[str, Any]
    """PEFT's adapter_config.json."""
    serialized_named_tensors: Annotated[list[str], Field(min_length=1, max_length=1)] | None = None
    """One, since there is one device."""
    serialized_tensors: str | None = None
    """What the same was called before."""
    pinned: bool | None = None

    # Refused unless off.
    load_format: unsupported("flattened_bucket", "direct", "auto") = None  # type: ignore[valid-type]
    added_tokens_config: unsupported({}) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_tensors(self) -> SGLangSharedLoraBody:
        if (self.serialized_named_tensors is None) == (self.serialized_tensors is None):
            raise InvalidRequestError(
                "give serialized_named_tensors, or serialized_tensors as it was called before",
                param="serialized_named_tensors",
            )
        return self

    @property
    def tensors(self) -> tuple[str, str]:
        """The text, and the field that it stands in."""
        if self.serialized_named_tensors is not None:
            return self.serialized_named_tensors[0], "serialized_named_tensors.0"
        return self.serialized_tensors or "", "serialized_tensors"


class SGLangLoraNameBody(LooseBody):
    lora_name: Name


BODIES: tuple[type[Body], ...] = (
    *(SGLangEmptyBody, SGLangPauseBody, SGLangContinueBody, SGLangAbortBody, SGLangMemoryBody, SGLangDiskBody),
    *(SGLangTensorBody, SGLangDistributedBody, SGLangGroupBody, SGLangLeaveBody, SGLangSessionBody),
    *(SGLangTensorNameBody, SGLangCheckBody, SGLangLoraBody, SGLangSharedLoraBody, SGLangLoraNameBody),
)
