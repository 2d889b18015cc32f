"""What a body asks for of each of its prompts, whether it says so once or in lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slipstream.engine.messages import LogprobsMode, SamplingParams
from slipstream.server.access.principal import Principal
from slipstream.server.errors import InvalidRequestError
from slipstream.server.generating import fit_context, logprobs_asked, require_choices
from slipstream.server.generation import OutputOptions
from slipstream.server.http.body import shown
from slipstream.server.preparing.prepared import Prepared, Structure
from slipstream.server.service import Service
from slipstream.server.sglang.schema import (
    ALL_TOKENS,
    DEFAULT_MAX_NEW_TOKENS,
    SGLangGenerateBody,
    SGLangSamplingParams,
    kind_of_ids,
)

MODE: LogprobsMode = "processed"
"""Log-probabilities are those of the distribution that a token was drawn from, which is what trainers compare with."""


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Which log-probabilities are to be told of a prompt and its answers."""

    start: int
    """Position in the prompt from which on; its length for none of it."""
    top: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for of one prompt."""

    params: SamplingParams
    output: OutputOptions
    seed: int | None
    cache_salt: str
    logprobs: Logprobs | None
    ids: list[str]
    """The ids of its answers."""
    adapter: str
    """See NewRequest."""


def read_asked(
    service: Service, principal: Principal, prepared: Prepared[SGLangGenerateBody], request_id: str
) -> list[Asked]:
    """``request_id`` is what the answers are called if the body has no ids for them.

    Raises InvalidRequestError, ContextTooLongError, OverloadedError.
    """
    body, prompts, structure = prepared.body, prepared.prompts, prepared.structure
    count = len(prompts)
    sampling: list[SGLangSamplingParams] = per_prompt(body.sampling_params, count, "sampling_params")
    sampling = [each or SGLangSamplingParams.model_validate({}) for each in sampling]
    choices = choices_of(sampling)
    require_choices(service, principal, choices, count)
    wanted = per_prompt(body.return_logprob, count, "return_logprob")
    starts = per_prompt(body.logprob_start_len, count, "logprob_start_len")
    tops = per_prompt(body.top_logprobs_num, count, "top_logprobs_num")
    ids = body.token_ids_logprob
    ids = per_prompt(ids if kind_of_ids(ids) == "one each" else [ids] * count, count, "token_ids_logprob")
    salts = per_prompt(body.cache_salt, count, "cache_salt")
    keys = per_prompt(body.extra_key, count, "extra_key")
    loras = per_prompt(body.lora_path, count, "lora_path")
    answer_ids = ids_of(body, count, choices, request_id)
    found = []
    for i, prompt in enumerate(prompts):
        logprobs = None
        if wanted[i]:
            logprobs = read_logprobs(service, principal, len(prompt), starts[i], tops[i] or 0, ids[i] or ())
        params = read_params(service, sampling[i], len(prompt), logprobs, body, structure)
        found.append(
            Asked(
                params=params,
                output=read_output(sampling[i], params, structure),
                seed=sampling[i].sampling_seed,
                # Requests of other dialects have a salt only: where there is no key, the prefixes are the same.
                cache_salt=repr((salts[i] or "", keys[i])) if keys[i] else salts[i] or "",
                logprobs=logprobs,
                ids=answer_ids[i * choices : (i + 1) * choices],
                adapter=adapter_of(service, loras[i]),
            )
        )
    return found


def per_prompt(value: Any, count: int, field: str) -> list[Any]:
    """A list with an entry for each prompt; raises InvalidRequestError for one of another length."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(f"{field}: an entry for each of the {count} prompts, not {len(value)}", param=field)
    return value


def adapter_of(service: Service, name: str | None) -> str:
    """Raises InvalidRequestError unless a LoRA of this name is beside the model."""
    if not name:
        return ""
    if not (adapter := service.adapters.of(name)):
        raise InvalidRequestError(f"lora_path: there is no LoRA {shown(name)} beside the model", param="lora_path")
    return adapter


def choices_of(sampling: list[SGLangSamplingParams]) -> int:
    """How many answers each prompt gets."""
    counts = {each.n or 1 for each in sampling}
    if len(counts) > 1:
        raise InvalidRequestError("sampling_params: n has to be the same for all prompts", param="sampling_params.n")
    return counts.pop()


