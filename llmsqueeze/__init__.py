"""Post-training compression of language models: smaller files, measured quality.

Importing this package teaches transformers to load llmsqueeze checkpoints with
``AutoModelForCausalLM.from_pretrained``, and to compute with them as they are stored where there are kernels;
lm-eval it teaches the model name "llmsqueeze". It imports neither torch nor transformers itself.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze import _register
from llmsqueeze._version import __version__
from llmsqueeze.errors import EnvironmentFault, LlmsqueezeError, RecipeError

if TYPE_CHECKING:
    from llmsqueeze.integration import LlmsqueezeConfig

__all__ = [
    "LlmsqueezeConfig",
    "LlmsqueezeError",
    "__version__",
    "kv_cache",
    "lm_eval_model",
    "use_kernels",
]


def __getattr__(name: str) -> Any:
    # Its base class is transformers', which is not imported before it is needed.
    if name == "LlmsqueezeConfig":
        from llmsqueeze.integration import LlmsqueezeConfig

        return LlmsqueezeConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def kv_cache(model: Any, tokens: int | None = None, *, skip_mass: float = 0.0) -> Any:
    """A new, empty KV cache for a loaded model, quantised as its checkpoint says: for `generate` and calls.

    A transformers Cache; what it holds lies packed. tokens: for so many of every sequence, at a fixed place
    that a kernel reads without unpacking it, on a CPU or on a GPU in 16 bits; prompts may have padding in
    front, and attend to their own keys and values as they are. Without: it grows, and is unpacked at every
    step. skip_mass, with tokens: the share of its weight, say 0.001, that decode attention may leave out to
    save work, in blocks of tokens that it all but ignores. RecipeError when the checkpoint has no such format
    (`llmsqueeze quantize-kv`), EnvironmentFault where no kernel reads it.
    """
    if not 0 <= skip_mass < 1 or (skip_mass and tokens is None):
        raise RecipeError(
            f"skip_mass {skip_mass}: give a share of 0 to below 1, and a number of tokens with it"
        )
    from llmsqueeze.runtime.kv_cache import attached_cache, attached_formats

    if tokens is None:
        return attached_cache(model)
    from llmsqueeze.ops import cpu
    from llmsqueeze.runtime.generate import fixed_cache

    formats = attached_formats(model)
    weight = next(model.parameters())
    fits = weight.device.type == "cuda" and weight.element_size() == 2
    if not fits and not (weight.device.type == "cpu" and cpu.library() is not None):
        raise EnvironmentFault(
            "a cache of so many tokens is read by a kernel: on CUDA in bfloat16 or float16, on a CPU where "
            "there was a C++ compiler when llmsqueeze was installed; leave tokens out"
        )
    cache = fixed_cache(model, tokens, formats, skip_mass)
    if cache.is_compileable:
        raise EnvironmentFault(
            "some layers have no KV-cache format in this checkpoint; leave tokens out, or, where those "
            "are of sliding attention, run quantize-kv again"
        )
    return cache


def lm_eval_model(pretrained: str | Path, **options: Any) -> Any:
    """A checkpoint directory as lm-eval's model (an HFLM), run as `llmsqueeze eval --tasks` runs it.

    For lm_eval.simple_evaluate(model=…), which also takes model="llmsqueeze" with these arguments as its
    model_args. options, as on the command line: dtype, device, bos, gate, kv_cache, backend; and
    batch_size: requests to a pass, by default as many as are of one length, up to a number of tokens.
    EnvironmentFault when lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentFault("this needs lm-eval: pip install 'llmsqueeze[eval]'")
    from llmsqueeze.harness import open_model

    return open_model(pretrained, **options)


def use_kernels(model: Any) -> Any:
    """Let a model with dense weights compute with compressed ones: its linears are replaced, in place.

    For models that were pruned, or loaded with LlmsqueezeConfig(dequantize=True): what from_pretrained gives
    computes with kernels already, and stays as it is. Returns what was done (runtime.linears.Report).
    EnvironmentFault on CUDA in float32, and on a CPU where no kernels were built. The model can then be used,
    compiled and captured in CUDA graphs, but not be saved, trained, moved or copied.
    """
    from llmsqueeze.runtime import sealed
    from llmsqueeze.runtime.linears import Report
    from llmsqueeze.runtime.linears import use_kernels as replace

    if sealed.is_sealed(model):
        return Report()
    report = replace(model)
    if report.formats:
        sealed.seal(model)
    return report


_register.install()
