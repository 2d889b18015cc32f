"""The fields by which a request says what its answer is to look like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.openai.fields import unsupported
from slipstream.server.structured import (
    ANY_OBJECT,
    WHITESPACE,
    choice_grammar,
    context_free_grammar,
    json_grammar,
    regex_grammar,
)

MAX_CHOICES = 10_000
Schema = dict[str, Any] | bool
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to say it, and what other servers have made of it."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")
    """The schema, as some servers take it."""
    value: Schema | str | None = None
    """The schema or the regular expression, as TGI takes them."""
    pattern: str | None = None
    grammar_: str | None = Field(None, alias="grammar")

    def grammar(self) -> str:
        """Empty for any text."""
        match self.type:
            case "text":
                return ""
            case "regex":
                param = "response_format.pattern" if self.value is None else "response_format.value"
                pattern = _needed(self.pattern if self.value is None else self.value, param)
                if not isinstance(pattern, str):
                    raise InvalidRequestError(f"{param}: a regular expression is needed", param=param)
                return regex_grammar(pattern, param)
            case "grammar":
                param = "response_format.grammar"
                return context_free_grammar(_needed(self.grammar_, param), param)
        stated = None if self.json_schema is None else self.json_schema.schema_
        given = {"json_schema.schema": stated, "schema": self.schema_, "value": self.value}
        name, schema = next(((name, each) for name, each in given.items() if each is not None), ("", None))
        if self.type == "json_object":
            name, schema = ("schema", ANY_OBJECT) if not name else (name, schema)
        schema = _needed(schema, "response_format.json_schema.schema")
        is_strict = name == "json_schema.schema" and self.json_schema is not None and self.json_schema.strict
        return json_grammar(schema, f"response_format.{name}", best_effort=not is_strict)


def _needed(value: Any, param: str) -> Any:
    if value is None:
        raise InvalidRequestError(f"missing field {param!r}", param=param, code="missing_required_parameter")
    return value


class StructuredOutputs(Body):
    """vLLM's."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None

    disable_fallback: bool | None = None
    disable_additional_properties: bool | None = None
    """It is what happens anyway."""
    structural_tag: unsupported() = None  # type: ignore[valid-type]

    def grammars(self) -> dict[str, str]:
        """By the field that asks for it."""
        at = "structured_outputs."
        pattern = WHITESPACE if self.whitespace_pattern is None else self.whitespace_pattern
        whitespace = None if self.disable_any_whitespace else pattern or None
        found: dict[str, str] = {}
        if self.json_ is not None:
            found[at + "json"] = json_grammar(self.json_, at + "json", whitespace=whitespace)
        if self.regex is not None:
            found[at + "regex"] = regex_grammar(self.regex, at + "regex")
        if self.choice is not None:
            found[at + "choice"] = choice_grammar(self.choice, at + "choice")
        if self.grammar is not None:
            found[at + "grammar"] = context_free_grammar(self.grammar, at + "grammar")
        if self.json_object:
            found[at + "json_object"] = json_grammar(ANY_OBJECT, at + "json_object", whitespace=whitespace)
        return found


class StructuredFields(Body):
    """What both generating routes take."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    # vLLM's older names.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None

    # Those of llama.cpp and SGLang.
    json_schema: Schema | str | None = None
    grammar: str | None = None
    """Empty: none; programs that have a form for it send what is in it."""
    regex: str | None = None
    ebnf: str | None = None

    def structure(self) -> tuple[str, str]:
        """The grammar that the answer has to follow, and the field that asks for it; empty if none does.

        Raises InvalidRequestError if several do, or one of them is wrong.
        """
        found: dict[str, str] = {}
        if self.response_format is not None and (grammar := self.response_format.grammar()):
            found["response_format"] = grammar
        if self.structured_outputs is not None:
            found |= self.structured_outputs.grammars()
        old = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            whitespace_pattern=self.guided_whitespace_pattern,
        )
        found |= {name.replace("structured_outputs.", "guided_"): text for name, text in old.grammars().items()}
        if self.json_schema is not None and self.json_schema != "":
            found["json_schema"] = json_grammar(self.json_schema, "json_schema", best_effort=True)
        if self.regex:
            found["regex"] = regex_grammar(self.regex, "regex")
        for name, text in {"grammar": self.grammar, "ebnf": self.ebnf}.items():
            if text:
                found[name] = context_free_grammar(text, name)
        if len(found) > 1:
            names = list(found)
            raise InvalidRequestError(
                f"an answer follows one of {', '.join(names)}; send only one of them", param=names[1]
            )
        return next(iter((text, name) for name, text in found.items()), ("", ""))
