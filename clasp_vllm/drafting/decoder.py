"""The target model seen as embed, sub-layers and final norm, so that a draft can leave some out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clasp_vllm.skipping.dynamic_program import State
from clasp_vllm.skipping.skip_mask import ATTENTION

LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class UnsupportedArchitectureError(ValueError):
    """The model's layers are not of the form that layer skipping knows how to run one by one."""


class Decoder:
    """A Llama-like decoder of which single sub-layers can be run.

    It holds the target's own modules and no parameters. In this family every sub-layer is
    ``delta, residual = norm(delta, residual); delta = f(delta)`` on a pair whose sum is the hidden
    state, so skipping one means passing the pair on. The pair starts as (embedding, zeros): a
    skipped first layer then takes the same arithmetic path as any other, and running all of them
    gives the target's own result, to the bit where the kernels are the same.
    """

    def __init__(
        self,
        model: nn.Module,
        reference_layers: Iterable[type[nn.Module]],
        reference_models: Iterable[type[nn.Module]],
        works: str,
        view: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Take the decoder out of ``model``, a vLLM causal language model.

        Args:
            model: the loaded target.
            reference_layers: decoder layer classes known to have the form above.
            reference_models: model classes known to do nothing but embed, layers and norm.
            works: the architectures that work, for the error message.
            view: how to look at a module in order to run it by itself.

        Raises:
            UnsupportedArchitectureError: the model has another form.
        """
        reason = _form_error(model, reference_layers, reference_models)
        if reason is not None:
            raise UnsupportedArchitectureError(
                f"layer skipping does not support {type(model).__name__}: {reason}. "
                f"Models that work: {works}. Remove the speculative configuration, or choose "
                "another speculative method for this model."
            )
        inner: Any = model.model
        self.layers: Sequence[Any] = [view(layer) for layer in inner.layers]
        self.num_layers = len(self.layers)
        self._embed = inner.embed_input_ids
        self._norm: Any = view(inner.norm)

    def with_layers(self, view: Callable[[nn.Module], nn.Module]) -> Decoder:
        """The same with another view of every layer."""
        decoder = copy.copy(self)
        decoder.layers = [view(layer) for layer in self.layers]
        return decoder

    def norm_weights(self) -> list[Tensor]:
        """Of the norms before attention and MLP, layer by layer, and of the last: [hidden_size] each."""
        norms = [n for x in self.layers for n in (x.input_layernorm, x.post_attention_layernorm)]
        return [norm.weight for norm in (*norms, self._norm)]

    def embed(self, token_ids: Tensor) -> State:
        """[rows] token ids to the state before the first layer, a pair of [rows, hidden_size]."""
        embedding = self._embed(token_ids)
        return embedding, torch.zeros_like(embedding)

    def run_sublayer(self, layer: int, part: int, positions: Tensor, state: State) -> State:
        """Apply one sub-layer (``ATTENTION`` or ``MLP``). May overwrite ``state``."""
        module = self.layers[layer]
        if part == ATTENTION:
            delta, residual = module.input_layernorm(*state)
            delta = module.self_attn(positions=positions, hidden_states=delta)
        else:
            delta, residual = module.post_attention_layernorm(*state)
            delta = module.mlp(delta)
        return delta, residual

    def run_layer(self, layer: int, positions: Tensor, state: State) -> State:
        """Apply one whole layer. May overwrite ``state``."""
        for part in (0, 1):
            state = self.run_sublayer(layer, part, positions, state)
        return state

    def finish(self, state: State) -> Tensor:
        """The final norm: [rows, hidden_size], what the language-model head takes."""
        hidden: Tensor = self._norm(*state)[0]
        return hidden


def _form_error(
    model: nn.Module, reference_layers: Iterable[type[nn.Module]], reference_models: Iterable[type[nn.Module]]
) -> str | None:
    """Why ``model`` has not the Llama form, or None if it has.

    Judged by the names that each forward refers to: nothing beyond a reference's, and of a layer's four
    parts every one, in their order. A name that is None on the instance is switched off.
    """
    inner: Any = getattr(model, "model", None)
    for name in ("embed_input_ids", "layers", "norm"):
        if not hasattr(inner, name):
            return f"it has no model.{name}"
    unknown = _extra_names(inner, reference_models)
    if unknown:
        return f"{type(inner).__name__}.forward uses {', '.join(unknown)}"
    for layer in inner.layers:
        parameters = list(inspect.signature(type(layer).forward).parameters)[1:4]
        if parameters != ["positions", "hidden_states", "residual"]:
            return f"{type(layer).__name__}.forward takes ({', '.join(parameters)}, ...)"
        unknown = _extra_names(layer, reference_layers)
        if unknown:
            return f"{type(layer).__name__}.forward uses {', '.join(unknown)}"
        used = [name for name in type(layer).forward.__code__.co_names if name in LAYER_PARTS]
        if used != list(LAYER_PARTS):
            return f"{type(layer).__name__}.forward runs {', '.join(used)}"
        if not {"positions", "hidden_states"} <= set(inspect.signature(layer.self_attn.forward).parameters):
            return f"{type(layer.self_attn).__name__}.forward takes no positions or no hidden_states"
    return None


def _extra_names(module: nn.Module | None, references: Iterable[type[nn.Module]]) -> list[str]:
    known = {name for reference in references for name in _names_used(reference)}
    return sorted(
        name
        for name in _names_used(type(module)) - known
        if getattr(module, name, module) is not None  # None on the instance: switched off
    )


def _names_used(cls: type) -> set[str]:
    """The names that a class's forward refers to, and the forwards that it calls by super()."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if "forward" in vars(owner):
            names |= set(vars(owner)["forward"].__code__.co_names)
            if "super" not in names:
                break
            names -= {"super", "forward"}
    return names
