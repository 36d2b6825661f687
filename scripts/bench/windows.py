"""How often do drafts that attend to a part of the context say what the target says?

    .venv/bin/python scripts/bench/windows.py MODEL --spec-bench question.jsonl --output windows.json

Questions of Spec-Bench after documents, answered by the model ("documents"), and the first of the documents
to be written again word for word ("copying", the answer is the document): what the second needs is as far
back as can be. At every position of the answers a draft of the whole model predicts the next token, attending
to the first tokens of the context and the last ones, the past being the full model's, as in a first draft
step. The table has the share of positions where draft and model agree on the likeliest token, and the
acceptance to expect at temperature 1 (the sum over tokens of the smaller probability).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import number, numbers
from clasp_vllm.tools.provenance import about

COPY = "Write the first text again, word for word."
CHUNK = 1024  # tokens of a prompt that are read at once


class Target:
    """The model, and what it makes of one text.

    Attributes:
        tokens: of the text.
        logits: [answer, vocab], what it says of each token of the answer.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def read(self, prompt: list[int], answer: list[int] | None, length: int) -> None:
        """Read a prompt and its answer; None: of so many of the likeliest tokens."""
        self.tokens, self._first = list(prompt), len(prompt)
        self._cache: Any = None
        for start in range(0, len(prompt), CHUNK):
            logits = self._step(prompt[start : start + CHUNK])
        said = [logits]
        for i in range(length - 1):
            self.tokens.append(int(said[-1].argmax()) if answer is None else answer[i])
            said.append(self._step(self.tokens[-1:]))
        self.logits = torch.stack(said)

    def _step(self, tokens: list[int]) -> Tensor:
        """[vocab] logits after further tokens."""
        out = self._model(
            torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = out.past_key_values
        last: Tensor = out.logits[0, -1]
        return last

    @torch.inference_mode()
    def draft(self, sink: int, window: int) -> Tensor:
        """[answer - 1, vocab] logits of drafts that attend to so many tokens, of these ``sink`` first ones.

        Of the answer's first token there is no draft: it comes with the prompt.
        """
        from transformers import DynamicCache

        said = []
        for at in range(self._first, len(self.tokens)):
            kept = list(range(at))
            if at + 1 > window:
                kept = kept[:sink] + kept[at - (window - sink - 1) :]
            index = torch.tensor(kept)
            cut = DynamicCache()
            for i, layer in enumerate(self._cache.layers):
                cut.update(layer.keys.index_select(2, index), layer.values.index_select(2, index), i)
            position = torch.tensor([[at]])
            out = self._model(
                torch.tensor([self.tokens[at : at + 1]]), position_ids=position, past_key_values=cut
            )
            said.append(out.logits[0, -1])
        return torch.stack(said)


def texts(
    args: argparse.Namespace, tokenizer: Any, context: int
) -> dict[str, list[tuple[list[int], list[int] | None]]]:
    """Prompts of about so many tokens, and answers where they are given."""
    read = spec_bench.read_questions(args.spec_bench)
    questions = [q for q in spec_bench.select(read, spec_bench.TASK) if len(q.turns) == 1][: args.prompts]

    def tokens(text: str) -> list[int]:
        made: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return made

    def prompt(question: spec_bench.Question) -> list[int]:
        return tokens(spec_bench.render(tokenizer, question.messages(lambda messages: "")))

    after = spec_bench.after_documents(questions, read, context, tokenizer)
    documents = [q for q in read if q.category in spec_bench.DOCUMENTS]
    copies: list[tuple[list[int], list[int] | None]] = []
    for first in documents:
        text, category = first.turns[-1].strip(), first.category
        copied = tokens(f"{text}\n\n")
        if len(copies) == args.prompts or len(copied) > context / 2:
            continue
        others = [question for question in documents if question is not first]
        task = [spec_bench.Question(category, (COPY,))]
        (asked,) = spec_bench.after_documents(task, others, context - len(copied), tokenizer)
        whole = spec_bench.Question(category, (f"{text}\n\n{asked.turns[0]}",))
        copies.append((prompt(whole), copied[: args.max_tokens]))
    return {"documents": [(prompt(question), None) for question in after], "copying": copies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="of the Llama family")
    parser.add_argument("--spec-bench", type=Path, required=True, help="Spec-Bench's question.jsonl")
    parser.add_argument("--prompts", type=number(1), default=6, help="of each kind and context")
    parser.add_argument("--max-tokens", type=number(2), default=48, help="tokens of each answer")
    parser.add_argument("--contexts", type=numbers(64), default=[1000, 2000, 4000, 7500])
    parser.add_argument("--windows", type=numbers(32), default=[256, 512, 1024, 2048])
    parser.add_argument("--sink", type=number(1), default=16, help="first tokens that are always seen")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    args = parser.parse_args()
    tokenizer, target = spec_bench.chat_tokenizer(args.model), Target(args.model)
    heads = ["context", "text", *(f"{window} tokens" for window in args.windows)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for context in args.contexts:
        for kind, some in texts(args, tokenizer, context).items():
            scores: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for prompt, answer in track(some, f"{kind}, {context}"):
                target.read(prompt, answer, args.max_tokens)
                model = target.logits[1:]
                for window in (window for window in args.windows if window < context):
                    draft = target.draft(args.sink, window)
                    agree = (draft.argmax(-1) == model.argmax(-1)).float()
                    common = torch.minimum(draft.softmax(-1), model.softmax(-1)).sum(-1)
                    scores[window].append((agree, common))
            means = {
                w: [float(torch.cat(one).mean()) for one in zip(*of, strict=True)] for w, of in scores.items()
            }
            cells = ["{:.3f}, {:.3f}".format(*means[w]) if w in means else "" for w in args.windows]
            lines.append(f"| {context} | {kind} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    print(*lines, sep="\n")
    if args.output:
        facts = {"about": about(args.model), "table": lines}
        args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
