"""What crosses the boundary between the API process and the engine process, in both directions.

Every message is a msgspec struct, so one definition is the type, the validation and the wire format. The engine
sees token ids only: text, templates, stop strings and tokenizers belong to the server.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from slipstream.engine.operations import AnyAnswer, AnyOperation, MemoryTag

FinishReason = Literal["stop", "length", "abort", "error"]
LogprobsMode = Literal["raw", "processed"]
Pooling = Literal["", "mean", "last"]
TrafficLevel = Literal["off", "tokens", "features"]
"""What may be kept of a request to learn from: nothing, its tokens, or hidden states of the model too."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How the tokens of one request are sampled; validated by the server, trusted by the engine.

    Processors apply in this order: grammar, allowed_token_ids, bad_words, min_tokens, logit_bias, repetition, frequency
    and presence penalty, temperature, top_k, min_p, top_p. ``temperature == 0`` takes the most likely token after the
    penalties and biases.
    """

    max_tokens: int
    """Most tokens of the answer; with 0 only the prompt is computed."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token seen in prompt or output."""
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    """Empty means every token is allowed."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear in the output."""
    grammar: str = ""
    """What the output has to match, in the notation of llguidance; empty for anything. Stop tokens are allowed where
    the output may end, from min_tokens on or where nothing else is left, and end it."""
    ends_in_time: bool = False
    """Near max_tokens only tokens are allowed after which there is time to end the output as the grammar wants."""
    seed: int | None = None
    """Selects the request's random stream; None lets the engine choose one."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request (end-of-sequence tokens included by the server); masked until min_tokens."""
    logprobs: int | None = None
    """None: no log-probabilities; k: of the sampled token and of the k most likely tokens."""
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0
    """Position of the first token of the prompt whose log-probability is wanted; what lies before may come from the
    prefix cache."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens whose log-probabilities are wanted at every position that tells any."""
    logprobs_mode: LogprobsMode = "raw"
    """raw: of the model's own distribution; processed: of the distribution the token was sampled from."""
    pooling: Pooling = ""
    """Which embedding of the prompt is wanted: the mean over its positions of what the output matrix reads, or that of
    the last one; empty for none."""


class SpeculationParams(msgspec.Struct, frozen=True, array_like=True):
    """Which draft tokens a request allows; they change its speed, never its tokens."""

    mode: str = "auto"
    """auto: every drafter of the server; off: none; or the name of one."""
    max_draft_tokens: int | None = None
    """Draft tokens verified at once, at most; None leaves it to the server."""


class NewRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="new"):
    """One sequence to generate. ``request_id`` is unique within the life of the client."""

    request_id: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower is more urgent; a level is worth a fixed head start in the queue, so nothing starves."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only between requests of equal salt."""
    tenant: str = ""
    """Whose request this is: tenants learn nothing of each other, see EngineConfig.prefix_cache_scope."""
    flow: str = ""
    """Who shares the machine with whom: flows get their shares of it, whatever each sends."""
    weight: float = 1.0
    """The flow's share, in proportion to those of the others."""
    route: str = ""
    """Which of the loaded versions of a learned drafter drafts; one that holds nothing stands for the shared one."""
    domain: str = ""
    """What the request is about, as its sender calls it."""
    traffic: TrafficLevel = "off"
    """What may be kept on disk."""
    speculation: SpeculationParams = SpeculationParams()
    arrival: float = 0.0
    """time.monotonic() at the server, seconds; comparable between processes of one host."""
    remember: bool = True
    """Whether drafters may keep its text in memory, for later requests of the same scope."""
    longest_first: bool = False
    """Belongs to a batch that is over when its longest answer is: likely-long answers go first, by a little."""
    expected_tokens: int = 0
    """How long its sender expects the answer to be; 0 if nothing is expected. Counts with ``longest_first`` only."""
    offline: bool = False
    """Nobody waits for the answer: it gets what others leave of the machine."""
    adapter: str = ""
    """The LoRA it is computed with, see LoadAdapter; empty for the model as it is. One that is not there is refused."""

    @property
    def scope(self) -> str:
        """Tenant and salt in one, such that no two pairs look alike: drafters learn within a scope only."""
        return repr((self.tenant, self.cache_salt))


