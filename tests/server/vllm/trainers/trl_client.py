"""Every call of TRL's own client, against a server at the address given; what came back as JSON. Run by test_trl.py.

Arguments: the address, a safetensors file of the weights that serve, one of others, and a free port.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from slipstream.clients.adapters.trl import connect

connect()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trl.generation.vllm_client import VLLMClient  # noqa: E402

PROMPT = [504, 2365, 6354, 16438]


class Model(torch.nn.Module):
    """Parameters under names with dots, as models have them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}

    def named_parameters(self, *arguments: Any, **named: Any) -> Any:
        return iter(self._tensors.items())


def main() -> None:
    url, own, other, port = sys.argv[1:]
    client = VLLMClient(base_url=url, group_port=int(port), connection_timeout=600)
    greedy = {"temperature": 0.0, "max_tokens": 6, "generation_kwargs": {"ignore_eos": True}}
    found: dict[str, Any] = {"model": client.model, "world_size": client.get_world_size()}
    found["info"] = client.get_server_info()
    found["generate"] = client.generate([PROMPT, PROMPT[:2]], n=2, logprobs=3, **greedy)
    found["texts"] = client.generate(["Hello", "The capital"], **greedy)
    found["silent"] = client.generate([PROMPT], logprobs=None, **greedy)
    messages = [[{"role": "user", "content": text}] for text in ("Hi", "What is the capital of France?")]
    found["chat"] = client.chat(messages, n=2, logprobs=2, **greedy)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    found["tools"] = client.chat(messages, tools=[tool], chat_template_kwargs={"x": 1}, **greedy)
    found["scores"] = client.get_sequence_logprobs([PROMPT, PROMPT[:3]], [1, 2], top_logprobs=5)
    found["chunks"] = client.get_sequence_logprobs([PROMPT, PROMPT[:3]], [1, 2], top_logprobs=5, chunk_size=1)
    found["features"] = client.image_features([None, None])
    client.init_communicator(device="cpu")
    client.update_model_params(Model(load_file(other)))
    client.reset_prefix_cache()
    found["updated"] = client.generate([PROMPT], **greedy)
    with client.weight_update():
        for name, tensor in load_file(own).items():
            client.update_named_param(name, tensor)
    client.reset_prefix_cache()
    found["back"] = client.generate([PROMPT], **greedy)
    client.close_communicator()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
