"""Spec-Bench's questions as chat requests, by its six groups (arXiv 2401.07851).

The questions are those of ``question.jsonl`` of hemingkx/Spec-Bench, which the user names. Prompts are made
by the model's own chat template. A second turn follows the model's own answer to the first.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from clasp_vllm.tools.servers import Server, ServerError

MULTI_TURN = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
GROUPS: dict[str, tuple[str, ...]] = {
    "multi_turn": MULTI_TURN,
    "translation": ("translation",),
    "summarization": ("summarization",),
    "qa": ("qa",),
    "math_reasoning": ("math_reasoning",),
    "rag": ("rag",),
}
GROUP_OF = {category: group for group, categories in GROUPS.items() for category in categories}
TASK = "spec_bench"  # all groups in turn; TASK/GROUP is one, TASK/CATEGORY too
DOCUMENTS = ("summarization", "rag")  # categories of long texts
TEMPLATE = 48  # tokens, more than a chat template adds
Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question and where in its conversation it is asked.

    Attributes:
        turns: what the user says, the last of which is to be answered.
        number: the file's question_id, the same for all turns of a conversation.
    """

    category: str
    turns: tuple[str, ...]
    number: str = field(default="", compare=False)

    def messages(self, answer: Callable[[list[Message]], str]) -> list[Message]:
        """The conversation up to the question. ``answer``: gives the model's answer to messages."""
        messages: list[Message] = []
        for turn in self.turns[:-1]:
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer(messages)})
        return [*messages, {"role": "user", "content": self.turns[-1]}]


def is_spec_bench(task: str) -> bool:
    """Whether a task's name is one of Spec-Bench's."""
    return task.partition("/")[0] == TASK


