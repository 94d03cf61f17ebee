"""Greedy decoding with a cache of fixed size, on a GPU every step of it one CUDA graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from llmsqueeze.errors import RecipeError
from llmsqueeze.runtime import attention
from llmsqueeze.runtime.kv_cache import LayerFormat
from llmsqueeze.runtime.tiles import TiledLayer, tiled_layers

# Before a step is captured it runs as it is: kernels are compiled, and libraries take their workspaces.
_WARM_STEPS = 3


class RoomLayer(DynamicLayer):  # type: ignore[misc]
    """What a CPU attends to: so many tokens' room, of which keys and values are the part that is filled.

    A static layer hands out all of it, with a mask that is made anew in every step.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.max_cache_len = length
        self._room: tuple[Tensor, Tensor] | None = None
        self._filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        new = [(*t.shape[:2], self.max_cache_len, t.shape[-1]) for t in (key_states, value_states)]
        if self._room is None or [t.shape for t in self._room] != new:
            self._room = key_states.new_empty(new[0]), value_states.new_empty(new[1])
        self._filled = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._room is not None
        begin, count = self._filled, key_states.shape[-2]
        if begin + count > self.max_cache_len:
            raise RecipeError(f"{begin + count} tokens do not fit {self.max_cache_len}")
        keys, values = self._room
        keys.narrow(2, begin, count).copy_(key_states)
        values.narrow(2, begin, count).copy_(value_states)
        self._filled = begin + count
        self.keys, self.values = (
            keys.narrow(2, 0, begin + count),
            values.narrow(2, 0, begin + count),
        )
        return self.keys, self.values

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    @property
    def nbytes(self) -> int:
        return 0 if self._room is None else sum(t.nbytes for t in self._room)


def fixed_cache(
    model: nn.Module, length: int, formats: Mapping[int, LayerFormat], skip_mass: float = 0.0
) -> Cache:
    """A cache of so many tokens that stays where it is; formats: of the layers that lie in tiles; skip_mass:
    see tiled_layers."""
    # The other layers are as long as the text, those of sliding attention too: transformers' own for those
    # decide in Python whether the window is full, which a graph would remember. The mask hides what slid out.
    count = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr]
    cuda = next(model.parameters()).device.type == "cuda"
    kind: Any = StaticLayer if cuda or formats else RoomLayer
    layers: list[Any] = [kind(length) for _ in range(count)]
    if formats:
        found = tiled_layers(model, formats, length, *attention.over_tiles(model), skip_mass)
        layers = [found.get(index, layer) for index, layer in enumerate(layers)]
        if len(found) < count:
            # Or static layers would get no mask that hides what is not there yet.
            for layer in found.values():
                layer.is_compileable = layer.mixed = True
    return Cache(layers=layers)


class Decoder:
    """Generates one token after another with a causal language model, batch 1.

    length: tokens that prompt and answer may have together. compiled: whether torch.compile fuses what
    lies between the kernels; takes a minute. formats: of the layers whose cache is to lie in tiles, see
    runtime.tiles; EnvironmentFault if there is no kernel for one. skip_mass: see tiled_layers. On a CPU steps
    run one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        *,
        compiled: bool = False,
        formats: Mapping[int, LayerFormat] | None = None,
        skip_mass: float = 0.0,
    ) -> None:
        self.model = model
        self.length = length
        self.device = next(model.parameters()).device
        attention.accept(model)
        self.cache = fixed_cache(model, length, formats or {}, skip_mass)
        parameters = inspect.signature(model.forward).parameters
        # Renamed in transformers 5.24.
        self._options = {"cache" if "cache" in parameters else "past_key_values": self.cache}
        self._forward: Any = (
            torch.compile(model.forward, fullgraph=True) if compiled else model.forward
        )
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if compiled:
            # Layers in tiles make their tables when they are first used: traced, a codebook takes minutes.
            with torch.no_grad():
                model(self._token, **self._options)
            self.cache.reset()
        if self.device.type == "cuda":
            self._capture()

    def cache_bytes(self, tokens: int) -> int:
        """Of so many cached tokens, which a step behind them reads; the cache must have been used."""
        total = 0
        for layer in self.cache.layers:
            if isinstance(layer, TiledLayer):
                total += layer.read_bytes(tokens)
            elif isinstance(layer, RoomLayer):
                total += layer.nbytes * tokens // layer.max_cache_len
            else:
                held = layer.keys.nbytes + layer.values.nbytes
                total += held * tokens // self.length
        return total

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int) -> Iterator[Tensor]:
        """Token ids, [1] each, as they come; prompt: [tokens]. RecipeError if they do not fit."""
        if len(prompt) + count > self.length:
            raise RecipeError(f"{len(prompt)} + {count} tokens do not fit {self.length}")
        self.cache.reset()
        logits = self.model(prompt[None].to(self.device), **self._options, logits_to_keep=1).logits
        self._token.copy_(logits[:, -1:].argmax(-1))
        yield self._token[0].clone()
        for _ in range(count - 1):
            self.step()
            yield self._token[0].clone()

    @torch.no_grad()
    def step(self) -> None:
        """One token further: the work of decoding, and nothing else."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        logits = self._forward(self._token, **self._options).logits
        self._token.copy_(logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_STEPS):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        self._graph = graph
