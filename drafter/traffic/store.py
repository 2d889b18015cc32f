"""The traffic store: what consenting requests said, in shard files with an index (``index.py``)."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slipstream.drafter.traffic.index import Entry, TenantStatistics, TrafficIndex
from slipstream.engine.errors import ConfigError

logger = logging.getLogger(__name__)
Int32 = NDArray[np.int32]
Tensors = dict[str, Tensor]
SHARD_BYTES = 16 << 20
"""A shard that has as much gets no more samples."""
SMALL_BYTES = 1 << 20
"""A shard smaller than this is written again together with what comes next, so that there are not too many."""
PAGE = 64
"""Samples read from the index at once, at most."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, from the first token of its prompt to the last of its answer."""

    tenant: str
    domain: str
    target_version: int
    drafter_version: int
    time: float
    """When the request arrived, in seconds since 1970."""
    tokens: Int32
    num_prompt: int
    start: int
    """First position with features: what was found in the prefix cache was not computed, and long requests keep the
    features of their end."""
    features: Tensor | None
    """[positions, taps, hidden] bfloat16 of positions start, start + 1, …; the last token was never computed."""
    topk: tuple[Tensor, Tensor] | None
    """Ids [answer, k] int32 and log-probabilities [answer, k] float16 of the target's most likely tokens, best first,
    at the places of the answer's tokens; before temperature and other sampling parameters."""
    greedy: bool
    id: int = 0
    """Given by the store; grows."""
    taps: tuple[int, ...] = ()
    """Layers whose inputs the features are."""
    question: int = 0
    """Given by the store: the same number where the prompt is the same."""
    after_purge: int = 0
    """The last purge that was known of when the request arrived: later ones are meant for it, too. Not kept."""


def question_of(prompt: Int32) -> int:
    """A number of 64 bits, with sign."""
    digest = hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class TrafficStore:
    """``append`` belongs to one process at a time; any other may read, count and purge meanwhile."""

    def __init__(
        self, folder: str | Path, max_bytes: int = 2 << 30, max_age: float = 7 * 86400.0, create: bool = True
    ) -> None:
        """``max_age`` in seconds. Raises ConfigError; without ``create`` also where there is no store."""
        self.index = TrafficIndex(folder, create)
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._lock: int | None = None

    def close(self) -> None:
        self.index.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def lock(self) -> None:
        """Makes this process the one that appends, and clears away what a killed one left.

        Raises ConfigError if another process is.
        """
        if self._lock is not None:
            return
        self._lock = self.index.lock()
        if self._lock is None:
            raise ConfigError(
                f"another server keeps its traffic in {self.index.folder}; give this one a --traffic-folder of its own"
            )
        self.index.clean()
        self.expire()

    # Reading --------------------------------------------------------------------------------------------------------

    def samples(
        self,
        since_id: int = 0,
        tenant: str | None = None,
        limit: int | None = None,
        order: Literal["recent", "oldest"] = "oldest",
        holdout: bool | None = None,
        features: bool = True,
    ) -> Iterator[Sample]:
        """Samples with a larger id than ``since_id``, read one by one, latest or earliest first.

        ``holdout``: only those held out of training, or only the others. Without ``features`` only tokens are read, a
        thousandth of the bytes. What is deleted meanwhile is left out.
        """
        page = PAGE if limit is None else min(limit, PAGE)
        yield from itertools.islice(self._pages(since_id, tenant, order, holdout, features, page), limit)

    def _pages(
        self,
        since_id: int,
        tenant: str | None,
        order: Literal["recent", "oldest"],
        holdout: bool | None,
        features: bool,
        page: int,
    ) -> Iterator[Sample]:
        below: int | None = None
        while entries := self.index.entries(since_id, tenant, order, holdout, page, below):
            for entry in entries:
                if (sample := self._read(entry, features)) is not None:
                    yield sample
            if order == "recent":
                below = entries[-1].id
            else:
                since_id = entries[-1].id

    def _read(self, entry: Entry, features: bool) -> Sample | None:
        """None if the sample was deleted since it was looked up."""
        while True:
            try:
                with safe_open(entry.shard, framework="pt") as shard:
                    return _decode(entry, {name: shard.get_tensor(name) for name in _names(entry, features)})
            except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError) as error:
                # Deleted, or written again into another shard; or damaged.
                found = self.index.entries(entry.id - 1, None, "oldest", None, 1, entry.id + 1)
                if not found:
                    return None
                if found[0].shard == entry.shard:
                    logger.warning("a sample of the traffic is damaged and left out: %s: %r", entry.shard, error)
                    return None
                [entry] = found

    def questions(self) -> dict[int, int]:
        """The question of every sample that there is now, by the id of the sample."""
        return self.index.questions()

    def statistics(self) -> dict[str, TenantStatistics]:
        return self.index.statistics()

    # Writing --------------------------------------------------------------------------------------------------------

    def append(self, samples: Sequence[Sample]) -> int:
        """Keeps the samples (their ids are given here), then lets go of what is too old or too much.

        Returns how many were kept: not those whose tenant was purged after they arrived.
        """
        self.lock()
        kept = 0
        for _, group in itertools.groupby(sorted(samples, key=_tenant), _tenant):
            part: list[Sample] = []
            size = 0
            for sample in group:
                part.append(sample)
                size += _size(sample)
                if size >= SHARD_BYTES:
                    kept += self._write(part)
                    part, size = [], 0
            if part:
                kept += self._write(part)
        self.expire()
        return kept

    def expire(self) -> None:
        self.index.expire(self._max_bytes, self._max_age)

    def purge(self, tenant: str | None = None) -> int:
        """Deletes everything of a tenant, or of all, from the disk; see ``TrafficIndex.purge``."""
        return self.index.purge(tenant)

    def _write(self, samples: list[Sample]) -> int:
        """One shard of one tenant: renamed into place and entered into the index in one transaction."""
        tenant = samples[0].tenant
        while samples := [sample for sample in samples if not self._is_purged(sample)]:
            young = self._small_shard(tenant)
            old, tensors, place = young if young else (None, {}, 0)
            for number, sample in enumerate(samples, place):
                tensors |= _encode(sample, number)
            file = f"{secrets.token_hex(8)}.safetensors"
            with self._saved(file, tensors) as draft, self.index.transaction() as db:
                stale = any(map(self._is_purged, samples))
                found = db.execute("SELECT oldest FROM shards WHERE id = ?", (old,)).fetchone()
                if stale or (old is not None and found is None):
                    continue
                oldest = min([sample.time for sample in samples] + ([found[0]] if found else []))
                row = (file, tenant, draft.stat().st_size, oldest)
                shard = db.execute(
                    "INSERT INTO shards (file, tenant, bytes, oldest) VALUES (?, ?, ?, ?)", row
                ).lastrowid
                if old is not None:
                    db.execute("UPDATE samples SET shard = ? WHERE shard = ?", (shard, old))
                    [left] = db.execute("SELECT file FROM shards WHERE id = ?", (old,)).fetchone()
                    db.execute("DELETE FROM shards WHERE id = ?", (old,))
                db.executemany(
                    "INSERT INTO samples (shard, place, tenant, time, num_tokens, fields, question) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [(shard, number, tenant, *_row(sample)) for number, sample in enumerate(samples, place)],
                )
                draft.rename(self.index.shards / file)
            if old is not None:
                (self.index.shards / left).unlink(missing_ok=True)
            break
        return len(samples)

    def _is_purged(self, sample: Sample) -> bool:
        return self.index.is_purged(sample.tenant, sample.after_purge)

    @contextmanager
    def _saved(self, file: str, tensors: Tensors) -> Iterator[Path]:
        """A file to be renamed into place; nothing of it stays if that does not come about."""
        draft = self.index.shards / f"{file}.tmp"
        try:
            self.index.shards.mkdir(mode=0o700, exist_ok=True)  # somebody may have deleted what was in the folder
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            save_file(tensors, draft)
            draft.chmod(0o600)
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            yield draft
        except BaseException:
            (self.index.shards / file).unlink(missing_ok=True)  # renamed, but not entered into the index
            raise
        finally:
            draft.unlink(missing_ok=True)

    def _small_shard(self, tenant: str) -> tuple[int, Tensors, int] | None:
        """The tenant's last shard, if it is small and young: its number, tensors and first free place."""
        with self.index.transaction() as db:
            row = db.execute(
                "SELECT id, file, bytes, oldest FROM shards WHERE tenant = ? ORDER BY id DESC LIMIT 1", (tenant,)
            ).fetchone()
            if row is None or row[2] >= SMALL_BYTES or row[3] < time.time() - self._max_age / 10:
                return None
            [last] = db.execute("SELECT MAX(place) FROM samples WHERE shard = ?", (row[0],)).fetchone()
        try:
            with safe_open(self.index.shards / row[1], framework="pt") as shard:
                return row[0], {name: shard.get_tensor(name) for name in shard.keys()}, last + 1  # noqa: SIM118
        except (OSError, SafetensorError):
            return None


