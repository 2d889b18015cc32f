"""verl's own server manager and client with this project's replica: a rollout that other weights interrupt.

Run by test_verl.py. Arguments: the address of a server, a folder with other weights, how many tokens to generate.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder

import ray
import verl
from omegaconf import OmegaConf
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerManager

from slipstream.clients.adapters.verl import NAME, register

PROMPT = [504, 2365, 6354, 16438]


async def main() -> None:
    address, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    register()
    # As few processes as Ray can do with: the test's machine may be small.
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    shipped = Path(verl.__file__).parent / "trainer" / "config" / "rollout" / "rollout.yaml"
    given = {
        "name": NAME,
        "nnodes": 1,
        "n_gpus_per_node": 1,
        "tensor_model_parallel_size": 1,
        "response_length": count,
        "prompt_length": len(PROMPT),
        "engine_kwargs": {NAME: {"addresses": [address]}},
    }
    rollout = OmegaConf.merge(OmegaConf.load(shipped), given)
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout, "model": {}}})
    manager = await LLMServerManager.create(config)
    [replica] = manager.get_replicas()
    # verl's client takes a version that is not told for one that is not known yet.
    await replica.servers[0].set_global_steps.remote(0)
    client = manager.get_client(FullyAsyncLLMServerClient)
    params = {"temperature": 1.0, "top_p": 1.0, "logprobs": True, "ignore_eos": True}
    asked: Any = {"prompt_ids": PROMPT, "sampling_params": params}
    # The first call starts Ray's actors, which may take longer than the rollout.
    await client.generate("zero", **asked | {"sampling_params": params | {"max_tokens": 1}})
    rolling = asyncio.create_task(client.generate("one", **asked))
    await asyncio.sleep(1.0)
    await replica.abort_all_requests()
    await replica.servers[0].update_weights_from_disk.remote(folder, 7)
    late = asyncio.create_task(client.generate("two", **asked | {"sampling_params": params | {"max_tokens": 4}}))
    await asyncio.sleep(1.5)
    waits = not late.done()
    await replica.resume_generation()
    whole, after = await rolling, await late
    await replica.abort_all_requests(reject_request=True)
    refused = await replica.servers[0].generate.remote(PROMPT, params, "three")
    await replica.resume_generation()
    await replica.sleep()
    await replica.wake_up()
    await replica.release_kv_cache()
    await replica.resume_kv_cache()
    await replica.clear_kv_cache()
    await replica.servers[0].set_global_steps.remote(8)
    again = await client.generate("four", **asked | {"sampling_params": params | {"max_tokens": 4}})
    print(
        json.dumps(
            {
                "tokens": whole.token_ids,
                "logprobs": whole.log_probs,
                "steps": [whole.extra_fields["min_global_steps"], whole.extra_fields["max_global_steps"]],
                "reason": whole.stop_reason,
                "waits": waits,
                "after": [len(after.token_ids), after.extra_fields["global_steps"]],
                "refused": [refused.token_ids, refused.stop_reason],
                "again": [len(again.token_ids), again.extra_fields["global_steps"]],
            }
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
