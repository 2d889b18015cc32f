"""What is tried again, and when: only what the server did not begin, so that nothing is done twice."""

from __future__ import annotations

from slipstream.clients.errors import APIError

LATER = (429, 503)
"""Answers that ask to come back later: the request was not taken."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


def may_try_again(refusal: APIError) -> bool:
    return refusal.status in LATER


def pause_before(attempt: int, refusal: APIError | None = None) -> float:
    """Seconds to wait after attempt 0, 1, …: what the server said, else twice as long each time."""
    asked = FIRST_PAUSE * 2**attempt if refusal is None or refusal.retry_after is None else refusal.retry_after
    return min(asked, LONGEST_PAUSE)
