"""Where the tokens of a cache stand, and how the model's rotary embedding turns what stands there.

A cache is handed keys after the rotation and without positions. Both are seen where they arise: in the
model's own rotary module, once in every forward pass.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Types whose frequencies depend on how long the text has become.
_MOVING = ("dynamic", "longrope")


class Rope:
    """The rotary embedding of a model. One per rotary module; rope_of makes it.

    seen: layer type (None where the model has one embedding for all) → position ids, cos and sin of the
    forward pass that goes on.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self.seen: dict[str | None, tuple[Tensor, Tensor, Tensor]] = {}
        types = getattr(module, "rope_type", "default")
        self.by_layer = isinstance(types, dict)
        kinds = types.values() if isinstance(types, dict) else [types]
        self.moving = any(kind in _MOVING for kind in kinds)
        module.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: Any, out: tuple[Tensor, Tensor]) -> None:
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        self.seen[given.get("layer_type")] = (given["position_ids"], *out)

    def at(self, ids: Tensor, layer_type: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, tokens, R] at these positions, rounded to `dtype` as the model rounds them.

        Where frequencies depend on the length, those of the longest position in ids: all keys are turned
        as if the text were read anew.
        """
        if self.moving:
            return self._compute(ids, layer_type, dtype)
        wanted = int(ids.max()) + 1 if ids.numel() else 1
        key = (layer_type, dtype, ids.device)
        cos, sin = self._tables.get(key, (None, None))
        if cos is None or sin is None or len(cos) < wanted:
            positions = torch.arange(2 * wanted, device=ids.device)[None]
            cos, sin = (part[0] for part in self._compute(positions, layer_type, dtype))
            self._tables[key] = cos, sin
        if ids.shape[0] == 1 and bool(
            (ids[0] == torch.arange(ids.shape[1], device=ids.device)).all()
        ):
            return cos[None, : ids.shape[1]], sin[None, : ids.shape[1]]
        return cos[ids.long()], sin[ids.long()]

    def _compute(
        self, ids: Tensor, layer_type: str | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        module: Any = self._module()
        probe = torch.empty(1, dtype=dtype, device=ids.device)
        # forward(), not the call: this is not a pass of the model, and must not be seen as one.
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = (
                module.forward(probe, ids, layer_type)
                if self.by_layer
                else module.forward(probe, ids)
            )
        return found


_ropes: weakref.WeakKeyDictionary[nn.Module, Rope] = weakref.WeakKeyDictionary()


def rope_of(model: nn.Module) -> Rope | None:
    """The rotary embedding of a model; None for one that has learned positions."""
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            if module not in _ropes:
                _ropes[module] = Rope(module)
            return _ropes[module]
    return None


class Positions:
    """Position ids of all tokens in a cache, [batch, tokens] int32, shared by its layers.

    Of a model without rotary embedding: counted from the beginning of every row, padding included.
    window: of the layers, before whose next tokens all but the last window - 1 are forgotten; 0: none is.
    """

    def __init__(self, rope: Rope | None, layer_type: str | None = None, window: int = 0) -> None:
        self.rope = rope
        self.window = window
        self.layer_type = layer_type if rope and rope.by_layer else None
        self.ids: Tensor | None = None
        self._arrived: Tensor | None = None
        self._newcomers: list[tuple[int, Tensor, Tensor]] = []
        self._all: tuple[Tensor, Tensor] | None = None
        self._first: tuple[Tensor, Tensor, Tensor] | None = None

    def append(self, batch: int, length: int, device: torch.device) -> None:
        """Take the positions of `length` tokens that the model is about to cache."""
        if self.rope is None:
            new = torch.arange(length, device=device)[None]
            if self.ids is not None and self.ids.shape[1]:
                new = new + self.ids[:, -1:] + 1
        else:
            new = self.rope.seen[self.layer_type][0].to(device)
            if new.shape[-1] != length:
                raise RuntimeError(f"{length} keys came with positions of shape {tuple(new.shape)}")
        new = new.int().expand(batch, -1)
        self._arrived = new
        if self.ids is not None and self.window:
            self.ids = self.ids[:, max(self.ids.shape[1] - self.window + 1, 0) :]
        self.change(new.clone() if self.ids is None else torch.cat([self.ids, new], dim=1))

    def arrived(self, count: int) -> list[tuple[int, Tensor, Tensor]]:
        """Of the newest tokens, every position below `count`: it, the rows that have it, where they do.

        Padding may claim a position too; the later token counts.
        """
        if self._arrived is not None:
            new, self._arrived = self._arrived, None
            self._newcomers = []
            for position in range(count) if bool((new < count).any()) else ():
                here = new == position
                rows = here.any(dim=1).nonzero()[:, 0]
                last = new.shape[1] - 1 - here[rows].int().flip(1).argmax(dim=1)
                self._newcomers.append((position, rows, last))
        return self._newcomers

    def newest(self) -> tuple[Tensor, Tensor]:
        """cos and sin [batch or 1, 1, tokens, R] that the model turned the newest keys with."""
        assert self.rope is not None
        _, cos, sin = self.rope.seen[self.layer_type]
        return cos.float()[:, None], sin.float()[:, None]

    def all(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [batch or 1, 1, tokens, R] of every token in the cache."""
        assert self.rope is not None and self.ids is not None
        if self._all is None:
            ids = self.ids[:1] if bool((self.ids == self.ids[:1]).all()) else self.ids
            cos, sin = self.rope.at(ids, self.layer_type, dtype)
            self._all = cos.float()[:, None], sin.float()[:, None]
        return self._all

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, place in the row and position of every token whose position is below `count`."""
        assert self.ids is not None
        if self._first is None:
            rows, places = (self.ids < count).nonzero(as_tuple=True)
            self._first = rows, places, self.ids[rows, places].long()
        return self._first

    def change(self, ids: Tensor | None) -> None:
        """Other rows, or fewer tokens."""
        self.ids, self._all, self._first = ids, None, None
