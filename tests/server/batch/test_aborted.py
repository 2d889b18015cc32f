"""What a trainer aborts of a batch is asked again: nobody waits for it, and a beginning is no answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.server.batch import runner
from tests.server.batch.asking import begin, client_of, ended, lines_of, request

LINES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["Once", "Twice"], "max_tokens": 500, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 500,
        "ignore_eos": True,
        "n": 2,
    },
    "/v1/responses": {"input": "Hello", "max_output_tokens": 500},
}


@pytest.mark.parametrize(("url", "way"), [*zip(LINES, ("abort", "sleep", "abort"), strict=True)])
def test_it_is_asked_again(
    start_local: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, way: str
) -> None:
    monkeypatch.setattr(runner, "RETRY_S", 0.01)
    server = start_local(batch_folder=str(tmp_path), max_running=4, max_model_len=4096)
    with client_of(server, "unused") as client:
        batch = begin(client, [request(number, url, **LINES[url]) for number in range(2)], url)
        server.wait_until(lambda: server.metric("generation_tokens_total") > 8)
        if way == "abort":
            assert server.post("/admin/v1/abort", {})[0] == 200
        else:
            assert server.post("/admin/v1/sleep", {})[0] == 200
            assert client.batches.retrieve(batch.id).request_counts.completed == 0
            assert server.post("/admin/v1/wake", {})[0] == 200
        batch = ended(server, client, batch)
        assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 2, None)
        for line in lines_of(client, batch.output_file_id).values():
            body = line["response"]["body"]
            if url == "/v1/responses":
                assert body["status"] != "cancelled"
            else:
                assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
