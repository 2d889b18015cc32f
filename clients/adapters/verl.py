"""verl with Slipstream servers that run already: a rollout replica whose Ray actor passes on what verl asks of it.

``register()`` before verl's trainer starts its servers; then ``actor_rollout_ref.rollout.name=slipstream``, and the
servers' addresses, one per replica, as ``actor_rollout_ref.rollout.engine_kwargs.slipstream.addresses``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any
from urllib.parse import quote

from slipstream.clients.http import HttpClient

NAME = "slipstream"
REFUSED = ("image_data", "video_data", "audio_data")


class _Calls(HttpClient):
    async def post(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        return await self._object("POST", path, body)


def register() -> None:
    """Lets verl find this replica under the name ``slipstream``. Raises ImportError without verl."""
    import_module("verl.workers.rollout.replica").RolloutReplicaRegistry.register(NAME, replica_class)


class SlipstreamServer:
    """What verl calls on a rollout server, for one Slipstream server. Runs as an asynchronous Ray actor.

    Errors of the server come as the client's own (APIError, UnreachableError).
    """

    def __init__(self, address: str, api_key: str | None = None, response_length: int = 0) -> None:
        """``api_key`` opens control, too. ``response_length``: most tokens of an answer that does not say; 0: what the
        context has room for."""
        self._address, self._key = address, api_key
        self._response_length = response_length
        self._calls: _Calls | None = None
        self._open: set[str] = set()
        """Ids of requests under way."""
        self._rejects = False
        self.global_steps: int | None = None
        """What the trainer says its weights are; told where the server's own name of them is no number."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        priority: int = 0,
        **more: Any,
    ) -> Any:
        """A TokenOutput; its ``global_steps`` are the version of the weights that sampled the last token.

        ``extra_fields["weight_versions"]`` says which weights sampled which tokens. Raises ValueError for images,
        videos and sounds.
        """
        if given := [name for name in REFUSED if more.get(name)]:
            raise ValueError(f"Slipstream's models take text only, and {', '.join(given)} was given")
        answer_type = import_module("verl.workers.rollout.replica").TokenOutput
        if self._rejects:
            return answer_type(token_ids=[], stop_reason="aborted", extra_fields={"global_steps": self.global_steps})
        params = dict(sampling_params)
        limit = params.pop("max_new_tokens", None) or self._response_length or None
        params.setdefault("max_tokens", limit)
        wants_logprobs = bool(params.pop("logprobs", False))
        asked = {"logprobs": 0} if wants_logprobs else {}
        body = {
            "token_ids": list(prompt_ids),
            "request_id": request_id,
            "sampling_params": params | asked,
            "priority": priority,
        }
        self._open.add(request_id)
        try:
            answer = await self._call("/inference/v1/generate", body)
        finally:
            self._open.discard(request_id)
        choice = answer["choices"][0]
        versions = choice["weight_versions"]
        last = versions[-1]["version"] if versions else ""
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        return answer_type(
            token_ids=choice["token_ids"],
            log_probs=[entry["logprob"] for entry in choice["logprobs"]["content"]] if wants_logprobs else None,
            stop_reason="aborted" if choice["finish_reason"] == "abort" else "completed",
            extra_fields={
                "global_steps": int(last) if last.isdecimal() else self.global_steps,
                "num_cached_tokens": details.get("cached_tokens"),
                "weight_versions": versions,
            },
        )

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """All end with the tokens they have, and no other begins until ``resume_generation``.

        Those that come meanwhile wait, or are aborted at once with ``reject_request``.
        """
        self._rejects = reject_request
        ended = sorted(self._open)
        await self._call(f"/pause?mode=abort&clear_cache={str(reset_prefix_cache).lower()}")
        return {"aborted_count": len(ended), "request_ids": ended}

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        """Ends one request with the tokens it has."""
        was_open = request_id in self._open
        await self._call("/abort_requests", {"request_ids": [request_id]})
        return {"aborted": was_open, "request_id": request_id}

    async def resume_generation(self) -> None:
        self._rejects = False
        await self._call("/resume")

    async def sleep(self) -> None:
        await self._call("/sleep?level=1")

    async def wake_up(self, tags: Sequence[str] = ()) -> None:
        await self._call("/wake_up?" + "&".join(f"tags={quote(tag)}" for tag in tags))

    async def clear_kv_cache(self) -> None:
        await self._call("/reset_prefix_cache")

    async def release_kv_cache(self) -> None:
        await self._call("/release_kv_cache_memory")

    async def resume_kv_cache(self) -> None:
        await self.wake_up(["kv_cache"])

    async def set_global_steps(self, global_steps: int) -> None:
        """Calls the weights that serve so."""
        self.global_steps = global_steps
        await self._call("/update_weight_version", {"new_version": str(global_steps), "abort_all_requests": False})

    async def update_weights_from_disk(self, folder: str, global_steps: int) -> None:
        """The server reads the weights in a folder of its machine, and calls them so. A pause goes on."""
        body = {"model_path": folder, "weight_version": str(global_steps), "keep_pause": True}
        await self._call("/update_weights_from_disk", body)
        self.global_steps = global_steps

    async def start_profile(self, **settings: Any) -> None:
        """Nothing: see the server's own profiler."""

    async def stop_profile(self) -> None:
        """Nothing."""

    async def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if self._calls is None:  # needs the loop in which the actor's calls run
            self._calls = _Calls(self._address, self._key)
        return await self._calls.post(path, body)


@cache
def replica_class() -> Any:
    """The class of replicas, which is derived from verl's."""
    ray: Any = import_module("ray")
    base: Any = import_module("verl.workers.rollout.replica")

    class SlipstreamReplica(base.RolloutReplica):  # type: ignore[misc]
        """One server that runs already. It takes none of Ray's GPUs: the server has its own."""

        async def init_standalone(self) -> None:
            self.rollout_mode = base.RolloutMode.STANDALONE
            await self.launch_servers()

        async def launch_servers(self) -> None:
            given = dict(self.config.engine_kwargs.get(NAME) or {})
            addresses = list(given.get("addresses") or [])
            if self.replica_rank >= len(addresses):
                raise ValueError(
                    f"rollout.engine_kwargs.{NAME}.addresses has {len(addresses)} servers, and this is replica number "
                    f"{self.replica_rank + 1}: name one server per replica, as http://HOST:PORT"
                )
            address = addresses[self.replica_rank]
            actor = ray.remote(SlipstreamServer).options(max_concurrency=self.max_concurrency)
            server = actor.remote(address, given.get("api_key"), self.config.response_length)
            self.servers, self._server_handle = [server], server
            self._server_address = address.removeprefix("http://")

    return SlipstreamReplica
