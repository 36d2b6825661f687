"""How often a draft with some layers skipped predicts the target's next token, at every position at once.

In a round of drafting the past is the target's: a draft's query meets the target's keys and
values of the tokens before it, and its own. One pass over the positions of an answer with an attention of
exactly that form gives the first draft token at each of them. It runs on transformers, because it needs
whole texts and no paged cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from clasp_vllm.calibration.store import stack_norms

_NAME = "exact_past"
BATCH = 8  # prompts answered at once


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


@dataclass
class Text:
    """A prompt and the answer of a model, with what the target makes of it.

    Attributes:
        tokens: [1, length] int64.
        positions: [1, counted] int64, whose next token is drafted.
        past: by layer the keys and values of all tokens, each [1, heads, length, head size].
        logits: [counted, vocabulary], the target's.
    """

    tokens: Tensor
    positions: Tensor
    past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Acceptance:
    """Greedy acceptance of a model's drafts on texts that the model writes itself."""

    def __init__(self, model: str, prompts: Sequence[str], num_tokens: int = 64) -> None:
        """Let ``model`` continue each prompt by ``num_tokens`` tokens, greedily."""
        AttentionInterface.register(_NAME, self._attend)
        tokenizer = AutoTokenizer.from_pretrained(model)
        # On a GPU in the checkpoint's precision; a CPU computes float32 best.
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if self._device.type == "cuda" else torch.float32
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self._device)
        asked = [tokenizer.encode(prompt) for prompt in prompts]
        batches = [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)]
        tokens = [text for batch in batches for text in self._continue(batch, num_tokens)]
        self.layers = list(self.model.model.layers)
        self.model.set_attn_implementation(_NAME)
        self._text, self._positions = Text(torch.empty(0), torch.empty(0)), torch.empty(0)
        self._recording = True
        self.texts = [self._read(text, num_tokens) for text in tokens]
        self._recording = False

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    def __call__(self, skipped: frozenset[int]) -> float:
        """The share of positions where the draft that skips these layers predicts what the model does."""
        kept = [layer for i, layer in enumerate(self.layers) if i not in skipped]
        self.model.model.layers = nn.ModuleList(kept)
        self.model.config.num_hidden_layers = len(kept)
        same = [self.logits(text).argmax(-1) == text.logits.argmax(-1) for text in self.texts]
        return float(torch.cat(same).float().mean())

    def of_sublayers(self, skipped: frozenset[int]) -> float:
        """The same for sub-layers: ``2 i`` is the attention of layer ``i``, ``2 i + 1`` its MLP."""
        handles = []
        try:
            for item in skipped:
                layer = self.layers[item // 2]
                module = layer.mlp if item % 2 else layer.self_attn
                handles.append(module.register_forward_hook(_nothing))
            return self(frozenset())
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def logits(self, text: Text) -> Tensor:
        """[counted, vocabulary], of the draft that the model's layers now are."""
        self._text, self._positions = text, text.positions
        tokens = text.tokens.gather(1, text.positions)
        hidden = self.model.model(tokens, position_ids=text.positions, use_cache=False).last_hidden_state
        logits: Tensor = self.model.lm_head(hidden[0])
        return logits

    @torch.inference_mode()
    def _read(self, tokens: list[int], num_tokens: int) -> Text:
        first, last = len(tokens) - num_tokens, len(tokens) - 1
        positions = torch.arange(len(tokens), device=self._device)[None]
        text = Text(torch.tensor([tokens], device=self._device), positions[:, first:last])
        self._text, self._positions = text, positions
        hidden = self.model.model(text.tokens, use_cache=False).last_hidden_state
        text.logits = self.model.lm_head(hidden[0, first:last])
        return text

    @torch.inference_mode()
    def _continue(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        there = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens, mask = (torch.tensor(rows, device=self._device) for rows in (padded, there))
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        generated = self.model.generate(tokens, attention_mask=mask, pad_token_id=0, **settings)
        return [prompt + row[longest:].tolist() for prompt, row in zip(prompts, generated, strict=True)]

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        """Attention of [batch, heads, queries, size] to the recorded past and the position's own key."""
        if self._recording:
            self._text.past[module.layer_idx] = key, value
        groups = query.shape[1] // key.shape[1]
        past_key, past_value, key, value = (
            heads.repeat_interleave(groups, 1) for heads in (*self._text.past[module.layer_idx], key, value)
        )
        scores = query @ past_key.transpose(2, 3) * scaling
        ago = self._positions[0, :, None] - torch.arange(scores.shape[-1], device=scores.device)
        before = ago > 0
        if more.get("sliding_window") is not None:
            before &= ago < more["sliding_window"]
        scores = scores.masked_fill(~before, -torch.inf)
        own = (query * key).sum(-1, keepdim=True) * scaling
        weights = torch.cat((scores, own), -1).softmax(-1)
        mixed = weights[..., :-1] @ past_value + weights[..., -1:] * value
        return mixed.transpose(1, 2).contiguous(), None
