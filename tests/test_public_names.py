"""Public names and the methods table say what is there."""

from __future__ import annotations

import dataclasses

import pytest

import llmsqueeze
from llmsqueeze.methods import WEIGHT_METHODS, weight_method
from llmsqueeze.numerics.stats import STATISTICS


def test_all_is_sorted_and_importable() -> None:
    assert sorted(llmsqueeze.__all__) == llmsqueeze.__all__
    for name in llmsqueeze.__all__:
        assert getattr(llmsqueeze, name) is not None


@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_methods_fit_their_protocol(name: str) -> None:
    method = weight_method(name)
    assert method.needs(method.Config()) <= STATISTICS
    assert dataclasses.is_dataclass(method.Config)
    assert method.Config.__dataclass_params__.frozen
    assert all(field.metadata["help"] for field in dataclasses.fields(method.Config))
    assert callable(method.prune)
    assert method.__doc__ and "arXiv" in method.__doc__
