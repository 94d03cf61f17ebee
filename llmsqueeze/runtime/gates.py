"""Linears that read only the inputs whose magnitude exceeds a threshold.

A Gate belongs to a vector: every linear fed by that vector shares it. Which tokens of a forward pass are
gated is the model's Policy: one token alone (decoding) always is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.activation import ActivationRecord, thresholds
from llmsqueeze.ops import keep_above, round_down
from llmsqueeze.policy import Policy

# Up to so many rows the whole linear is one operator, which a kernel may replace; beyond, what a gate
# drops is zeroed and the product is an ordinary one: rows that keep different inputs share no savings.
SPARSE_ROWS = 2


class Gating:
    """What the gates of one model share.

    policy: see Policy. counting: whether gates add up what they keep. length: tokens of the current
    pass.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.counting = False
        self.length = 1
        self.gates: dict[str, Gate] = {}

    def count(self, on: bool = True) -> None:
        """Start counting from zero, or stop."""
        self.counting = on
        for gate in self.gates.values():
            gate.kept, gate.seen = None, 0

    def sparsity(self) -> dict[str, float]:
        """The share of inputs that each gate dropped since count(); gates that saw no token are absent."""
        return {
            name: 1 - int(gate.kept) / gate.seen
            for name, gate in self.gates.items()
            if gate.kept is not None
        }


