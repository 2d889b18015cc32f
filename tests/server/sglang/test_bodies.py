"""Bodies as trainers and routers send them, and what is refused of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from slipstream.server.sglang.control_schema import BODIES as CONTROL_BODIES
from slipstream.server.sglang.schema import SGLangGenerateBody, SGLangSamplingParams
from tests.server.sglang.calls import PROMPT, TEXT, generate, refused

BODIES = {
    "slime": {
        "input_ids": PROMPT,
        "sampling_params": {
            **{
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "max_new_tokens": 4,
                "stop": None,
                "stop_token_ids": None,
            },
            **{"skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False},
            "sampling_seed": 42,
        },
        "return_logprob": True,
    },
    "areal": {
        "input_ids": PROMPT,
        "image_data": [],
        "sampling_params": {
            **{"top_p": 1.0, "top_k": 100_000_000, "max_new_tokens": 4, "temperature": 1.0, "stop_token_ids": [0, 2]},
            **{"ignore_eos": False, "skip_special_tokens": True, "frequency_penalty": 0.0},
        },
        "return_logprob": True,
        "stream": False,
    },
    "router": {
        "text": TEXT,
        "sampling_params": {"max_new_tokens": 4, "no_stop_trim": False, "custom_params": None, "beam_width": 1},
        **{"return_logprob": False, "return_hidden_states": False, "stream": False, "log_metrics": True},
        **{"lora_path": None, "session_params": None, "bootstrap_room": None, "data_parallel_rank": 0},
        **{"routing_key": "k", "session_id": "s", "custom_labels": {"a": "b"}, "background": False},
    },
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_as_they_are_sent(server: Any, name: str) -> None:
    status, answer = server.post("/generate", BODIES[name])
    assert status == 200, answer
    assert len(answer["output_ids"]) <= 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"sampling_params": {"json_schema": "["}}, "sampling_params.json_schema"),
        ({"sampling_params": {"regex": "a+", "choice": ["a"]}}, "sampling_params.choice"),
        ({"sampling_params": {"regex": "(a"}}, "sampling_params.regex"),
        ({"sampling_params": {"regex": "a+", "ignore_eos": True}}, "sampling_params.ignore_eos"),
        ({"sampling_params": {"structural_tag": "x"}}, "sampling_params.structural_tag"),
        ({"sampling_params": {"stop_regex": "a+"}}, "sampling_params.stop_regex"),
        ({"sampling_params": {"custom_params": {"return_top_p_token_ids": True}}}, "sampling_params.custom_params"),
        ({"sampling_params": {"beam_width": 2}}, "sampling_params.beam_width"),
        ({"sampling_params": {"temprature": 1}}, "sampling_params.temprature"),
        ({"sampling_params": {"top_k": -2}}, "sampling_params.top_k"),
        ({"return_routed_experts": True}, "return_routed_experts"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"lora_path": "x"}, "lora_path"),
        ({"image_data": ["x"]}, "image_data"),
        ({"image_data": [None, ["x"]]}, "image_data"),
        ({"text": "", "input_ids": None}, "text"),
        ({"routed_dp_rank": 1}, "routed_dp_rank"),
        ({"text": "both"}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [60_000]}, "input_ids"),
        ({"input_ids": None}, "text"),
        ({"top_logprobs_num": 21, "return_logprob": True}, "top_logprobs_num"),
        ({"priority": 1}, "priority"),
    ],
)
def test_what_is_refused(server: Any, body: dict[str, Any], param: str) -> None:
    error = refused(server, **body)
    assert error["param"] == param and error["message"]


def test_structured_answers(server: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    sampling = {"max_new_tokens": 64, "temperature": 1, "sampling_seed": 2}
    for given in (schema, json.dumps(schema)):
        [found] = generate(server, [PROMPT], sampling={**sampling, "json_schema": given})
        assert set(json.loads(found["text"])) == {"a"}
        assert found["meta_info"]["finish_reason"]["type"] == "stop"
    said = generate(server, sampling={**sampling, "json_schema": {}})["text"]
    assert said[0] in '{["-0123456789tfn', "any JSON"
    assert generate(server, sampling={**sampling, "choice": ["red", "green"]})["text"] in ("red", "green")
    assert re.fullmatch("[ab]{3}", generate(server, sampling={**sampling, "regex": "[ab]{3}"})["text"])
    assert generate(server, sampling={**sampling, "ebnf": 'root ::= "yes" | "no"'})["text"] in ("yes", "no")
    answers = generate(server, [PROMPT] * 2, sampling_params=[{"regex": "[ab]{3}"}, {"regex": "[ab]{3}", "n": 1}])
    assert all(re.fullmatch("[ab]{3}", answer["text"]) for answer in answers)
    error = refused(server, input_ids=[PROMPT] * 2, sampling_params=[{"regex": "a"}, {}])
    assert error["code"] == "unsupported_parameter"


def test_fields_nobody_knows(server: Any) -> None:
    generate(server, routed_experts_dtype="uint8")
    server.wait_until_logged("ignored unknown request field routed_experts_dtype")


def test_less_urgent_and_not_kept(server: Any) -> None:
    assert generate(server, priority=-3, no_logs=True, cache_salt="s")["output_ids"] == generate(server)["output_ids"]
    generate(server, [450] * 40, cache_salt="one")
    assert generate(server, [450] * 40, cache_salt="two")["meta_info"]["cached_tokens"] == 0
    assert generate(server, [450] * 40, cache_salt="one", extra_key="k")["meta_info"]["cached_tokens"] == 0
    assert generate(server, [450] * 40, cache_salt="one")["meta_info"]["cached_tokens"] > 0


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/sglang.md").read_text()
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    bodies = (SGLangGenerateBody, SGLangSamplingParams, *CONTROL_BODIES)
    fields = {name for body in bodies for name in body.model_fields}
    unnamed = {name for name in fields - words if not name.startswith(("bootstrap_", "mm_", "return_flat_"))}
    assert len(fields) > 100
    assert unnamed == OF_IMAGES | OF_SCORING


OF_IMAGES = {"video_config", "images_config", "decode_tp_size", "disagg_prefill_dp_rank", "sampling_logprobs_mode"}
OF_SCORING = {"multi_item_delimiter_indices", "token_indices_to_pool"}
"""Refused, and of kinds that the page names together."""


def test_fields_that_routers_add_to_the_other_dialect(server: Any) -> None:
    added = {"return_hidden_states": False, "separate_reasoning": True, "stream_reasoning": True}
    added["include_reasoning"] = True
    body = {"prompt": TEXT, "max_tokens": 2, "temperature": 0}
    assert server.complete(TEXT, max_tokens=2, **added) | IGNORED == server.complete(TEXT, max_tokens=2) | IGNORED
    server.chat(max_tokens=1, **added)
    for name, value in added.items():
        status, answer = server.post("/v1/completions", body | {name: not value})
        assert status == 400 and answer["error"]["param"] == name


IGNORED = {"id": "", "created": 0}
