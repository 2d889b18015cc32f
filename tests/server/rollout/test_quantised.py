"""Servers that keep weights and cache in 8 bits: after an update each is what starts with those weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.clients.admin import AdminClient
from slipstream.clients.trainer import Trainer
from tests.server.vllm.sending import PROMPT, post, send_shared, with_weights

TOGETHER = [("q8", "fp8"), ("q4", "int8")]
FORMATS = [*TOGETHER, *(pytest.param(each, marks=pytest.mark.slow) for each in (("q8", "auto"), ("none", "fp8")))]
"""What the slow ones have alone, others have together."""
SAMPLED = {"max_new_tokens": 40, "temperature": 1.0, "sampling_seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module", params=FORMATS, ids="-".join)
def formats(request: pytest.FixtureRequest) -> dict[str, str]:
    quantize, cache = request.param
    return {"quantize": quantize, "kv_cache_dtype": cache, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tiny_model: Path, policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of version 1."""
    return with_weights(tiny_model, tmp_path_factory.mktemp("other") / "tiny-model", policy(1))


def seen(server: Any) -> dict[str, Any]:
    """Checksums of what serves, and a sample with its log-probabilities; those are the server's own scores of it."""
    body = {"input_ids": PROMPT, "sampling_params": SAMPLED, "return_logprob": True}
    told = post(server, "/generate", body)["meta_info"]["output_token_logprobs"]
    tokens = [token for _, token, *_ in told]
    body = {"input_ids": PROMPT + tokens, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    scored = post(server, "/generate", body | {"logprob_start_len": len(PROMPT)})["meta_info"]["input_token_logprobs"]
    assert [entry[0] for entry in told] == pytest.approx([entry[0] for entry in scored], abs=1e-4)
    checksums = post(server, "/weight_checker", {"action": "checksum"})["checksums"]
    return {"checksums": checksums, "tokens": tokens, "logprobs": [entry[0] for entry in told]}


async def test_after_an_update_it_is_what_starts_with_those_weights(
    start_local: Callable[..., Any], formats: dict[str, str], policy: Any, folder: Path, tiny_model: Path
) -> None:
    server, fresh = start_local(**formats), start_local(**formats, model=str(folder))
    before, expected = seen(server), seen(fresh)
    assert before["logprobs"] != expected["logprobs"]
    for send in (by_sglang_from_disk, by_vllm_from_memory):
        send(server, policy(1), folder)
        assert seen(server) == expected
        send(server, policy(0), tiny_model)
        assert seen(server) == before
    async with AdminClient(server.url) as admin:
        await Trainer(admin, first_version=7).push(policy(1))  # checks the checksums of what it has sent
    assert seen(server) == expected


def by_sglang_from_disk(server: Any, weights: Any, folder: Path) -> None:
    post(server, "/update_weights_from_disk", {"model_path": str(folder)})


def by_vllm_from_memory(server: Any, weights: Any, folder: Path) -> None:
    post(server, "/start_weight_update")
    send_shared(server, weights)
    post(server, "/finish_weight_update")
