"""Kernels for a CPU, on every instruction set that this machine has."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmsqueeze import ops
from llmsqueeze.bench_model import operator_error
from llmsqueeze.numerics import int8, panels
from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu, input_major
from llmsqueeze.runtime.linears import use_kernels
from llmsqueeze.runtime.packed import BitmaskLinear
from tests.conftest import TINY, tiny_model
from tests.test_linears import IDS, gated_arguments, gated_model, logits, pruned_model

if cpu.library() is None:
    pytest.skip("built with the package where there is a C++ compiler", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ISAS = range(cpu.INSTRUCTIONS.index(cpu.instructions() or "portable") + 1)
NONE = torch.empty(0)


def off(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_product_is_that_of_fp64(
    rows: int,
    columns: int,
    density: float,
    tokens: int,
    dtype: torch.dtype,
    biased: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    weight = (torch.randn(rows, columns, generator=generator) * keep).to(dtype)
    x = torch.randn(tokens, columns, generator=generator)
    bias = torch.randn(rows, generator=generator) if biased else None
    offset = torch.zeros(1) if bias is None else bias
    expected = x.double() @ weight.double().t() + offset.double()
    size = x.double().abs() @ weight.double().abs().t() + offset.double().abs()
    for isa in ISAS:
        y = cpu.bitmask_linear(x, *pack_bitmask(weight), bias, isa=isa)
        assert y.dtype == torch.float32 and y.shape == (tokens, rows)
        assert bool(((y - expected).abs() <= 2e-6 * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_the_operator_keeps_torchs_contract(dtype: torch.dtype, tokens: int) -> None:
    weight = (torch.randn(24, 40) * (torch.rand(24, 40) < 0.5)).bfloat16()
    x, bias = torch.randn(2, tokens, 40).to(dtype), torch.randn(24).to(dtype)
    operator: Any = torch.ops.llmsqueeze.bitmask_linear
    call = (x, *pack_bitmask(weight), bias)
    torch.library.opcheck(operator, call)
    y = operator(*call)
    assert y.dtype == dtype
    rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert off(y, x.double() @ weight.double().t() + bias.double()) < rounding


def test_what_is_no_number_shows() -> None:
    """As in a dense product, also where the weight is zero."""
    packed = pack_bitmask(torch.eye(4, 40).bfloat16())
    for bad in (torch.nan, torch.inf):
        x = torch.ones(1, 40)
        x[0, 35] = bad
        for isa in ISAS:
            assert bool(cpu.bitmask_linear(x, *packed, None, isa=isa).isnan().all())


def test_halves_of_every_kind() -> None:
    """Subnormal, infinite and NaN weights mean what they mean to torch."""
    bits = torch.arange(-32768, 32768, 7, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        weight = bits.view(dtype)[:, None]
        packed = pack_bitmask(weight)
        for isa in ISAS:
            y = cpu.bitmask_linear(torch.ones(1, 1), *packed, None, isa=isa)[0]
            assert torch.equal(y.nan_to_num(123.0), weight[:, 0].float().nan_to_num(123.0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_count_of_tokens(isa: int, dtype: torch.dtype) -> None:
    """Not worse than twice what torch makes of it in fp32. Some rows are empty, some are full."""
    weight = (torch.randn(50, 301) * (torch.rand(50, 301) < 0.5)).to(dtype)
    weight[::7] = 0
    weight[3::7] = 1
    packed = pack_bitmask(weight)
    for tokens in range(1, 19):
        x = torch.randn(tokens, 301)
        expected = x.double() @ weight.double().t()
        dense = nn.functional.linear(x, weight.float())
        for seen in (x, x.to(dtype)):
            found = cpu.bitmask_linear(seen, *packed, None, isa=isa)
            if seen.dtype == torch.float32:
                limit = 2 * float((dense - expected).abs().max()) + 4e-6  # a last place
                assert float((found - expected).abs().max()) <= limit
                assert off(found, expected) <= 2 * off(dense, expected) + 2**-24
            else:
                exact = seen.double() @ weight.double().t()
                assert off(found, exact) <= 2 * off(nn.functional.linear(seen, weight), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_all_there(isa: int, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (7, 63), (9, 64), (20, 301)):
        held = torch.randn(rows * columns + 1).to(dtype)
        weight, bias = held[1:].view(rows, columns), torch.randn(rows)
        for tokens in (*range(1, 18),):
            x = torch.randn(tokens, columns)
            expected = x.double() @ weight.double().t() + bias.double()
            size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
            y = cpu.dense_linear(x, weight, bias, isa=isa)
            assert bool(((y - expected).abs() <= 2e-6 * size).all())
    torch.library.opcheck(torch.ops.llmsqueeze.dense_linear.default, (x, weight, bias))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    weight = (torch.randn(100, 333) * (torch.rand(100, 333) < 0.5)).bfloat16()
    packed = pack_bitmask(weight)
    before = torch.get_num_threads()
    for isa in ISAS:
        for tokens in (3, 20):
            x = torch.randn(tokens, 333)
            expected = cpu.bitmask_linear(x, *packed, None, isa=isa)
            try:
                torch.set_num_threads(threads)
                found = cpu.bitmask_linear(x, *packed, None, isa=isa)
            finally:
                torch.set_num_threads(before)
            assert off(found, expected.double()) < 1e-6  # torch's own product may sum otherwise


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("glu", [False, True])
def test_rows_that_lie_apart(isa: int, glu: bool) -> None:
    """Side by side, others between them; of several weights, some left over."""
    counts = (1203, 1203) if glu else (1203, 333, 7)
    weights = [(torch.randn(n, 70) * (torch.rand(n, 70) < 0.5)).bfloat16() for n in counts]
    group = cpu.Group(
        *map(list, zip(*map(pack_bitmask, weights), strict=True)), [NONE] * len(counts)
    )
    before = torch.get_num_threads()
    for tokens in (1, 2, 5, 8):
        x = torch.randn(tokens, 70)
        expected = [x.double() @ w.double().t() for w in weights]
        try:
            torch.set_num_threads(1)
            found = group.product(x, None, 0.0, None, None, glu, isa=isa)
        finally:
            torch.set_num_threads(before)
        wanted = (
            nn.functional.silu(expected[0]) * expected[1] if glu else torch.cat(expected, dim=1)
        )
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_values_may_begin_anywhere() -> None:
    """In a file nothing is aligned to more than its own size."""
    weight = (torch.randn(20, 100) * (torch.rand(20, 100) < 0.5)).bfloat16()
    x, (values, mask, row_offsets) = torch.randn(2, 100), pack_bitmask(weight)
    held = torch.zeros(len(values) + 1, dtype=values.dtype)
    held[1:] = values
    bits = torch.zeros(mask.numel() + 3, dtype=torch.uint8)
    bits[3:] = mask.flatten()
    for isa in ISAS:
        expected = cpu.bitmask_linear(x, values, mask, row_offsets, None, isa=isa)
        moved = held[1:], bits[3:].view(mask.shape), row_offsets
        assert torch.equal(cpu.bitmask_linear(x, *moved, None, isa=isa), expected)


GUARDED = """
import ctypes, mmap, sys, torch
from llmsqueeze import ops
from llmsqueeze.numerics import int8, panels
from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu, input_major

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
held = []

def at_the_end_of_a_page(tensor):
    size = tensor.nbytes
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    base = libc.mmap(None, pages + mmap.PAGESIZE, 3, 0x22, -1, 0)
    assert libc.mprotect(base + pages, mmap.PAGESIZE, 0) == 0
    where = base + pages - size
    ctypes.memmove(where, tensor.contiguous().data_ptr(), size)
    buffer = (ctypes.c_char * size).from_address(where)
    held.append(buffer)
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for rows, columns, density in ((5, 64, 0.5), (3, 33, 1.0), (40, 17, 0.3), (7, 100, 0.05)):
        weight = (torch.randn(rows, columns) * (torch.rand(rows, columns) < density)).to(dtype)
        weight[-1, -1] = 1
        parts = [at_the_end_of_a_page(part) for part in pack_bitmask(weight)]
        for tokens in (1, 4, 17):
            x = at_the_end_of_a_page(torch.randn(tokens, columns))
            for isa in range(int(sys.argv[1])):
                y = cpu.bitmask_linear(x, *parts, None, isa=isa)
                expected = x.double() @ weight.double().t()
                assert (y - expected).norm() <= 1e-5 * expected.norm()
        whole = at_the_end_of_a_page(weight)
        for tokens in (1, 4, 17):
            x = at_the_end_of_a_page(torch.randn(tokens, columns))
            for isa in range(int(sys.argv[1])):
                expected = x.double() @ weight.double().t()
                y = cpu.dense_linear(x, whole, None, isa=isa)
                assert (y - expected).norm() <= 1e-5 * expected.norm()
        columnwise = at_the_end_of_a_page(weight.t().contiguous()).t()
        codes, largest = int8.encode(weight)
        codes, scale = at_the_end_of_a_page(codes.t().contiguous()).t(), int8.scales(largest)
        runs = [at_the_end_of_a_page(part) for part in vars(panels.pack(weight)).values()]
        for tokens in (1, 2, 17):
            x = at_the_end_of_a_page(torch.randn(tokens, columns))
            threshold = at_the_end_of_a_page(torch.full((columns,), 0.3))
            expected = (x * (x.abs() > threshold)).double() @ weight.double().t()
            three = None, None, None
            for isa in range(int(sys.argv[1])):
                for y in (
                    cpu.gated_linear(x, threshold, columnwise, *three, isa=isa),
                    cpu.gated_bitmask_linear(x, threshold, *runs, *three, rows, isa=isa),
                ):
                    assert (y - expected).norm() <= 1e-5 * expected.norm()
                cpu.gated_int8_linear(x, threshold, codes, scale, *three, isa=isa)
                y = cpu.panels_linear(x, *runs, None, 1, rows, isa=isa)
                expected_all = (x.double() @ weight.double().t())[:, 1:]
                assert (y - expected_all).norm() <= 1e-5 * expected_all.norm()
