"""Requests made of real text. Every round of a workload has prompts that no earlier round had."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol, get_args

from slipstream.loadtest.dataset import ShareGPT, code_passages, estimate_tokens

WorkloadName = Literal["sharegpt", "shared-prefix", "long", "rewrite", "extract", "code", "fixed"]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
CHARS_PER_TOKEN = 4
MAX_QUESTION_TOKENS = 1000


class WorkloadError(Exception):
    """The data does not hold what a workload needs."""


class Tokenizer(Protocol):
    """The server's own tokenizer; ``slipstream.clients.aio.AsyncClient`` is one."""

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    async def detokenize(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A path and the JSON body, without the model name and the stream fields."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadOptions:
    name: WorkloadName = "sharegpt"
    input_tokens: int | None = None
    """Tokens of the long text in each prompt; not used by ``sharegpt``. None: the workload's own default."""
    output_tokens: int = 128
    ignore_eos: bool | None = None
    """Generate ``output_tokens`` whatever the model says. None: only ``fixed`` does."""
    temperature: float = 0.0
    seed: int = 0
    dataset: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(WorkloadName):
            raise ValueError(f"unknown workload {self.name!r}; there are {', '.join(get_args(WorkloadName))}")
        if self.name == "sharegpt" and self.input_tokens is not None:
            raise ValueError("the lengths of sharegpt prompts are those of the data: input_tokens has no meaning")
        if self.output_tokens < 1 or (self.input_tokens is not None and self.input_tokens < 1):
            raise ValueError("input_tokens and output_tokens must be at least 1")


# A long prompt, its template and 128 output tokens fit into a context of 4,096.
DEFAULT_INPUT_TOKENS = {"shared-prefix": 1000, "long": 3900, "rewrite": 200, "extract": 200, "code": 200, "fixed": 128}
# Answers that repeat their prompts, in turn: text, text, code.
REWRITE = "Correct the spelling and punctuation of the following text. Change nothing else.\n\n"
COPY = "Copy the following text word for word, up to its end.\n\n"
FIX_CODE = "Fix the bugs in the following code, if there are any. Answer with the whole code.\n\n"
CONTINUE_CODE = "Continue the following Python code. Answer with the code that comes next.\n\n"
# One application with one task.
EXTRACT = "Extract the facts from the text below. Write one fact per line.\n\n"


class Workload:
    """Draws requests from the data: the same for the same options and server tokenizer, new ones in each round.

    Without a tokenizer, lengths are estimated at four characters per token.
    """

    def __init__(self, options: WorkloadOptions, tokenizer: Tokenizer | None = None) -> None:
        self.options = options
        self.exact_lengths = tokenizer is not None
        self._tokenizer = tokenizer
        self._data = ShareGPT(options.dataset)
        self._questions = self._unique_questions(Random(f"questions {options.seed}"))
        self._random = Random(f"texts {options.seed}")
        self._code = code_passages(Random(f"code {options.seed}"), self._input_tokens * CHARS_PER_TOKEN)
        self._beginnings: set[str] = set()
        self._special_tokens: int | None = None

    async def round(self, count: int) -> list[Request]:
        """The next ``count`` requests."""
        match self.options.name:
            case "sharegpt":
                return [self._chat({"role": "user", "content": question}) for question in self._next_questions(count)]
            case "shared-prefix":
                guide = await self.text(self._input_tokens)
                system = {"role": "system", "content": f"Answer in the spirit of these texts.\n\n{guide}"}
                return [
                    self._chat(system, {"role": "user", "content": question})
                    for question in self._next_questions(count)
                ]
            case "long":
                texts = [await self.text(self._input_tokens) for _ in range(count)]
                return [self.summarise(text) for text in texts]
            case "rewrite":
                return [await self._task((REWRITE, COPY, FIX_CODE)[i % 3]) for i in range(count)]
            case "code":
                return [await self._task(CONTINUE_CODE) for _ in range(count)]
            case "extract":
                return [await self._task(EXTRACT) for _ in range(count)]
            case "fixed":
                texts = [await self.text(self._input_tokens, exact=True) for _ in range(count)]
                return [Request(COMPLETIONS, {"prompt": text, **self._fields()}) for text in texts]

    def summarise(self, text: str) -> Request:
        return self._chat({"role": "user", "content": f"{text}\n\nSummarise the text above in a few sentences."})

    async def _task(self, task: str) -> Request:
        tokens = self._input_tokens
        is_code = task in (FIX_CODE, CONTINUE_CODE)
        text = self._next_code() if is_code else await self.text(tokens)
        if is_code and self._tokenizer is not None:
            text = await self._cut(text, tokens, exact=False) or text
        return self._chat({"role": "user", "content": task + text})

    async def text(self, tokens: int, *, exact: bool = False) -> str:
        """Real text of about ``tokens`` tokens whose beginning no earlier text had.

        ``exact``: as a completions prompt the text has exactly that many tokens, special tokens included; only
        with a tokenizer.
        """
        # English has four to five characters per token, so nine of them are rarely too few.
        for passage in islice(self._data.passages(self._random, 9 * tokens + 100), 1000):
            if passage[:100] in self._beginnings:
                continue
            text = await self._cut(passage, tokens, exact) if self._tokenizer else passage[: tokens * CHARS_PER_TOKEN]
            if text is not None:
                self._beginnings.add(passage[:100])
                return text
        raise WorkloadError(
            f"found no unused text of {tokens} tokens in {self._data.path.name}"
            + (": is /detokenize of this server the inverse of /tokenize?" if exact else "")
        )

    async def _cut(self, passage: str, tokens: int, exact: bool) -> str | None:
        assert self._tokenizer is not None
        if self._special_tokens is None:
            plain = await self._tokenizer.tokenize("text", add_special_tokens=False)
            self._special_tokens = len(await self._tokenizer.tokenize("text", add_special_tokens=True)) - len(plain)
        ids = await self._tokenizer.tokenize(passage, add_special_tokens=False)
        size = tokens - self._special_tokens if exact else tokens
        if size < 1 or len(ids) < size:
            return None
        text = await self._tokenizer.detokenize(ids[:size])
        # A cut between two tokens may tokenize differently than the whole did.
        if exact and len(await self._tokenizer.tokenize(text, add_special_tokens=True)) != tokens:
            return None
        return text

    @property
    def _input_tokens(self) -> int:
        return self.options.input_tokens or DEFAULT_INPUT_TOKENS.get(self.options.name, 1)

    def _chat(self, *messages: dict[str, str]) -> Request:
        return Request(CHAT, {"messages": list(messages), **self._fields()})

    def _fields(self) -> dict[str, Any]:
        options = self.options
        fields: dict[str, Any] = {"max_tokens": options.output_tokens, "temperature": options.temperature}
        ignore_eos = options.name == "fixed" if options.ignore_eos is None else options.ignore_eos
        if ignore_eos:
            fields["ignore_eos"] = True
        return fields

    def _next_questions(self, count: int) -> list[str]:
        questions = list(islice(self._questions, count))
        if len(questions) < count:
            raise WorkloadError(
                f"{self._data.path.name} has no {count} unused prompts left: ask for fewer or shorter rounds"
            )
        return questions

    def _next_code(self) -> str:
        passage = next(self._code, None)
        if passage is None:
            raise WorkloadError(f"the standard library has no unused code of {self._input_tokens} tokens left")
        return passage

    def _unique_questions(self, random: Random) -> Iterator[str]:
        seen = set()
        for conversation in self._data.shuffled(random):
            question = conversation.question()
            if question and question not in seen and 4 <= estimate_tokens(question) <= MAX_QUESTION_TOKENS:
                seen.add(question)
                yield question
