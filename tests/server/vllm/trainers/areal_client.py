"""AReaL's own clients of SGLang's and vLLM's servers: a rollout that is interrupted while other weights come.

Run by test_areal.py. Arguments: ``sglang`` or ``vllm``, host and port of a server, a folder with other weights, how
many tokens to generate, and a folder for notes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import torch
from areal.api import ModelRequest, WeightUpdateMeta
from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig, NameResolveConfig
from areal.engine.sglang_remote import RemoteSGLangEngine
from areal.engine.vllm_remote import RemotevLLMEngine
from areal.utils import name_resolve, names

PROMPT = [504, 2365, 6354, 16438]
SCORED = 20


async def main() -> None:
    dialect, address, folder, count, notes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    name_resolve.reconfigure(NameResolveConfig(nfs_record_root=notes))
    config = InferenceEngineConfig(
        experiment_name="slipstream", trial_name=str(time.time()), backend=f"{dialect}:d1", pause_grace_period=0.0
    )
    engine = RemoteSGLangEngine(config) if dialect == "sglang" else RemotevLLMEngine(config)
    engine.initialize(addr=[address])
    engine.set_version(0)
    asked = GenerationHyperparameters(max_new_tokens=count, max_tokens=2 * count, temperature=1.0, ignore_eos=True)
    rollout = asyncio.create_task(engine.agenerate(ModelRequest(input_ids=PROMPT, gconfig=asked)))
    await asyncio.sleep(1.0)
    engine.pause()
    await asyncio.to_thread(engine.pause_generation)
    # The trainer says so when it has written them.
    written = names.update_weights_from_disk(config.experiment_name, config.trial_name, 0)
    name_resolve.add(written, str(time.time()), replace=True)
    meta = WeightUpdateMeta(type="disk", path=folder, clear_checkpoint_after_load=False)
    await asyncio.to_thread(engine.update_weights_from_disk(meta).result)
    engine.set_version(1)
    await asyncio.to_thread(engine.continue_generation)
    engine.resume()
    found = await rollout
    tokens = PROMPT + found.output_tokens
    mask = torch.zeros(1, len(tokens), dtype=torch.int32)
    mask[0, -SCORED:] = 1
    [scores] = await asyncio.to_thread(engine.compute_logp, [{"input_ids": torch.tensor([tokens]), "loss_mask": mask}])
    await asyncio.to_thread(engine.offload)
    await asyncio.to_thread(engine.onload)
    print(
        json.dumps(
            {
                "tokens": found.output_tokens,
                "logprobs": found.output_logprobs,
                "versions": found.output_versions,
                "reason": found.stop_reason,
                "scores": scores.flatten().tolist()[-SCORED:],
            }
        )
    )
    engine.destroy()


if __name__ == "__main__":
    asyncio.run(main())
