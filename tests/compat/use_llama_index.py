"""llama-index: its client for servers that are like OpenAI's.

Without ``annotations`` from ``__future__``: it makes a tool's schema of the types themselves.
"""

from typing import Any, Literal

from checks import QUESTION, feature, run
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


def weather(city: Literal["Rome", "Bern"]) -> str:
    """The weather of a city."""
    return "22 degrees"


def llm(url: str, model: str, **options: Any) -> Any:
    options = {"max_tokens": 300, "is_function_calling_model": True, **options}
    return OpenAILike(
        model=model, api_base=f"{url}/v1", api_key="unused", is_chat_model=True, max_retries=0, context_window=8192,
        **options,
    )  # fmt: skip


@feature("complete, chat, streamed")
def plain(url: str, model: str) -> None:
    found = llm(url, model, max_tokens=12, temperature=0)
    assert found.complete("Hello").text
    message = [ChatMessage(role="user", content="Hello")]
    whole = found.chat(message).message.content
    assert [piece.message.content for piece in found.stream_chat(message)][-1] == whole


@feature("tools: required, streamed, history")
def tools(url: str, model: str) -> None:
    tool = FunctionTool.from_defaults(weather)
    found = llm(url, model)
    history = [ChatMessage(role="user", content=QUESTION)]
    answer = found.chat_with_tools([tool], chat_history=list(history), tool_required=True)
    [call] = found.get_tool_calls_from_response(answer)
    assert call.tool_kwargs["city"] in ("Rome", "Bern")
    result = ChatMessage(role="tool", content=str(tool(**call.tool_kwargs)), tool_call_id=call.tool_id)
    assert found.chat([*history, answer.message, result]).message.content
    *_, last = found.stream_chat_with_tools([tool], chat_history=history, tool_required=True)
    assert found.get_tool_calls_from_response(last)[0].tool_kwargs["city"] in ("Rome", "Bern")


@feature("structured_predict")
def structured(url: str, model: str) -> None:
    found = llm(url, model, should_use_structured_outputs=True)
    assert isinstance(found.structured_predict(Weather, PromptTemplate(QUESTION)), Weather)


@feature("embeddings")
def embeddings(url: str, model: str) -> None:
    found = OpenAILikeEmbedding(model_name=model, api_base=f"{url}/v1", api_key="unused", max_retries=0)
    assert len(found.get_text_embedding_batch(["One", "Two"])) == 2


if __name__ == "__main__":
    run()
