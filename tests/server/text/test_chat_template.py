"""Chat templates rendered as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from slipstream.server.text import ChatTemplate, TemplateError, Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

CHATML = """\
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA3_LIKE = """\
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- set date_string = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) ~ "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson ~ "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL_LIKE = """\
{%- set ns = namespace(index=0, system='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (ns.system + '\\n\\n' if ns.system and loop.last else '') + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

QWEN_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last_user=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == "user" %}{% set ns.last_user = index %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last_user %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{ tool_call.arguments }}
            {%- else %}{{ tool_call.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

PARTS_ONLY = """\
{% for message in messages %}<{{ message.role }}>{% for part in message.content %}
{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}</{{ message.role }}>
{% endfor %}"""

EITHER = """\
{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}</{{ message.role }}>
{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3_LIKE, "mistral": MISTRAL_LIKE, "qwen": QWEN_LIKE, "either": EITHER}


@pytest.fixture(scope="module")
def reference() -> Callable[..., str]:
    """transformers' rendering."""
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)

    def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        assert isinstance(text, str)
        return text

    return render


FIELDS = {"tools", "documents", "add_generation_prompt", "continue_final_message"}


def assert_equal(reference: Callable[..., str], template: str, messages: list[dict[str, Any]], **options: Any) -> None:
    ours = {name: value for name, value in options.items() if name in FIELDS}
    ours["variables"] = {name: value for name, value in options.items() if name not in FIELDS}
    try:
        expected = reference(template, messages, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        with pytest.raises(TemplateError) as caught:
            ChatTemplate(template, SPECIAL).render(messages, **ours)
        if isinstance(error, jinja2.TemplateError) and "continue_final" not in str(caught.value):
            assert str(error) in str(caught.value)
    else:
        assert ChatTemplate(template, SPECIAL).render(messages, **ours) == expected


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <eine> Stadt & mehr",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": [1, None]}}}
text = st.text("ab \n'\"<é你|_", max_size=12)
plain = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": text})
message = st.one_of(
    plain,
    plain,
    st.fixed_dictionaries({"role": st.just("tool"), "content": text, "name": st.none()}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none() | text, "tool_calls": st.just([CALL])}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": text},
        optional={"reasoning": text, "reasoning_content": st.none() | text, "tool_calls": st.none()},
    ),
)
alternating = st.lists(text, min_size=1, max_size=6).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": each} for i, each in enumerate(texts)]
)


@settings(max_examples=150)
@given(
    name=st.sampled_from([*TEMPLATES, "default"]),
    messages=alternating | st.lists(message, min_size=1, max_size=5),
    options=st.fixed_dictionaries(
        {},
        optional={
            "add_generation_prompt": st.booleans(),
            "continue_final_message": st.just(True),
            "tools": st.sampled_from([None, [TOOL], [TOOL, TOOL]]),
            "enable_thinking": st.booleans(),
            "date_string": text,
            "eos_token": st.just("<other end>"),
        },
    ),
)
def test_renders_like_transformers(
    reference: Callable[..., str],
    default_tokenizer: Tokenizer,
    name: str,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    if options.get("continue_final_message") and options.get("add_generation_prompt"):
        options.pop("add_generation_prompt")
    template = default_tokenizer.chat_template if name == "default" else TEMPLATES[name]
    assert template is not None
    assert_equal(reference, template, messages, **options)


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("final", ["to be continued", "trailing  \n", "  both  "])
def test_continue_final_message(reference: Callable[..., str], name: str, final: str) -> None:
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": final}]
    assert_equal(reference, TEMPLATES[name], messages, continue_final_message=True)
    rendered = ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, continue_final_message=True)
    assert rendered.rstrip().endswith(final.strip())


def test_default_model_prompt(default_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(default_tokenizer.chat_templates, default_tokenizer.special_tokens)
    assert template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_documents_and_reserved_names_reach_the_template(reference: Callable[..., str]) -> None:
    template = "{{ self_name }}{% for d in documents %}{{ d.title }}{% endfor %}{{ messages | length }}{{ name }}"
    options = {"documents": [{"title": "T", "text": "x"}], "self_name": "S", "name": "N"}
    assert_equal(reference, template, [{"role": "user", "content": "a"}], **options)


def test_named_templates() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, SPECIAL)
    messages = [{"role": "user", "content": "a"}]
    assert template.render(messages) == "plain"
    assert template.render(messages, tools=[TOOL]) == "tools"
    with pytest.raises(TemplateError, match="none called 'default'"):
        ChatTemplate({"rag": "x"}).render(messages)


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def test_parts_are_joined_for_templates_that_take_texts() -> None:
    for template in (CHATML, MISTRAL_LIKE, QWEN_LIKE, "{{ messages[0].content }}", "{{ messages[0].content|tojson }}"):
        as_parts = ChatTemplate(template, SPECIAL).render([{"role": "user", "content": PARTS}])
        assert as_parts == ChatTemplate(template, SPECIAL).render([{"role": "user", "content": "one\ntwo"}])


