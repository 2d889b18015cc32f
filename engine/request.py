"""A request as the scheduler sees it."""

from __future__ import annotations

from slipstream.engine.kv.pool import BlockHash
from slipstream.engine.messages import NewRequest, TokenLogprobs


class Request:
    """Private to the scheduler and mutable; everybody else sees plans and deltas.

    A request is caught up when ``num_computed == length``: ``length`` counts the known tokens and those that a step
    under way will sample. Prefill, decode and recomputation after preemption are all "catching up".
    """

    __slots__ = (
        "awaited",
        "block_hashes",
        "blocks",
        "deadline",
        "drafter_version",
        "finished",
        "in_flight",
        "message",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_published",
        "offer",
        "prompt_logprobs",
        "root",
        "scheduled_at",
        "seed",
        "slot",
        "tokens",
        "told_first",
    )

    def __init__(self, message: NewRequest, deadline: float, root: BlockHash) -> None:
        self.message = message
        self.deadline = deadline
        """Orders the queue: see Scheduler.add."""
        self.root = root
        self.tokens = list(message.prompt)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        """Positions whose keys and values are in the cache once every planned step has run."""
        self.in_flight = 0
        """Tokens that planned steps will sample and that are not committed yet."""
        self.blocks: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.awaited: BlockHash | None = None
        """A block that another request is computing and that this one waits for."""
        self.num_published = 0
        self.slot = -1
        """Row in the runner's tables while running."""
        self.seed: int | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        """Collected chunk by chunk until the first delta takes them along."""
        self.offer: tuple[float, ...] = ()
        """What drafters propose now: the probability that guess i and all before it are right."""
        self.drafter_version = 0
        """Of the learned drafter that guessed last; 0 if none did."""
        self.num_cached = 0
        self.num_preemptions = 0
        self.scheduled_at = 0.0
        self.told_first = False
        self.finished = False

    @property
    def request_id(self) -> int:
        return self.message.request_id

    @property
    def length(self) -> int:
        return len(self.tokens) + self.in_flight

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt
