"""The library of C++ that is built with the package, where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from llmsqueeze.errors import EnvironmentFault


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they were not built. EnvironmentFault if it is another
    version's, or does not load."""
    found = sorted(Path(__file__).parent.glob("_bitmask.*"))
    if not found:
        return None
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise EnvironmentFault(
            f"{found[0].name} does not load ({error}); install llmsqueeze again"
        ) from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, arguments in {
        "linears": [pointer, size, pointer, ctypes.c_float] + [pointer] * 4
        + [size] * 2 + [number] * 4,
        "attend": [pointer] * 6 + [size, pointer] + [size] * 5 + [ctypes.c_float] + [number] * 3,
        "rotate": [pointer, size, pointer, pointer, size, pointer] + [size] * 3,
        "bitmask_expand": [pointer] * 4 + [size] * 3 + [number] * 4,
        "bitmask_find": [pointer] * 3 + [size] * 2 + [number] * 2,
        "bitmask_take": [pointer] * 4 + [size] * 2 + [number] * 2,
        "gated_linear": [pointer, size, pointer, size] + [pointer] * 4 + [size] * 3 + [number] * 3,
        "gated_bitmask_linear": [pointer] * 3 + [size, pointer, size] + [pointer] * 3
        + [size] * 3 + [number] * 3,
        "kv_attend": [pointer, pointer, size] + [pointer] * 9 + [size] * 6
        + [ctypes.c_float] * 2 + [number] * 3,
        "kv_append": [pointer] * 3 + [size] + [pointer] * 10 + [size] * 5 + [number],
    }.items():  # fmt: skip
        function = getattr(loaded, f"llmsqueeze_{name}", None)
        if function is None:
            raise EnvironmentFault(
                f"{found[0].name} was built by another version of llmsqueeze; install it again"
            )
        function.argtypes, function.restype = arguments, None
    return loaded
