"""How often a draft with some layers skipped predicts the full model's next token, at every position at once.

In a round of drafting the past is the full model's: a draft's query meets the full model's keys and
values of the tokens before it, and its own. One pass over a text with an attention of exactly that form
gives the first draft token at each of its positions. It runs on transformers, because it needs
whole texts and no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from clasp_vllm.calibration.store import stack_norms

_NAME = "exact_past"
MOST_SCORES = 1 << 26  # of attention, of a layer, at a time


def _nothing(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the sub-layer adds nothing to the hidden state."""
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@dataclass(frozen=True)
class ModelFacts:
    """What a calibration needs to know of a model.

    Attributes:
        num_layers, hidden_size: its shape.
        shares: [2 num_layers] share of each sub-layer in the weights that a decode step reads.
        norms: see ``store.stack_norms``.
    """

    num_layers: int
    hidden_size: int
    shares: list[float]
    norms: Tensor

    @classmethod
    def of(cls, name: str) -> ModelFacts:
        """Load the model ``name`` and look."""
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        config, layers = model.config, model.model.layers
        experts = getattr(config, "num_experts", None) or 1  # of which a token reads a few
        used = getattr(config, "num_experts_per_tok", None) or 1

        def size(module: nn.Module) -> float:
            return sum(
                weight.numel() * (used / experts if "experts" in name else 1)
                for name, weight in module.named_parameters()
            )

        sizes = [size(module) for layer in layers for module in (layer.self_attn, layer.mlp)]
        whole = sum(sizes) + model.lm_head.weight.numel()
        norms = [n for x in layers for n in (x.input_layernorm, x.post_attention_layernorm)]
        return cls(
            len(layers),
            config.hidden_size,
            [one / whole for one in sizes],
            stack_norms([norm.weight for norm in (*norms, model.model.norm)]),
        )


class Acceptance:
    """Greedy acceptance of a model's drafts on texts that the model writes itself."""

    def __init__(self, model: str, prompts: Sequence[str], num_tokens: int = 64) -> None:
        """Let ``model`` continue each prompt by ``num_tokens`` tokens, greedily."""
        AttentionInterface.register(_NAME, self._attend)
        self._keys: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by layer and first row
        self._recording = True
        tokenizer = AutoTokenizer.from_pretrained(model)
        # On a GPU in the checkpoint's precision; a CPU computes float32 best.
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if self._device.type == "cuda" else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self._device)
        texts = [self._continue(tokenizer.encode(prompt), num_tokens) for prompt in prompts]
        longest = max(len(text) for text in texts)
        self._tokens = torch.tensor(
            [text + [0] * (longest - len(text)) for text in texts], device=self._device
        )
        heads = self._model.config.num_attention_heads
        self._rows = max(MOST_SCORES // (heads * longest**2), 1)  # in one pass
        self._first_row = 0
        self._counted = torch.zeros_like(self._tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            self._counted[row, len(text) - num_tokens : len(text) - 1] = True
        self._layers = list(self._model.model.layers)
        self._model.set_attn_implementation(_NAME)
        self._predicted = self._predict()
        self._recording = False

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._layers)

    def __call__(self, skipped: frozenset[int]) -> float:
        """The share of positions where the draft that skips these layers predicts what the model does."""
        kept = [layer for i, layer in enumerate(self._layers) if i not in skipped]
        self._model.model.layers = nn.ModuleList(kept)
        self._model.config.num_hidden_layers = len(kept)
        same = self._predict() == self._predicted
        return float(same.float().mean())

    def of_sublayers(self, skipped: frozenset[int]) -> float:
        """The same for sub-layers: ``2 i`` is the attention of layer ``i``, ``2 i + 1`` its MLP."""
        handles = []
        try:
            for item in skipped:
                layer = self._layers[item // 2]
                module = layer.mlp if item % 2 else layer.self_attn
                handles.append(module.register_forward_hook(_nothing))
            return self(frozenset())
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def _continue(self, prompt: list[int], num_tokens: int) -> list[int]:
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        given = torch.tensor([prompt], device=self._device)
        tokens: list[int] = self._model.generate(given, pad_token_id=0, **settings)[0].tolist()
        return tokens

    @torch.inference_mode()
    def _predict(self) -> Tensor:
        """[counted positions] tokens."""
        found = []
        for first in range(0, len(self._tokens), self._rows):
            self._first_row, rows = first, slice(first, first + self._rows)
            hidden = self._model.model(self._tokens[rows], use_cache=False).last_hidden_state
            found.append(self._model.lm_head(hidden[self._counted[rows]]).argmax(-1))
        return torch.cat(found)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        """[batch, heads, length, size] attention to the recorded past and the position's own key."""
        place = module.layer_idx, self._first_row
        if self._recording:
            self._keys[place] = key, value
        groups = query.shape[1] // key.shape[1]
        past_key, past_value, key, value = (
            heads.repeat_interleave(groups, 1) for heads in (*self._keys[place], key, value)
        )
        scores = query @ past_key.transpose(2, 3) * scaling
        length = scores.shape[-1]
        before = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril(-1)
        if more.get("sliding_window") is not None:
            before = before.triu(1 - more["sliding_window"])
        scores = scores.masked_fill(~before, -torch.inf)
        own = (query * key).sum(-1, keepdim=True) * scaling
        weights = torch.cat((scores, own), -1).softmax(-1)
        mixed = weights[..., :-1] @ past_value + weights[..., -1:] * value
        return mixed.transpose(1, 2).contiguous(), None
