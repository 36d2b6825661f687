"""Spec-Bench's questions as chat requests."""

import argparse
import json
import shutil

import pytest
from engines import DEMO_MODEL

from clasp_vllm.bench.report import write_report
from clasp_vllm.bench.serving_options import add_arguments, fill_in
from clasp_vllm.cli import main
from clasp_vllm.tools.prompts import datasets
from clasp_vllm.tools.spec_bench import (
    GROUPS,
    Question,
    ServedChat,
    after_documents,
    asked,
    prompts,
    read_questions,
    select,
)

LINES = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Rewrite."]},
    {"question_id": 2, "category": "math", "turns": ["Add.", "Add more."]},
    *({"question_id": 3, "category": name, "turns": [f"{name} {i}"]} for i in (1, 2) for name in (
        "translation", "summarization", "qa", "math_reasoning", "rag")),
]  # fmt: skip


class Parrot:
    """A model that repeats; its answers are counted."""

    asked = 0

    def render(self, messages):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def answer(self, messages):
        self.asked += 1
        return messages[-1]["content"].lower()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_both_turns_are_asked_and_the_second_follows_the_models_answer(path):
    questions = select(read_questions(path), "spec_bench/multi_turn")
    chat = Parrot()
    assert prompts(questions, 4, chat) == [
        "<user>Write.",
        "<user>Write.<assistant>write.<user>Rewrite.",
        "<user>Add.",
        "<user>Add.<assistant>add.<user>Add more.",
    ]
    assert chat.asked == 2


def test_groups_take_turns(path):
    questions = select(read_questions(path), "spec_bench")
    assert [question.category for question in questions][: len(GROUPS)] == [
        "writing", "translation", "summarization", "qa", "math_reasoning", "rag"
    ]  # fmt: skip
    assert len(questions) == 14
    assert questions[6] == Question("writing", ("Write.", "Rewrite."))


def test_one_group_one_category_and_the_first_left_out(path):
    questions = read_questions(path)
    assert [q.turns for q in select(questions, "spec_bench/qa")] == [("qa 1",), ("qa 2",)]
    assert [q.turns for q in select(questions, "spec_bench/math")] == [("Add.",), ("Add.", "Add more.")]
    assert [q.turns for q in select(questions, "spec_bench/qa", skip=1)] == [("qa 2",)]


def test_a_conversation_is_left_out_whole(path):
    questions = read_questions(path)
    assert [q.turns for q in select(questions, "spec_bench/multi_turn", skip=1)] == [
        ("Add.",), ("Add.", "Add more.")
    ]  # fmt: skip


def test_the_categories_of_conversations_take_turns(path):
    lines = [{"category": c, "turns": [f"{c} {i}", "And?"]} for c in ("math", "coding") for i in (1, 2)]
    path.write_text("\n".join(map(json.dumps, lines)))
    questions = select(read_questions(path), "spec_bench/multi_turn")
    first = [question.turns[0] for question in questions[::2]]
    assert first == ["math 1", "coding 1", "math 2", "coding 2"]


def test_every_answer_is_asked_for_once_and_kept_with_the_results(path, monkeypatch):
    questions = select(read_questions(path), "spec_bench/multi_turn")
    requests = []

    def answer(self, messages):
        requests.append(messages)
        return "An answer."

    monkeypatch.setattr(ServedChat, "_ask", answer)
    chat = ServedChat(server=None, tokenizer=None, max_tokens=8)
    for _ in range(2):
        assert asked(questions, chat) == [
            {"question": "1", "turn": 1, "answers": []},
            {"question": "1", "turn": 2, "answers": ["An answer."]},
            {"question": "2", "turn": 1, "answers": []},
            {"question": "2", "turn": 2, "answers": ["An answer."]},
        ]
    assert len(requests) == 2


def test_a_line_separator_inside_a_question(path):
    path.write_text(json.dumps({"category": "qa", "turns": ["One\u2028two?"]}, ensure_ascii=False))
    assert read_questions(path) == [Question("qa", ("One\u2028two?",))]


