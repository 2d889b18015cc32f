"""Who goes first: every request gets a deadline when it arrives, and the earliest deadline goes first.

A deadline is the arrival time, plus the time its prompt needs, plus a fixed time per level of priority. So short
prompts overtake long ones by a little, urgent requests overtake others by a bounded time, and nothing starves:
whoever comes late enough has a later deadline.

Requests of a batch that is over when its longest answer is may ask for the longest answers first: then likely-long ones
get up to one level of priority ahead of likely-short ones. How long is what the sender expects, else what earlier
answers to the same prompt took, else the most the answer may have.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import NewRequest
from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.step_cost import StepCost

REMEMBERED_PROMPTS = 8192
"""Whose answers' lengths are known; about 150 bytes each."""
OFFLINE_S = 1e9
"""How far offline requests stand behind others, in seconds: nobody lives to see them overtake."""
NEWEST = 0.5
"""Weight of the newest answer in the mean; the others' halve with each."""


class QueueOrder:
    """Gives deadlines, and learns how long answers are."""

    def __init__(self, config: EngineConfig, cost: StepCost, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._cost = cost
        self._clock = clock
        self._lengths: OrderedDict[bytes, float] = OrderedDict()  # least recently used first

    def deadline(self, message: NewRequest) -> float:
        arrival = message.arrival or self._clock()
        service = self._cost.predict(StepWork().add(0, len(message.prompt)))
        ahead = self._share_of_level(message) * self._config.priority_step_s if message.longest_first else 0.0
        return arrival + service + seconds_back(message, self._config.priority_step_s) - ahead

    def ended(self, message: NewRequest, tokens: int) -> None:
        """An answer came to its end with so many tokens."""
        if message.longest_first:
            key = _key(message)
            before = self._lengths.pop(key, float(tokens))
            self._lengths[key] = before + NEWEST * (tokens - before)
            if len(self._lengths) > REMEMBERED_PROMPTS:
                self._lengths.popitem(last=False)

    def expected_tokens(self, message: NewRequest) -> float:
        """How many tokens the answer will probably have; never more than it may have."""
        most = message.params.max_tokens
        known = message.expected_tokens or self._lengths.get(_key(message), most)
        return min(known, most)

    def _share_of_level(self, message: NewRequest) -> float:
        """From 0 for no token up to 1; half a level for a thousand, so that any two lengths differ."""
        expected = self.expected_tokens(message)
        return expected / (expected + 1000)


def seconds_back(message: NewRequest, priority_step_s: float) -> float:
    """How far a request stands behind one of priority 0 that is like it in all else."""
    return message.priority * priority_step_s + (OFFLINE_S if message.offline else 0.0)


def _key(message: NewRequest) -> bytes:
    """Names a prompt of a tenant: what others' answers took is nobody's business."""
    person = blake2b(message.tenant.encode(), digest_size=16).digest()
    return blake2b(array("i", message.prompt).tobytes(), digest_size=16, salt=person).digest()
