"""How fast a whole model decodes on a GPU, compressed and dense, in one harness. On a CPU: see bench_cpu."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from llmsqueeze import ops
from llmsqueeze.bench import Timing, relative_error
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.evaluate import cache_options
from llmsqueeze.ops import packed_append, packed_attention
from llmsqueeze.runtime import attention, layers, load
from llmsqueeze.runtime.gates import gating_of, remove
from llmsqueeze.runtime.generate import Decoder, fixed_cache
from llmsqueeze.runtime.kv_cache import LayerFormat
from llmsqueeze.runtime.linears import use_kernels
from llmsqueeze.runtime.packed import GatedProduct, PackedLinear

STEPS, REPEATS = 32, 7
# ‖y - reference‖ / ‖reference‖ of an operator's result; both round to 16 bits, each by 1.7e-3. Logits are no
# measure: of SmolLM2-135M in bf16 they are 1 to 5 % off fp32 when it was pruned, and 20 to 25 % with gates,
# where an input near its threshold counts in one precision and not in the other.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Speed:
    """Of one model. step: milliseconds a token; prefill: of a whole prompt; weights: bytes on the device;
    read: of them and of the KV cache, by one decoded token behind the prompt; cache: of the latter alone;
    resident, peak: on a CPU, bytes of memory that its process holds, and held at most."""

    step: Timing
    prefill: Timing
    weights: int
    read: int
    cache: int
    load_seconds: float
    resident: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A compressed model beside the same weights made dense. error: the largest of an operator, on what it
    met while decoding; logit_error: against the dense model with the same gates, in the same dtype;
    same_tokens: how many of the first greedy tokens agree. dense_dtype, slower_dense: on a CPU, what the
    dense model was fastest in, and how fast it was otherwise."""

    dense: Speed
    compressed: Speed
    error: float
    logit_error: float
    same_tokens: int
    tokens: int
    formats: dict[str, int]
    dense_dtype: torch.dtype | None = None
    slower_dense: Speed | None = None

    @property
    def speedup(self) -> float:
        return self.dense.step.median / self.compressed.step.median

    @property
    def bound(self) -> float:
        """How many times fewer bytes a token reads."""
        return self.dense.read / self.compressed.read


