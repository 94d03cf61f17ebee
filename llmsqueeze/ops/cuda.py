"""CUDA kernels: compiled at first use, kept on disk, launched on torch's current stream.

The only module that imports cuda.core.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from llmsqueeze.errors import EnvironmentFault

Macros = Mapping[str, int]
# A kernel's name and its macros in alphabetical order.
Variant = tuple[str, tuple[tuple[str, int], ...]]
# Shared memory of a block on GPUs whose launches are recorded.
_DIGEST = hashlib.sha256().digest_size
_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}  # KiB


@dataclass
class _Recording:
    arch: str
    variants: set[Variant] = field(default_factory=set)


_recording: _Recording | None = None
_importing = threading.Lock()


@contextlib.contextmanager
def recording(arch: str) -> Iterator[set[Variant]]:
    """While this lasts nothing is launched: what would be, on a GPU of this architecture, is noted."""
    global _recording
    _recording = _Recording(arch)
    try:
        yield _recording.variants
    finally:
        _recording = None


def cubin_folder() -> Path:
    """Where compiled kernels are kept: LLMSQUEEZE_CACHE_DIR, or the user's cache folder."""
    given = os.environ.get("LLMSQUEEZE_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else base / "llmsqueeze") / "kernels"


# What several kernels share, beside what all do.
_SHARED_SOURCE = {"kv_append": ("kv_tiles",), "kv_attend": ("kv_tiles",)}


def source(name: str) -> str:
    """The whole source of kernels/NAME.cu."""
    folder = importlib.resources.files("llmsqueeze._kernels")
    parts = "prelude", *_SHARED_SOURCE.get(name, ()), name
    return "\n".join((folder / f"{part}.cu").read_text("utf-8") for part in parts)


def compile_cubin(name: str, macros: Macros, arch: str, log: TextIO | None = None) -> bytes:
    """kernels/NAME.cu as machine code for an architecture such as "sm_90"; needs no GPU.

    log: gets what the assembler says of registers and spills.

    Raises EnvironmentFault without cuda.core, and with the compiler's words when it refuses.
    """
    compiler()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=name, arch=arch, std="c++17", define_macro=[(k, str(v)) for k, v in macros.items()],
        ptxas_options=["-v"] if log else None,
    )  # fmt: skip
    try:
        code = Program(source(name), "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # each release of cuda.core has its own
        raise EnvironmentFault(f"kernels/{name}.cu does not compile for {arch}: {error}") from error
    return bytes(code)


def cubin(name: str, macros: Macros, arch: str) -> bytes:
    """compile_cubin, from disk if the same was compiled before by the same compiler."""
    versions = compiler()
    text = "\0".join((source(name), repr(sorted(macros.items())), arch, versions))
    path = cubin_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    if kept := read_cubin(path):
        return kept
    code = compile_cubin(name, macros, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another process may compile the same, or be killed half-way.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(code + hashlib.sha256(code).digest())
    os.replace(file.name, path)
    return code


def read_cubin(path: Path) -> bytes | None:
    """What cubin() kept; None where there is nothing, or something damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    code, digest = kept[:-_DIGEST], kept[-_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


@functools.cache
def compiler() -> str:
    """Versions of what compiles kernels; EnvironmentFault if it is not installed."""
    try:
        # Another thread would see the package half imported.
        with _importing:
            import cuda.core
            from cuda.bindings import nvrtc
    except ImportError as error:
        raise EnvironmentFault(
            "CUDA kernels need the package cuda-core; run: pip install 'llmsqueeze[cuda]'"
        ) from error
    return f"cuda.core {cuda.core.__version__}, nvrtc {nvrtc.nvrtcVersion()}"


def architecture(index: int) -> tuple[str, int]:
    """A device's architecture, and how many multiprocessors it has."""
    return (_recording.arch, 132) if _recording else _architecture(index)


@functools.cache
def _architecture(index: int) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(index)
    return f"sm_{found.major}{found.minor}", found.multi_processor_count


def is_hopper(index: int) -> bool:
    """Whether a device has clusters and programmatic dependent launch: sm_90 and later."""
    return int(architecture(index)[0][3:]) >= 90


def most_shared(index: int) -> int:
    """Bytes of dynamic shared memory that a block may have; 4 KB are left for what kernels declare."""
    if _recording:
        return _SHARED.get(_recording.arch, 99) * 1024 - 4096
    return _most_shared(index)


@functools.cache
def _most_shared(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin - 4096


@functools.cache
def _kernel(name: str, macros: tuple[tuple[str, int], ...], index: int) -> Any:
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    arch, _ = architecture(index)
    if torch.cuda.is_current_stream_capturing():
        raise EnvironmentFault(
            f"kernel {name} is used for the first time within a CUDA graph capture;"
            " run the model once before capturing it"
        )
    kernel = ObjectCode.from_cubin(cubin(name, dict(macros), arch)).get_kernel(name)
    wanted = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    handle = driver.CUkernel(int(kernel.handle))
    status = driver.cuKernelSetAttribute(
        wanted, most_shared(index), handle, driver.CUdevice(index)
    )[0]
    if int(status):
        raise EnvironmentFault(f"kernel {name}: {status!r}")
    return kernel


@functools.lru_cache(maxsize=4096)
def _config(grid: tuple[int, int], block: int, shared: int, cluster: int, overlap: bool) -> Any:
    from cuda.core import LaunchConfig

    more: dict[str, Any] = {"cluster": cluster} if cluster > 1 else {}
    if overlap:
        more["programmatic_stream_serialization"] = True
    # With clusters cuda.core counts those, not blocks.
    wanted = (grid[0] // cluster, grid[1])
    return LaunchConfig(grid=wanted, block=block, shmem_size=shared, **more)


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def launch(
    name: str,
    macros: Macros,
    like: Tensor,
    arguments: tuple[Any, ...],
    *,
    grid: tuple[int, int],
    block: int,
    shared: int,
    cluster: int = 1,
) -> None:
    """Run kernels/NAME.cu on the current stream of `like`'s device.

    arguments: tensors, None for a null pointer, and numbers, of 32 bits. shared: bytes of dynamic shared
    memory.
    """
    if _recording:
        _recording.variants.add((name, tuple(sorted(macros.items()))))
        return
    from cuda.core import launch as start

    index = like.device.index
    if shared > most_shared(index):
        raise EnvironmentFault(
            f"kernel {name} needs {shared} bytes of shared memory, this GPU has {most_shared(index)}; "
            "use --backend reference"
        )
    kernel = _kernel(name, tuple(sorted(macros.items())), index)
    stream = _stream(torch.cuda.current_stream(index).cuda_stream)
    config = _config(grid, block, shared, cluster, bool(macros.get("PDL")))
    values = map(_argument, arguments)
    if index == torch.cuda.current_device():
        start(stream, config, kernel, *values)
        return
    # The default stream is that of the current device, whatever the tensors' is.
    with torch.cuda.device(index):
        start(stream, config, kernel, *values)


def _argument(value: Any) -> Any:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)
