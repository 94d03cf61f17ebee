"""The state of mask training on disk: one file, replaced whole, that knows which run it belongs to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.methods import patch
from llmsqueeze.methods.base import Target
from llmsqueeze.state_file import read_state, write_state

STATE_NAME = "masks.pt"
STATE_VERSION = 1


class TrainingState:
    """Training state in a directory: one file, replaced whole.

    It holds the logits, AdamW's moments, the curves and what run it belongs to; a step's noise and
    windows follow from its number.
    """

    def __init__(self, directory: Path, identity: dict[str, str]) -> None:
        self._file = directory / STATE_NAME
        self._identity = identity
        directory.mkdir(parents=True, exist_ok=True)

    def restore(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[list[float], list[float]]:
        """Losses and densities of the steps that are done; the arguments are set to what they were."""
        if not self._file.exists():
            return [], []
        # On the CPU: the logits and moments have their place on the device already.
        raw = read_state(self._file)
        try:
            found, version = raw["identity"], raw["version"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._file}: not a training state; delete it to start again"
            ) from error
        if version != STATE_VERSION:
            raise RecipeError(f"{self._file}: state version {version}; delete it to start again")
        for what, digest in self._identity.items():
            if found.get(what) != digest:
                raise RecipeError(
                    f"{self._file} belongs to a run with another {what}; repeat that run's options, "
                    "name another state directory, or delete this one to start again"
                )
        with torch.no_grad():
            for parameter, value in zip(parameters, raw["logits"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(raw["optimizer"])
        return raw["losses"].tolist(), raw["densities"].tolist()

    def write(
        self,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: list[float],
        densities: list[float],
    ) -> None:
        """Write beside the old state, then put it in its place."""
        raw = {
            "version": STATE_VERSION,
            "identity": self._identity,
            "logits": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "losses": torch.tensor(losses, dtype=torch.float64),
            "densities": torch.tensor(densities, dtype=torch.float64),
        }
        write_state(self._file, raw)


def identity_of(
    model: nn.Module,
    sites: dict[str, Tensor],
    benefits: dict[str, Tensor] | None,
    tokens: Tensor,
    target: Target,
    config: patch.Config,
) -> dict[str, str]:
    """Digests of all that a result depends on, by the word that an error message gives them."""
    # How often the state is saved changes nothing.
    options = {**asdict(config), **asdict(target), "save_every": None}
    text = json.dumps(options, sort_keys=True)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "set of tokens": _digest({"tokens": tokens}),
        "starting mask": _digest(
            {**sites, **{f"{n}.tiles": t for n, t in (benefits or {}).items()}}
        ),
        "model": _digest({n: p.detach() for n, p in model.named_parameters()}),
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256, hex, of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
