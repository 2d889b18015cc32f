"""Bodies of the routes by which trainers control vLLM's server, and AReaL's and TRL's versions of it.

Fields that these servers do not know are ignored there, and here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import LooseBody

MAX_TENSORS = 2**16
MAX_NAME_CHARS = 1024

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Names = Annotated[list[Name], Field(max_length=MAX_TENSORS, fail_fast=True)]
Shape = Annotated[list[Annotated[int, Field(ge=0, lt=2**40)]], Field(max_length=8)]
Shapes = Annotated[list[Shape], Field(max_length=MAX_TENSORS, fail_fast=True)]
Path = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Port = Annotated[int, Field(ge=1, lt=2**16)]
PortText = Annotated[str, Field(pattern=r"^[0-9]{1,5}$")]
Address = Annotated[str, Field(min_length=1, max_length=253)]
Backend = Literal["nccl", "gloo"]
Rank = Annotated[int, Field(ge=0, lt=2**20)]
WorldSize = Annotated[int, Field(ge=2, lt=2**20)]
Version = Annotated[str, Field(min_length=1, max_length=512)]


class VllmAbortBody(LooseBody):
    request_ids: Annotated[list[Annotated[str, Field(max_length=512)]], Field(fail_fast=True)] | None = None


class ResetCacheBody(LooseBody):
    reset_running_requests: bool | None = None


class InitInfo(LooseBody):
    """How a trainer's tensors will come."""

    master_address: Address | None = None
    master_port: Port | None = None
    rank_offset: Rank | None = None
    world_size: WorldSize | None = None
    packed: bool | None = None
    packed_buffer_size_bytes: int | None = Field(None, ge=1, lt=2**48)
    packed_num_buffers: int | None = Field(None, ge=1, lt=2**16)
    backend: Backend | None = None
    """Not of vLLM, where it is an option of the server."""
    nccl_unique_id_b64: str | None = None


class InitBody(LooseBody):
    init_info: InitInfo


class UpdateInfo(LooseBody):
    """Tensors that come next: over the group, or as what is told of them here."""

    names: Names | None = None
    dtype_names: Names | None = None
    shapes: Shapes | None = None
    packed: bool | None = None
    packed_buffer_size_bytes: int | None = Field(None, ge=1, lt=2**48)
    ipc_handles_pickled: str | None = None
    shared_memory: Name | None = None
    """Not of vLLM: the name of a segment of shared memory that holds a safetensors file of ``num_bytes``."""
    num_bytes: int | None = Field(None, ge=8, lt=2**48)
    tensor_sizes: list[int] | None = Field(None, fail_fast=True)

    @model_validator(mode="after")
    def _check_lengths(self) -> UpdateInfo:
        lengths = [None if field is None else len(field) for field in (self.names, self.dtype_names, self.shapes)]
        if len(set(lengths)) > 1 and self.ipc_handles_pickled is None:
            raise InvalidRequestError(
                "update_info: names, dtype_names and shapes must be equally long", param="update_info.names"
            )
        if (self.shared_memory is None) != (self.num_bytes is None):
            raise InvalidRequestError("update_info: shared_memory needs num_bytes", param="update_info.num_bytes")
        ways = [self.shared_memory is not None, self.ipc_handles_pickled is not None]
        if (self.names is None and not any(ways)) or all(ways):
            raise InvalidRequestError(
                "update_info: names, dtype_names and shapes of what is broadcast, or ipc_handles_pickled, or "
                "shared_memory",
                param="update_info",
            )
        return self


UpdateInfos = Annotated[list[UpdateInfo], Field(min_length=1, max_length=MAX_TENSORS, fail_fast=True)]
OneOrSome = Annotated[
    Annotated[UpdateInfo, Tag("just one")] | Annotated[UpdateInfos, Tag("some of them")],
    Discriminator(lambda value: "some of them" if isinstance(value, list) else "just one"),
]


