"""``slipstream doctor``: what would run here, why, and what is missing; each reason is one sentence."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from slipstream.kernels.attention import choice
from slipstream.kernels.native import library
from slipstream.server.commands import doctor
from slipstream.server.commands.cli import app
from slipstream.server.commands.doctor import Asked, attention, versions

DEVICES = ("cpu", "cuda")


def test_it_says_what_is_here() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert set(found) == set(doctor.SECTIONS)
    installed = {fact["name"]: fact for fact in found["Versions"]}
    assert installed["torch"]["value"] == torch.__version__
    [weights] = found["Weights"]
    form, because = weights["value"].split(": ")
    assert (
        weights["name"] == "default" and because and form.startswith(("packed (Q4_1, Q8_0), ", "bfloat16", "float32"))
    )
    processor = {fact["name"]: fact["value"] for fact in found["Processor"]}
    if library.load() is not None:
        assert re.match(r"\d+\.\d GB/s", processor["reads memory at"])
        assert re.match(r"[\d,]+ in bfloat16, [\d,]+ in float32, [\d,]+ in int8", processor["computes at most"])
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert f"torch: {torch.__version__}" in text and "compiled kernels" in text


def test_what_only_a_gpu_needs_is_missed_on_a_gpu_only() -> None:
    found = {device: {fact.name: fact for fact in versions(Asked(None, torch.device(device)))} for device in DEVICES}
    assert "attention by flashinfer" not in found["cpu"]
    if choice.missing("flashinfer"):
        assert "flashinfer is not installed: pip install" in found["cuda"]["attention by flashinfer"].advice


def test_on_a_gpu_it_says_what_computes_attention_and_why_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.launch, "capability", lambda device: 90)
    monkeypatch.setattr(choice.launch, "runs_on", lambda kind: True)
    for name in ("missing", "absent"):
        monkeypatch.setattr(choice, name, lambda name: "xformers is not installed" if name == "xformers" else "")
    facts = {fact.name: fact.value for fact in attention(Asked(None, torch.device("cuda")))}
    assert facts["chosen"].startswith("triton: ") and facts["not xformers"] == "xformers is not installed"
    assert facts["not flashinfer"] and facts["with --deterministic"] == "triton"
    kept = {"with --kv-cache-dtype int8", "with --kv-cache-dtype fp8"}
    assert {facts.pop(name) for name in kept} == {"triton"}
    assert set(facts) == {"chosen", "not flashinfer", "not xformers", "not torch", "with --deterministic"}