def read_questions(path: Path) -> list[Question]:
    """All questions of a file, each turn of a conversation as one.

    Raises:
        ValueError: it is not Spec-Bench's format; the message names the file.
    """
    questions = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() also splits inside strings
            if line.strip():
                row = json.loads(line)
                turns, category, number = row["turns"], str(row["category"]), str(row.get("question_id", ""))
                if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                    raise TypeError(f"turns is {turns!r}, not a list of strings")
                questions += [Question(category, (*turns[: i + 1],), number) for i in range(len(turns))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--spec-bench {path}: not Spec-Bench's question.jsonl ({error!r})") from None
    if not questions:
        raise ValueError(f"--spec-bench {path}: holds no questions")
    return questions


def select(questions: Sequence[Question], task: str, skip: int = 0) -> list[Question]:
    """The questions of a task in the file's order, without the first ``skip`` of each group.

    Groups take turns where the task has several, and so do the categories of a group, so that the first few
    questions are of all of them. A conversation counts once, with both of its turns.

    Raises:
        ValueError: the task is not known, or nothing is left of one of its groups.
    """
    _, slash, name = task.partition("/")
    if not slash:
        groups = [_group(questions, task, categories, skip) for categories in GROUPS.values()]
        return list(_in_turn(groups))
    if name not in GROUPS and name not in MULTI_TURN:
        allowed = ", ".join(f"{TASK}/{group}" for group in (*GROUPS, *MULTI_TURN))
        raise ValueError(f"--tasks {task}: allowed are {TASK} (all groups in turn), {allowed}")
    return _group(questions, task, GROUPS.get(name, (name,)), skip)


def _group(
    questions: Sequence[Question], task: str, categories: tuple[str, ...], skip: int
) -> list[Question]:
    conversations = list(_in_turn(_conversations(questions, category) for category in categories))[skip:]
    if not conversations:
        raise ValueError(f"--tasks {task}: --spec-bench has no more than {skip} of {', '.join(categories)}")
    return [question for conversation in conversations for question in conversation]


def _conversations(questions: Sequence[Question], category: str) -> list[list[Question]]:
    conversations: list[list[Question]] = []
    for question in questions:
        if question.category == category:
            if len(question.turns) == 1:
                conversations.append([])
            conversations[-1].append(question)
    return conversations


def _in_turn(sequences: Iterable[Iterable[T]]) -> Iterable[T]:
    return (item for item in chain.from_iterable(zip_longest(*sequences)) if item is not None)


class Chat(Protocol):
    """A model that is asked by messages."""

    def render(self, messages: list[Message]) -> str:
        """The prompt that its chat template makes."""
        ...

    def answer(self, messages: list[Message]) -> str:
        """Its likeliest answer."""
        ...


def chat_tokenizer(model: str) -> Any:
    """The model's tokenizer, which has a chat template.

    Raises:
        ValueError: there is none; the message is for the user.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: no tokenizer can be loaded ({error})") from None
    if not tokenizer.chat_template:
        raise ValueError(f"{model}: has no chat template, and --tasks {TASK} asks by chat requests")
    return tokenizer


class ServedChat:
    """The model behind a server. It is asked everything once, so that all methods get the same prompts."""

    def __init__(self, server: Server, tokenizer: Any, max_tokens: int) -> None:
        self._server = server
        self._max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._answers: dict[str, str] = {}

    def render(self, messages: list[Message]) -> str:
        """See ``Chat``."""
        return render(self._tokenizer, messages)

    def answer(self, messages: list[Message]) -> str:
        """See ``Chat``.

        Raises:
            ServerError: the server refuses.
        """
        key = json.dumps(messages)
        if key not in self._answers:
            self._answers[key] = self._ask(messages)
        return self._answers[key]

    def _ask(self, messages: list[Message]) -> str:
        body = {
            "model": self._server.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        request = urllib.request.Request(
            f"{self._server.url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                answer: str = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise ServerError(f"the server refuses a chat request: {error.read().decode()}") from None
        return answer


class OfflineChat:
    """The model in an engine without a server."""

    def __init__(self, tokenizer: Any, generate: Callable[[list[int]], list[int]]) -> None:
        """``generate``: gives the tokens that the model answers a prompt with."""
        self._tokenizer, self._generate = tokenizer, generate

    def render(self, messages: list[Message]) -> str:
        """See ``Chat``."""
        return render(self._tokenizer, messages)

    def answer(self, messages: list[Message]) -> str:
        """See ``Chat``."""
        answer: str = self._tokenizer.decode(
            self._generate(self.tokens(self.render(messages))), skip_special_tokens=True
        )
        return answer

    def tokens(self, prompt: str) -> list[int]:
        """A rendered prompt's, which holds its special tokens already."""
        tokens: list[int] = self._tokenizer(prompt, add_special_tokens=False).input_ids
        return tokens


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The prompt that a tokenizer's chat template makes."""
    prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def after_documents(
    questions: Sequence[Question], documents: Iterable[Question], tokens: int, tokenizer: Any
) -> list[Question]:
    """Single turns, each after so much of the same documents that it has about ``tokens`` tokens in all.

    Args:
        documents: questions whose texts are long, those of ``DOCUMENTS``, to be read one after the other.

    Raises:
        ValueError: there are too few documents, or a question alone has more tokens.
    """

    def ids(text: str) -> list[int]:
        made: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return made

    texts = (f"{one.turns[-1]}\n\n" for one in documents if one.category in DOCUMENTS)
    read = [token for text in texts for token in ids(text)]
    made = []
    for question in questions:
        room = tokens - len(ids(question.turns[-1])) - TEMPLATE
        if not 0 < room <= len(read):
            raise ValueError(
                f"--context {tokens}: allowed are {tokens - room + 1} to {tokens - room + len(read)}, by the "
                f"lengths of question {question.number} and of the documents of --spec-bench"
            )
        turn = f"{tokenizer.decode(read[:room])}\n\n{question.turns[-1]}"
        made.append(replace(question, turns=(turn,)))
    return made


def asked(questions: Sequence[Question], chat: Chat) -> list[dict[str, Any]]:
    """What results keep of the questions: which they were, and the answers to the turns before them."""
    records = []
    for question in questions:
        answers = [m["content"] for m in question.messages(chat.answer) if m["role"] == "assistant"]
        records.append({"question": question.number, "turn": len(question.turns), "answers": answers})
    return records


def prompts(questions: Sequence[Question], count: int, chat: Chat) -> list[str]:
    """So many prompts, from the start again if there are too few."""
    made = [chat.render(question.messages(chat.answer)) for question in islice(questions, count)]
    return list(islice(cycle(made), count))
