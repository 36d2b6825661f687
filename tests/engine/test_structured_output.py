"""With each backend of structured output answers are plain vLLM's, alone and many at once."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
from engines import PERSON, PROMPTS, engine_process, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 5,
    "optimization_interval": 2,
    "max_optimized_requests": 3,
    "draft_exit_threshold": 0.0,
}
PENS = r" (\d{1,3} pens, ){2,4}done"
CHOICE = [" 21 miles", " 12 kilometres"]
GRAMMAR = 'root ::= " " number " pens" (" and " number " more")? "."\nnumber ::= [0-9] | [0-9] number\n'
# Of outlines and the others.
REQUESTS: list[tuple[str, dict[str, Any] | None]] = [
    (PROMPTS[13], {"json": PERSON}),
    (PROMPTS[1], {"regex": PENS}),
    (PROMPTS[2], {"choice": CHOICE}),
    (PROMPTS[14], {"json": PERSON}),
    (PROMPTS[9], None),
    (PROMPTS[0], {"regex": PENS}),
    (PROMPTS[6], {"json": PERSON}),
    (PROMPTS[10], {"regex": r"SELECT [a-z]{1,8}, [a-z]{1,8} FROM [a-z]{1,12}"}),
    (PROMPTS[1], {"choice": CHOICE}),
]
BY_GRAMMAR: list[tuple[str, dict[str, Any] | None]] = [
    (PROMPTS[1], {"grammar": GRAMMAR}),
    (PROMPTS[0], {"grammar": GRAMMAR}),
    (PROMPTS[14], {"json_object": True}),
]
AGAIN: list[tuple[str, dict[str, Any] | None]] = [
    (PROMPTS[8], {"json": PERSON}),
    (PROMPTS[7], {"choice": CHOICE}),
    (PROMPTS[3], None),
]
BACKENDS = {
    "xgrammar": REQUESTS + BY_GRAMMAR,
    "guidance": REQUESTS + BY_GRAMMAR,
    "outlines": REQUESTS + AGAIN,  # vLLM has no grammars with it
}


def answers(backend: str, speculative_config: object) -> tuple[list, list, int, list[str], str]:
    """Answers one by one and at once, draft tokens accepted, what was logged, and who constrained them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("vllm").addHandler(handler)
    config = {"backend": backend} | ({} if backend == "outlines" else {"disable_any_whitespace": True})
    with running(speculative_config=speculative_config, structured_outputs_config=config) as llm:

        def ask(requests: list[tuple[str, dict[str, Any] | None]]) -> list[tuple[list[int], str]]:
            prompts = [prompt for prompt, _ in requests]
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=60,
                    structured_outputs=None if given is None else StructuredOutputsParams(**given),
                )
                for _, given in requests
            ]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [(list(output.outputs[0].token_ids), output.outputs[0].text) for output in outputs]

        requests = BACKENDS[backend]
        alone = [answer for request in requests for answer in ask([request])]
        at_once = ask(requests)
        accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
        manager = llm.llm_engine.engine_core.engine_core.structured_output_manager
        return alone, at_once, accepted, logged, type(manager.backend).__name__


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_plain_vllms(backend):
    with engine_process("v1") as call:
        plain, plain_at_once, *_ = call(answers, backend, None)
        alone, at_once, accepted, logged, used = call(answers, backend, CLASP)
    assert used.lower().removesuffix("backend") == backend
    assert alone == plain
    assert at_once == plain_at_once
    assert accepted > 0
    assert not [line for line in logged if "FSM" in line or "grammar" in line or "atcher" in line]
    for (_, given), (_, text) in zip(BACKENDS[backend], alone, strict=True):
        check(given or {}, text)


def check(given: dict[str, Any], text: str) -> None:
    """Whether an answer is as it had to be; it may have been cut off."""
    if "json" in given and text.rstrip().endswith("}"):
        assert json.loads(text).keys() == {"name", "age"}
    if "regex" in given and given["regex"] == PENS:
        assert re.fullmatch(PENS, text)
    if "choice" in given:
        assert text in CHOICE
