"""SkyRL's own client against a server: every call, and an interrupted rollout. Run by test_skyrl.py.

Arguments: the address, the name of the model, a folder with a LoRA, a segment of shared memory with other weights as a
safetensors file, and its size.
"""

from __future__ import annotations

import asyncio
import json
import sys
import typing
from typing import Any

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict  # type: ignore[assignment]  # SkyRL is for Python 3.12, where they are one

from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient  # noqa: E402

PROMPT = [504, 2365, 6354, 16438]
LONG = {"max_tokens": 12000, "temperature": 1.0, "seed": 4, "ignore_eos": True, "logprobs": 0}


async def rollout(client: RemoteInferenceClient, url: str, segment: str, size: int) -> dict[str, Any]:
    """Frozen in the middle, while other weights come."""
    asked = {"prompts": None, "prompt_token_ids": [PROMPT], "sampling_params": LONG, "session_ids": ["one"]}
    running = asyncio.create_task(
        client.generate({**asked, "mm_features": None, "cache_salt": "v0"}, client.model_name)
    )
    await asyncio.sleep(1.0)
    await client.pause()
    frozen = not running.done()
    await client._call_all_servers("/start_weight_update")
    await client.update_named_weights({"shared_memory": segment, "num_bytes": size})
    await client._call_all_servers("/finish_weight_update", {"weight_version": "v1"})
    await client.resume()
    output = await running
    return {
        "frozen": frozen,
        "ids": output["response_ids"][0],
        "logprobs": output["response_logprobs"][0],
        "reason": output["stop_reasons"][0],
    }


async def main() -> None:
    url, model, lora, segment, size = sys.argv[1:]
    client = RemoteInferenceClient(proxy_url=url, server_urls=[url], data_parallel_size=1, model_name=model)
    found: dict[str, Any] = {"world_size": await client.get_world_size()}
    found["rollout"] = await rollout(client, url, segment, int(size))
    chunks = [{"type": "encoded_text", "tokens": PROMPT}]
    asked = {"prompt": {"chunks": chunks}, "num_samples": 2, "sampling_params": {"max_tokens": 4, "temperature": 0.0}}
    asked |= {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2, "session_id": "s"}
    found["sample"] = await client.sample({"json": asked})
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": model, "messages": messages, "max_tokens": 3, "session_id": "s"}
    found["chat"] = await client.chat_completion({"json": body})
    found["render"] = await client.render_chat_completion({"json": body})
    found["completion"] = await client.completion({"json": {"model": model, "prompt": "Hi", "max_tokens": 3}})
    found["tokens"] = await client.tokenize(["Hello there"])
    found["texts"] = await client.detokenize(found["tokens"])
    await client.finish_session("s")
    found["slept"] = await client.sleep(level=1)
    await client.wake_up(tags=["weights"])
    await client.wake_up(tags=["kv_cache"])
    found["reset"] = await client.reset_prefix_cache(reset_running_requests=True)
    await client.load_lora_adapter("skyrl-lora", lora)
    found["lora"] = await client.completion({"json": {"model": "skyrl-lora", "prompt": "Hi", "max_tokens": 3}})
    await client.unload_lora_adapter("skyrl-lora")
    await client.start_weight_update()
    await client.finish_weight_update()
    await client.teardown()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
