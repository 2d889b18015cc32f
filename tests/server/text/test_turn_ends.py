"""What ends an answer is what the template in use puts after it, wherever the template comes from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from slipstream.engine.errors import ConfigError
from slipstream.server.config import ServerConfig
from slipstream.server.preparing.text_model import load_template, load_text_model
from slipstream.server.text import ChatTemplate, TemplateError, Tokenizer, load_tokenizer
from slipstream.server.text.tokenizer_files import TokenizerParts

SPECIAL = ("</s>", "<|im_end|>", "<|im_end|>x", "<|eot|>")
END = {
    "<|im_end|>\n": (("<|im_end|>",), ()),
    " </s>": (("</s>",), ()),
    "<|eot|><|im_end|>": (("<|eot|>",), ()),
    "<|im_end|>x": (("<|im_end|>x",), ()),
    "<plain>": (("<plain>",), ()),
    "\n### End\n": ((), ("### End",)),
    "<|nothing|>": ((), ("<|nothing|>",)),
    "\n\n": ((), ()),
    "": ((), ()),
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens(["<plain>"])
    own = {"default": "{{ messages[-1].content }}</s>", "tool_use": "{{ messages[-1].content }}<|eot|>"}
    return Tokenizer(TokenizerParts(backend, {}, (), own))


def ends_with(tokenizer: Tokenizer, end: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    template = "{% for m in messages %}{{ m.role + m.content }}" + end + "{% endfor %}"
    found = tokenizer.turn_ends(ChatTemplate(template))
    return tuple(tokenizer.decode([token], False) for token in found.token_ids), found.stops


def test_ends_of_turns(tokenizer: Tokenizer) -> None:
    assert {end: ends_with(tokenizer, end) for end in END} == END
    assert [tokenizer.decode([token], False) for token in tokenizer.eos_token_ids] == ["</s>", "<|eot|>"]


@settings(max_examples=100)
@given(
    token=st.sampled_from([*SPECIAL, "<plain>"]), before=st.text(" \n", max_size=3), after=st.text("\n ab<", max_size=5)
)
def test_the_first_token_after_an_answer_ends_it(tokenizer: Tokenizer, token: str, before: str, after: str) -> None:
    [found], stops = ends_with(tokenizer, before + token + after)
    assert (token + after).startswith(found) and len(found) >= len(token) and not stops


def test_a_template_given_by_option(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    found = load_text_model("default", ServerConfig(chat_template=str(template)))
    [end] = found.turn_ends.token_ids
    assert found.tokenizer.decode([end], False) == "<|endoftext|>" and end not in found.tokenizer.eos_token_ids
    template.write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"^--chat-template: the chat template 'default' of .*template.jinja"):
        load_text_model("default", ServerConfig(chat_template=str(template)))


def test_broken_templates_in_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Backend(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    user = [{"role": "user", "content": "a"}]
    fine = {"name": "default", "template": "fine"}
    for broken in ("{% if %}", 5, None, {"a": 1}):
        config.write_text(json.dumps({"chat_template": [fine, {"name": "tool_use", "template": broken}]}))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            template = load_template(load_tokenizer(tmp_path), None)
        assert template is not None and template.render(user) == "fine"
        assert "'tool_use'" in caplog.text and str(tmp_path) in caplog.text and "--chat-template" not in caplog.text
        with pytest.raises(TemplateError, match="'tool_use'"):
            template.render(user, tools=[{}])
    for declared in (7, ["x"], [{"name": "a"}], {"default": []}):
        config.write_text(json.dumps({"chat_template": declared}))
        template = load_template(load_tokenizer(tmp_path), None)
        assert template is not None
        with pytest.raises(TemplateError, match=str(tmp_path)):
            template.render(user)
    config.write_text("{}")
    (tmp_path / "chat_template.json").write_text("{")
    for name, content in (
        ("chat_template.json", b"{"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"{%"),
    ):
        (tmp_path / name).write_bytes(content)
        template = load_template(load_tokenizer(tmp_path), None)
        assert template is not None
        with pytest.raises(TemplateError, match=name if content != b"{%" else str(tmp_path)):
            template.render(user)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1})[:-3])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(tmp_path).encode("a")
    assert str(tmp_path / "generation_config.json") in caplog.text
