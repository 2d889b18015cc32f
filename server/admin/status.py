"""What the dashboard shows, in one answer; without a registry it has everything but the evolution."""

from __future__ import annotations

import time
from dataclasses import astuple
from importlib.metadata import version
from typing import Any

from msgspec.structs import asdict

from slipstream.server.service import Service


async def status(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = {
        "server": {
            "version": version("slipstream"),
            "models": service.model_names,
            "phase": service.phase,
            "health": service.health()[1],
            "time": time.time(),
            "started": time.time() - (time.monotonic() - service.began),
        },
        "requests": None,
        "points": [astuple(point) for point in service.observer.points],
        "accept_length": service.observer.accept_length,
        "traffic": {"log": service.traffic.traffic_log, "folder": service.traffic.traffic_folder},
        "drafters": [],
        "speculation_steps": {},
        "evolution": None,
    }
    if not service.is_loaded:
        return found
    ready, stats = service.engine.ready, service.engine.stats
    found["server"] |= {
        "device": ready.device,
        "dtype": ready.dtype,
        "kv_cache_dtype": ready.kv_cache_dtype,
        "weights": ready.weights,
        "weights_because": ready.weights_because,
        "kernels": ready.kernels,
        "target_lineage": service.engine_config.target_lineage,
        "target_version": stats.target_version,
        "weight_version": service.control.weight_version,
        "paused": stats.is_paused,
        "released": stats.released,
        "max_model_len": ready.max_model_len,
        "speculation": service.engine_config.speculation,
    }
    found["server"]["engine_restarts"] = service.supervisor.restarts
    found["requests"] = {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "generation_tokens": stats.generation_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "steps": stats.steps,
        "blocks_used": stats.blocks_used,
        "blocks_total": stats.blocks_total,
    }
    found["traffic"] |= asdict(stats.traffic)
    found["drafters"] = [
        asdict(drafter) | {"versions": [asdict(each) for each in drafter.versions]} for drafter in stats.drafters
    ]
    found["speculation_steps"] = stats.speculation_steps
    if service.evolution is not None:
        found["evolution"] = await service.evolution.status()
    return found
