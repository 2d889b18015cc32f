"""Fields that programs made for llama.cpp send with everything they ask for, most of them as they are when off."""

from __future__ import annotations

from typing import Any

from slipstream.server.http.body import Body
from slipstream.server.openai.fields import unsupported


class LlamaCppFields(Body):
    cache_prompt: bool | None = None
    """It is what happens anyway."""

    # Refused unless off.
    id_slot: unsupported(-1) = None  # type: ignore[valid-type]
    timings_per_token: unsupported(False) = None  # type: ignore[valid-type]
    return_progress: unsupported(False) = None  # type: ignore[valid-type]
    post_sampling_probs: unsupported(False) = None  # type: ignore[valid-type]
    n_probs: unsupported(0) = None  # type: ignore[valid-type]
    min_keep: unsupported(0) = None  # type: ignore[valid-type]
    t_max_predict_ms: unsupported(0) = None  # type: ignore[valid-type]
    lora: unsupported([]) = None  # type: ignore[valid-type]
    repeat_penalty: unsupported(1, 1.0) = None  # type: ignore[valid-type]
    typical_p: unsupported(1, 1.0) = None  # type: ignore[valid-type]
    typ_p: unsupported(1, 1.0) = None  # type: ignore[valid-type]
    tfs_z: unsupported(1, 1.0) = None  # type: ignore[valid-type]
    top_a: unsupported(0, 0.0) = None  # type: ignore[valid-type]
    top_n_sigma: unsupported(-1, -1.0) = None  # type: ignore[valid-type]
    mirostat: unsupported(0) = None  # type: ignore[valid-type]
    dry_multiplier: unsupported(0, 0.0) = None  # type: ignore[valid-type]
    dynatemp_range: unsupported(0, 0.0) = None  # type: ignore[valid-type]
    xtc_probability: unsupported(0, 0.0) = None  # type: ignore[valid-type]

    # Accepted: what they belong to is off.
    repeat_last_n: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: Any = None
    dynatemp_exponent: float | None = None
    xtc_threshold: float | None = None