def options(path, *arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["model", f"--spec-bench={path}", *arguments])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tasks=spec_bench/chemistry"], "--tasks spec_bench/chemistry: allowed are spec_bench .*rag"),
        (["--tasks=spec_bench/qa", "--skip=2"], "has no more than 2 of qa"),
        (
            ["--tasks=spec_bench/qa", "--prompts=3", "--concurrency=1"],
            "has 2 prompts after --skip 0.* needs 3",
        ),
        (
            ["--tasks=spec_bench", "--prompts=3", "--concurrency=1,8"],
            "has 14 prompts after --skip 0.* needs 16",
        ),
    ],
)
def test_bad_options(path, arguments, part):
    with pytest.raises(ValueError, match=part):
        fill_in(options(path, *arguments))


def test_a_model_without_a_chat_template_is_refused_before_a_server_starts(path, tmp_path, capsys):
    for file in DEMO_MODEL.glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    words = ["--tasks=spec_bench/qa", "--prompts=1", "--concurrency=1", f"--output={tmp_path}"]
    assert main(["bench", str(tmp_path), f"--spec-bench={path}", *words]) == 2
    assert "has no chat template" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "content", ["", "{", '{"category": "qa"}', "[]", '{"category": "qa", "turns": "Who?"}']
)
def test_a_file_of_something_else(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=f"--spec-bench {path}"):
        fill_in(options(path, "--tasks=spec_bench"))


def test_answers_end_where_the_model_ends_them(path, tmp_path):
    args = options(path, "--tasks=spec_bench/qa,maths", "--prompts=2", "--max-tokens=50", "--concurrency=1")
    fill_in(args)
    sets = datasets(args, tmp_path, Parrot())
    lines = (tmp_path / "spec_bench_qa.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": f"<user>qa {i}", "output_tokens": 50} for i in (1, 2)
    ]
    assert "--ignore-eos" not in sets["spec_bench/qa"]
    assert "--ignore-eos" in sets["maths"]


def measurement(group, plain, repeat, speed):
    return {
        "method": "x", "plain": plain, "repeat": repeat, "tokens_per_second": speed, "failed": 0,
        "workload": {"task": f"spec_bench/{group}", "concurrency": 1, "temperature": 0.0},
        "accepted_length": None, "acceptance_by_position": [], "texts": ["a"], "counters": {},
        "ttft_p50": 1.0, "tpot_p50": 1.0, "tpot_p95": 1.0, "answers_before": 26,
    }  # fmt: skip


def test_the_report_has_groups_and_their_mean(tmp_path):
    speeds = {"qa": (2.0, 2.0), "rag": (1.0, 4.0)}
    rows = [measurement(g, True, r, 1.0) for g in speeds for r in (0, 1)]
    rows += [measurement(g, False, r, s) for g, both in speeds.items() for r, s in enumerate(both)]
    write_report({"about": {}, "methods": {}, "measurements": rows}, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| method | at once | temperature | qa | rag | mean |" in text
    assert "| x | 1 | 0 | 2.00 (2.00 to 2.00) | 2.50 (1.00 to 4.00) | 2.24 |" in text
    assert "| x | spec_bench/rag | 1 | 0 | 26 | 1.00 | 4.00 |" in text


def test_one_repeat_is_not_split_into_first_and_later_ones(tmp_path):
    rows = [measurement("qa", plain, 0, 1.0) for plain in (True, False)]
    write_report({"about": {}, "methods": {}, "measurements": rows}, tmp_path)
    assert "first repeat" not in (tmp_path / "results.md").read_text()


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, add_special_tokens):
        return type("Encoding", (), {"input_ids": text.split()})

    def decode(self, words):
        return " ".join(words)


def test_questions_are_asked_after_documents():
    documents = [Question("rag", (f"{n} " * 100,)) for n in range(3)] + [Question("qa", ("short",))]
    questions = [Question("qa", ("Why?",)), Question("writing", ("Write.", "Write more now."))]
    made = after_documents(questions, documents, 200, Words())
    assert [len(question.turns) for question in made] == [1, 1]
    assert [question.turns[0].split()[-1] for question in made] == ["Why?", "now."]
    assert made[0].turns[0].split()[:100] == made[1].turns[0].split()[:100] == ["0"] * 100
    assert all(140 < len(question.turns[0].split()) <= 200 for question in made)
    for tokens in (40, 400):
        with pytest.raises(ValueError, match=f"--context {tokens}: allowed are 50 to 349"):
            after_documents(questions, documents, tokens, Words())
