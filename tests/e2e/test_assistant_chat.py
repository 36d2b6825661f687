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
    return chat_requests


def ask(client: openai.OpenAI, model: str, request: dict, stream: bool) -> str:
    """The answer, or the call of a tool."""
    words = {"model": model, "max_tokens": 64, "temperature": 0, **request}
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


def answers(tmp_path, *arguments: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Of all requests, one by one and sixteen at once, whole and streamed; and the server's counters."""
    model = str(assistant("pypi"))
    texts = {}
    with serve(model, *ARGUMENTS, *arguments, log=tmp_path / f"log{len(arguments)}", port=8140) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)
        for at_once in (1, 16):
            for stream in (False, True):
                with ThreadPoolExecutor(at_once) as pool:
                    jobs = [pool.submit(ask, client, model, request, stream) for request in requests()]
                    texts[f"{at_once} at once, {'streamed' if stream else 'whole'}"] = [
                        j.result() for j in jobs
                    ]
        return texts, server.metrics()


@pytest.mark.slow
def test_answers_are_plain_vllms(tmp_path):
    plain, _ = answers(tmp_path)
    always = '{"method": "clasp", "adaptive": ["layers", "length", "exit"]}'  # whether it pays or not
    for config in ('{"method": "clasp"}', always):
        ours, counters = answers(tmp_path, "--speculative-config", config)
        assert len(requests()) == 30
        for how, texts in plain.items():
            assert ours[how] == texts, how
        assert counters["spec_decode_num_drafts"] > 0
        assert counters["layer_skip_failures"] == 0
