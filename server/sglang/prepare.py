"""From the bytes of a body to what the engine needs: parsed and tokenized. See openai/prepare.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slipstream.server.body import parse
from slipstream.server.errors import InvalidRequestError
from slipstream.server.openai.prepare import encode, require_fits
from slipstream.server.prepared import Limits, Prepared
from slipstream.server.sglang.schema import SGLangGenerateBody
from slipstream.server.text_model import TextModel


def sglang_generate(text: TextModel, limits: Limits, raw: bytes) -> Prepared[SGLangGenerateBody]:
    """The body keeps an empty ``text``, a list for a list of prompts. Raises InvalidRequestError."""
    body = parse(SGLangGenerateBody, raw, "warn")
    single = body.is_single
    field = "input_ids" if body.text is None else "text"
    given: Any = getattr(body, field)
    prompts = [given] if single else given
    if not 0 < len(prompts) <= limits.max_prompts:
        raise InvalidRequestError(
            f"{field}: 1 to {limits.max_prompts} prompts (--max-prompts), not {len(prompts)}", param=field
        )
    if field == "text":
        prompts = encode(text, limits, prompts, True, field)
    for prompt in prompts:
        require_fits(limits, len(prompt), field)
    return Prepared(body.model_copy(update={"text": "" if single else [], "input_ids": None}), prompts, [])


JOBS: dict[str, Callable[[TextModel, Limits, bytes], Any]] = {"sglang_generate": sglang_generate}
