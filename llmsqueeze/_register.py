"""Registers our quantizer with transformers, and our model with lm-eval, at the moment they can take it.

transformers and lm-eval find no plugins by themselves, so ``import llmsqueeze`` must register. Importing
them here would cost every command line start seconds, so registration waits for the import of
``transformers.quantizers.auto``, which ``from_pretrained`` needs anyway, and of ``lm_eval.models``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _register_quantizer() -> None:
    import llmsqueeze.integration  # noqa: F401  registers on import


def _register_model() -> None:
    from lm_eval.api.registry import model_registry

    if "llmsqueeze" not in model_registry:
        model_registry.register("llmsqueeze", target="llmsqueeze.harness:HarnessLM")


# lm-eval fills its registry when it finds it empty: not before it did.
_TRIGGERS: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "lm_eval.models": _register_model,
}


def install() -> None:
    """Register now where the library is loaded, else as soon as it loads. Calling it again is safe."""
    waiting = [finder.trigger for finder in sys.meta_path if isinstance(finder, _AfterImport)]
    for trigger, register in _TRIGGERS.items():
        if trigger in sys.modules:
            register()
        elif trigger not in waiting:
            sys.meta_path.insert(0, _AfterImport(trigger))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the usual finders import the trigger module, then registers and steps aside."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _TRIGGERS[fullname])
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, register: Callable[[], None]) -> None:
        self._loader = loader
        self._register = register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register()
