"""A real assistant over HTTP: every answer is plain vLLM's, whatever is asked and however."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from clasp_vllm.tools.assistant import assistant
from clasp_vllm.tools.servers import serve

SYSTEM = {"role": "system", "content": "You answer in one short paragraph."}
ARTICLE = (
    "The town council of Alderney voted on Tuesday to rebuild the old harbour wall, which a storm broke in "
    "February. The work will take two years and cost four million pounds, of which half comes from "
    "reserves. Fishermen welcomed the decision; two members who voted against it asked for a cheaper plan. "
)
PASSAGES = (
    "[1] The kiwi is a flightless bird of New Zealand about the size of a hen.\n"
    "[2] Kiwis lay the largest egg of any bird for their size.\n"
    "[3] The kiwi fruit was named after the bird in 1959.\n"
)
# The six kinds of Spec-Bench.
ASKED = {
    "multi_turn": ["Write a letter to a neighbour about a lost cat.", "Describe a day at the sea.",
                   "What is a prime number?", "Plan a small garden."],
    "translation": [f"Translate German to English: {text}" for text in (
        "Der Hund schläft unter dem Tisch.", "Morgen fahren wir mit dem Zug nach Köln.",
        "Sie hat das Buch schon zweimal gelesen.", "Wo ist der nächste Bahnhof?")],
    "summarization": [f"Summarize: {ARTICLE * n}" for n in (1, 2, 3, 4)],
    "qa": ["Who wrote Hamlet?", "What is the capital of Australia?", "How many legs has a spider?",
           "When did the Second World War end?"],
    "math_reasoning": [f"A box holds {n} pens. How many pens are in 7 boxes? Think step by step." for n in
                       (12, 15, 24, 31)],
    "rag": [f"{PASSAGES}\nUse the passages. {question}" for question in (
        "What was the fruit named after?", "How large is the bird?", "Who lays the largest egg?",
        "Where does the kiwi live?")],
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
# vLLM constrains a strict tool's call by a grammar that begins in the middle of an answer.
STRICT = [
    {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}},
    {
        "type": "function",
        "function": {
            "name": "time",
            "description": "The time in a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "format": {"type": "string", "enum": ["12 hours", "24 hours"]},
                },
                "required": ["city", "format"],
                "additionalProperties": False,
            },
        },
    },
]
ARGUMENTS = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
ARGUMENTS += [
    "--kv-cache-memory-bytes",
    "1000000000",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
]


def requests() -> list[dict]:
    """Arguments of ``chat.completions.create``."""
    chat_requests: list[dict] = []
    for kind, questions in ASKED.items():
        for question in questions:
            messages = [{"role": "user", "content": question}]
            if kind == "multi_turn":
                messages += [
                    {"role": "assistant", "content": "Of course."},
                    {"role": "user", "content": "Shorter."},
                ]
            if len(chat_requests) % 3 == 0:
                messages.insert(0, SYSTEM)
            chat_requests.append({"messages": messages})
    for name in ("Eve, a baker of 64", "Leo, a pilot of 31", "Ann, who is 7"):
        schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        chat_requests.append(
            {"messages": [{"role": "user", "content": f"As JSON: {name}."}], "response_format": schema}
        )
    for city in ("Oslo", "Rome", "Lima"):
        choice = {"type": "function", "function": {"name": "weather"}}
        messages = [{"role": "user", "content": f"How is the weather in {city}?"}]
        chat_requests.append({"messages": messages, "tools": TOOLS, "tool_choice": choice})
        chat_requests.append({"messages": messages, "tools": STRICT, "tool_choice": "required"})
        chat_requests.append({"messages": shown_calls(city), "tools": STRICT, "tool_choice": "auto"})
    return chat_requests


def shown_calls(city: str) -> list[dict]:
    """A question after two that were answered by calls, so that a small model makes one by itself."""
    messages = []
    for other in ("Paris", "Cairo"):
        call = f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{other}"}}}}\n</tool_call>'
        messages.append({"role": "user", "content": f"How is the weather in {other}?"})
        messages.append({"role": "assistant", "content": call})
    return [*messages, {"role": "user", "content": f"How is the weather in {city}?"}]


def ask(client: openai.OpenAI, model: str, request: dict, stream: bool) -> str:
    """The answer, or the call of a tool."""
    words = {"model": model, "max_tokens": 48, "temperature": 0, **request}
    if not stream:
        message = client.chat.completions.create(**words).choices[0].message
        calls = [f"{call.function.name}({call.function.arguments})" for call in message.tool_calls or []]
        return (message.content or "") + "".join(calls)
    text, name = "", ""
    for chunk in client.chat.completions.create(stream=True, **words):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                name = name or call.function.name or ""
                text += call.function.arguments or ""
    return f"{name}({text})" if name else text


def answers(tmp_path, *arguments: str) -> tuple[dict[str, list[str]], dict[str, float], str]:
    """Of all requests, one by one and sixteen at once, once whole and once streamed; the server's counters
    and log."""
    model = str(assistant("pypi"))
    texts = {}
    with serve(model, *ARGUMENTS, *arguments, log=tmp_path / f"log{len(arguments)}", port=8140) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)
        for at_once in (1, 16):
            with ThreadPoolExecutor(at_once) as pool:
                jobs = [
                    pool.submit(ask, client, model, request, stream=(i + at_once) % 2 == 0)
                    for i, request in enumerate(requests())
                ]
                texts[f"{at_once} at once"] = [job.result() for job in jobs]
        return texts, server.metrics(), server.log.read_text()


# The second: whether it pays or not.
CONFIGS = {
    "as it comes": '{"method": "clasp"}',
    "always": '{"method": "clasp", "adaptive": ["layers", "length", "exit"]}',
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, list[str]]:
    texts, *_ = answers(tmp_path_factory.mktemp("plain"))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_answers_are_plain_vllms(plain, tmp_path, config):
    ours, counters, log = answers(tmp_path, "--speculative-config", CONFIGS[config])
    assert len(requests()) == 36
    for how, texts in plain.items():
        assert ours[how] == texts, how
    assert counters["spec_decode_num_drafts"] > 0
    assert counters["layer_skip_failures"] == 0
    assert "Failed to advance FSM" not in log  # vLLM issue 44006


@pytest.mark.slow
def test_tools_are_called(plain):
    """Without having to, too."""
    for texts in plain.values():
        called = [text for text in texts if text.startswith(("weather(", "time("))]
        assert len(called) > 6