class AbortRequests(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Unknown ids are ignored: the request may have ended while the message was on its way."""

    request_ids: list[int]
    stopped: bool = False
    """The requests have said all that was wanted: a stop string ended the text."""


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """A control operation, answered by exactly one CallReply."""

    call_id: int
    operation: AnyOperation


ToEngine = NewRequest | AbortRequests | Call


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural logarithm) at one position."""

    token: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]] = []
    """The most likely tokens, best first."""
    asked: list[float] = []
    """Log-probabilities of ``logprob_token_ids``, in their order."""


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Progress of one request in one step. Exactly one delta of a request carries a finish_reason: its last."""

    request_id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Log-probabilities of the prompt, in the first delta of a request that asked for them; none of its first, nor
    of those before ``prompt_logprobs_from``."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The member of stop_token_ids that ended the request; it is the last of ``tokens``."""
    is_shortened: bool = False
    """The request ended by itself, but near max_tokens something was forbidden for which there was no time."""
    error: str | None = None
    is_refused: bool = False
    """The error is what the request asks for, and it would get it again."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache; in the first and in the last delta."""
    scheduled_at: float = 0.0
    """time.monotonic() when the request first entered a step; in the first and in the last delta. 0 if it never did."""
    num_preemptions: int = 0
    """How often the request was preempted; in the last delta."""
    num_drafted: int = 0
    """Draft tokens verified in this step."""
    num_accepted: int = 0
    """Accepted draft tokens among the verified ones that count."""
    target_version: int = 0
    """The weights that sampled the tokens."""
    drafter_version: int = 0
    """Version of the learned drafter that had proposed what comes in this step, whether or not it was verified; 0 if
    nothing was proposed, or by another drafter."""
    first_right: bool = False
    """Whether the first draft token of what that drafter had proposed was right."""
    embedding: bytes = b""
    """float32 [hidden], in the last delta of a request that asked for it."""


class VersionStats(msgspec.Struct, array_like=True):
    """What became of the draft tokens of one version of a learned drafter, while it is loaded."""

    version: int
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class DrafterStats(msgspec.Struct, array_like=True):
    """What became of one drafter's draft tokens; counters count from the start of the engine."""

    name: str
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    """How often the draft token at each position was accepted."""
    routes: dict[str, int] = {}
    """Loaded versions of a learned drafter by route; "" is the shared one."""
    versions: list[VersionStats] = []
    """Statistics of the loaded versions."""
    swaps: int = 0
    memory_bytes: int = 0
    """Weights, the room to load new ones beside them, and caches, over all routes."""


class TrafficStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What became of the requests that may be kept; counters count from the start of the engine."""

    kept: int = 0
    dropped: int = 0
    """Requests that were not kept for lack of room, or because keeping them failed."""
    redacted: int = 0
    """Requests that the redaction hook refused."""
    store_bytes: int = 0
    store_tokens: int = 0
    failure: str = ""
    """Why nothing can be kept at the moment."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A snapshot after a step; counters count from the start of the engine."""

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found there."""
    preemptions: int = 0
    step_tokens: int = 0
    """Tokens computed in this step."""
    step_seconds: float = 0.0
    """Wall time of this step on the device."""
    steps: int = 0
    model_seconds: float = 0.0
    """Wall time spent in the model and in sampling, over all steps."""
    verify_seconds: float = 0.0
    """The part of it in steps that verified draft tokens."""
    draft_seconds: float = 0.0
    """Wall time spent proposing draft tokens, over all steps; no part of model_seconds."""
    overhead_cpu_seconds: float = 0.0
    """CPU time spent on everything else, over all steps: planning, batches, results, messages."""
    drafters: list[DrafterStats] = []
    speculation_steps: dict[str, int] = {}
    """Steps by the reason for the number of draft tokens verified in them."""
    traffic: TrafficStats = TrafficStats()
    target_version: int = 0
    is_paused: bool = False
    is_still: bool = False
    """Whether no step will run until somebody resumes the engine, or gives it its memory back."""
    released: tuple[MemoryTag, ...] = ()
    """What it has given back of its memory; see ReleaseMemory."""


class StepOutputs(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Everything one step has to tell the server; also sent without deltas as a heartbeat."""

    deltas: list[TokenDelta]
    stats: EngineStats


class CallReply(msgspec.Struct, frozen=True, array_like=True, tag="reply"):
    call_id: int
    result: AnyAnswer = None
    error: str | None = None
    kind: Literal["failed", "refused", "misfit", "superseded"] = "failed"
    """Refused: a verdict on what was asked for, which would be the same again. Misfit: refused, but not damaged.
    Superseded: something else was asked for before it was done.
    """


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="ready"):
    """The first message of an engine process that came up."""

    model_type: str
    vocab_size: int
    max_model_len: int
    dtype: str
    """Number format of weights that are not packed, and of the cache unless it has another."""
    kv_cache_dtype: str
    """That of the cache: as ``dtype``, or ``int8`` or ``fp8``."""
    weights: str
    """How weights are kept, for example ``bfloat16`` or ``packed (Q4_1, Q8_0), int8``."""
    weights_because: str
    """Why so, for people."""
    device: str
    kernels: str
    """Which backend runs the hot path, for example ``native-avx512bf16`` or ``torch``."""
    block_size: int
    num_blocks: int
    weights_bytes: int
    kv_cache_bytes: int
    load_seconds: float
    drafters: tuple[str, ...] = ()
    """Names of the drafters that requests may choose."""


class EngineFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The last message of an engine process that ends in an error."""

    message: str
    user_error: bool = False
    """True when the user can mend it (a wrong path, too little memory): shown without a traceback."""


FromEngine = StepOutputs | CallReply | EngineReady | EngineFailed