class UpdateWeightsBody(LooseBody):
    update_info: OneOrSome | None = None
    weight_dir: Path | None = None
    """Not of vLLM, but of prime-rl: a folder with all tensors."""

    @model_validator(mode="after")
    def _check_ways(self) -> UpdateWeightsBody:
        if (self.update_info is None) == (self.weight_dir is None):
            raise InvalidRequestError("send either update_info or weight_dir", param="update_info")
        return self

    @property
    def infos(self) -> list[UpdateInfo]:
        found = self.update_info or []
        return found if isinstance(found, list) else [found]


class VllmFinishBody(LooseBody):
    weight_version: Version | None = None


class WeightVersionBody(LooseBody):
    """vLLM's, and SGLang's, which also knows the second field."""

    new_version: Version
    abort_all_requests: bool | None = None


class CheckWeightsBody(LooseBody):
    action: Literal["checksum", "reset", "compare"]
    baseline: dict[str, str] | None = Field(None, max_length=MAX_TENSORS)

    @model_validator(mode="after")
    def _check_action(self) -> CheckWeightsBody:
        if self.action == "compare" and self.baseline is None:
            raise InvalidRequestError(
                "action compare needs a baseline, which is what checksum answered", param="baseline"
            )
        if self.action == "reset":
            raise InvalidRequestError(
                "action reset is not supported: new weights are staged and have to be complete, so nothing needs to be "
                "destroyed to see that they came; use checksum",
                param="action",
                code="unsupported_parameter",
            )
        return self


class CallBody(LooseBody):
    """A method of vLLM's workers."""

    method: Name
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    timeout: float | None = None


class LoraBody(LooseBody):
    lora_name: Name
    lora_path: Path
    load_inplace: bool | None = None


class LoraNameBody(LooseBody):
    lora_name: Name


# AReaL ---------------------------------------------------------------------------------------------------------------


class ArealUpdateBody(LooseBody):
    model_path: Path
    load_format: Literal["auto", "safetensors"] | None = None
    abort_all_requests: bool | None = None


class ArealLoraBody(LooseBody):
    lora_model_path: Path
    lora_name: Name
    lora_int_id: int
    base_model_name: str
    load_format: Literal["auto", "safetensors"] | None = None
    abort_all_requests: bool | None = None


class ArealGroupBody(LooseBody):
    master_address: Address
    master_port: PortText
    rank_offset: Rank
    world_size: WorldSize
    backend: Backend
    group_name: Name


class ArealTensorsBody(LooseBody):
    names: Names
    dtypes: Names
    shapes: Shapes
    group_name: Name

    @model_validator(mode="after")
    def _check_lengths(self) -> ArealTensorsBody:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise InvalidRequestError("names, dtypes and shapes must be equally long", param="names")
        return self


class ArealLoraTensorsBody(ArealTensorsBody):
    lora_name: Name
    lora_int_id: int
    lora_target_modules: list[str] | str
    lora_rank: int = Field(ge=1, lt=2**16)
    lora_alpha: float
    lora_bias: str
    base_model_name: str | None = None


# TRL -----------------------------------------------------------------------------------------------------------------


class TrlCommunicatorBody(LooseBody):
    host: Address
    port: Port
    world_size: WorldSize
    client_device_uuid: str | None = None


class TrlTensorBody(LooseBody):
    name: Name
    dtype: Name
    shape: Shape


class TrlTensorsBody(LooseBody):
    params: Annotated[list[TrlTensorBody], Field(min_length=1, max_length=MAX_TENSORS, fail_fast=True)]


BODIES: tuple[type[LooseBody], ...] = (
    *(VllmAbortBody, ResetCacheBody, InitBody, UpdateWeightsBody, VllmFinishBody, WeightVersionBody, CheckWeightsBody),
    *(CallBody, LoraBody, LoraNameBody, ArealUpdateBody, ArealLoraBody, ArealGroupBody, ArealTensorsBody),
    *(ArealLoraTensorsBody, TrlCommunicatorBody, TrlTensorBody, TrlTensorsBody),
)
