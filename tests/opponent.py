"""CLaSp once more, written for nothing but clarity, on transformers: slow, one sequence, one token at a time.

It shares no code with the package. What it says of acceptance the engine must say too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Settings:
    """M, K, the exit threshold, rounds between two optimisations, and where these look.

    ``on_last_verified``: as in the paper, on the last token with known keys and values, which gives
    no draft token; else on the token to draft from, whose optimisation gives the first.
    """

    num_skipped: int
    num_tokens: int
    threshold: float
    interval: int
    on_last_verified: bool = False


class Past:
    """Keys and values of one sequence by layer, in the form that transformers' attention asks for."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys, self.values, self.frozen = list(keys), list(values), False

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        key = torch.cat((self.keys[layer], key), dim=2)
        value = torch.cat((self.values[layer], value), dim=2)
        if not self.frozen:
            self.keys[layer], self.values[layer] = key, value
        return key, value


class Opponent:
    """Greedy decoding of a Llama by CLaSp."""

    def __init__(self, model):
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        )
        self.layers = self.model.model.layers

    @torch.inference_mode()
    def accepted(self, prompt: list[int], num_tokens: int, settings: Settings) -> tuple[list[int], list[int]]:
        """Generate ``num_tokens`` tokens or a few more: these, and the drafts accepted in each round."""
        past, first = self._read(prompt)
        tokens, rounds, skipped = [*prompt, first], [], frozenset()
        while len(tokens) - len(prompt) < num_tokens:
            drafts: list[int] = []
            if len(rounds) % settings.interval == 0:
                if settings.on_last_verified:
                    before = Past([k[:, :, :-1] for k in past.keys], [v[:, :, :-1] for v in past.values])
                    skipped, _ = self._optimize(before, tokens[-2], settings.num_skipped)
                else:
                    skipped, exact = self._optimize(past, tokens[-1], settings.num_skipped)
                    token, probability = self._choose(exact)
                    drafts.append(token)
            unsure = bool(drafts) and probability < settings.threshold
            following = Past(past.keys, past.values)
            if drafts and not unsure:  # the token itself has keys and values from the target
                self._step(following, tokens[-1], frozenset())
            while len(drafts) < settings.num_tokens and not unsure:
                state = self._step(following, (tokens + drafts)[-1], skipped)
                token, probability = self._choose(state)
                drafts.append(token)
                unsure = probability < settings.threshold
            count = 0
            for draft in [*drafts, None]:  # verify, one token at a time
                token, _ = self._choose(self._step(past, tokens[-1], frozenset()))
                tokens.append(token)
                if token != draft:
                    break
                count += 1
            rounds.append(count)
        return tokens[len(prompt) :], rounds

    def _read(self, prompt: list[int]) -> tuple[Past, int]:
        output = self.model(torch.tensor([prompt]), use_cache=True)
        cache = output.past_key_values.layers
        return Past([x.keys for x in cache], [x.values for x in cache]), int(output.logits[0, -1].argmax())

    def _choose(self, state: Tensor) -> tuple[int, float]:
        logits = self.model.lm_head(self.model.model.norm(state))[0, -1]
        return int(logits.argmax()), float(logits.softmax(-1).max())

    def _step(self, past: Past, token: int, skipped: frozenset[int]) -> Tensor:
        state, rotary = self._embed(past, token)
        for i in range(len(self.layers)):
            if i not in skipped:
                state = self._layer(i, state, rotary, past)
        return state

    def _embed(self, past: Past, token: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = self.model.model.embed_tokens(torch.tensor([[token]]))
        # The longest layer: what is skipped in a draft has no keys of the draft's tokens.
        position = torch.tensor([[max(k.shape[2] for k in past.keys)]])
        return state, self.model.model.rotary_emb(state, position)

    def _layer(self, i: int, state: Tensor, rotary: tuple[Tensor, Tensor], past: Past) -> Tensor:
        out = self.layers[i](state, position_embeddings=rotary, attention_mask=None, past_key_values=past)
        return out[0] if isinstance(out, tuple) else out

    def _optimize(self, past: Past, token: int, num_skipped: int) -> tuple[frozenset[int], Tensor]:
        """The layers to skip, and the target's last state."""
        past = Past(past.keys, past.values)
        past.frozen = True  # every cell sees its own key and value only
        x, rotary = self._embed(past, token)
        best: dict[int, tuple[Tensor, frozenset[int]]] = {0: (x, frozenset())}
        for i in range(len(self.layers)):
            x = self._layer(i, x, rotary, past)
            best_after = {}
            for j in range(min(i + 1, num_skipped) + 1):
                options = []
                if j in best:
                    options.append((self._layer(i, best[j][0], rotary, past), best[j][1]))
                if j - 1 in best:
                    options.append((best[j - 1][0], best[j - 1][1] | {i}))
                closeness = [float(torch.cosine_similarity(o[0][0], x[0], dim=-1)) for o in options]
                best_after[j] = options[closeness.index(max(closeness))]
            best = best_after
        return best[num_skipped][1], x
