"""Every column of a pass on the real engine, against an independent transformers implementation.

Column j must see the exact keys and values of all tokens before its own, its own at its own
position, and nothing else. The oracle computes each cell of the programme alone, with the model of
transformers, and compares hidden states, similarities and masks.
"""

import pytest
import torch
from engines import DEMO_MODEL, PROMPTS, drafter, engine_process, generate, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 3,
    "num_skipped_layers": 10,
    "mask_memory": 0.0,  # each choice is to be the best for its own token
    "draft_exit_threshold": 0.0,
}
# Lengths on both sides of a block boundary (blocks of 32), among them the first token of a block.
LENGTHS = [2, 31, 32, 33, 70]


def recorded_passes(runner_block_size: int) -> list[dict]:
    """Optimisation passes of the engine: token, position, and the whole outcome."""
    passes = []
    with running(speculative_config=CLASP, block_size=runner_block_size) as llm:
        tokenizer = llm.get_tokenizer()
        text = tokenizer.encode(" ".join(PROMPTS))
        ours = drafter(llm)
        original = ours.policy.run_programme

        def run_programme(batch, prior, window):
            programme, hidden = original(batch, prior, window)
            for row, request_id in enumerate(batch.request_ids):
                passes.append(
                    {
                        "request": request_id.split("-")[0],
                        "token": int(batch.tokens[row]),
                        "position": int(batch.positions[row]),
                        "skipped": programme.margins[:, :, row] > 0,
                        "states": (programme.states[0] + programme.states[1])[:, row],
                        "similarity": programme.similarity[:, row],
                        "mask": programme.mask(10)[row],
                    }
                )
            return programme, hidden

        ours.policy.run_programme = run_programme
        prompts = [{"prompt_token_ids": text[i * 7 : i * 7 + n]} for i, n in enumerate(LENGTHS)]
        outcome = generate(llm, prompts, max_tokens=16)
    for item in passes:
        index = int(item["request"])
        item["tokens"] = prompts[index]["prompt_token_ids"] + outcome.token_ids[index]
    return passes


@pytest.fixture(scope="module", params=["v1", "v2"])
def passes(request):
    with engine_process(request.param) as call:
        return call(recorded_passes, 32)


class Oracle:
    """One token of the demo model at a time, layer by layer, over an exact cache."""

    def __init__(self):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            DEMO_MODEL, dtype=torch.float32, attn_implementation="eager"
        )
        self.layers = self.model.model.layers

    @torch.inference_mode()
    def follow(self, past: list[int], token: int, skipped: torch.Tensor):
        """Make the engine's choices (``skipped``: [layers, columns]) and check that each is the best.

        Returns the columns' final states, the target's, and for each cell whether the oracle's
        own choice is the same (it may differ where two similarities are equal to rounding).
        """
        import copy

        from transformers import DynamicCache

        max_skipped = skipped.shape[1] - 1
        cache = DynamicCache()
        self.model(torch.tensor([past]), past_key_values=cache, use_cache=True)
        position = torch.tensor([[len(past)]])
        x0 = self.model.model.embed_tokens(torch.tensor([[token]]))
        rotary = self.model.model.rotary_emb(x0, position)

        def apply(i: int, x: torch.Tensor) -> torch.Tensor:
            own = copy.deepcopy(cache)  # nobody else's key at this position
            out = self.layers[i](
                x, position_embeddings=rotary, attention_mask=None, past_key_values=own, position_ids=position
            )
            return out[0] if isinstance(out, tuple) else out

        columns, full, agreed = {0: x0}, x0, []
        for i in range(len(self.layers)):
            full = apply(i, full)
            new = {}
            for j in range(min(i + 1, max_skipped) + 1):
                candidates = {}
                if j in columns:
                    candidates[False] = apply(i, columns[j])
                if j - 1 in columns:
                    candidates[True] = columns[j - 1]
                cosine = {
                    skip: torch.cosine_similarity(x[0], full[0], dim=-1).item()
                    for skip, x in candidates.items()
                }
                choice = bool(skipped[i, j])
                assert choice in candidates, (i, j)
                assert cosine[choice] >= max(cosine.values()) - 1e-5, (i, j, cosine)
                agreed.append(choice == max(cosine, key=cosine.get))
                new[j] = candidates[choice]
            columns = new
        states = torch.stack([columns[j][0, 0] for j in range(max_skipped + 1)])
        return states, full[0, 0], agreed


def test_columns_match_transformers(passes):
    oracle = Oracle()
    boundary = [p for p in passes if p["position"] % 32 in (0, 1, 31)]
    others = [p for p in passes if p["position"] % 32 not in (0, 1, 31)]
    assert len(boundary) >= 3
    agreed = []
    for item in boundary[:5] + others[:5]:
        assert item["tokens"][item["position"]] == item["token"]
        past = item["tokens"][: item["position"]]
        states, full, same = oracle.follow(past, item["token"], item["skipped"])
        agreed += same
        torch.testing.assert_close(item["states"][0], full, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(item["states"], states, atol=1e-3, rtol=1e-3)
        cosine = torch.cosine_similarity(states, full[None], dim=-1)
        torch.testing.assert_close(item["similarity"], cosine, atol=1e-5, rtol=0)
        assert item["mask"].sum() == 10
    # What is left are ties within float32 rounding.
    assert sum(agreed) / len(agreed) > 0.99
