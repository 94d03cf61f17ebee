"""Kernels without a GPU: every variant compiles for every architecture, without spills, to what it should."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import gaps, sparse24
from llmsqueeze.ops import cuda, gap_kernels, kernels, operands
from llmsqueeze.ops.variants import all_variants, warm

pytest.importorskip("cuda.core", reason="compiles with cuda-core and NVRTC")

STREAMED = r"LDG\.E\.NA\.LTC(128|256)B\.128"
# What a kernel must have become. Looked at for one architecture without and one with Hopper's features: the
# disassembler takes as long as the compiler.
EXPECTED = {
    "sparse24": (r"HMMA\.SP\.16832", STREAMED),
    "gaps": (STREAMED, r"LDS"),
    "gated": (STREAMED, r"FFMA"),
    "sparse24_expand": (rf"{STREAMED}|LDG\.E\.128", r"STG\.E\.(64|128)"),
    "attend": (STREAMED, r"MUFU\.EX2", r"FFMA"),
    "outputs24_expand": (r"LDG\.E\.128", r"STG\.E\.128"),
    "gaps_tensor": (STREAMED, r"HMMA\.1688|STG\.E\.128", r"STS\.U16", r"LDS\.(64|128)"),
    "gaps_expand": (STREAMED, r"STG\.E\.U16"),
    "kv_append": (r"SHFL\.BFLY",),
    "kv_attend": (r"HMMA\.16816", r"MOVM", r"MUFU\.EX2", r"UBLKCP|LDGSTS\.E\.BYPASS\.128"),
}


def disassemble(code: bytes, path: Path) -> str:
    import nvidia

    tool = next(p for base in nvidia.__path__ for p in Path(base).rglob("nvdisasm"))
    path.write_bytes(code)
    return subprocess.run(
        [tool, "-c", "-ndf", path], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(("arch", "dtype", "some"), [
    ("sm_90", torch.bfloat16, slice(None)),
    ("sm_80", torch.bfloat16, slice(None)),
    ("sm_86", torch.bfloat16, slice(0, None, 4)),
    ("sm_89", torch.bfloat16, slice(1, None, 4)),
    ("sm_89", torch.float16, slice(2, None, 4)),
    ("sm_120", torch.bfloat16, slice(3, None, 4)),
])  # fmt: skip
def test_every_variant_compiles(arch: str, dtype: torch.dtype, some: slice, tmp_path: Path) -> None:
    """All of them for Ampere and Hopper, and a quarter for each of the others, which ask for the same."""
    found = all_variants(arch, dtype)
    assert {name for name, _ in found} == set(EXPECTED)
    rings = {dict(macros)["RING"] for name, macros in found if name == "gaps_tensor"}
    assert rings == ({1024, 2048} if arch in ("sm_80", "sm_90") else {1024})
    found = found[some]

    def make(index: int) -> tuple[str, str]:
        name, macros = found[index]
        log = io.StringIO()
        code = cuda.compile_cubin(name, dict(macros), arch, log)
        # Of a kernel the first variant where there is no Hopper, every one where there is.
        looked_at = arch == "sm_90" or (arch == "sm_80" and name != found[index - 1][0])
        return log.getvalue(), disassemble(code, tmp_path / f"{index}") if looked_at else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(make, range(len(found))))
    for (name, macros), (log, text) in zip(found, texts, strict=True):
        assert "bytes spill stores" in log
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", log), (name, macros, log)
        if text:
            for opcode in EXPECTED[name]:
                assert re.search(opcode, text), (name, macros, opcode)
            assert (" ACQBULK" in text) == bool(dict(macros).get("PDL")), (name, macros)


def test_a_cubin_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMSQUEEZE_CACHE_DIR", str(tmp_path))
    macros = {"HALF": 0, "PDL": 0}
    first = cuda.cubin("sparse24_expand", macros, "sm_90")
    (kept,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert cuda.cubin("sparse24_expand", macros, "sm_90") == first == cuda.read_cubin(kept)


def test_threads_may_all_compile_first() -> None:
    """In a process of its own: cuda.core must not have been imported."""
    code = (
        "import threading; from concurrent.futures import ThreadPoolExecutor;"
        "from llmsqueeze.ops import cuda; begin = threading.Barrier(8)\n"
        "def compile(i):\n"
        "    begin.wait(); return cuda.compile_cubin('outputs24_expand', {'HALF': 0, 'PDL': 0}, 'sm_90')\n"
        "with ThreadPoolExecutor(8) as pool: print(len(set(pool.map(compile, range(8)))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


def test_another_source_or_macro_is_another_cubin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMSQUEEZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: b"code")
    for macros, arch in (({"HALF": 0}, "sm_90"), ({"HALF": 1}, "sm_90"), ({"HALF": 0}, "sm_80")):
        cuda.cubin("gaps", macros, arch)
    monkeypatch.setattr(cuda, "source", lambda name: "changed")
    cuda.cubin("gaps", {"HALF": 0}, "sm_90")
    assert len(list((tmp_path / "kernels").iterdir())) == 4


def test_the_compilers_words_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "source", lambda name: "__global__ void f() { nonsense; }")
    with pytest.raises(EnvironmentFault, match=r"kernels/gaps\.cu does not compile for sm_90"):
        cuda.compile_cubin("gaps", {}, "sm_90")


def test_what_kernels_refuse() -> None:
    stream = sparse24.pack(torch.zeros(16, 256, dtype=torch.bfloat16))
    with pytest.raises(EnvironmentFault, match="float32"):
        kernels.sparse24_linear(torch.zeros(1, 256), stream, None, 16)
    plain = torch.zeros(16, 256, dtype=torch.bfloat16)
    with pytest.raises(EnvironmentFault, match="input-major"):
        kernels.gated_linear(plain[:1], torch.zeros(256), plain, None, None, None)


def test_warming_compiles_all_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMSQUEEZE_CACHE_DIR", str(tmp_path))
    compiled = []
    monkeypatch.setattr(cuda, "compile_cubin", lambda *given: compiled.append(given) or b"code")
    count = warm("sm_90")
    assert count == len(compiled) == len(list((tmp_path / "kernels").iterdir())) > 40
    assert warm("sm_90") == count == len(compiled)


def test_recording_ends() -> None:
    with pytest.raises(ZeroDivisionError), cuda.recording("sm_90"):
        assert cuda.architecture(5) == ("sm_90", 132)
        raise ZeroDivisionError
    assert cuda._recording is None


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("panel", [64, 200, 256])
def test_many_tokens_are_multiplied_by_expanded_weights(
    monkeypatch: pytest.MonkeyPatch, ragged: bool, panel: int
) -> None:
    """Panels, the order of rows and the bias, with a reference in the place of the expanding kernel."""
    rows, columns = 200, 64
    density = torch.linspace(0, 1, rows)[torch.randperm(rows)][:, None] if ragged else 0.5
    weight = (torch.randn(rows, columns) * (torch.rand(rows, columns) < density)).bfloat16()
    packed = gaps.pack(weight, gaps.Shape(3, 2, 1))
    order = packed.order if ragged else None
    places = weight[packed.order.clamp_min(0).long()] * (packed.order >= 0)[:, None]

    def expand(*given: object) -> torch.Tensor:
        *_, order, begin, end = given
        assert order is None or (begin, end) == (0, rows)
        return (places if order is None else weight)[begin:end]

    monkeypatch.setattr(gap_kernels, "_expand", expand)
    monkeypatch.setattr(operands, "PANEL", panel * 2 * columns)
    monkeypatch.setattr(cuda, "most_shared", lambda _: 100_000)
    x, bias = torch.randn(3, 11, columns).bfloat16(), torch.randn(rows).bfloat16()
    x.requires_grad_()  # of a model that is not under no_grad
    for given in (None, bias):
        y = kernels.gap_linear(
            x, packed.stream, packed.starts, packed.first, order, given, rows, *packed.arguments()
        )
        expected = x.double() @ weight.double().t() + (0 if given is None else given.double())
        assert y.shape == (3, 11, rows) and y.is_contiguous()
        assert torch.allclose(y.double(), expected, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("spans", "slices", "tokens", "expected"),
    [
        # Warps for as few rounds as can be, and no more blocks at once than each multiprocessor gets.
        ({7: 700, 8: 800}, 900, 8, (1024, 7, 2, 64 * 1024)),
        ({7: 700, 8: 800}, 900, 0, (1024, 7, 3, 64 * 1024)),  # made dense
        ({7: 700, 8: 800}, 264, 8, (1024, 7, 2, 233472 // 3)),
        ({6: 900, 9: 1300}, 132, 8, (2048, 9, 1, 128 * 1024)),
        ({8: 900}, 132, 8, (1024, 8, 2, 233472 // 2)),
        ({4: 900, 9: 1300}, 900, 8, (2048, 9, 1, 128 * 1024)),
        ({4: 900}, 900, 8, (2048, 4, 1, 128 * 1024)),
        ({4: 2049}, 900, 8, None),
    ],
)
def test_the_ring_of_a_launch(
    spans: dict[int, int], slices: int, tokens: int, expected: tuple[int, ...] | None
) -> None:
    found = [spans.get(n, 3000) for n in gaps.TURNS]
    with cuda.recording("sm_90"):
        ring = gap_kernels.choose_ring(found, 26, slices, tokens, 0)
    assert expected == (ring and (ring.columns, ring.warps, ring.blocks, ring.shared))


@pytest.mark.parametrize("current", [0, 1])
def test_a_kernel_is_launched_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, current: int
) -> None:
    import contextlib
    from collections.abc import Iterator
    from types import SimpleNamespace

    seen: list[tuple[int, tuple[object, ...]]] = []
    state = SimpleNamespace(device=current)

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, state.device = state.device, index
        yield
        state.device = before

    def start(stream: object, config: object, kernel: object, *values: object) -> None:
        seen.append((state.device, values))

    monkeypatch.setattr("cuda.core.launch", start)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=100 + index)
    )
    for name in ("_kernel", "_stream", "_config"):
        monkeypatch.setattr(cuda, name, lambda *given: given)
    monkeypatch.setattr(cuda, "most_shared", lambda _: 1000)
    like = SimpleNamespace(device=SimpleNamespace(index=1))
    cuda.launch("gaps", {}, like, (None, 7), grid=(1, 1), block=32, shared=10)  # type: ignore[arg-type]
    ((where, (null, number)),) = seen
    assert where == 1 and null == 0 and number.value == 7  # type: ignore[attr-defined]
    assert state.device == current