def compare(
    checkpoint: Checkpoint,
    prompt: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiled: bool,
    skip_mass: float = 0.0,
    note: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Greedy decoding behind a prompt [tokens]; batch 1. skip_mass: what attention may leave out, see
    runtime.tiles. EnvironmentFault if the compressed one is wrong."""
    length = len(prompt) + STEPS * (REPEATS + 1) + 1
    note("dense")
    began = time.perf_counter()
    model = load(checkpoint, dtype, device)
    seconds = time.perf_counter() - began
    expected = last_logits(model, prompt)
    gated = gating_of(model) is not None
    if gated:
        remove(model)
    dense, tokens = _speed(model, prompt, length, seconds, compiled)
    del model
    _free()
    note("compressed")
    began = time.perf_counter()
    model = load(checkpoint, dtype, device)
    report = use_kernels(model)
    seconds = time.perf_counter() - began
    logit_error = relative_error(last_logits(model, prompt), expected)
    attention.accept(model)
    error, operator = operator_error(model, prompt)
    if not error <= TOLERANCE:
        raise EnvironmentFault(f"{operator}: wrong result on this GPU (relative error {error:.2g})")
    formats = getattr(model, "llmsqueeze_kv_formats", None)
    compressed, others = _speed(model, prompt, length, seconds, compiled, formats, skip_mass)
    same = agreement(tokens, others)
    return Comparison(
        dense, compressed, error, logit_error, same, len(tokens), dict(report.formats)
    )


def agreement(one: list[int], other: list[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def formats_of(model: nn.Module) -> dict[str, int]:
    """Format → how many modules hold weights in it."""
    found = [m for m in model.modules() if isinstance(m, (PackedLinear, GatedProduct))]
    return dict(Counter(module.format for module in found))


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that decoding one token reads: of embeddings that are no head, one row."""
    head: Any = model.get_output_embeddings()
    total = 0.0
    seen: set[int] = set()
    gating = gating_of(model)
    shares = {id(gate): name for name, gate in gating.gates.items()} if gating else {}
    for module in model.modules():
        kept = 1.0
        if isinstance(module, GatedProduct) and gating:
            kept = 1 - gating.sparsity().get(shares[id(module.gate)], 0.0)
        held = [*module.parameters(recurse=False)]
        if isinstance(module, (PackedLinear, GatedProduct)):
            held += [b for b in module.buffers(recurse=False) if b is not None]
        for tensor in held:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            looked_up = isinstance(module, nn.Embedding) and tensor is not head.weight
            size: float = tensor.numel() * tensor.element_size()
            if (
                isinstance(tensor, nn.Parameter) and tensor.dim() == 3
            ):  # of experts: those that are chosen
                size *= model.config.num_experts_per_tok / tensor.shape[0]
            total += size / tensor.shape[0] if looked_up else size * kept
    return round(total)


class _Checking(TorchDispatchMode):  # type: ignore[misc]
    """While this lasts, operators are compared with their references, once for all arguments of a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}
        self._seen: set[tuple[str, ...]] = set()
        # Arguments of the last kv_append as its reference left them.
        self._coded: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "llmsqueeze" and name == "kv_append":
            self._coded = [a.clone() if isinstance(a, Tensor) else a for a in args]
            packed_append.kv_append(*self._coded)
        y = func(*args, **(kwargs or {}))
        if func.namespace == "llmsqueeze" and name != "kv_append":
            shapes = (name, *map(_shape, args))
            if shapes not in self._seen:
                self._seen.add(shapes)
                if name == "kv_attend":
                    name, args = "kv_append, kv_attend", self._over_coded(args)
                    error = relative_error(y, packed_attention.kv_attend(*args))
                else:
                    error = relative_error(y, getattr(ops, name)(*args))
                known = self.errors.get(name, 0.0)
                self.errors[name] = known if known >= error or math.isnan(known) else error
        return y

    def _over_coded(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of kv_attend, tiles and sinks as the reference coded the newest token into them."""
        q, _, *rest = args
        tiles, sinks = self._coded[2], self._coded[11:13]
        return (q, tiles, *rest[:7], *sinks, *rest[9:])


def _shape(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        return str([_shape(each) for each in argument])
    return str(argument.shape if isinstance(argument, Tensor) else argument)


@torch.no_grad()
def operator_error(
    model: nn.Module, prompt: Tensor, formats: Mapping[int, LayerFormat] | None = None
) -> tuple[float, str]:
    """The largest relative error of an operator's result while one token is decoded, and whose it is.

    formats: of a KV cache in tiles; what is appended to it and what attention makes of it then are one.
    """
    cache: Any = DynamicCache(config=model.config)
    if formats:
        cache = fixed_cache(model, len(prompt), formats)
    ids = prompt[None].to(next(model.parameters()).device)
    model(ids[:, :-1], **cache_options(model, cache))
    with _Checking() as checking, layers.through_operators():
        model(ids[:, -1:], **cache_options(model, cache))
    if not checking.errors:
        return 0.0, "no operator"
    errors = checking.errors
    operator = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[operator], operator


@torch.no_grad()
def last_logits(model: nn.Module, prompt: Tensor) -> Tensor:
    """[8, vocabulary] of the last tokens of a prompt, read one by one, as decoding does."""
    cache = DynamicCache(config=model.config)
    ids = prompt[None].to(next(model.parameters()).device)
    model(ids[:, :-8], **cache_options(model, cache))
    found = [
        model(ids[:, i : i + 1], **cache_options(model, cache)).logits[0, -1].double()
        for i in range(ids.shape[1] - 8, ids.shape[1])
    ]
    return torch.stack(found)


@torch.no_grad()
def count_dropped(model: nn.Module, tokens: list[int]) -> None:
    """Let gates, if there are any, count what they drop of these tokens, as decoding does, for read_bytes."""
    gating = gating_of(model)
    if gating is None:
        return
    policy, gating.policy = gating.policy, type(gating.policy).parse("all")
    gating.count()
    model(torch.tensor([tokens], device=next(model.parameters()).device), use_cache=False)
    gating.counting, gating.policy = False, policy


def _speed(
    model: nn.Module, prompt: Tensor, length: int, seconds: float, compiled: bool,
    formats: Mapping[int, LayerFormat] | None = None, skip_mass: float = 0.0,
) -> tuple[Speed, list[int]]:  # fmt: skip
    """How fast it is, and the first tokens it chose. formats: of a KV cache in tiles."""
    decoder = Decoder(model, length, compiled=compiled, formats=formats, skip_mass=skip_mass)
    tokens = [int(token) for token in decoder.generate(prompt, STEPS)]
    cache = decoder.cache_bytes(len(prompt) + STEPS)
    step = _timing(lambda: [decoder.step() for _ in range(STEPS)], STEPS)
    count_dropped(model, tokens)
    ids = prompt[None].to(decoder.device)
    with torch.no_grad():
        prefill = _timing(lambda: model(ids, use_cache=False, logits_to_keep=1), 1)
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    read = read_bytes(model) + cache
    return Speed(step, prefill, sum(held.values()), read, cache, seconds), tokens


def _timing(work: Callable[[], object], parts: int) -> Timing:
    """Milliseconds a part."""
    found = []
    work()
    for _ in range(REPEATS - 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / parts)
    return Timing(statistics.median(found), min(found), max(found))


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
