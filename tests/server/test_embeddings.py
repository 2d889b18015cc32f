"""/v1/embeddings, against the same model elsewhere; and what clients ask of a tokenizer."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

TEXTS = ["The capital of France is Paris.", "A cat.", "word " * 700]


def vectors(server: Any, texts: Any, **fields: Any) -> Any:
    status, found = server.post("/v1/embeddings", {"input": texts, **fields})
    assert status == 200, found
    assert [each["index"] for each in found["data"]] == list(range(len(found["data"])))
    return np.array([each["embedding"] for each in found["data"]])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_it_is_what_the_model_elsewhere_makes_of_them(server: Any, tiny_model: Path, pooling: str) -> None:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    found = vectors(server, TEXTS, pooling=pooling, normalize=False)
    for text, vector in zip(TEXTS, found, strict=True):
        _, told = server.post("/tokenize", {"prompt": text})
        with torch.inference_mode():
            states = model(torch.tensor([told["tokens"]])).last_hidden_state[0]
        wanted = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
        cosine = vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted)
        assert cosine > 0.99 and abs(np.linalg.norm(vector) / np.linalg.norm(wanted) - 1) < 0.05


def test_how_they_are_asked_for_does_not_matter(server: Any) -> None:
    found = vectors(server, TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    alone = np.concatenate([vectors(server, text) for text in TEXTS])
    np.testing.assert_allclose(alone, found, atol=1e-5)
    ids = [server.post("/tokenize", {"prompt": text})[1]["tokens"] for text in TEXTS]
    np.testing.assert_allclose(vectors(server, ids), found, atol=1e-5)
    np.testing.assert_allclose(vectors(server, ids[0]), found[:1], atol=1e-5)
    coded = server.post("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})[1]["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), found[0], atol=1e-5)
    short = vectors(server, TEXTS[0], dimensions=8)[0]
    np.testing.assert_allclose(short, found[0, :8] / np.linalg.norm(found[0, :8]), atol=1e-5)
    # What the cache holds of a text does not change it.
    np.testing.assert_allclose(vectors(server, TEXTS[2], pooling="last"), vectors(server, TEXTS[2], pooling="last"))
    server.wait_until_idle()


def test_the_openai_client(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        found = client.embeddings.create(model="tiny-model", input=TEXTS[:2])
    np.testing.assert_allclose(np.array([each.embedding for each in found.data]), vectors(server, TEXTS[:2]), atol=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 4


def test_one_that_is_aborted_is_no_empty_vector(server: Any) -> None:
    assert server.post("/admin/v1/pause", {})[0] == 200
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(server.post, "/v1/embeddings", {"input": TEXTS})
        server.wait_until(lambda: server.service.engine.num_open)
        assert server.post("/admin/v1/abort", {})[1] == {"aborted": len(TEXTS)}
        assert server.post("/admin/v1/resume", {})[0] == 200
    status, found = asked.result()
    assert (status, found["error"]["code"]) == (503, "aborted")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "word " * 9000}, "input"),
        ({"input": [10**6]}, "input"),
        ({"dimensions": 10**6}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_refused(server: Any, fields: Any, param: str) -> None:
    status, found = server.post("/v1/embeddings", {"input": "x", **fields})
    assert (status, found["error"]["param"]) == (400, param), found


def test_who_tokenizes_by_the_server_learns_what_it_needs(server: Any) -> None:
    """What lm-eval's remote tokenizer asks for."""
    status, info = server.get("/tokenizer_info")
    assert status == 200 and info["eos_token"] and "messages" in info["chat_template"]
    _, found = server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})
    assert found["count"] == 1
