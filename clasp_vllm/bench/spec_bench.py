"""Spec-Bench's questions as chat requests, by its six groups (arXiv 2401.07851).

The questions are those of ``question.jsonl`` of hemingkx/Spec-Bench, which the user names. Prompts are made
by the model's own chat template. A second turn follows the model's own answer to the first.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Protocol

from clasp_vllm.bench.servers import Server

MULTI_TURN = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
GROUPS: dict[str, tuple[str, ...]] = {
    "multi_turn": MULTI_TURN,
    "translation": ("translation",),
    "summarization": ("summarization",),
    "qa": ("qa",),
    "math_reasoning": ("math_reasoning",),
    "rag": ("rag",),
}
TASK = "spec_bench"  # all groups in turn; TASK/GROUP is one, TASK/CATEGORY too
Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question and where in its conversation it is asked.

    Attributes:
        turns: what the user says, the last of which is to be answered.
    """

    category: str
    turns: tuple[str, ...]

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
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                one = json.loads(line)
                turns, category = tuple(map(str, one["turns"])), str(one["category"])
                questions += [Question(category, turns[: i + 1]) for i in range(len(turns))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--spec-bench {path}: not Spec-Bench's question.jsonl ({error!r})") from None
    if not questions:
        raise ValueError(f"--spec-bench {path}: holds no questions")
    return questions


def select(questions: Sequence[Question], task: str, skip: int = 0) -> list[Question]:
    """The questions of a task in their order, without the first ``skip`` of each group.

    Raises:
        ValueError: the task is not known, or nothing is left of one of its groups.
    """
    _, slash, name = task.partition("/")
    if not slash:
        each = [_group(questions, task, categories, skip) for categories in GROUPS.values()]
        in_turn = chain.from_iterable(zip_longest(*each))
        return [question for question in in_turn if question is not None]
    if name not in GROUPS and name not in MULTI_TURN:
        allowed = ", ".join(f"{TASK}/{group}" for group in (*GROUPS, *MULTI_TURN))
        raise ValueError(f"--tasks {task}: allowed are {TASK} (all groups in turn), {allowed}")
    return _group(questions, task, GROUPS.get(name, (name,)), skip)


def _group(
    questions: Sequence[Question], task: str, categories: tuple[str, ...], skip: int
) -> list[Question]:
    found = [question for question in questions if question.category in categories][skip:]
    if not found:
        raise ValueError(f"--tasks {task}: --spec-bench has no more than {skip} of {', '.join(categories)}")
    return found


class Chat(Protocol):
    """A model that is asked by messages."""

    def render(self, messages: list[Message]) -> str:
        """The prompt that its chat template makes."""
        ...

    def answer(self, messages: list[Message]) -> str:
        """Its likeliest answer."""
        ...


class ServedChat:
    """The model behind a server."""

    def __init__(self, server: Server, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self._server = server
        self._max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(server.model)

    def render(self, messages: list[Message]) -> str:
        """See ``Chat``."""
        prompt: str = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return prompt

    def answer(self, messages: list[Message]) -> str:
        """See ``Chat``. The same for every method, for all are asked the same then."""
        words = {
            "model": self._server.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        request = urllib.request.Request(
            f"{self._server.url}/chat/completions",
            json.dumps(words).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            answer: str = json.load(response)["choices"][0]["message"]["content"]
        return answer


def prompts(questions: Sequence[Question], count: int, chat: Chat) -> list[str]:
    """So many prompts, from the start again if there are too few."""
    made = [chat.render(question.messages(chat.answer)) for question in islice(questions, count)]
    return list(islice(cycle(made), count))