def _tenant(sample: Sample) -> str:
    return sample.tenant


def _size(sample: Sample) -> int:
    return sum(tensor.nbytes for tensor in _encode(sample, 0).values())


def _row(sample: Sample) -> tuple[object, ...]:
    question = question_of(sample.tokens[: sample.num_prompt])
    return sample.time, len(sample.tokens), json.dumps(_fields(sample)), question


def _fields(sample: Sample) -> dict[str, object]:
    """What the index keeps as JSON."""
    return {
        "domain": sample.domain,
        "target_version": sample.target_version,
        "drafter_version": sample.drafter_version,
        "num_prompt": sample.num_prompt,
        "start": sample.start,
        "greedy": sample.greedy,
        "taps": list(sample.taps),
        "parts": sorted(_encode(sample, 0)),
    }


def _encode(sample: Sample, place: int) -> Tensors:
    tensors = {"tokens": torch.from_numpy(np.array(sample.tokens, np.int32))}
    if sample.features is not None:
        tensors["features"] = sample.features.contiguous()
    if sample.topk is not None:
        tensors["topk_ids"], tensors["topk_logprobs"] = (part.contiguous() for part in sample.topk)
    return {f"{place}.{name}": tensor for name, tensor in tensors.items()}


def _names(entry: Entry, features: bool) -> list[str]:
    parts = [name.partition(".")[2] for name in entry.fields["parts"]]
    return [f"{entry.place}.{part}" for part in parts if features or part == "tokens"]


def _decode(entry: Entry, tensors: Tensors) -> Sample:
    fields = entry.fields
    parts = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return Sample(
        tenant=entry.tenant,
        domain=fields["domain"],
        target_version=fields["target_version"],
        drafter_version=fields["drafter_version"],
        time=entry.time,
        tokens=parts["tokens"].numpy(),
        num_prompt=fields["num_prompt"],
        start=fields["start"],
        features=parts.get("features"),
        topk=(parts["topk_ids"], parts["topk_logprobs"]) if "topk_ids" in parts else None,
        greedy=fields["greedy"],
        id=entry.id,
        taps=tuple(fields["taps"]),
        question=entry.question,
    )
