"""Async client for the admin API of a Slipstream server; docs/api.md says what each call does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlencode

from slipstream.clients.http import HttpClient

Change = Literal["promote", "rollback", "retire", "pin", "unpin"]
Answer = dict[str, Any]
Memory = Literal["kv_cache", "weights"]


class AdminClient(HttpClient):
    """``base_url`` is the server's root; ``api_key`` one of its ``--admin-key``. Paths are those of the server.

    Every call raises APIError for what the server refuses and UnreachableError without an answer.
    """

    async def status(self) -> Answer:
        """Everything the dashboard shows."""
        return await self._object("GET", "/admin/v1/status")

    async def drafters(self, route: str | None = None, pruned: bool = False) -> list[Answer]:
        """Versions, oldest first, of a route or of all; also those whose weights are deleted, if asked for."""
        query = {"pruned": str(pruned).lower()} | ({} if route is None else {"route": route})
        found: list[Answer] = (await self._object("GET", f"/admin/v1/drafters?{urlencode(query)}"))["drafters"]
        return found

    async def drafter(self, version: int) -> Answer:
        """``{"drafter", "history"}`` of one version."""
        return await self._object("GET", f"/admin/v1/drafters/{version}")

    async def diff(self, a: int, b: int) -> Answer:
        """How two versions differ; takes seconds, because the server has to load both."""
        return await self._object("GET", f"/admin/v1/drafters/{a}/diff/{b}")

    async def change(self, change: Change, version: int, reason: str = "") -> Answer:
        """``{"drafter", "live"}``: the version afterwards, and what is live on its route."""
        return await self._object("POST", f"/admin/v1/drafters/{version}/{change}", {"reason": reason})

    async def prune(self, keep: int, route: str | None = None, reason: str = "") -> list[int]:
        """Deletes the weights of all but the newest versions; which ones."""
        body = {"keep": keep, "route": route, "reason": reason}
        pruned: list[int] = (await self._object("POST", "/admin/v1/drafters/prune", body))["pruned"]
        return pruned

    async def import_drafter(
        self,
        folder: str,
        *,
        target: str | None = None,
        target_lineage: str | None = None,
        route: str | None = None,
        note: str | None = None,
    ) -> Answer:
        """Adds a head as a candidate; ``target`` and ``target_lineage`` are the server's own if not given.

        Returns the version.
        """
        body = {"folder": folder, "target": target, "target_lineage": target_lineage, "route": route, "note": note}
        found: Answer = (await self._object("POST", "/admin/v1/drafters/import", body))["drafter"]
        return found

    async def export_drafter(self, version: int, folder: str) -> Answer:
        """Writes a version in the EAGLE-3 layout: ``{"version", "folder", "notes"}``."""
        return await self._object("POST", "/admin/v1/drafters/export", {"version": version, "folder": folder})

    async def evolve(self, action: Literal["pause", "resume", "train", "judge"]) -> Answer:
        """Pauses training, goes on with it, asks for a round, or ends it: ``{"paused", "report"}``."""
        return await self._object("POST", "/admin/v1/evolve", {"action": action})

    async def pause(self, mode: Literal["keep", "recompute", "wait", "abort"] = "keep") -> None:
        """Lets no request begin, and none go on but as the mode says."""
        await self._object("POST", "/admin/v1/pause", {"mode": mode})

    async def resume(self) -> None:
        """Ends a pause."""
        await self._object("POST", "/admin/v1/resume", {})

    async def abort(self, ids: Sequence[str] | None = None) -> int:
        """Ends requests by their ids, or all of them, each with what it has said; how many sequences that were."""
        aborted: int = (await self._object("POST", "/admin/v1/abort", {"ids": ids}))["aborted"]
        return aborted

    async def sleep(
        self,
        tags: Sequence[Memory] | None = None,
        keep_weights: bool = True,
        mode: Literal["keep", "recompute", "wait", "abort"] = "abort",
    ) -> list[str]:
        """Has the engine give memory back to the system, all of it without ``tags``; what it has given back."""
        body = {"tags": tags, "keep_weights": keep_weights, "mode": mode}
        released: list[str] = (await self._object("POST", "/admin/v1/sleep", body))["released"]
        return released

    async def wake(self, tags: Sequence[Memory] | None = None) -> list[str]:
        """Has the engine take memory again; what is still given back."""
        released: list[str] = (await self._object("POST", "/admin/v1/wake", {"tags": tags}))["released"]
        return released

    async def begin_update(self, version: int, mode: Literal["keep", "recompute", "abort"] = "recompute") -> None:
        """Begins an update of the model's weights; ``mode`` is what becomes of running requests when it is finished."""
        await self._object("POST", "/admin/v1/target/begin", {"version": version, "mode": mode})

    async def fill(self, version: int, tensors: bytes) -> int:
        """Sends a safetensors file with tensors by their Hugging Face names; how many have not come completely.

        Of those that are only some rows of a tensor, its metadata tells the first ones: ``{"first_rows": JSON}``.
        """
        return _missing(await self._object("POST", f"/admin/v1/target/fill?version={version}", tensors))

    async def read(self, version: int, path: str) -> int:
        """Has the server read a safetensors file, a whole model or a LoRA, from a path of its own; see ``fill``."""
        return _missing(await self._object("POST", "/admin/v1/target/read", {"version": version, "path": path}))

    async def share(self, version: int, segment: str, num_bytes: int) -> int:
        """Has a server of this machine read a safetensors file from shared memory, which is free again afterwards."""
        body = {"version": version, "segment": segment, "num_bytes": num_bytes}
        return _missing(await self._object("POST", "/admin/v1/target/shared", body))

    async def join_group(self, name: str, address: str, port: int, world_size: int, rank: int, **options: Any) -> None:
        """Has the server join a group of processes; returns when all have. ``options`` as in docs/api.md."""
        body = {"name": name, "address": address, "port": port, "world_size": world_size, "rank": rank, **options}
        await self._object("POST", "/admin/v1/groups/join", body)

    async def leave_group(self, name: str) -> None:
        await self._object("POST", "/admin/v1/groups/leave", {"name": name})

    async def receive(
        self,
        version: int,
        group: str,
        tensors: Sequence[tuple[str, str, Sequence[int]]],
        buffer_bytes: int | None = None,
    ) -> int:
        """Has the server take tensors (name, number format, shape) that are broadcast in a group; see ``fill``."""
        described = [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in tensors]
        body = {"version": version, "group": group, "tensors": described, "buffer_bytes": buffer_bytes}
        return _missing(await self._object("POST", "/admin/v1/target/receive", body))

    async def finish_update(
        self,
        version: int,
        keep_rest: bool = False,
        checksums: Mapping[str, str] | None = None,
        lora_scale: float | None = None,
    ) -> Answer:
        """Serves with the new weights from now on: ``{"version", "prepare_seconds", "pause_seconds"}``."""
        body = {"version": version, "keep_rest": keep_rest, "checksums": checksums, "lora_scale": lora_scale}
        return await self._object("POST", "/admin/v1/target/finish", body)

    async def cancel_update(self, version: int) -> None:
        """Gives an update up."""
        await self._object("POST", "/admin/v1/target/cancel", {"version": version})

    async def checksums(self) -> dict[str, str]:
        """SHA-256 of every tensor that serves, in the number format of the weights."""
        found: dict[str, str] = (await self._object("GET", "/admin/v1/target/checksums"))["checksums"]
        return found

    async def traffic(self) -> dict[str, Answer]:
        """What is kept, by tenant."""
        tenants: dict[str, Answer] = (await self._object("GET", "/admin/v1/traffic"))["tenants"]
        return tenants

    async def purge_traffic(self, tenant: str | None) -> int:
        """Deletes everything kept of a tenant, or of all if None; how many samples that were."""
        body = {"all": True} if tenant is None else {"tenant": tenant}
        purged: int = (await self._object("POST", "/admin/v1/traffic/purge", body))["purged_samples"]
        return purged


def _missing(answer: Answer) -> int:
    missing: int = answer["missing"]
    return missing