print("read nothing else")
"""


def test_nothing_is_read_beyond_the_weights() -> None:
    """Every buffer ends where memory that must not be touched begins."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(len(ISAS))], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "read nothing else", (done.returncode, done.stderr)


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same(family: str, dtype: torch.dtype) -> None:
    model = pruned_model("50 %", family).to(dtype)
    inputs = [IDS, IDS[:1, :1], torch.arange(30)[None]]
    expected = [logits(model, ids) for ids in inputs]
    report = use_kernels(model)
    assert set(report.formats) == {"bitmask"}
    assert (
        report.bytes_after < {torch.float32: 0.5, torch.bfloat16: 0.9}[dtype] * report.bytes_before
    )
    for ids, reference in zip(inputs, expected, strict=True):
        worst = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert off(logits(model, ids), reference.double()) < worst


def test_weights_go_back_to_the_bits_that_hold_them() -> None:
    weight = torch.randn(8, 16).bfloat16().float()
    assert BitmaskLinear(weight, None).values.dtype == torch.bfloat16
    assert BitmaskLinear(torch.full((8, 16), 1 + 2**-10), None).values.dtype == torch.float16
    assert BitmaskLinear(torch.randn(8, 16), None).values.dtype == torch.float32


def test_dense_weights_stay() -> None:
    model = tiny_model()
    assert not use_kernels(model).formats
    assert any(isinstance(m, nn.Linear) for m in model.modules())


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 200),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 2),
    st.sampled_from([*DTYPES, torch.int8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_products_behind_gates_are_those_of_fp64(
    rows: int,
    columns: int,
    density: float,
    kept: float,
    tokens: int,
    dtype: torch.dtype,
    biased: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight * (torch.rand(rows, columns, generator=generator) < density)
    x = torch.randn(tokens, columns, generator=generator)
    threshold = x.abs().amax(0).quantile(1 - kept).expand(columns if seed % 2 else 1).contiguous()
    threshold = -torch.ones_like(threshold) if kept == 1 else threshold
    bias = torch.randn(rows, generator=generator) if biased else None
    if dtype == torch.int8:
        codes, largest = int8.encode(weight)
        scale = int8.scales(largest)
        exact = codes.double() * scale.double()[:, None]
    else:
        weight = weight.to(dtype)
        exact = weight.double()
    seen = x.double() * (x.abs() > threshold)
    offset = torch.zeros(1).double() if bias is None else bias.double()
    expected = seen @ exact.t() + offset
    size = seen.abs() @ exact.abs().t() + offset.abs() + 1e-30
    for isa in ISAS:
        three: Any = (bias, None, None)
        if dtype == torch.int8:
            found = [
                cpu.gated_int8_linear(x, threshold, input_major(codes), scale, *three, isa=isa),
            ]
        else:
            packed = vars(panels.pack(weight)).values()
            found = [
                cpu.gated_linear(x, threshold, input_major(weight), *three, isa=isa),
                cpu.gated_linear(x, threshold, weight.t().contiguous().t(), *three, isa=isa),
                cpu.gated_bitmask_linear(x, threshold, *packed, *three, rows, isa=isa),
            ]
        for y in found:
            assert y.dtype == torch.float32 and y.shape == (tokens, rows)
            assert bool(((y - expected).abs() <= 2e-6 * size).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [5, 100, 3000, 9001])
def test_panels_for_many_tokens(isa: int, rows: int) -> None:
    weight = (torch.randn(rows, 37) * (torch.rand(rows, 37) < 0.5)).bfloat16()
    packed = panels.pack(weight)
    assert torch.equal(panels.unpack(packed, rows), weight)
    parts = vars(packed).values()
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.randn(20, 37).to(dtype), torch.randn(rows).to(dtype)
        for begin, end in ((0, rows), (rows // 3, rows), (1, rows - 1), (rows // 2, rows // 2 + 1)):
            y = cpu.panels_linear(x, *parts, bias[begin:end], begin, end, isa=isa)
            exact = (x.double() @ weight.double().t() + bias.double())[:, begin:end]
            dense = nn.functional.linear(x, weight.to(dtype), bias)[:, begin:end]
            assert off(y, exact) <= 2 * off(dense, exact)


@pytest.mark.parametrize("name", ["gated_bitmask_linear", "panels_linear"])
@pytest.mark.parametrize("rank", [0, 3])
def test_operators_with_panels_keep_torchs_contract(name: str, rank: int) -> None:
    weight = (torch.randn(70, 24) * (torch.rand(70, 24) < 0.5)).bfloat16()
    x, bias, threshold = torch.randn(2, 24).bfloat16(), torch.randn(70).bfloat16(), torch.rand(24)
    parts = tuple(vars(panels.pack(weight)).values())
    branch = (torch.randn(70, rank).bfloat16(), torch.randn(rank, 24).bfloat16())
    call: tuple[Any, ...] = (x, *parts, bias[7:66], 7, 66)
    if name == "gated_bitmask_linear":
        call = (x, threshold, *parts, bias, *(branch if rank else (None, None)), 70)
    operator = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(operator, call)
    exact = getattr(ops, name)(*(c.double() if isinstance(c, Tensor) and c.is_floating_point()
                                 and c is not threshold else c for c in call))  # fmt: skip
    assert off(operator(*call), exact) < 4e-3


@pytest.mark.parametrize("name", ["gated_linear", "gated_int8_linear", "int8_linear"])
@pytest.mark.parametrize("glu", [False, True])
def test_operators_behind_gates_keep_torchs_contract(name: str, glu: bool) -> None:
    call: Any = (*gated_arguments()[name][1:], glu)
    if glu:  # rows of two parts, in eights
        call = tuple(c[:32] if isinstance(c, Tensor) and len(c) == 40 else c for c in call)
    operator = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(operator, call)
    exact = getattr(ops, name)(*call)
    assert off(operator(*call), exact.double()) < 1e-2
    wide = operator(call[0].repeat(5, 1), *call[1:])
    assert off(wide[:2], exact.double()) < 1e-2


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_shows_behind_gates(isa: int) -> None:
    """Also where it would be dropped."""
    weight = torch.eye(40, 40).bfloat16()
    threshold = torch.full((40,), 0.5)
    codes, largest = int8.encode(weight)
    for bad in (torch.nan, torch.inf):
        x = torch.ones(1, 40)
        x[0, 35] = bad
        for limit in (threshold, torch.full((40,), torch.inf)):
            three = (None, None, None)
            for y in (
                cpu.gated_linear(x, limit, input_major(weight), *three, isa=isa),
                cpu.gated_bitmask_linear(
                    x, limit, *vars(panels.pack(weight)).values(), *three, 40, isa=isa
                ),
                cpu.gated_int8_linear(
                    x, limit, input_major(codes), int8.scales(largest), *three, isa=isa
                ),
            ):
                assert torch.equal(y.isnan(), ops.gated_linear(x, limit, weight, *three).isnan())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing_behind_gates(threads: int) -> None:
    weight = (torch.randn(1000, 33) * (torch.rand(1000, 33) < 0.5)).bfloat16()
    x, threshold = torch.randn(2, 33), torch.full((1,), 0.5)
    three, parts = (None, None, None), tuple(vars(panels.pack(weight)).values())
    before = torch.get_num_threads()
    for isa in ISAS:
        found = []
        for count in (before, threads):
            try:
                torch.set_num_threads(count)
                found.append(
                    (
                        cpu.gated_linear(x, threshold, input_major(weight), *three, isa=isa),
                        cpu.gated_bitmask_linear(x, threshold, *parts, *three, 1000, isa=isa),
                    )
                )
            finally:
                torch.set_num_threads(before)
        assert off(found[0][0], found[1][0].double()) < 1e-6
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("format", ["gated", "gated int8", "gated bitmask"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_model_with_gates_computes_the_same(format: str, rank: int) -> None:
    """In fp32: a rounding error of 16 bits may open a gate or close it."""
    model = gated_model(rank)
    for module in model.modules():
        if format != "gated" and isinstance(module, nn.Linear) and hasattr(module, "gate"):
            weight = module.weight.data
            scarce = weight * (torch.rand(weight.shape) < 0.5)
            module.weight.data = int8.round_weight(weight) if "int8" in format else scarce
    narrow = copy.deepcopy(model)
    model = model.float()
    exact = copy.deepcopy(model)
    for module in exact.modules():
        if "int8" in format and isinstance(module, nn.Linear) and hasattr(module, "gate"):
            # Codes times their scale are not rounded to 16 bits here.
            codes, largest = int8.encode(module.weight.data.bfloat16())
            module.weight.data = int8.decode(codes, int8.scales(largest), torch.float32)
    report = use_kernels(model)
    assert report.formats == {format: 12}
    for ids in (IDS[:1, :1], IDS, torch.arange(30)[None]):
        assert off(logits(model, ids), logits(exact, ids).double()) < 1e-5
    use_kernels(narrow)
    assert operator_error(narrow, IDS[0])[0] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_panels_are_put_where_they_belong(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One panel, and several, the last of them smaller, in memory that they share."""
    weight = (torch.randn(50, 48) * (torch.rand(50, 48) < 0.5)).bfloat16()
    x, parts = torch.randn(2, 40, 48).to(dtype), pack_bitmask(weight)
    offset = torch.randn(50).to(dtype) if bias else None
    exact = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    for size in (16 * 2**20, 48 * dtype.itemsize * 7):
        monkeypatch.setattr(ops, "PANEL", size)
        for _ in range(2):
            found = torch.ops.llmsqueeze.bitmask_linear(x, *parts, offset)
            assert found.is_contiguous() and found.dtype == dtype
            assert off(found, exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
