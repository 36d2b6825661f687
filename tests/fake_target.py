"""A target in pure torch with a paged KV cache, for tests of drafting without vLLM.

It stands for a model as vLLM runs it: layers of the Llama form, one query token per row, keys and values in
blocks. Of kernels, devices and a batch that changes it knows nothing: the engine tests have the real thing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.passes import Model

BLOCK = 4  # tokens


class PagedCache:
    """A ``PagedAttention``: keys and values of all layers in blocks."""

    def __init__(self, num_layers: int, num_blocks: int, scratch_block: int, hidden_size: int) -> None:
        self.max_model_len, self.max_rows, self.block_size = 64, 4, BLOCK
        self.scratch_block, self.sink = scratch_block, True
        self.memory = torch.full((num_layers, num_blocks, BLOCK, 2, hidden_size), torch.nan)
        self.rows: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def decode(self, positions: Tensor, block_table: Tensor, max_lengths: Tensor) -> Iterator[None]:
        assert (max_lengths > positions).all()
        before, self.rows = self.rows, (positions, block_table.long())
        try:
            yield
        finally:
            self.rows = before

    def copy_blocks(self, layer: int, source: Tensor, target: Tensor) -> None:
        for row, block in enumerate(source.tolist()):
            self.memory[layer, target[row]] = self.memory[layer, block].clone()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, hidden_size]; each row's key and value are written first."""
        assert self.rows is not None
        results = []
        for position, table, *qkv in zip(*self.rows, query, key, value, strict=True):
            self.memory[layer, table[position // BLOCK], position % BLOCK] = torch.stack(qkv[1:])
        for position, table, q in zip(*self.rows, query, strict=True):
            past = self.memory[layer, table].flatten(0, 1)[: position + 1]
            results.append((past[:, 0] @ q / len(q) ** 0.5).softmax(0) @ past[:, 1])
        return torch.stack(results)


class Norm(nn.Module):
    def forward(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden = delta + residual
        return hidden / hidden.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt(), hidden


class Attention(nn.Module):
    def __init__(self, index: int, size: int, cache: PagedCache) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.index, self.cache = index, cache

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, -1)
        turned = query * (1 + positions[:, None] / 16), key * (1 + positions[:, None] / 16)
        return self.out(self.cache.attend(self.index, *turned, value))


class Layer(nn.Module):
    def __init__(self, index: int, size: int, cache: PagedCache) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = Attention(index, size, cache)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.Tanh(), nn.Linear(2 * size, size))

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class Inner(nn.Module):
    def __init__(self, num_layers: int, vocabulary: int, size: int, cache: PagedCache) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(i, size, cache) for i in range(num_layers))
        self.norm = Norm()

    def embed_input_ids(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden_states = self.embed_input_ids(tokens)
        residual = torch.zeros_like(hidden_states)
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Target(nn.Module):
    """Requests whose prompts have been read, each with blocks of its own."""

    def __init__(
        self, prompts: list[list[int]], num_layers: int = 6, scratch: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width, blocks = 8, 1 + 8 * len(prompts)
        self.cache = PagedCache(num_layers, blocks + scratch, blocks, 16)
        self.model = Inner(num_layers, 32, 16, self.cache)
        self.head = nn.Linear(16, 32, bias=False)
        self.tables = 1 + torch.arange(width * len(prompts), dtype=torch.int32).view(-1, width)
        self.prompts = prompts
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt[:-1]):
                self.run(row, token, position)

    @torch.inference_mode()
    def run(self, row: int, token: int, position: int) -> Tensor:
        """[vocabulary] logits after a token of a request."""
        positions = torch.tensor([position])
        with self.cache.decode(positions, self.tables[row : row + 1], positions + 1):
            return self.head(self.model(torch.tensor([token]), positions))[0]

    def continuation(self, row: int, count: int) -> list[int]:
        """What the target says greedily."""
        tokens, prompt = [], self.prompts[row]
        token, position = prompt[-1], len(prompt) - 1
        for _ in range(count):
            token = int(self.run(row, token, position).argmax())
            tokens.append(token)
            position += 1
        return tokens

    def batch(self) -> SequenceBatch:
        """All requests, about to be drafted for."""
        positions = torch.tensor([len(prompt) - 1 for prompt in self.prompts])
        return SequenceBatch(
            [str(row) for row in range(len(self.prompts))],
            torch.tensor([prompt[-1] for prompt in self.prompts]),
            positions,
            self.tables,
            (positions + 1).int(),
        )

    def decoder(self) -> Decoder:
        return Decoder(self, [Layer], [Inner], "the fake")

    def rounded(self, step: float) -> Model:
        """The target with its weights rounded to multiples of ``step``, over the same cache."""

        def view(module: nn.Module) -> nn.Module:
            rounded = copy.deepcopy(module, {id(self.cache): self.cache})
            for weight in rounded.parameters():
                weight.data = (weight.data / step).round() * step
            return rounded

        return Model(self.decoder().with_layers(view), view(self.head))
