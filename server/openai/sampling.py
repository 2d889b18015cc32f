"""From the fields of a request to the engine's sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slipstream.engine.messages import SamplingParams
from slipstream.server.errors import InvalidRequestError
from slipstream.server.generation import OutputOptions
from slipstream.server.openai.schema import SamplingBody
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.service import Service


def sampling_params(
    service: Service,
    body: SamplingBody,
    prepared: Prepared[Any],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """``max_tokens`` and the numbers of log-probabilities as resolved for the endpoint.

    Raises:
        InvalidRequestError: min_tokens is more than max_tokens, the constraints can forbid every token, or the model
            cannot end an answer where its structure does.
    """
    text, structure = service.text, prepared.structure
    default = text.sampling_defaults.get
    top_p = first_set(body.top_p, default("top_p"), 1.0)
    top_k = int(first_set(body.top_k, default("top_k"), 0))
    if top_p == 0:  # the smallest set with any probability: the most likely token
        top_p, top_k = 1.0, 1
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {min_tokens}, more than the {max_tokens} tokens of max_tokens", param="min_tokens"
        )
    stop = dict.fromkeys(body.stop_token_ids or ())
    if not body.ignore_eos:
        # Files and templates may name tokens that the model does not have; TextModel.fit has said so.
        known = range(service.engine.ready.vocab_size)
        found = [*text.tokenizer.eos_token_ids, *(prepared.ends or text.turn_ends).token_ids]
        stop |= dict.fromkeys(token for token in found if token in known)
    if structure is not None and not stop:
        raise InvalidRequestError(
            f"{structure.param}: the model has no token that ends a text; name one in stop_token_ids",
            param=structure.param,
        )
    words = bad_words(service, body.bad_words or ())
    require_way_out(body.allowed_token_ids or (), words, tuple(stop) if min_tokens else ())
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=first_set(body.temperature, default("temperature"), 1.0),
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=first_set(body.min_p, default("min_p"), 0.0),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=first_set(body.repetition_penalty, default("repetition_penalty"), 1.0),
        logit_bias=body.logit_bias or {},
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=words,
        grammar="" if structure is None else structure.grammar,
        ends_in_time=structure is not None and structure.ends_in_time,
        stop_token_ids=tuple(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
        logprobs_mode=body.logprobs_mode or service.config.logprobs_mode,
    )


def output_options(body: SamplingBody, prepared: Prepared[Any]) -> OutputOptions:
    ends, structure, speech = prepared.ends, prepared.structure, prepared.speech
    keeps_special = speech is not None and speech.keeps_special
    return OutputOptions(
        structure_param=None if structure is None else structure.param,
        end_texts=() if ends is None or body.ignore_eos else ends.stops,
        stop=body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False and not keeps_special,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
    )


def bad_words(service: Service, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """A word is tokenized as the beginning of a text and as one that follows a space."""
    encode = service.text.tokenizer.encode
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(" "), " " + word.lstrip(" ")):
            if tokens := tuple(encode(text, add_special_tokens=False)):
                found[tokens] = None
    return tuple(found)


def require_way_out(allowed: Iterable[int], words: Iterable[tuple[int, ...]], stop: Iterable[int]) -> None:
    """Raises InvalidRequestError if the other constraints may forbid every allowed token at once."""
    forbidden = {word[-1] for word in words}.union(stop)
    if allowed and forbidden.issuperset(allowed):
        raise InvalidRequestError(
            "allowed_token_ids: bad_words, or stop tokens before min_tokens, can leave no token to generate",
            param="allowed_token_ids",
        )


def first_set(*values: float | None) -> float:
    return next(value for value in values if value is not None)
