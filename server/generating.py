"""A generating request as every dialect of HTTP makes one, and its way into the engine.

A dialect reads a body into a GenerationRequest, gets a Generation for it, and writes what comes; nothing here knows the
names of its fields, but for those it is told to name in errors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from slipstream.engine.messages import NewRequest, SamplingParams, SpeculationParams
from slipstream.engine.validation import foreign_token
from slipstream.server.access.consent import read_statement
from slipstream.server.access.principal import Principal, principal_of
from slipstream.server.config import MAX_PRIORITY
from slipstream.server.errors import ContextTooLongError, InvalidRequestError
from slipstream.server.generation import Generation, OutputOptions, Sequence
from slipstream.server.http.body import read_body
from slipstream.server.preparing.prepared import Answered, Prepared
from slipstream.server.preparing.text_work import INLINE_BYTES
from slipstream.server.responses import LargeResponse, cancelled_on_disconnect
from slipstream.server.rollout.groups import Rollout
from slipstream.server.service import Service
from slipstream.server.telemetry import log

SEED_MASK = 2**63 - 1
ANY_DRAFTER = SpeculationParams()


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is asked for. Who asks, and what its headers say about it, comes from the HTTP request itself."""

    prompts: SequenceOf[list[int]]
    params: SequenceOf[SamplingParams]
    """Sampling parameters of each prompt; they differ in ``max_tokens`` only, and have no seed."""
    param: str
    """The field of the prompts, for errors."""
    output: OutputOptions
    choices: int = 1
    """Answers per prompt."""
    seed: int | None = None
    """Seed of the request: choice i samples with the stream of seed + i, whatever prompt it belongs to."""
    speculation: SpeculationParams = ANY_DRAFTER
    priority: int = 0
    cache_salt: str = ""
    user: str | None = None
    """The tenant, as the client calls it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """May say about the request what headers say (server/access/consent.py)."""
    answer_prefix: str = ""
    """Stands before the request's id in the id of the answer."""
    request_id: str | None = None
    """Id of the request, if it brings one."""
    sequence_ids: SequenceOf[str] = ()
    """An id for each sequence, in the order prompt, choice, by which it can be aborted; or none."""
    rollout: Rollout | None = None
    """The batch of rollouts that it belongs to, if it does."""
    timeout_s: float | None = None
    """How long its sender would wait for the whole answer."""
    adapter: str = ""
    """The LoRA it is computed with; see NewRequest."""
    arrival: float
    """time.monotonic()"""


async def unchanged(raw: bytes) -> bytes:
    return raw


async def prepare_generation(
    service: Service, request: Request, job: str, before: Callable[[bytes], Awaitable[bytes]] = unchanged
) -> Prepared[Any]:
    """A generating request, unless the queue is full anyway; ``before`` as for prepare."""
    service.require_ready()
    service.control.require_awake()
    service.admission.require_room(principal_of(request.scope).account, 1)
    prepared: Prepared[Any] = await prepare(service, request, job, before)
    return prepared


async def prepare(
    service: Service, request: Request, job: str, before: Callable[[bytes], Awaitable[bytes]] = unchanged
) -> Any:
    """What a job (server/jobs.py) makes of the body, which ``before`` may join to what the server knows.

    Raises ClientDisconnect when nobody waits for it any more.
    """
    service.require_ready()
    account = principal_of(request.scope).account
    service.admission.begin(account)
    if account.is_offline:  # whoever sends it holds its bytes
        return await service.work.run_behind(job, await before(await read_body(request, service.config.max_body_bytes)))
    with service.bodies.hold() as held:
        raw = await read_body(request, service.config.max_body_bytes, held)
        if len(raw) <= INLINE_BYTES:
            return await service.work.run(job, await before(raw))
        async with cancelled_on_disconnect(request.receive, None):
            return await service.work.run(job, await before(raw))
        raise ClientDisconnect


async def answer_without_engine(
    service: Service, request: Request, job: str, before: Callable[[bytes], Awaitable[bytes]] = unchanged
) -> LargeResponse:
    """``before`` as for prepare. Raises ModelNotFoundError, and what the job raises."""
    found: Answered = await prepare(service, request, job, before)
    service.require_model(found.model)
    return LargeResponse(service, found.data)


