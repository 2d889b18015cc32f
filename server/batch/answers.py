"""The answers of /v1/files and /v1/batches, as the OpenAPI document shows them; docs/batches.md says what they mean."""

from __future__ import annotations

from typing import Literal

from slipstream.server.batch.records import BatchStatus
from slipstream.server.http.description import Answer


class FileObject(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class FileList(Answer):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Answer):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchProblem(Answer):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchProblems(Answer):
    object: Literal["list"]
    data: list[BatchProblem]


class BatchCounts(Answer):
    total: int
    completed: int
    failed: int


class BatchCached(Answer):
    cached_tokens: int


class BatchReasoning(Answer):
    reasoning_tokens: int


class BatchUsage(Answer):
    input_tokens: int
    input_tokens_details: BatchCached
    output_tokens: int
    output_tokens_details: BatchReasoning
    total_tokens: int


class BatchObject(Answer):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(Answer):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


ANSWERS: tuple[type[Answer], ...] = (FileObject, FileList, FileDeleted, BatchObject, BatchList)
