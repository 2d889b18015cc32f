"""What is stored of a file and of a batch, and what the API shows of it."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
OPEN: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class StoredFile(msgspec.Struct, kw_only=True):
    id: str
    owner: str
    """The tenant that may see it."""
    bytes: int
    created_at: int
    """Seconds since 1970, as all times here."""
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]

    def shown(self) -> dict[str, Any]:
        told = msgspec.to_builtins(self)
        del told["owner"]
        return {"object": "file", "status": "processed", "status_details": None, **told}


class LineProblem(msgspec.Struct, kw_only=True):
    """Why a batch was not begun."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """Counted from 1."""


class RequestCounts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class UsageOfBatch(msgspec.Struct):
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class Batch(msgspec.Struct, kw_only=True):
    id: str
    owner: str
    key: str
    """The name of the key that its requests count for."""
    headers: dict[str, str]
    """What its creator said of all its requests, by header."""
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str
    """The names that the files of answers and of errors have or will have."""
    error_id: str
    output_seconds: int
    """How long these are kept."""
    status: BatchStatus = "validating"
    metadata: dict[str, str] | None = None
    errors: list[LineProblem] = []
    counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    usage: UsageOfBatch = msgspec.field(default_factory=UsageOfBatch)
    left: int = 0
    """How many of the requests that failed were not answered at all."""
    model: str | None = None
    has_output: bool = False
    has_errors: bool = False
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    def become(self, status: BatchStatus, now: float) -> None:
        self.status = status
        setattr(self, f"{status}_at", int(now))

    def shown(self) -> dict[str, Any]:
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        usage = self.usage
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": msgspec.to_builtins(self.errors)} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_id if self.has_output else None,
            "error_file_id": self.error_id if self.has_errors else None,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{name}_at": getattr(self, f"{name}_at") for name in times},
            "request_counts": msgspec.to_builtins(self.counts),
            "usage": {
                "input_tokens": usage.input_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.input_tokens + usage.output_tokens,
            },
            "metadata": self.metadata,
        }


def fresh(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
