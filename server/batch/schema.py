"""The bodies of /v1/files and /v1/batches. What each field does is listed in docs/batches.md."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body

WINDOW = re.compile(r"([1-9]\d{0,5})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MOST_WINDOW_S = 30 * 86400
LEAST_KEPT_S, KEPT_S = 3600, 30 * 86400
"""How long files are kept at least and at most, which is the default, too."""
MOST_METADATA = 16
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class KeptAfter(Body):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=LEAST_KEPT_S, le=KEPT_S)


class UploadBody(Body):
    """The fields of a multipart form; ``file`` is read before."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False, "required": ["file", "purpose"]})

    file: Annotated[str | None, WithJsonSchema({"type": "string", "format": "binary"})] = None
    purpose: Literal["batch"]
    expires_after: KeptAfter | None = None


class CreateBatchBody(Body):
    input_file_id: str = Field(max_length=100)
    endpoint: Endpoint
    completion_window: str = Field(max_length=10)
    metadata: dict[Key, Value] | None = Field(None, max_length=MOST_METADATA)
    output_expires_after: KeptAfter | None = None

    @model_validator(mode="after")
    def _check(self) -> CreateBatchBody:
        if not self.seconds or self.seconds > MOST_WINDOW_S:
            raise InvalidRequestError(
                "completion_window: a number and s, m, h or d, at most 30d, such as 24h", param="completion_window"
            )
        return self

    @property
    def seconds(self) -> int:
        """The completion window."""
        found = WINDOW.fullmatch(self.completion_window)
        return int(found[1]) * SECONDS[found[2]] if found else 0


class CancelBatchBody(Body):
    """No fields."""


BODIES: tuple[type[Body], ...] = (CreateBatchBody, CancelBatchBody, UploadBody)
