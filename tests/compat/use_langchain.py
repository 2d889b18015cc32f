"""langchain-openai."""

from __future__ import annotations

from typing import Any, Literal

from checks import ANSWER, QUESTION, feature, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


@tool
def weather(city: Literal["Rome", "Bern"]) -> str:
    """The weather of a city."""
    return "22 degrees"


def chat_model(url: str, model: str, **options: Any) -> Any:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="unused", model=model, max_retries=0, **options)


@feature("invoke, stream")
def invoke(url: str, model: str) -> None:
    llm = chat_model(url, model, max_tokens=12, temperature=0)
    assert llm.invoke("Hello").content == "".join(chunk.content for chunk in llm.stream("Hello"))


@feature("bind_tools")
def bind_tools(url: str, model: str) -> None:
    llm = chat_model(url, model, max_tokens=300)
    for choice in ("any", "weather"):
        answer = llm.bind_tools([weather], tool_choice=choice).invoke(QUESTION)
        assert answer.tool_calls and answer.tool_calls[0]["args"]["city"] in ("Rome", "Bern"), answer
    results = [ToolMessage("22 degrees", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert llm.bind_tools([weather]).invoke([HumanMessage(QUESTION), answer, *results])


@feature("with_structured_output: json_schema")
def json_schema(url: str, model: str) -> None:
    llm = chat_model(url, model, max_tokens=300)
    assert isinstance(llm.with_structured_output(Weather, method="json_schema").invoke(QUESTION), Weather)


@feature("with_structured_output: function_calling")
def function_calling(url: str, model: str) -> None:
    llm = chat_model(url, model, max_tokens=300)
    assert isinstance(llm.with_structured_output(Weather, method="function_calling").invoke(QUESTION), Weather)


@feature("with_structured_output: json_mode")
def json_mode(url: str, model: str) -> None:
    llm = chat_model(url, model, max_tokens=300, temperature=0)
    assert isinstance(llm.with_structured_output(Weather, method="json_mode").invoke(ANSWER), Weather)


@feature("responses: invoke, stream, tools, structured output")
def responses(url: str, model: str) -> None:
    llm = chat_model(url, model, max_tokens=300, use_responses_api=True)
    assert llm.bind_tools([weather], tool_choice="any").invoke(QUESTION).tool_calls
    assert isinstance(llm.with_structured_output(Weather, method="json_schema").invoke(QUESTION), Weather)
    short = chat_model(url, model, max_tokens=16, use_responses_api=True)
    assert list(short.stream("Hello"))


@feature("embeddings")
def embeddings(url: str, model: str) -> None:
    found = OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="unused", model=model, check_embedding_ctx_length=False, max_retries=0
    ).embed_documents(["One", "Two"])
    assert len(found) == 2


if __name__ == "__main__":
    run()
