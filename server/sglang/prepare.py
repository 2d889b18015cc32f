"""From the bytes of a body to what the engine needs: parsed and tokenized. See openai/prepare.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import parse
from slipstream.server.openai.prepare import encode, require_fits, tried
from slipstream.server.preparing.prepared import Limits, Prepared, Structure
from slipstream.server.preparing.text_model import TextModel
from slipstream.server.sglang.schema import SGLangGenerateBody, SGLangSamplingParams


def sglang_generate(text: TextModel, limits: Limits, raw: bytes) -> Prepared[SGLangGenerateBody]:
    """The body keeps an empty ``text``, a list for a list of prompts.

    Raises:
        InvalidRequestError
        RunElsewhereError: it has a grammar that has to be tried.
    """
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
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens", param=field)
        require_fits(limits, len(prompt), field)
    done = body.model_copy(update={"text": "" if single else [], "input_ids": None})
    return Prepared(done, prompts, [], structure=structure(text, limits, body))


def structure(text: TextModel, limits: Limits, body: SGLangGenerateBody) -> Structure | None:
    """What the answers are to look like, which is the same for all of them."""
    given: Any = body.sampling_params
    sampling: list[SGLangSamplingParams | None] = given if isinstance(given, list) else [given]
    found = {("", "") if each is None else each.structure() for each in sampling}
    if len({grammar for grammar, _ in found}) > 1:
        raise InvalidRequestError(
            "sampling_params: the structure of answers has to be the same for all prompts; send others apart",
            param="sampling_params",
            code="unsupported_parameter",
        )
    grammar, param = found.pop() if found else ("", "")
    return tried(text, limits, Structure(grammar, param) if grammar else None)


JOBS: dict[str, Callable[[TextModel, Limits, bytes], Any]] = {"sglang_generate": sglang_generate}
