"""Kernels for a CPU, on every instruction set that this machine has."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu
from llmsqueeze.runtime.linears import use_kernels
from llmsqueeze.runtime.packed import BitmaskLinear
from tests.conftest import TINY, tiny_model
from tests.test_linears import IDS, gated_model, logits, pruned_model

if cpu.library() is None:
    pytest.skip("built with the package where there is a C++ compiler", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ISAS = range(cpu.INSTRUCTIONS.index(cpu.instructions() or "portable") + 1)


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
                limit = 2 * float((dense - expected).abs().max()) + 1e-6
                assert float((found - expected).abs().max()) <= limit
            else:
                exact = seen.double() @ weight.double().t()
                assert off(found, exact) <= 2 * off(nn.functional.linear(seen, weight), exact)


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
from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu

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


def test_gates_and_dense_weights_stay() -> None:
    for model in (gated_model(), tiny_model()):
        before = [type(m) for m in model.modules()]
        assert not use_kernels(model).formats
        assert [type(m) for m in model.modules()] == before
        assert any(isinstance(m, nn.Linear) for m in model.modules())
