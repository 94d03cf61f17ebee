"""Registers our quantizer with transformers at the moment transformers can take it.

transformers finds no plugins by itself, so ``import llmsqueeze`` must register. Importing
transformers here would cost every command line start seconds, so registration waits for the import
of ``transformers.quantizers.auto``, which ``from_pretrained`` needs anyway.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers is loaded, else as soon as it loads. Calling it again is safe."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    import llmsqueeze.integration  # noqa: F401  registers on import


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the usual finders import the trigger module, then registers and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
