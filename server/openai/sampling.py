"""From the fields of a request to the engine's sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from slipstream.engine.messages import SamplingParams
from slipstream.engine.validation import foreign_token
from slipstream.server.errors import ContextTooLongError, InvalidRequestError
from slipstream.server.generation import OutputOptions
from slipstream.server.openai.schema import CompletionBody, GenerationBody
from slipstream.server.service import Service
from slipstream.server.text import TurnEnds

SEED_MASK = 2**63 - 1


def sampling_params(
    service: Service,
    body: GenerationBody,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    ends: TurnEnds | None = None,
) -> SamplingParams:
    """``max_tokens`` and the numbers of log-probabilities as resolved for the endpoint; ``ends`` of a conversation with
    a template of its own.

    Raises:
        InvalidRequestError: min_tokens is more than max_tokens, or the constraints can forbid every token.
    """
    text = service.text
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
        found = [*text.tokenizer.eos_token_ids, *(ends or text.turn_ends).token_ids]
        stop |= dict.fromkeys(token for token in found if token in known)
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
        allowed_token_ids=tuple(dict.fromkeys(body.allowed_token_ids or ())),
        bad_words=words,
        stop_token_ids=tuple(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprobs_mode=body.logprobs_mode or service.config.logprobs_mode,
    )


def output_options(body: GenerationBody, ends: TurnEnds | None) -> OutputOptions:
    """``ends``: of a conversation."""
    return OutputOptions(
        end_texts=() if ends is None or body.ignore_eos else ends.stops,
        stop=body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        offsets=isinstance(body, CompletionBody) and body.logprobs is not None,
    )


def fit_context(service: Service, prompt_tokens: int, asked: int | None, param: str) -> int:
    """The number of tokens there is room for.

    Raises:
        InvalidRequestError: the prompt is empty.
        ContextTooLongError: the prompt and the tokens asked for are longer than the model's context.
    """
    limit = service.engine.ready.max_model_len
    if prompt_tokens == 0:
        raise InvalidRequestError("the prompt has no tokens", param=param)
    if prompt_tokens + (1 if asked is None else asked) > limit:
        answer = "" if asked is None else f" and the answer may have {asked}"
        raise ContextTooLongError(
            f"the model's context is {limit} tokens, but the prompt has {prompt_tokens}{answer}", param=param
        )
    return limit - prompt_tokens


def logprobs_asked(service: Service, value: int | None, param: str) -> int | None:
    """Checks a number of log-probabilities; -1 stands for the whole vocabulary."""
    if value is None:
        return None
    limit = service.config.max_logprobs
    vocab_size = service.engine.ready.vocab_size
    asked = vocab_size if value == -1 else value
    if limit != -1 and asked > limit:
        raise InvalidRequestError(f"{param}: at most {limit} (--max-logprobs), not {value}", param=param)
    return min(asked, vocab_size)


def require_known_tokens(
    service: Service, prompts: SequenceOf[SequenceOf[int]], params: SamplingParams, param: str
) -> None:
    """The one place where token ids are checked, whether they came as ids or as text that the tokenizer made them of.

    A tokenizer may have more tokens than the model. ``param`` names the prompts' field.

    Raises:
        InvalidRequestError: the model does not have one of them.
    """
    vocab_size = service.engine.ready.vocab_size
    found = foreign_token(prompts, params, vocab_size)
    if found is None:
        return
    field = param if found.field == "prompt" else found.field
    token = str(found.token)
    if text := service.text.tokenizer.token_name(found.token):
        token += f" ({text!r}), which only the tokenizer has"
    raise InvalidRequestError(f"{field}: the model has the tokens 0 to {vocab_size - 1}, not {token}", param=field)


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