def start_generation(
    service: Service, request: Request, asked: GenerationRequest, *others: GenerationRequest
) -> Generation:
    """The sequences are in the order request, prompt, choice. They are submitted when the Generation is entered.

    One HTTP request may ask for several things at once (``others``), of as many choices each; their answer is one, and
    named as the first says.

    Raises:
        InvalidRequestError: the model lacks a token of a prompt (the field ``param``) or of the parameters; there is no
            such drafter; the priority is not allowed; headers and metadata contradict each other.
    """
    sequences: list[Sequence] = []
    for each in (asked, *others):
        sequences += make_sequences(service, request, each, len(sequences))
    if asked.request_id is not None:
        request.state.request_id = asked.request_id
        log.request_id.set(asked.request_id)
    request_id = request.state.request_id
    name = asked.answer_prefix + request_id
    generation = Generation(service, name, asked.arrival, sequences, asked.choices, request_id, asked.rollout)
    generation.account, generation.timeout_s = principal_of(request.scope).account, asked.timeout_s
    return generation


def make_sequences(service: Service, request: Request, asked: GenerationRequest, first: int) -> list[Sequence]:
    """Those of one GenerationRequest, the first of which has index ``first``; raises what start_generation raises."""
    require_known_tokens(service, asked.prompts, asked.params[0], asked.param)
    require_known_drafter(service, asked.speculation.mode)
    principal = principal_of(request.scope)
    priority = allowed_priority(principal, asked.priority)
    said = read_statement(request, asked.metadata, asked.user, service.traffic.traffic_consent)
    # Drafters learn what the model says without a LoRA: features made again of the text would be those, too.
    traffic = "off" if asked.adapter else said.kept(service.traffic.traffic_log)
    domain, tenant = said.domain, principal.tenant(said.user)
    sequences: list[Sequence] = []
    for prompt, params in zip(asked.prompts, asked.params, strict=True):
        for choice in range(asked.choices):
            request_id = service.engine.next_request_id()
            new = NewRequest(
                request_id=request_id,
                prompt=prompt,
                params=for_choice(params, asked.seed, choice),
                priority=priority,
                cache_salt=asked.cache_salt,
                tenant=tenant,
                flow=principal.key,
                weight=principal.account.limits.weight,
                domain=domain,
                traffic=traffic,
                route=service.route(request_id, tenant, domain, asked.adapter),
                speculation=asked.speculation,
                arrival=asked.arrival,
                remember=said.level != "off",
                longest_first=asked.rollout is not None,
                expected_tokens=asked.rollout.expected_tokens if asked.rollout else 0,
                offline=principal.account.is_offline,
                adapter=asked.adapter,
            )
            sequences.append(Sequence(first + len(sequences), new, asked.output, service))
    for sequence, sequence_id in zip(sequences, asked.sequence_ids, strict=False):
        sequence.id = sequence_id
    return sequences


def require_choices(service: Service, principal: Principal, choices: int, prompts: int = 1) -> None:
    """``choices`` per prompt.

    Raises InvalidRequestError if they are too many, OverloadedError if there is no room for the sequences.
    """
    most = principal.limits.max_n
    if choices > most:
        raise InvalidRequestError(f"n: at most {most} (--max-n), not {choices}", param="n")
    service.admission.require_room(principal.account, choices * prompts)


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


def logprobs_asked(service: Service, principal: Principal, value: int | None, param: str) -> int | None:
    """Checks a number of log-probabilities; -1 stands for the whole vocabulary."""
    if value is None:
        return None
    limit = principal.limits.max_logprobs
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


def allowed_priority(principal: Principal, priority: int) -> int:
    """The priority of a request; 0 is that of one that asks for none.

    Raises InvalidRequestError for one that would put a request further before others than the server lets it.
    """
    least = principal.limits.most_urgent_priority
    if priority == 0:
        return max(least, 0)
    if priority < least:
        raise InvalidRequestError(
            f"priority: {least} to {MAX_PRIORITY} on this server, not {priority} (--most-urgent-priority)",
            param="priority",
        )
    return priority


def require_known_drafter(service: Service, mode: str) -> None:
    """Raises InvalidRequestError for a drafter this server does not have."""
    modes = ("auto", "off", *service.engine.ready.drafters)
    if mode not in modes:
        raise InvalidRequestError(
            f"speculation.mode: {mode!r} is none of {', '.join(modes)}; --speculation says which drafters there are",
            param="speculation.mode",
        )


def for_choice(params: SamplingParams, seed: int | None, choice: int) -> SamplingParams:
    return params if seed is None else msgspec.structs.replace(params, seed=(seed + choice) & SEED_MASK)
