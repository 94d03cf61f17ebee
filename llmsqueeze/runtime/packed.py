"""A module for every form in which weights lie for a kernel. What becomes of which linear: see linears."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmsqueeze.numerics import gaps, int8, mixed24, outputs24, panels, sparse24
from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import input_major, linear, round_down
from llmsqueeze.runtime.gates import Gate
from llmsqueeze.runtime.sealed import refusal

# Below, reading where the zeros are costs nearly what they saved.
LEAST_SPARSITY = 0.4


class PackedLinear(nn.Module):  # type: ignore[misc]
    """y = W x + b for [out_features, in_features] weights that exist only in a kernel's layout.

    glu: rows are ops.in_pairs() of a gate's and an up projection's, and y is ops.swiglu() of the product.
    residual, in forward: [..., out_features], which is added before y is rounded; None: nothing.
    """

    format: ClassVar[str]
    pairs: ClassVar[bool] = True  # whether glu gains anything

    def __init__(self, weight: Tensor, bias: Tensor | None, *, glu: bool = False) -> None:
        super().__init__()
        self.glu = glu
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias, persistent=False)
        self.register_state_dict_pre_hook(_refuse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Sparse24Linear(PackedLinear):
    """At most two non-zeros in four: for sparse tensor cores. stream: see numerics.sparse24."""

    format = "2:4"
    stream: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, glu: bool = False) -> None:
        super().__init__(weight, bias, glu=glu)
        self.register_buffer("stream", sparse24.pack(weight), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.sparse24_linear(
            x, self.stream, added(self.bias, residual), self.out_features, self.glu
        )
        return y


class Mixed24Linear(PackedLinear):
    """2:4 in most places and dense in others, as PATCH leaves weights. Buffers: see numerics.mixed24."""

    format = "2:4 and dense"
    pairs = False  # rows in turns would mix the tiles of one matrix with those of the other
    stream: Tensor
    entries: Tensor
    metadata: Tensor
    starts: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, glu: bool = False) -> None:
        super().__init__(weight, bias, glu=glu)
        for name, part in vars(mixed24.pack(weight)).items():
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.mixed24_linear(
            x, self.stream, self.entries, self.metadata, self.starts, added(self.bias, residual),
            self.out_features, self.glu,
        )  # fmt: skip
        return y


class GapLinear(PackedLinear):
    """Zeros anywhere: non-zeros and the gaps between them. Buffers and shape: see numerics.gaps.Gaps."""

    format = "gaps"
    stream: Tensor
    starts: Tensor
    first: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, glu: bool = False) -> None:
        super().__init__(weight, bias, glu=glu)
        packed = gaps.pack_best(weight, _multiprocessors(weight.device), 16 if glu else 1)
        self.register_buffer("stream", packed.stream, persistent=False)
        self.register_buffer("starts", packed.starts, persistent=False)
        self.register_buffer("first", packed.first, persistent=False)
        self.register_buffer("order", packed.moved(), persistent=False)
        self.shape = packed.arguments()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.gap_linear(
            x, self.stream, self.starts, self.first, self.order, added(self.bias, residual),
            self.out_features, *self.shape, self.glu,
        )  # fmt: skip
        return y


class Int8Linear(PackedLinear):
    """Eight bits a weight. codes: [out, in], input-major; scale: [out]; see numerics.int8."""

    format = "int8"
    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, glu: bool = False) -> None:
        super().__init__(weight, bias, glu=glu)
        codes, largest = int8.encode(narrowed(weight))
        self.register_buffer("codes", input_major(codes), persistent=False)
        self.register_buffer("scale", int8.scales(largest), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.int8_linear(
            x, self.codes, self.scale, added(self.bias, residual), self.glu
        )
        return y


class BitmaskLinear(PackedLinear):
    """Zeros anywhere, for a CPU: as on disk. values, mask, row_offsets: see numerics.packing."""

    format = "bitmask"
    pairs = False
    values: Tensor
    mask: Tensor
    row_offsets: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, parts: dict[str, Tensor] | None = None
    ) -> None:
        """parts: of the weight by name, if it was packed before; then it may be an empty one."""
        super().__init__(weight, bias)
        if parts is None:
            names = ("values", "mask", "row_offsets")
            parts = dict(zip(names, pack_bitmask(narrowed(weight)), strict=True))
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.bitmask_linear(
            x, self.values, self.mask, self.row_offsets, self.bias
        )
        return y if residual is None else y + residual


class DenseLinear(PackedLinear):
    """Few zeros, for a CPU: as on disk, in 16 bits or fp32, whatever the model computes in."""

    format = "dense"
    pairs = False
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.dense_linear(x, self.weight, self.bias)
        return y if residual is None else y + residual


class StoredInt8Linear(PackedLinear):
    """Eight bits a weight, for a CPU: as on disk. codes: [out, in]; scale: see numerics.int8."""

    format = "int8"
    pairs = False
    codes: Tensor
    scale: Tensor

    def __init__(self, bias: Tensor | None, codes: Tensor, largest: Tensor) -> None:
        super().__init__(codes, bias)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", int8.scales(largest), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        none = self.scale[:0]
        y: Tensor = torch.ops.llmsqueeze.linears(
            x, None, 0.0, [self.codes], [none], [none], [self.scale], self.bias, residual
        )
        return y


class StoredEmbedding(nn.Module):  # type: ignore[misc]
    """An embedding as on disk, whose rows come out in dtype."""

    weight: Tensor

    def __init__(self, weight: Tensor, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.padding_idx, self.dtype = padding_idx, dtype
        self.register_buffer("weight", weight, persistent=False)
        self.register_state_dict_pre_hook(_refuse)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight, self.padding_idx).to(self.dtype)


class GatedProduct(nn.Module):  # type: ignore[misc]
    """What the linears behind a gate put out, one after another: [rows, columns] weights, all of them.

    forward: of tokens that the gate has to itself. rows: of inputs that were gated already, some outputs.
    glu, residual: as in PackedLinear.
    """

    format = "gated"
    pairs = True
    weight: Tensor
    limit: Tensor

    def __init__(
        self,
        gate: Gate,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None,
        *,
        glu: bool = False,
    ) -> None:
        super().__init__()
        self.gate, self.glu = gate, glu
        self.out_features, self.in_features = weight.shape
        self.register_buffer("limit", _compact(gate.threshold, weight.dtype), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.store(weight)

    def store(self, weight: Tensor) -> None:
        self.register_buffer("weight", input_major(narrowed(weight)), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.gated_linear(
            x, self.limit, self.weight, added(self.bias, residual), self.up, self.gate.down,
            self.glu,
        )  # fmt: skip
        return y

    def rows(self, x: Tensor, begin: int, end: int, bias: Tensor | None) -> Tensor:
        return linear(x, self.weight[begin:end], bias)


class GatedInt8Product(GatedProduct):
    """With weights of eight bits; see Int8Linear."""

    format = "gated int8"
    codes: Tensor
    scale: Tensor

    def store(self, weight: Tensor) -> None:
        codes, largest = int8.encode(narrowed(weight))
        self.register_buffer("codes", input_major(codes), persistent=False)
        self.register_buffer("scale", int8.scales(largest), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.gated_int8_linear(
            x, self.limit, self.codes, self.scale, added(self.bias, residual), self.up,
            self.gate.down, self.glu,
        )  # fmt: skip
        return y

    def rows(self, x: Tensor, begin: int, end: int, bias: Tensor | None) -> Tensor:
        codes, scale = self.codes[begin:end], self.scale[begin:end]
        y: Tensor = torch.ops.llmsqueeze.int8_linear(x, codes, scale, bias)
        return y


class Gated24Product(GatedProduct):
    """With weights that are 2:4 along the outputs. Buffers: see numerics.outputs24.Columns."""

    format = "gated 2:4-out"
    values: Tensor
    keep: Tensor
    index: Tensor | None

    def store(self, weight: Tensor) -> None:
        packed = outputs24.pack(weight)
        self.register_buffer("values", packed.values, persistent=False)
        self.register_buffer("keep", packed.keep, persistent=False)
        self.register_buffer("index", packed.index, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.gated_24_linear(
            x, self.limit, self.values, self.keep, self.index, added(self.bias, residual), self.up,
            self.gate.down, self.out_features, self.glu,
        )  # fmt: skip
        return y

    def rows(self, x: Tensor, begin: int, end: int, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.outputs24_linear(
            x, self.values, self.keep, self.index, bias, begin, end
        )
        return y


class GatedBitmaskProduct(GatedProduct):
    """With weights that have zeros anywhere, for a CPU. Buffers: see numerics.panels.Panels."""

    format = "gated bitmask"
    values: Tensor
    mask: Tensor
    row_offsets: Tensor

    def store(self, weight: Tensor) -> None:
        for name, part in vars(panels.pack(narrowed(weight))).items():
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.gated_bitmask_linear(
            x, self.limit, self.values, self.mask, self.row_offsets, added(self.bias, residual),
            self.up, self.gate.down, self.out_features, self.glu,
        )  # fmt: skip
        return y

    def rows(self, x: Tensor, begin: int, end: int, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.llmsqueeze.panels_linear(
            x, self.values, self.mask, self.row_offsets, bias, begin, end
        )
        return y


def added(bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """What an operator adds to its product."""
    if bias is None or residual is None:
        return bias if residual is None else residual
    return bias + residual


def _compact(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The same thresholds in fewer bytes, since every block of a kernel reads them: one if they are equal."""
    if bool((threshold == threshold[0]).all()):
        return threshold[:1].clone()
    return round_down(threshold, dtype)


def narrowed(weight: Tensor) -> Tensor:
    """The same weight in 16 bits, if they hold it: as before it was loaded in fp32."""
    if weight.element_size() == 2:
        return weight
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return weight.to(dtype)
    return weight


def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 132
    )


def _refuse(*args: Any) -> None:
    raise refusal("saved")
