"""Whether drafting pays: learned from what steps bring and from what asking takes; and when it is tried again."""

from __future__ import annotations

from slipstream.engine.scheduling.draft_depth import LEAST_S

PAUSE_BELOW = 1.01
"""Where verification and drafting together bring less than this, drafting pauses, for what steps would take without is
known to some two percent; …"""
MORE_BESIDE_OTHERS = 0.01
"""… and so much more with every doubling of the requests in a step: some get more tokens than others, end earlier, and
steps for those that are left take nearly as long as before …"""
PROBE_EVERY = 16
"""… but for a probe after so many steps, to see whether that has changed."""
HOPED_FOR = 0.02
"""So much more than that is taken for known before anything was seen."""
PROBE_SHARE = 0.005
"""Asking takes at most so much of the time while drafting does not pay: where it means to read prompts first, probes
are further apart."""
RETRY_SHARE = 0.01
"""And so much of it where versions nobody has seen come one after the other, each of which would be tried at once."""
LONGEST_PAUSE = 512
"""Each probe of costly drafters that disappoints makes their pause twice as long, up to this."""
SMOOTHING = 0.03
"""Weight of a step, and of a probe, in what is known of this."""
SMOOTHING_ROWS = 16
"""Steps of fewer requests weigh so much less: one draft token that is right or wrong says little, and texts differ.
With a larger weight, luck stops a drafter that brings a tenth for more than half of the time."""
HOPE = 4.0
"""The first steps weigh more than that, as a mean does: as if so many of full weight had been seen, which were as is
hoped for."""
PLAIN_SMOOTHING, MOST_ERROR = 0.25, 0.3
"""Weight of a step without draft tokens in what is known of such, and how far it may be from what was expected."""
MOST_KNOWN = 1.1
"""What drafting brings counts up to this, so that it is soon known when it no longer pays."""


class Worth:
    """Whether a kind of drafters pays, and when it is asked though it did not."""

    def __init__(self, longest_pause: int, pause_below: float = PAUSE_BELOW) -> None:
        self._pause_below = pause_below
        self._plain = self._seconds = 0.0
        """What steps would take without, and what they take with asking; smoothed. So long steps weigh as they last,
        and one after which drafters read whole prompts as many."""
        self.plain_error = 1.0
        """How long steps without draft tokens take, where most have some, relative to what the cost model expects: it
        knows them by longer ones then, and a few percent decide whether drafting pays."""
        self._longest = longest_pause
        self._pause = PROBE_EVERY
        self.next_probe = 0
        """The step; only where it is paused."""
        self.has_succeeded = False
        """The last probe, if it is paused: then the next one follows at once, as everything is read by now."""
        self._seen = 0.0
        """Steps since the last change, each by its share of a full weight."""
        self._spent = 0.0
        """Seconds of asking in probes since the last one that did not succeed."""
        self._next_retry = 0
        """The step from which on the probes before are a small enough share of the time."""

    @property
    def ratio(self) -> float:
        """Tokens per second with drafting and verification, relative to doing without."""
        return self._plain / self._seconds if self._seconds else self._pause_below + HOPED_FOR

    @property
    def is_paused(self) -> bool:
        return self.ratio < self._pause_below

    def observe(self, step: int, plain: float, seconds: float, rows: int) -> None:
        """A step of so many requests took so long with asking, and its tokens would have taken ``plain`` without."""
        was_paused = self.is_paused
        share = min(rows / SMOOTHING_ROWS, 1.0)
        self._seen += share
        weight = SMOOTHING if was_paused else share * max(SMOOTHING, 1 / (HOPE + self._seen))
        before = self._seconds or seconds
        self._seconds = before + weight * (seconds - before)
        before = self._plain or (self._pause_below + HOPED_FOR) * seconds
        self._plain = min(before + weight * (plain - before), MOST_KNOWN * self._seconds)
        self.has_succeeded = was_paused and plain >= self._pause_below * seconds
        if self.has_succeeded:
            self.next_probe = step
            return
        self._pause = min(2 * self._pause, self._longest) if was_paused else PROBE_EVERY
        steps_spent = self._spent / max(self._seconds, LEAST_S)
        affordable, self._next_retry = round(steps_spent / PROBE_SHARE), step + round(steps_spent / RETRY_SHARE)
        self.next_probe, self._spent = step + min(max(self._pause, affordable), self._longest), 0.0

    def observe_plain(self, error: float) -> None:
        """A step without draft tokens, while drafting is not paused, took so long relative to what was expected."""
        error = min(max(error, 1 - MOST_ERROR), 1 + MOST_ERROR)
        self.plain_error += PLAIN_SMOOTHING * (error - self.plain_error)

    def spend(self, seconds: float) -> None:
        """Asking took so long, in a probe."""
        self._spent += seconds

    def wait(self, step: int) -> None:
        """Is in use again, after others were."""
        self.next_probe = step + self._pause

    def retry(self) -> None:
        """Something has changed: what disappointed before may pay now."""
        self._pause, self.next_probe, self._seen = PROBE_EVERY, self._next_retry, 0.0


class WorthByLoad:
    """Whether networks pay, by the binary order of the number of requests: beside two they may, beside forty not."""

    def __init__(self) -> None:
        self._worths: dict[int, Worth] = {}

    def of(self, requests: int) -> Worth:
        """With so many in a step."""
        order = requests.bit_length()
        if (found := self._worths.get(order)) is None:
            found = self._worths[order] = Worth(LONGEST_PAUSE, PAUSE_BELOW + MORE_BESIDE_OTHERS * (order - 1))
        return found

    def wait(self, step: int) -> None:
        """See ``Worth.wait``."""
        for worth in self._worths.values():
            worth.wait(step)

    def retry(self) -> None:
        """See ``Worth.retry``."""
        for worth in self._worths.values():
            worth.retry()
