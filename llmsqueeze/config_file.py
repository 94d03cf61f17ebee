"""config.json of a checkpoint, read with suspicion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsqueeze import untrusted
from llmsqueeze.errors import CheckpointError

# What config.json may choose attention by. Other names are of packages, or of code that transformers fetches.
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
# transformers makes a list of as many labels.
_MOST_LABELS = 2**16


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    file = path / "config.json"
    try:
        config = untrusted.read_json(file, twice=True)  # as transformers, which reads it again
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no config.json, so this is not a checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} {untrusted.reason(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return config


def check_config(path: Path, config: dict[str, Any]) -> None:
    """CheckpointError on what would let transformers run other code, read other weights or never end."""
    file = path / "config.json"
    for key in _ATTENTION_KEYS:
        if config.get(key) not in _ATTENTIONS:
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r}, for which transformers may fetch and run code; take the "
                "key out"
            )
    if "transformers_weights" in config:
        raise CheckpointError(f"{file} names its weights by transformers_weights; take the key out")
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path}: has an adapter (adapter_config.json), which changes the weights; merge it first, or "
            "move it away"
        )
    for key in ("num_labels", "_num_labels"):
        if not 0 <= _whole(config.get(key, 0)) <= _MOST_LABELS:
            raise CheckpointError(f"{file}: {key} is {config[key]!r}")


def _whole(value: Any) -> int:
    """-1 for what is no whole number."""
    return value if type(value) is int else -1
