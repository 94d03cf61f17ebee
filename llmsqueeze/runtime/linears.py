"""Which linears of a model run on compressed weights, and how they are put in its place.

They are made from dense linears, or from weights that are read for it, one after another, so that no more
than one weight is on the device twice.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import gaps, int8, mixed24, outputs24, sparse24
from llmsqueeze.ops import cpu, in_pairs
from llmsqueeze.runtime import layers, mlp, residual
from llmsqueeze.runtime.backend import missing
from llmsqueeze.runtime.fused import Fused, FusedPart
from llmsqueeze.runtime.gates import GatedLinear
from llmsqueeze.runtime.packed import (
    LEAST_SPARSITY,
    BitmaskLinear,
    GapLinear,
    Gated24Product,
    GatedBitmaskProduct,
    GatedInt8Product,
    GatedProduct,
    Int8Linear,
    Mixed24Linear,
    PackedLinear,
    Sparse24Linear,
    narrowed,
)

# Where both fit: on an H100 int8 was faster at 50 % zeros, but for 4096 × 4096, and gaps at 60 %.
GAPS_BEAT_INT8 = 0.55
# Linears that are fed by one tensor, by their names: one product for all.
FUSED = (("q_proj", "k_proj", "v_proj"), mlp.PAIR)


# A module for a weight, and how it is chosen: by the weight, and whether it is behind a gate.
Kind = type[GatedProduct] | type[PackedLinear]
Choice = Callable[[Tensor, bool], Kind | None]


class GatedPart(nn.Module):  # type: ignore[misc]
    """A linear behind a gate whose weight is part of a GatedProduct: rows begin to end."""

    def __init__(self, fused: Fused, linear: GatedLinear, begin: int, end: int) -> None:
        super().__init__()
        self.fused, self.gate, self.last = fused, linear.gate, linear.last
        self.begin, self.end = begin, end
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: only where there is no other part."""
        gate, product, rows = self.gate, self.fused.product, slice(self.begin, self.end)
        if gate.whole(x):
            return self.fused.outputs(x, self.last, residual)[..., rows]
        kept, side = gate.split(x)
        if self.last:
            gate.release()
        bias = None if product.bias is None else product.bias[rows]
        y: Tensor = product.rows(kept, self.begin, self.end, bias)
        if side is not None and product.up is not None:
            y = y + side @ product.up[rows].t()
        return y if residual is None else y + residual


@dataclass
class Report:
    """What use_kernels did. formats: format → linears; bytes_before, bytes_after: of their weights."""

    formats: Counter[str] = field(default_factory=Counter)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    def add(self, format: str, linears: int, weight: Tensor, module: nn.Module) -> None:
        self.count(format, linears, _bytes(weight), module)

    def count(self, format: str, linears: int, before: int, module: nn.Module) -> None:
        """before: bytes of the weights that a module now has."""
        self.formats[format] += linears
        self.bytes_before += before
        self.bytes_after += sum(_bytes(buffer) for buffer in module.buffers())


def use_kernels(model: nn.Module, device: torch.device | None = None) -> Report:
    """Replace the linears of a loaded model by those that run on compressed weights, in place.

    device: where they are to live; weights are packed there, each on its own. Linears without a gate that
    have fewer zeros than LEAST_SPARSITY, and are not of eight bits, stay as they are, and so does what the
    rest of the model is made of. The model can then no longer be saved or trained.

    Raises EnvironmentFault where there are no kernels, and in a dtype that they do not compute in.
    """
    where = device or next(model.parameters()).device
    return pack_linears(
        model, where, check=_check, choose=on_cpu if where.type == "cpu" else _on_cuda
    )


@torch.no_grad()
def pack_linears(
    model: nn.Module,
    device: torch.device,
    *,
    check: Callable[[torch.dtype, torch.device], None] = lambda dtype, device: None,
    choose: Choice | None = None,
    weight_of: Callable[[str, nn.Linear], Tensor] = lambda name, linear: linear.weight,
) -> Report:
    """use_kernels() without asking whether there are kernels: elsewhere operators run their reference.

    check: called before a linear is replaced, if any is. choose: the module for a weight, and whether it is
    behind a gate; None: it stays. [default: as on a GPU] weight_of: the weight of a linear, by its name too,
    in the dtype that the model computes in.
    """
    choose = choose or _on_cuda
    begun = time.perf_counter()
    report = Report()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owners = [
        (name, module)
        for name, module in model.named_modules()
        if any(isinstance(child, nn.Linear) for child in module.children())
    ]
    for path, owner in owners:
        product = None
        for names in _groups(owner, head):
            linears = [getattr(owner, name) for name in names]
            paths = [f"{path}.{name}" if path else name for name in names]
            found = [weight_of(*each).to(device) for each in zip(paths, linears, strict=True)]
            pairs = bool(path) and names == mlp.PAIR and mlp.is_swiglu(owner) and _alike(found)
            weight, kind = _weight(found, linears[0], pairs, choose)
            if pairs and (kind is None or not kind.pairs):
                pairs = False
                weight, kind = _weight(found, linears[0], pairs, choose)
            del found
            if kind is None:
                continue
            check(weight.dtype, device)
            if pairs:
                product = _pack_pairs(linears, weight, kind, report)
                for name in names:  # the weights can go
                    delattr(owner, name)
                continue
            parts = _pack(linears, weight, kind, report)
            for name, part in zip(names, parts, strict=True):
                setattr(owner, name, part)
        if product is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, mlp.PackedMLP(product, owner.down_proj))
    if device.type == "cpu" and cpu.library() is not None:
        layers.join(model)
    residual.join(model, lambda linear: isinstance(linear, (PackedLinear, GatedPart)))
    report.seconds = time.perf_counter() - begun
    return report


