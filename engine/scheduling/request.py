"""A request as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import SystemRandom

import numpy as np

from slipstream.engine.messages import FinishReason, NewRequest, TokenDelta, TokenLogprobs
from slipstream.engine.plan import NO_DRAFT, PLAIN, FirstDraft, Float64, LoadedAdapter, NewRow
from slipstream.engine.scheduling.kv import prefix
from slipstream.engine.scheduling.kv.pool import BlockHash

RANDOM = SystemRandom()


class Request:
    """Private to the scheduler and mutable; everybody else sees plans and deltas.

    A request is caught up when ``num_computed == length``: ``length`` counts the known tokens and those that a step
    under way will sample. Prefill, decode and recomputation after preemption are all "catching up". Draft tokens under
    way count as if they were right, in both; what was wrong is taken back when the step is committed.
    """

    __slots__ = (
        "adapter",
        "awaited",
        "block_hashes",
        "blocks",
        "deadline",
        "drafter_version",
        "finished",
        "grammar",
        "in_flight",
        "is_held",
        "message",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_published",
        "num_shown",
        "offer",
        "outgrown",
        "pooled",
        "prompt_logprobs",
        "root",
        "scheduled_at",
        "seed",
        "sharing",
        "slot",
        "tokens",
        "told_first",
        "turn",
        "unsure",
        "weights",
    )

    def __init__(
        self,
        message: NewRequest,
        deadline: float,
        sharing: tuple[str, ...] = (),
        is_held: bool = False,
        adapter: LoadedAdapter = PLAIN,
    ) -> None:
        """A request may find cache blocks only of requests with the same ``sharing``."""
        self.message = message
        self.adapter = adapter
        self.deadline = deadline
        """Orders the queue: see QueueOrder."""
        self.sharing = sharing
        self.root: BlockHash = b""
        """Root of the chain of hashes of its blocks, taken when it is to be admitted."""
        self.weights = -1
        """Which weights of the target the root stands for; none yet."""
        self.tokens = list(message.prompt)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        """Positions whose keys and values are in the cache once every planned step has run."""
        self.in_flight = 0
        """Tokens that planned steps will sample at most, and that are not committed yet."""
        self.unsure = 0
        """Draft tokens among those in flight: nobody knows yet whether they are right."""
        self.blocks: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.awaited: BlockHash | None = None
        """A block that another request is computing and that this one waits for."""
        self.num_published = 0
        self.slot = -1
        """Row in the runner's tables while running."""
        self.seed: int | None = None
        self.outgrown = False
        """Whether it is longer than the model's switch length, and computed as such."""
        self.begin_again()
        self.offer: tuple[float, ...] = ()
        """What drafters propose now: the probability that draft token i and all before it are right."""
        self.is_held = is_held
        """Whether it waits for its grammar."""
        self.grammar: object = None
        """The compiled grammar, which is kept as long as the request."""
        self.drafter_version = 0
        """Version of the learned drafter that proposed last; 0 if none did."""
        self.num_cached = 0
        self.num_preemptions = 0
        self.scheduled_at = 0.0
        self.told_first = False
        self.finished = False
        self.turn = 0.0
        """What its flow had had of the machine when it began."""

    def begin_again(self) -> None:
        """Forgets what was told of the prompt, which is computed from now on."""
        # Places of tokens that have no log-probability: the first, and those that are not wanted.
        untold = max(1, min(self.message.params.prompt_logprobs_from, len(self.message.prompt)))
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * untold
        """Collected chunk by chunk until the first delta takes them along."""
        self.pooled: Float64 | None = None
        """Likewise: the sum of which its embedding is made."""
        self.num_shown = self.num_computed
        """Positions that costly drafters have looked at, or never will: the prefix cache had them."""

    @property
    def tells_of_prompt(self) -> bool:
        """Whether it is collecting what it is to tell of its prompt: an embedding, or log-probabilities."""
        params = self.message.params
        return not self.told_first and bool(params.pooling or params.prompt_logprobs is not None)

    def pool(self, states: Float64) -> None:
        """Takes in what a step computed for its embedding."""
        self.pooled = states if self.pooled is None else self.pooled + states

    def _embedding(self) -> bytes:
        if self.pooled is None:
            return b""
        count = self.num_prompt if self.message.params.pooling == "mean" else 1
        return (self.pooled / count).astype(np.float32).tobytes()

    def awaits_result(self, max_model_len: int, switch_length: int) -> bool:
        """Whether what is under way has to be known before more is planned: it ends the request, or may bring it to the
        end of its context, or to the length from which on it is computed in another way.
        """
        if not self.in_flight:
            return False
        if self.num_output + self.in_flight - self.unsure >= self.message.params.max_tokens:
            return True
        return self.length >= max_model_len or (self.unsure > 0 and not self.outgrown and self.length > switch_length)

    def stream_seed(self) -> int:
        """The seed of its random stream: its own, or one chosen once, so that it continues after a preemption."""
        if self.seed is None:
            asked = self.message.params.seed
            self.seed = asked if asked is not None else RANDOM.getrandbits(63)
        return self.seed

    def new_row(self) -> NewRow:
        """What the runner is told when it has been given a slot."""
        return NewRow(self.slot, self.message, list(self.tokens), self.stream_seed(), self.adapter.number)

    def outgrow(self) -> None:
        """Has the request use no blocks computed for shorter sequences from now on; it must hold none."""
        self.outgrown = True
        self.weights = -1

    def take_root(self, weights: int) -> None:
        """Has the request use blocks that the target computes with these weights; it must hold none."""
        if weights != self.weights:
            self.weights = weights
            root = prefix.seed(weights, *self.sharing)
            self.root = prefix.outgrown(root) if self.outgrown else root
            self.block_hashes = []
            self.awaited = None

    @property
    def has_begun(self) -> bool:
        """Whether it was ever part of a step."""
        return self.scheduled_at > 0

    @property
    def is_prompt(self) -> bool:
        """Whether it has more to catch up with than the token that was sampled last."""
        return self.length - self.num_computed > 1

    @property
    def rank(self) -> tuple[bool, int]:
        """Lower ones may push it out."""
        return self.message.offline, self.message.priority

    @property
    def request_id(self) -> int:
        return self.message.request_id

    @property
    def length(self) -> int:
        return len(self.tokens) + self.in_flight

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def take(self, sampled: Sequence[int], max_model_len: int) -> tuple[int, FinishReason | None, int | None]:
        """Appends what a step sampled, up to where it ends the request: how many, why it ends, and the stop token."""
        params = self.message.params
        for taken, token in enumerate(sampled, 1):
            self.tokens.append(token)
            # A grammar allows stop tokens before min_tokens only where nothing else is left.
            if token in params.stop_token_ids and (self.num_output >= params.min_tokens or params.grammar):
                return taken, "stop", token
            if self.num_output >= params.max_tokens or len(self.tokens) >= max_model_len:
                return taken, "length", None
        return len(sampled), None, None

    def delta(
        self,
        target_version: int,
        tokens: list[int],
        finish: FinishReason | None,
        stop_token: int | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        error: str | None = None,
        is_refused: bool = False,
        num_drafted: int = 0,
        num_accepted: int = 0,
        first_draft: FirstDraft = NO_DRAFT,
        is_shortened: bool = False,
    ) -> TokenDelta:
        """What there is to tell; the first one tells how the request began, and so does the last."""
        first = not self.told_first
        self.told_first = True
        wants_prompt = first and self.message.params.prompt_logprobs is not None
        return TokenDelta(
            request_id=self.request_id,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if wants_prompt else None,
            finish_reason=finish,
            stop_token=stop_token,
            is_shortened=is_shortened,
            error=error,
            is_refused=is_refused,
            num_cached_tokens=self.num_cached if first or finish else 0,
            scheduled_at=self.scheduled_at if first or finish else 0.0,
            num_preemptions=self.num_preemptions if finish else 0,
            num_drafted=num_drafted,
            num_accepted=num_accepted,
            target_version=target_version,
            drafter_version=first_draft.version,
            first_right=first_draft.is_right,
            embedding=self._embedding() if finish in ("stop", "length") else b"",
        )


def check_rows(
    running: Sequence[Request], waiting: Iterable[Request], free_slots: Sequence[int], rows: int, block_size: int
) -> None:
    """Raises AssertionError if requests, rows and blocks do not add up."""
    slots = [request.slot for request in running]
    assert len(set(slots)) == len(slots) and -1 not in slots, "two requests share a row"
    assert len(slots) + len(free_slots) == rows, "a row is lost"
    assert all(request.slot == -1 and not request.blocks for request in waiting), "a waiting request holds room"
    for request in running:
        assert request.num_computed <= request.length, "more positions computed than there are tokens"
        assert len(request.blocks) * block_size >= request.num_computed, "tokens without a block"
