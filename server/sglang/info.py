"""What trainers and routers ask a server about itself."""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from slipstream.server.errors import InvalidRequestError
from slipstream.server.service import Service

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
GIB = 2**30


def model_info(service: Service) -> dict[str, Any]:
    model = service.engine_config.model
    return {
        "model_path": model,
        "served_model_name": service.model_names[0],
        "tokenizer_path": model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": service.control.weight_version,
        "load_format": "auto",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": service.engine.ready.model_type,
    }


def server_info(service: Service) -> dict[str, Any]:
    """What a server of one process on one device is, in the words of those who ask."""
    ready, config = service.engine.ready, service.config
    return {
        **model_info(service),
        "host": config.host,
        "port": config.port,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "num_gpus": 1,
        "nnodes": 1,
        "node_rank": 0,
        "base_gpu_id": 0,
        "gpu_id_step": 1,
        "disaggregation_bootstrap_port": None,
        "encoder_only": False,
        "enable_memory_saver": False,
        "enable_return_routed_experts": False,
        "incremental_streaming_output": False,
        "stream_interval": service.config.stream_interval,
        "speculative_algorithm": None if service.engine_config.speculation == "off" else "AUTO",
        "dtype": ready.dtype,
        "kv_cache_dtype": ready.kv_cache_dtype,
        "device": ready.device.partition(":")[0],
        "context_length": ready.max_model_len,
        "page_size": ready.block_size,
        "max_running_requests": service.engine_config.max_running,
        "max_total_num_tokens": ready.num_blocks * ready.block_size,
        "internal_states": [
            {
                "weight_version": service.control.weight_version,
                "memory_usage": memory(service),
                "effective_max_running_requests_per_dp": service.engine_config.max_running,
            }
        ],
        "status": "ready",
        "version": version("slipstream"),
        "frontend": "slipstream",
        # Trainers that speak the other dialect ask the same path.
        "vllm_config": {
            "weight_transfer_config": {"backend": "nccl" if ready.device.startswith("cuda") else "gloo"},
            "model_config": {
                "model": service.engine_config.model,
                "max_model_len": ready.max_model_len,
                "dtype": ready.dtype,
                "logprobs_mode": f"{config.logprobs_mode}_logprobs",
            },
            "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        },
        "vllm_env": {},
        "system_env": {},
    }


def memory(service: Service) -> dict[str, Any]:
    ready = service.engine.ready
    return {
        "weight_gb": round(ready.weights_bytes / GIB, 3),
        "kv_cache_gb": round(ready.kv_cache_bytes / GIB, 3),
        "graph_gb": 0.0,
        "token_capacity": ready.num_blocks * ready.block_size,
    }


def requests(service: Service) -> tuple[int, int]:
    """How many run and how many wait; both together are exact at any moment, so 0 means that nothing is left."""
    engine = service.engine
    running = min(engine.stats.num_running, engine.num_open)
    return running, engine.num_open - running


def loads(service: Service, include: Collection[str]) -> dict[str, Any]:
    """Raises InvalidRequestError for a section there is not."""
    if unknown := [name for name in include if name not in SECTIONS]:
        raise InvalidRequestError(
            f"include: {', '.join(SECTIONS)}, separated by commas, not {unknown[0][:60]!r}", param="include"
        )
    ready, stats = service.engine.ready, service.engine.stats
    running, waiting = requests(service)
    capacity = ready.num_blocks * ready.block_size
    used = stats.blocks_used * ready.block_size
    points = service.observer.points
    load: dict[str, Any] = {
        "timestamp": time.time(),
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_used_tokens": used,
        "num_total_tokens": used,
        "num_active_tokens": used,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": capacity,
        "max_running_requests": service.engine_config.max_running,
        "token_usage": round(used / capacity, 4) if capacity else 0.0,
        "gen_throughput": round(points[-1].tokens_per_second, 2) if points else 0.0,
        "cache_hit_rate": hit_rate(stats.prefix_cache_hits, stats.prefix_cache_queries),
        "utilization": round(running / service.engine_config.max_running, 4),
        "total_prefill_uncached_tokens": stats.prompt_tokens - stats.prefix_cache_hits,
    }
    everything = not include or "all" in include
    if everything or "memory" in include:
        load["memory"] = memory(service)
    if everything or "spec" in include:
        drafted = sum(drafter.draft_tokens for drafter in stats.drafters)
        accepted = sum(drafter.accepted_tokens for drafter in stats.drafters)
        load["speculative"] = {
            "accept_length": service.observer.accept_length,
            "accept_rate": hit_rate(accepted, drafted),
        }
    if everything or "queues" in include:
        load["queues"] = {"waiting": waiting, "grammar": 0, "prealloc_ready": 0}
    return load


def hit_rate(hits: int, asked: int) -> float:
    return round(hits / asked, 4) if asked else 0.0


def loads_answer(service: Service, include: Collection[str]) -> dict[str, Any]:
    return {
        "timestamp": datetime.now(UTC).isoformat(),
        "version": version("slipstream"),
        "accelerator": service.engine.ready.device,
        "num_accelerators": 1,
        "loads": [loads(service, include)],
    }


def old_load(service: Service) -> list[dict[str, Any]]:
    """What routers of older versions ask for."""
    running, waiting = requests(service)
    tokens = service.engine.stats.blocks_used * service.engine.ready.block_size
    return [{"dp_rank": 0, "num_reqs": running + waiting, "num_waiting_reqs": waiting, "num_tokens": tokens}]