def ids_of(body: SGLangGenerateBody, count: int, choices: int, request_id: str) -> list[str]:
    """The ids of all answers, in the order prompt, choice; raises InvalidRequestError if two are the same."""
    rid = body.rid
    if isinstance(rid, list):
        named = per_prompt(rid, count, "rid")
        if len(set(named)) < count:
            raise InvalidRequestError("rid: two prompts have the same", param="rid")
        return named if choices == 1 else [f"{name}_{i}" for name in named for i in range(choices)]
    name = rid or request_id
    if body.is_single and choices == 1:
        return [name]
    return [f"{name}_{i}" for i in range(count * choices)]


def read_logprobs(
    service: Service, principal: Principal, length: int, start: int | None, top: int, ids: list[int] | tuple[int, ...]
) -> Logprobs:
    start = length if start is None or start == -1 else start
    if start > length:
        raise InvalidRequestError(
            f"logprob_start_len: the prompt has {length} tokens, so at most {length}, not {start}",
            param="logprob_start_len",
        )
    logprobs_asked(service, principal, top, "top_logprobs_num")
    logprobs_asked(service, principal, len(ids), "token_ids_logprob")
    return Logprobs(start=start, top=top, token_ids=tuple(ids))


def read_params(
    service: Service,
    asked: SGLangSamplingParams,
    length: int,
    logprobs: Logprobs | None,
    body: SGLangGenerateBody,
    structure: Structure | None,
) -> SamplingParams:
    given = "max_new_tokens" in asked.model_fields_set
    room = fit_context(service, length, asked.max_new_tokens if given else None, "sampling_params.max_new_tokens")
    max_tokens = min(room, DEFAULT_MAX_NEW_TOKENS) if not given else asked.max_new_tokens
    max_tokens = room if max_tokens is None else max_tokens
    min_tokens = asked.min_new_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_new_tokens is {min_tokens}, more than the {max_tokens} tokens of max_new_tokens",
            param="sampling_params.min_new_tokens",
        )
    top_p, top_k = 1.0 if asked.top_p is None else asked.top_p, asked.top_k or 0
    if top_k < 0 or top_k >= ALL_TOKENS:
        top_k = 0
    if top_p == 0:  # the smallest set with any probability: the most likely token
        top_p, top_k = 1.0, 1
    stop = () if asked.ignore_eos else stop_tokens(service, asked)
    if structure is not None and not stop:
        raise InvalidRequestError(
            f"{structure.param}: the model has no token that ends a text; name one in stop_token_ids",
            param=structure.param,
        )
    prompt_logprobs = None
    if logprobs is not None and logprobs.start < length:
        prompt_logprobs = logprobs.top
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=asked.min_p or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        logit_bias=asked.logit_bias or {},
        stop_token_ids=stop,
        grammar="" if structure is None else structure.grammar,
        logprobs=None if logprobs is None else logprobs.top,
        prompt_logprobs=prompt_logprobs,
        prompt_logprobs_from=0 if prompt_logprobs is None or logprobs is None else logprobs.start,
        logprob_token_ids=() if logprobs is None else logprobs.token_ids,
        logprobs_mode=body.logprobs_mode or MODE,
    )


def stop_tokens(service: Service, asked: SGLangSamplingParams) -> tuple[int, ...]:
    """Those asked for, and the ends of a text and of a turn that the model has."""
    text, known = service.text, range(service.engine.ready.vocab_size)
    found = [*text.tokenizer.eos_token_ids, *text.turn_ends.token_ids]
    return tuple(dict.fromkeys([*(asked.stop_token_ids or ()), *(token for token in found if token in known)]))


def read_output(asked: SGLangSamplingParams, params: SamplingParams, structure: Structure | None) -> OutputOptions:
    return OutputOptions(
        structure_param=None if structure is None else structure.param,
        stop=asked.stop_strings,
        include_stop=bool(asked.no_stop_trim),
        skip_special_tokens=asked.skip_special_tokens is not False,
        min_tokens=params.min_tokens,
        stop_token_ids=frozenset(params.stop_token_ids),
        interval=asked.stream_interval or 0,
    )
