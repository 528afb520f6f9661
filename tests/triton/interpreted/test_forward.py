"""The forward kernels over the gallery of scores and masks, layouts, tails, dead rows and dead slots."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit.testing import Dims, qkv

Compare = Callable[..., Any]


def _gallery() -> Any:
    """The variants of tests/conformance, each with its equation for the oracle."""
    path = Path(__file__).parents[2] / "conformance/test_modifiers.py"
    spec = importlib.util.spec_from_file_location("gallery_of_modifiers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GALLERY = _gallery()


@pytest.mark.parametrize("name", GALLERY.VARIANTS)
def test_gallery(name: str, compare: Compare, rng: np.random.Generator) -> None:
    dims = Dims(1, 2, 1, 140, 130, 16, 24)
    variant = GALLERY.VARIANTS[name](rng, dims)
    call = dict(variant.mods or variant.plain)
    weighting = call.pop("normalizer", None)
    fields = call | ({} if weighting is None else {"sink": weighting.sink})
    compare(*qkv("gaussian", rng, dims), oracle=variant.oracle, **fields)
