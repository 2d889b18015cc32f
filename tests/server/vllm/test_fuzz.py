"""Random requests to the routes of vLLM's dialect: no 500, no hang, and nothing left behind."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from slipstream.server.vllm import control_schema, schema

tokens = st.integers(0, 49_151)
extremes: list[Any] = [2**31, 2**63, -(2**63), 10**40, 1e308, "\0", "../../x", "a" * 3000, "🦜", "127.0.0.1", "gloo"]
plain = st.none() | st.booleans() | st.integers(-3, 60_000) | st.floats(-2, 3) | st.text(max_size=12)
plain |= st.sampled_from(extremes)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sampling: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 60_000),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logprobs": st.none() | st.integers(0, 3),
    "prompt_logprobs": st.integers(0, 3),
    "stop": st.text(min_size=1, max_size=3),
    "stop_token_ids": st.lists(tokens, max_size=3),
    "min_tokens": st.integers(0, 3),
    "ignore_eos": st.booleans(),
    "bad_words": st.lists(st.text(min_size=1, max_size=3), max_size=2),
    "skip_special_tokens": st.booleans(),
    "allowed_token_ids": st.lists(tokens, min_size=1, max_size=4),
}
amount = {"max_tokens": st.integers(0, 4), "n": st.sampled_from([None, 1, 2, 3])}
params = st.fixed_dictionaries(amount, optional=sampling)
prompts = st.lists(tokens, min_size=1, max_size=5)
conversation = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=3,
)
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/inference/v1/generate": st.fixed_dictionaries(
        {"token_ids": prompts, "sampling_params": params},
        optional={
            "stream": st.booleans(),
            "output_mode": st.sampled_from(["tokens", "text"]),
            "return_token_ids": st.booleans(),
            "cache_salt": st.text(min_size=1, max_size=3),
        },
    ),
    "/v1/chat/completions/render": st.fixed_dictionaries({"messages": conversation}, optional=sampling),
    "/generate/": st.fixed_dictionaries(
        amount | {"prompts": st.lists(prompts, min_size=1, max_size=3) | st.lists(st.text(max_size=9), max_size=3)},
        optional=sampling | {"generation_kwargs": st.fixed_dictionaries({}, optional=sampling)},
    ),
    "/chat/": st.fixed_dictionaries(
        amount | {"messages": st.lists(conversation, min_size=1, max_size=2)}, optional=sampling
    ),
    "/get_sequence_logprobs/": st.lists(prompts, min_size=1, max_size=3).flatmap(
        lambda sequences: st.fixed_dictionaries(
            {
                "sequences": st.just(sequences),
                "prompt_lengths": st.tuples(*(st.integers(0, len(one)) for one in sequences)),
                "top_logprobs": st.integers(1, 4),
                "response_format": st.sampled_from([None, "json", "binary"]),
            }
        )
    ),
}
FIELDS = sorted(
    {name for body in (schema.VllmSampling, schema.TokensInBody, schema.TrlChatBody) for name in body.model_fields}
)
CONTROLS = [
    *("/abort_requests", "/inference/v1/abort_requests", "/reset_prefix_cache", "/update_weights"),
    *("/finish_weight_update", "/weight_checker", "/collective_rpc", "/init_weight_transfer_engine"),
    *("/v1/load_lora_adapter", "/skyrl/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/areal_update_weights"),
    *("/areal_update_weights_lora", "/areal_set_update_weight_meta", "/areal_update_weights_xccl"),
    *("/areal_set_update_weight_meta_lora", "/areal_update_weights_lora_xccl", "/update_named_param/"),
    *("/batch_update_named_params/", "/reset_prefix_cache/", "/areal_continue_generation", "/wake_up", "/resume"),
]
CONTROL_FIELDS = sorted({name for body in control_schema.BODIES for name in body.model_fields})
short_lists = st.lists(st.sampled_from(["model.norm.weight", "x", "float32", "torch.bfloat16", ""]), max_size=2)
control_values = values | short_lists | st.lists(st.lists(st.integers(0, 5), max_size=2), max_size=2)
nested = st.dictionaries(st.sampled_from(CONTROL_FIELDS), control_values, max_size=4)
control_bodies = st.dictionaries(st.sampled_from(CONTROL_FIELDS), control_values | nested, max_size=5)


def send(server: Any, path: str, body: Any) -> int:
    status: int = server.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})[0]
    event(f"{path}: {status}")
    return status


@settings(max_examples=60)
@given(data=st.data(), other=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=2))
def test_generating_routes(server: Any, data: st.DataObject, other: dict[str, Any]) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    other = {name: value for name, value in other.items() if name not in amount}
    status = send(server, path, data.draw(BODIES[path]) | other)
    assert status in (200, 400, 404, 429), status


@settings(max_examples=80)
@given(path=st.sampled_from(CONTROLS), body=control_bodies)
def test_control_routes(trained_server: Any, path: str, body: dict[str, Any]) -> None:
    """But for those that wait for a trainer, as they should."""
    told = body.get("init_info")
    if isinstance(told, dict):
        told.pop("master_port", None)
    status = send(trained_server, path, body)
    assert status in (200, 400, 404, 409, 413), status


def test_they_leave_nothing_behind(server: Any, trained_server: Any) -> None:
    for each in (server, trained_server):
        each.wait_until_idle()
        assert each.complete([504, 2365], max_tokens=2)["choices"]
    assert trained_server.get("/is_paused")[1] == {"is_paused": False}
