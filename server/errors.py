"""What an HTTP client can be told. Every error of every route has the body
``{"error": {"message", "type", "param", "code"}}``.

ApiError
├── InvalidRequestError        400  a field is wrong, unknown or unsupported; ``param`` names it
│   └── ContextTooLongError    400  prompt and answer do not fit the model; code context_length_exceeded
├── UnauthorizedError          401  no API key, or a wrong one
├── ForbiddenError             403  the admin API without a key, from elsewhere; a key of the other door
├── NotFoundError              404  no such route
│   ├── ModelNotFoundError     404  no such model; code model_not_found
│   └── VersionNotFoundError   404  no such version of a drafter; code version_not_found
├── MethodNotAllowedError      405
├── TooSlowError               408  the request did not arrive in time
├── ConflictError              409  not possible in the state things are in; code says which
├── BodyTooLargeError          413
├── UnsupportedMediaTypeError  415  the body is not declared as JSON
├── OverloadedError            429  the queue is full; Retry-After says when to come back
│   └── RateLimitedError       429  the limits of a key are reached
├── HeadTooLargeError          431
├── GenerationFailedError      500  the engine failed this request
├── UnavailableError           503  loading, draining, or the engine is gone; Retry-After
└── TimedOutError              504  --request-timeout-s, or the time that the request gives itself, is over
"""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


class ApiError(Exception):
    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        # Both may repeat what a client sent, which may be megabytes.
        self.message = shortened(message, MAX_MESSAGE_CHARS)
        super().__init__(self.message)
        self.param = None if param is None else shortened(param, MAX_PARAM_CHARS)
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"message": self.message, "param": self.param, "code": self.code, "retry_after_s": self.retry_after_s}
        return type(self), (self.message,), state

    def body(self) -> bytes:
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return _encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        return headers


class InvalidRequestError(ApiError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextTooLongError(InvalidRequestError):
    code = "context_length_exceeded"


class UnauthorizedError(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class ForbiddenError(ApiError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFoundError(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_route"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class VersionNotFoundError(NotFoundError):
    code = "version_not_found"


class MethodNotAllowedError(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooSlowError(ApiError):
    status = 408
    type = "timeout_error"
    code = "request_too_slow"


class ConflictError(ApiError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLargeError(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaTypeError(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class HeadTooLargeError(ApiError):
    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class OverloadedError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class RateLimitedError(OverloadedError):
    """``reason`` is the limit that was reached, by its name in UsageLimits."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int | None = None, reason: str = "") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.reason = reason


class GenerationFailedError(ApiError):
    code = "generation_failed"


class UnavailableError(ApiError):
    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class TimedOutError(ApiError):
    status = 504
    type = "timeout_error"
    code = "request_timeout"
