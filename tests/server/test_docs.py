"""docs/api.md and docs/metrics.md list what there is."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slipstream.server.admin import routes as admin_routes
from slipstream.server.anthropic import schema as anthropic
from slipstream.server.batch import schema as batch
from slipstream.server.openai import schema
from slipstream.server.respond import schema as respond
from slipstream.server.vllm import control as vllm_control
from slipstream.server.vllm import routes as vllm_routes

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "api.md",
    "responses.md",
    "batches.md",
    "messages.md",
    "sglang.md",
    "vllm.md",
    "trainers/trl.md",
    "trainers/areal.md",
)
"""Where routes and their fields are documented."""


def words(*pages: str) -> set[str]:
    """What stands between backquotes, taken apart."""
    prose = [re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL) for page in pages]
    return {word for page in prose for text in re.findall(r"`([^`]+)`", page) for word in re.findall(r"\w+", text)}


def test_every_field_is_documented() -> None:
    found = [
        *vars(schema).values(),
        *vars(respond).values(),
        *vars(batch).values(),
        *vars(anthropic).values(),
        *admin_routes.BODIES,
        *vllm_routes.BODIES,
        *vllm_control.BODIES,
    ]
    bodies = [value for value in found if isinstance(value, type) and issubclass(value, schema.Body)]
    fields = {about.alias or name for body in bodies for name, about in body.model_fields.items()}
    assert len(fields) > 50
    assert fields - words(*PAGES) == set()


def test_the_page_of_options_is_current() -> None:
    made = runpy.run_path(str(DOCS.parent / "scripts/make_reference.py"))
    assert made["PAGE"].read_text() == made["page"](), "run scripts/make_reference.py"


def test_every_page_is_in_the_site() -> None:
    config = (DOCS.parent / "mkdocs.yml").read_text()
    assert [str(page) for page in DOCS.rglob("*.md") if f": {page.relative_to(DOCS)}\n" not in config] == []


def test_links_lead_to_files() -> None:
    """The site is built with strict links, which takes packages that only `make docs` installs."""
    wrong = [
        f"{page.relative_to(DOCS)}: {target}"
        for page in DOCS.rglob("*.md")
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text())
        if not (page.parent / target).is_file()
    ]
    assert wrong == []


@pytest.mark.slow
def test_the_site_is_built_and_no_link_leads_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api.html").exists()


def test_every_route_is_documented(server: Any) -> None:
    routes = server.get("/openapi.json")[1]["paths"]
    text = "".join((DOCS / page).read_text() for page in PAGES)
    assert len(routes) > 8
    assert [route for route in routes if not re.search(re.escape(route) + r"[`?]", text)] == []


def test_references_of_the_openapi_page_lead_somewhere(server: Any) -> None:
    page = server.get("/openapi.json")[1]
    assert server.get("/openapi.json")[1] == page  # what is kept of it for the next time has not been changed
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(page)))
    assert "ChatBody" in references
    assert references <= set(page["components"]["schemas"])


def test_the_openapi_page_says_what_routes_take_and_answer(server: Any) -> None:
    """What they really answer is held against it in every request of every test: see conftest.py."""
    page = server.get("/openapi.json")[1]
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert {"200", "400", "401", "403", "408", "431", "500"} <= set(answers), (method, path)
            assert "422" not in answers
            for answer in answers.values():
                schema = next(iter(answer["content"].values()))["schema"]
                kinds = ("openmetrics-text", "octet-stream", "x-jsonl")
                plain = {"text/plain", "text/html", *(f"application/{kind}" for kind in kinds)}
                assert "$ref" in schema or set(answer["content"]) <= plain, (method, path)
            assert ("requestBody" in operation) == (method == "post")
            assert ("413" in answers) == ("415" in answers) == (method == "post")
    taken = page["paths"]["/tokenize"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [form["$ref"].rpartition("/")[2] for form in taken["oneOf"]] == ["TokenizeTextBody", "TokenizeMessagesBody"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = page["paths"][path]["post"]["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"404", "429", "503", "504"} <= set(answers)


def test_routes_refuse_what_the_openapi_page_says_they_refuse(server: Any) -> None:
    """A body that has to be there and is not; a field that nobody knows, where there are none but those listed."""
    page = server.get("/openapi.json")[1]
    tried = 0
    for path, operations in page["paths"].items():
        body = operations.get("post", {}).get("requestBody", {"content": {}})
        if not (forms := body["content"].get("application/json")):
            continue
        names = re.findall(r"#/components/schemas/(\w+)", json.dumps(forms))
        closed = all(page["components"]["schemas"][name]["additionalProperties"] == {"type": "null"} for name in names)
        for told, sent in ((body["required"], b""), (closed, b'{"nobody_knows": 1}')):
            if told:
                status, _, answer = server.request("POST", re.sub(r"{\w+}", "1", path), sent)
                assert status in (400, 404, 409), (path, sent, answer)
                tried += 1
    assert tried > 60


def test_bodies_that_ignore_unknown_fields_do_so_in_all_their_parts(server: Any) -> None:
    page = server.get("/openapi.json")[1]
    schemas = page["components"]["schemas"]

    def kinds(part: Any) -> set[bool]:
        names, seen = re.findall(r"#/components/schemas/(\w+)", json.dumps(part)), set[str]()
        while names:
            if (name := names.pop()) not in seen:
                seen.add(name)
                names += re.findall(r"#/components/schemas/(\w+)", json.dumps(schemas[name]))
        return {
            schemas[name]["additionalProperties"] is True for name in seen if "additionalProperties" in schemas[name]
        }

    bodies = {path: found["post"].get("requestBody", {}) for path, found in page["paths"].items() if "post" in found}
    assert kinds(bodies["/v1/chat/completions"]) == {False}
    for path in ("/inference/v1/generate", "/v1/chat/completions/render", "/chat/", "/update_weights_from_disk"):
        assert kinds(bodies[path]) == {True}, path
    rendered = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "nobody_knows": 1}]}]}
    assert server.post("/v1/chat/completions/render", rendered | {"nor_this": 1})[0] == 200
    assert server.post("/v1/chat/completions", rendered)[0] == 400
    assert (
        server.post("/v1/chat/completions", {"messages": [], "nobody_knows": None})[1]["error"]["param"] == "messages"
    )


def test_every_metric_is_documented(server: Any) -> None:
    kinds = re.findall(r"^# TYPE slipstream:(\w+) (\w+)$", server.get("/metrics")[1], re.M)
    rows = re.findall(r"^\| ([^|]+) \| (gauge|counter|histogram) \|", (DOCS / "metrics.md").read_text(), re.M)
    documented = [(name, kind) for names, kind in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(documented) > 60
    assert sorted(documented) == sorted(kinds)  # each once, too