class Gate(nn.Module):  # type: ignore[misc]
    """The threshold of one vector. threshold: [in] fp32; down: [rank, in] or None, see ops.gated_linear."""

    threshold: Tensor
    down: Tensor | None

    def __init__(self, gating: Gating, threshold: Tensor, down: Tensor | None = None) -> None:
        super().__init__()
        self.gating = gating
        self.kept: Tensor | None = None
        self.seen = 0
        self.register_buffer("threshold", threshold, persistent=False)
        self.register_buffer("down", down, persistent=False)
        # Looking up a buffer costs as much as comparing a short vector: not when there is none.
        self.branched = down is not None
        self._rounded: tuple[Tensor, int, Tensor] | None = None
        self._last: tuple[weakref.ref[Tensor], Tensor, Tensor | None] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        threshold = self.threshold
        super()._apply(fn, recurse)
        # Casting a model must not round thresholds: only their device follows.
        self.threshold = threshold.to(self.threshold.device)
        return self

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the weights see of x, and down · (x - that) if there is a low-rank branch.

        Linears fed by the same tensor call in turn: the work is done once.
        """
        if self._last is not None and self._last[0]() is x and not torch.is_grad_enabled():
            return self._last[1], self._last[2]
        kept = self._apply_gate(x)
        side = (x - kept) @ self.down.t() if self.branched and self.down is not None else None
        self._last = None if torch.compiler.is_compiling() else (weakref.ref(x), kept, side)
        return kept, side

    def whole(self, x: Tensor) -> bool:
        """Whether every token of x is gated, and there are few enough for one operator to do it all."""
        length = self.gating.length if x.dim() == 2 else x.shape[-2]
        few = x.numel() <= SPARSE_ROWS * x.shape[-1]
        return few and not self.gating.counting and self.gating.policy.first_gated(length) == 0

    def release(self) -> None:
        """Forget the tensors that were kept for the next linear of the same input."""
        self._last = None

    def _apply_gate(self, x: Tensor) -> Tensor:
        length = self.gating.length if x.dim() == 2 else x.shape[-2]
        first = self.gating.policy.first_gated(length)
        if first >= length:
            return x
        if first == 0 and not self.gating.counting:
            return self._gated(x)
        # Some models flatten samples and tokens on their way to the MLP.
        shaped = x.reshape(-1, length, x.shape[-1])
        gated = self._gated(shaped)
        if self.gating.counting:
            kept = torch.count_nonzero(gated[:, first:])
            self.kept = kept if self.kept is None else self.kept + kept
            self.seen += gated[:, first:].numel()
        if first:
            gated[:, :first] = shaped[:, :first]
        return gated.reshape(x.shape)

    def _gated(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            gated: Tensor = torch.ops.llmsqueeze.gate(x, self.threshold)
            return gated
        return keep_above(x, self._limit(x.dtype))

    def _limit(self, dtype: torch.dtype) -> Tensor:
        """The threshold in `dtype`; made again when it was changed."""
        made = self._rounded
        threshold = self.threshold
        if (
            made is None
            or made[0] is not threshold
            or made[1] != threshold._version
            or (made[2].dtype != dtype)
        ):
            made = self._rounded = (threshold, threshold._version, round_down(threshold, dtype))
        return made[2]


class GatedLinear(nn.Linear):  # type: ignore[misc]
    """A linear behind a gate. last: whether no other linear reads the same tensor after this one."""

    def __init__(self, linear: nn.Linear, gate: Gate, up: Tensor | None, *, last: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.gate = gate
        self.last = last
        self.register_buffer("up", up, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate
        if torch.compiler.is_compiling() and gate.whole(x):
            fused: Tensor = torch.ops.llmsqueeze.gated_linear(
                x, gate.threshold, self.weight, self.bias, self.up, gate.down
            )
            return fused
        kept, side = gate.split(x)
        if self.last:
            gate.release()
        y = nn.functional.linear(kept, self.weight, self.bias)
        return y if side is None or self.up is None else y + side @ self.up.t()


class GatedOutput(nn.Module):  # type: ignore[misc]
    """An activation function whose result is gated: CHESS."""

    def __init__(self, function: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.function = function
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        kept, _ = self.gate.split(self.function(x))
        self.gate.release()
        return kept


@dataclass(frozen=True)
class GateParts:
    """One gate to install. Names are relative to the module it is installed in.

    kind "input": `members`, linears fed by one tensor, read it gated, in the order of their calls;
    ups: member → [out, rank]. kind "output": what module `at` puts out is gated.
    """

    kind: str
    at: str
    members: tuple[str, ...]
    threshold: Tensor
    down: Tensor | None = None
    ups: dict[str, Tensor] | None = None


def install(
    root: nn.Module, parts: dict[str, GateParts], policy: Policy, blocks: Iterable[nn.Module]
) -> Gating:
    """Put gates into a model or block. blocks: the decoder blocks, which tell how long a pass is."""
    gating = Gating(policy)
    for name, part in parts.items():
        weight = root.get_submodule(part.members[0]).weight
        assert isinstance(weight, Tensor)
        down = None if part.down is None else part.down.to(weight)
        gate = Gate(gating, part.threshold.to(weight.device), down)
        gating.gates[name] = gate
        if part.kind == "output":
            _replace(root, part.at, GatedOutput(root.get_submodule(part.at), gate))
            continue
        for member in part.members:
            linear = root.get_submodule(member)
            assert isinstance(linear, nn.Linear)
            up = part.ups[member].to(weight) if part.ups else None
            last = member == part.members[-1]
            _replace(root, member, GatedLinear(linear, gate, up, last=last))
    hook = _Length(gating)
    for block in blocks:
        block.register_forward_pre_hook(hook, with_kwargs=True)
    return gating


def parts_of(record: ActivationRecord, tensors: dict[str, Tensor]) -> dict[str, GateParts]:
    """The gates of a checkpoint, as its manifest and side tensors give them."""
    parts = {}
    for name, gate in record.gates.items():
        ups = {member: tensors[f"{member}.up"] for member in gate.members} if gate.rank else None
        parts[name] = GateParts(
            gate.kind,
            name,
            gate.members,
            thresholds(gate.threshold, tensors[f"{name}.scale"]),
            tensors.get(f"{name}.down"),
            ups,
        )
    return parts


def gating_of(model: nn.Module) -> Gating | None:
    """The gating of a model that has gates."""
    for module in model.modules():
        if isinstance(module, Gate):
            return module.gating
    return None


class _Length:
    """A hook of decoder blocks: how many tokens this pass has. A copy of the model gets its own."""

    def __init__(self, gating: Gating) -> None:
        self.gating = gating

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.gating.length = hidden.shape[1]


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def remove(model: nn.Module) -> None:
    """Take the gates out of a model: what they stood before computes with all of its inputs again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GatedOutput):
            _replace(model, name, module.function)
        elif isinstance(module, GatedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            _replace(model, name, plain)
