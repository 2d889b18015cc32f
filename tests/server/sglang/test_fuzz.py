"""Random bodies to every route of the dialect: no 5xx, no hang, and the server answers as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from slipstream.server.sglang.control_schema import BODIES
from slipstream.server.sglang.schema import SGLangGenerateBody, SGLangSamplingParams

extremes: list[Any] = [2**31, 2**63, 2**64, -(2**63), 10**40, 1e308, 5e-324, -0.0, "\0", "a" * 5000, "🦜", "\r\nx: y"]
plain = st.none() | st.booleans() | st.integers(-3, 60_000) | st.floats(-2, 3) | st.text(max_size=12)
plain |= st.sampled_from(extremes)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
tokens = st.integers(0, 49_151)
ids = st.lists(tokens, min_size=1, max_size=5)
text = st.text(max_size=20)
flag = st.none() | st.booleans()


def one_or_many(one: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return one | st.lists(one, max_size=3)


valid_params: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.sampled_from([-1, 0, 1, 5, 2**30]),
    "min_p": st.floats(0, 1),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "logit_bias": st.dictionaries(tokens.map(str), st.floats(-100, 100), max_size=2),
    "sampling_seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=2), max_size=2),
    "stop_token_ids": st.lists(tokens, max_size=2),
    "min_new_tokens": st.integers(0, 3),
    "no_stop_trim": flag,
    "ignore_eos": flag,
    "skip_special_tokens": flag,
    "stream_interval": st.integers(1, 3),
    "regex": st.sampled_from(["a+", "[0-9]{2}", "(", ""]),
    "json_schema": st.sampled_from(["{}", "$$ANY$$", '{"type": "integer"}', "["]),
    "choice": st.lists(st.sampled_from(["a", "b"]), max_size=2),
}
params = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(0, 4), "n": st.sampled_from([1, 1, 2])}, optional=valid_params
)
valid = st.fixed_dictionaries(
    {"sampling_params": one_or_many(params)},
    optional={
        "rid": one_or_many(st.text(min_size=1, max_size=5)),
        "return_logprob": one_or_many(st.booleans()),
        "logprob_start_len": one_or_many(st.integers(-1, 6)),
        "top_logprobs_num": one_or_many(st.integers(0, 3)),
        "token_ids_logprob": ids | st.lists(ids, max_size=3),
        "return_text_in_logprobs": flag,
        "logprobs_mode": st.sampled_from(["raw", "processed"]),
        "stream": flag,
        "incremental_streaming_output": flag,
        "return_prompt_token_ids": flag,
        "cache_salt": one_or_many(text),
        "extra_key": one_or_many(text),
    },
)
prompts = st.one_of(
    one_or_many(text).map(lambda found: {"text": found}),
    (ids | st.lists(ids, max_size=3)).map(lambda found: {"input_ids": found}),
)
FIELDS = sorted(SGLangGenerateBody.model_fields.keys() - {"sampling_params", "text", "input_ids"})
PARAMS = sorted(SGLangSamplingParams.model_fields.keys() - {"max_new_tokens", "n"})
anything = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=2)
any_params = st.dictionaries(st.sampled_from(PARAMS) | st.text(max_size=8), values, max_size=2)


def mixed(body: Any, prompt: Any, other: Any, other_params: Any) -> Any:
    body = body | prompt | other
    sampling = body["sampling_params"]
    return body | {"sampling_params": sampling | other_params if isinstance(sampling, dict) else sampling}


nothing: st.SearchStrategy[Any] = st.just({})
bodies = st.one_of(
    st.builds(mixed, valid, prompts, nothing, nothing),
    st.builds(mixed, valid, prompts, anything, any_params),
    values,
)


def post(server: Any, route: str, body: Any) -> tuple[int, dict[str, str], bytes]:
    found: tuple[int, dict[str, str], bytes] = server.request(
        "POST", route, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return found


@settings(max_examples=100)
@given(body=bodies)
def test_no_body_breaks_generation(server: Any, body: Any) -> None:
    status, headers, reply = post(server, "/generate", body)  # this holds the answer against the OpenAPI document, too
    event(str(status))
    assert status in (200, 400), reply
    if status == 400:
        assert json.loads(reply)["error"]["message"]
        return
    if headers["content-type"].startswith("text/event-stream"):
        assert reply.endswith(b"data: [DONE]\n\n") and b'"error"' not in reply
        return
    answers = json.loads(reply)
    for answer in answers if isinstance(answers, list) else [answers]:
        meta = answer["meta_info"]
        assert meta["completion_tokens"] == len(answer["output_ids"])
        assert meta["finish_reason"]["type"] in ("stop", "length")
        for name in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
            assert len(meta.get(name, answer["output_ids"])) == len(answer["output_ids"])


ROUTES = [
    *("/pause_generation", "/continue_generation", "/abort_request", "/flush_cache", "/begin_weight_update"),
    *("/end_weight_update", "/release_memory_occupation", "/resume_memory_occupation", "/get_weights_by_name"),
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_distributed"),
    *("/destroy_weights_update_group", "/weights_checker", "/init_weights_update_group"),
    *("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"),
]
NAMES = sorted({name for body in BODIES for name in body.model_fields} - {"master_address", "world_size"})
known = {
    "mode": st.sampled_from(["abort", "retract", "in_place"]),
    "tags": st.lists(st.sampled_from(["weights", "kv_cache", "cuda_graph"]), max_size=3),
    "names": st.lists(text, max_size=2),
    "dtypes": st.lists(st.sampled_from(["float32", "torch.bfloat16", "x"]), max_size=2),
    "shapes": st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=2),
    "serialized_named_tensors": st.sampled_from([[""], ["gASVBQAAAAAAAABLAS4="], ["x"], ["AAAA"], []]),
    "action": st.sampled_from(["snapshot", "compare", "checksum"]),
    "model_path": st.sampled_from(["/nowhere", "/dev/null", "\n"]),
    "name": st.sampled_from(["model.norm.weight", "model.embed_tokens.weight", "x"]),
    "truncate_size": st.integers(1, 3),
}
control_bodies = st.one_of(
    st.fixed_dictionaries({}, optional=known), st.dictionaries(st.sampled_from(NAMES), values, max_size=3), values
)


@pytest.fixture(scope="module")
def controlled(start_local: Callable[..., Any]) -> Any:
    return start_local()


@settings(max_examples=50)
@given(route=st.sampled_from(ROUTES), body=control_bodies)
def test_no_body_breaks_control(controlled: Any, route: str, body: Any) -> None:
    status, _, reply = post(controlled, route, body)
    event(f"{route} {status}")
    assert status in (200, 400, 409), reply


def test_the_server_serves_on(controlled: Any) -> None:
    """Whatever the bodies before have left behind."""
    for path in ("/resume_memory_occupation", "/continue_generation"):
        assert post(controlled, path, {})[0] == 200
    status, _, reply = post(controlled, "/generate", {"text": "x", "sampling_params": {"max_new_tokens": 2}})
    assert status == 200, reply