def test_parts_are_passed_through_to_templates_that_take_them(reference: Callable[..., str]) -> None:
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]
    for template in (EITHER, PARTS_ONLY):
        assert_equal(reference, template, messages)
        assert_equal(reference, template, messages, continue_final_message=True)
    wrapped = ChatTemplate(PARTS_ONLY).render([{"role": "user", "content": "one"}])
    assert wrapped == ChatTemplate(PARTS_ONLY).render([{"role": "user", "content": PARTS[:1]}])
    assert "one" in wrapped


def test_tool_call_arguments_may_be_json_text() -> None:
    function = {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}  # type: ignore[index]
    openai = [{"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}]
    parsed = [{"role": "assistant", "tool_calls": [CALL]}]
    for template in (QWEN_LIKE, LLAMA3_LIKE):
        assert ChatTemplate(template, SPECIAL).render(openai) == ChatTemplate(template, SPECIAL).render(parsed)
    for nothing in ({"arguments": ""}, {"arguments": "{}"}, {"arguments": None}, {}):
        without = [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", **nothing}}]}]
        assert '"arguments": {}' in ChatTemplate(QWEN_LIKE).render(without)
    broken = [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{half"}}]}]
    assert '"arguments": {half}' in ChatTemplate(QWEN_LIKE).render(broken)


def test_text_after_answer() -> None:
    after = {"chatml": ["<|im_end|>\n"], "llama3": ["<|eot_id|>"], "mistral": ["</s>"], "qwen": ["<|im_end|>\n"]}
    assert {name: ChatTemplate(TEMPLATES[name], SPECIAL).texts_after_answer() for name in after} == after
    assert ChatTemplate("{{ raise_exception('no') }}").texts_after_answer() == []


def test_a_broken_template_concerns_only_who_needs_it() -> None:
    user = [{"role": "user", "content": "a"}]
    unreadable = TemplateError("cannot read it")
    for broken in (
        "{% if %}",
        "{{ " + "9" * 5000 + " }}",
        "{{ x | nothing }}",
        "{{" + "(" * 9999,
        unreadable,
    ):
        template = ChatTemplate({"default": "fine", "tool_use": broken}, SPECIAL, "model/tokenizer_config.json")
        assert template.render(user) == "fine"
        for raises in (template.check, lambda template=template: template.render(user, tools=[{}])):
            with pytest.raises(TemplateError) as caught:
                raises()
            known = broken is unreadable
            assert known or "the chat template 'tool_use' of model/tokenizer_config.json" in str(caught.value)
        assert list(template.broken) == ["tool_use"]
    for source in ("{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"):
        assert ChatTemplate({"default": source, "other": "{{ messages[-1].content }}!"}).texts_after_answer() == ["!"]
        with pytest.raises(TemplateError):
            ChatTemplate(source).render(user)


def test_errors() -> None:
    user = [{"role": "user", "content": "a"}]
    roles = [*user, *user]
    with pytest.raises(TemplateError, match=r"^Conversation roles must alternate user/assistant"):
        ChatTemplate(MISTRAL_LIKE, SPECIAL).render(roles)
    with pytest.raises(TemplateError, match="cannot render this conversation: 'dict object' has no attribute 'x'"):
        ChatTemplate("{{ messages[0].x.y }}").render(user)
    with pytest.raises(TemplateError, match=r"not valid Jinja: .*line 2"):
        ChatTemplate("first\n{% if %}").check()
    with pytest.raises(TemplateError, match="messages is empty"):
        ChatTemplate(CHATML).render([])
    with pytest.raises(TemplateError, match="exclude each other"):
        ChatTemplate(CHATML).render(user, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(TemplateError, match="no text to continue"):
        ChatTemplate(EITHER).render([{"role": "assistant", "tool_calls": []}], continue_final_message=True)
    with pytest.raises(TemplateError, match="does not show the final message"):
        ChatTemplate("{{ messages[0].content | upper }}").render(user, continue_final_message=True)
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(TemplateError, match=r"messages\[1\]\.content has a part of type 'image_url'"):
        ChatTemplate(EITHER).render([*user, {"role": "user", "content": [*PARTS, image]}])


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__subclasses__() }}",
    ],
)
def test_templates_are_sandboxed(escape: str) -> None:
    rendered = ""
    try:
        rendered = ChatTemplate(escape).render([{"role": "user", "content": "a"}])
    except TemplateError as error:
        assert "cannot" in str(error) or "unsafe" in str(error)
    assert rendered == ""