def _weight(
    weights: list[Tensor], first: nn.Linear, pairs: bool, choose: Choice
) -> tuple[Tensor, Kind | None]:
    """The weight of all of them, and the module for it. pairs: see ops.in_pairs."""
    weight = in_pairs(*weights) if pairs else torch.cat(weights)
    return weight, choose(weight, isinstance(first, GatedLinear))


def _alike(weights: list[Tensor]) -> bool:
    """Whether two have about as many zeros: rows in turns take the place of the fuller one."""
    counts = sorted(int(weight.count_nonzero()) for weight in weights)
    return counts[-1] <= 1.05 * counts[0]


def _on_cuda(weight: Tensor, gated: bool) -> Kind | None:
    return _gated_kind(weight) if gated else _packed_kind(weight)


def on_cpu(weight: Tensor, gated: bool) -> Kind | None:
    """The module that reads least."""
    zeros = 1 - int(weight.count_nonzero()) / weight.numel()
    if zeros < GAPS_BEAT_INT8 and int8.fits(narrowed(weight)):
        return GatedInt8Product if gated else Int8Linear
    if zeros >= LEAST_SPARSITY:
        return GatedBitmaskProduct if gated else BitmaskLinear
    return GatedProduct if gated else None


def _packed_kind(weight: Tensor) -> type[PackedLinear] | None:
    """The module for a weight without a gate; None if it is to stay dense."""
    zeros = 1 - int(weight.count_nonzero()) / weight.numel()
    if zeros >= 0.5 and sparse24.fits(weight):
        return Sparse24Linear
    if zeros >= mixed24.LEAST_SPARSE / 2 and mixed24.fits(weight):
        return Mixed24Linear
    # A row's gaps can be counted over so many columns.
    gaps_fit = zeros >= LEAST_SPARSITY and weight.shape[1] <= gaps.MAX_COLUMNS
    if not (gaps_fit and zeros >= GAPS_BEAT_INT8) and int8.fits(weight):
        return Int8Linear
    return GapLinear if gaps_fit else None


def _gated_kind(weight: Tensor) -> type[GatedProduct]:
    """The module for weights behind a gate: the one that reads least."""
    if int8.fits(weight):
        return GatedInt8Product
    return Gated24Product if outputs24.fits(weight) else GatedProduct


def _pack(
    linears: list[nn.Linear],
    weight: Tensor,
    kind: Kind,
    report: Report,
) -> list[nn.Module]:
    """What stands in for linears of one input. weight: of all of them, where it is to live."""
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.to(weight.device) for linear in linears])
    ends = list(itertools.accumulate(linear.out_features for linear in linears))
    starts = [end - linear.out_features for linear, end in zip(linears, ends, strict=True)]
    spans = list(zip(linears, starts, ends, strict=True))
    if issubclass(kind, GatedProduct):
        ups = [linear.up for linear in linears]
        up = None if ups[0] is None else torch.cat([up.to(weight.device) for up in ups])
        gate = linears[0].gate.to(weight.device)
        fused = Fused(kind(gate, weight, bias, up))
        report.add(kind.format, len(linears), weight, fused.product)
        return [GatedPart(fused, *span) for span in spans]
    packed = kind(weight, bias)
    report.add(kind.format, len(linears), weight, packed)
    if len(linears) == 1:
        return [packed]
    fused = Fused(packed)
    return [FusedPart(fused, start, end, last=end == ends[-1]) for _, start, end in spans]


def _pack_pairs(
    linears: list[nn.Linear],
    weight: Tensor,
    kind: Kind,
    report: Report,
) -> PackedLinear | GatedProduct:
    """The product of a gate and an up projection with their activation. weight: of both, in pairs."""

    def pairs(parts: list[Tensor]) -> Tensor:
        return in_pairs(*(part.to(weight.device) for part in parts))

    bias = None if linears[0].bias is None else pairs([linear.bias for linear in linears])
    product: PackedLinear | GatedProduct
    if issubclass(kind, GatedProduct):
        up = None if linears[0].up is None else pairs([linear.up for linear in linears])
        product = kind(linears[0].gate.to(weight.device), weight, bias, up, glu=True)
    else:
        product = kind(weight, bias, glu=True)
    report.add(kind.format, len(linears), weight, product)
    return product


def _groups(owner: nn.Module, head: nn.Module | None) -> list[tuple[str, ...]]:
    """Names of linears in a module that become one, or stand alone. Holds none of them."""
    kinds = {
        name: _kind(child)
        for name, child in owner.named_children()
        if type(child) in (nn.Linear, GatedLinear) and child is not head
    }
    fused = [
        names
        for names in FUSED
        if all(name in kinds for name in names) and len({kinds[name] for name in names}) == 1
    ]
    taken = set(itertools.chain.from_iterable(fused))
    return fused + [(name,) for name in kinds if name not in taken]


def _kind(linear: nn.Linear) -> tuple[Any, ...]:
    """Equal for linears that can be one."""
    gate = linear.gate if isinstance(linear, GatedLinear) else None
    return gate, linear.in_features, linear.bias is None


def _check(dtype: torch.dtype, device: torch.device) -> None:
    if reason := missing(dtype, device):
        raise EnvironmentFault(f"{reason}, or use --backend reference")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
