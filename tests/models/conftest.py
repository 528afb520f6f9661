"""Shared by the tests of whole models: quiet, without gradients, padded batches, and one way to judge a run."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.bench.architectures import TINY, architectures

Make = Callable[..., Any]
Tokens = Callable[..., dict[str, Tensor]]
Judge = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    transformers = pytest.importorskip("transformers")
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    """``tokens(17, 4, left=True)``: a padded batch of token ids below 211 with its attention mask."""

    def make(*lengths: int, left: bool = False) -> dict[str, Tensor]:
        generator, width = torch.Generator().manual_seed(1), max(lengths)
        ids = torch.randint(3, 211, (len(lengths), width), generator=generator)
        at, lens = torch.arange(width), torch.tensor(lengths)[:, None]
        mask = at >= width - lens if left else at < lens
        return {"input_ids": ids * mask, "attention_mask": mask.long()}

    return make


@pytest.fixture(scope="session")
def judge() -> Judge:
    """``judge(ours, torchs, exact)``: both float32 results against the same model in float64.

    Two correct float32 runs differ in the order of their roundings alone, so attnkit's error in the Frobenius norm is
    at most twice torch's.
    """

    def compare(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
        assert ours.dtype == torch.float32
        assert exact.dtype == torch.float64
        assert (ours - exact).norm() <= 2 * (torchs - exact).norm()
        assert (ours - exact).norm() <= 1e-5 * exact.norm()

    return compare


@pytest.fixture(scope="session")
def make() -> Make:
    """``make(name, implementation)``: random weights, the same each time for every implementation."""
    made: dict[tuple[str, str], Any] = {}

    def make(name: str, implementation: str = "attnkit") -> Any:
        key = name, implementation
        if key in made:
            return made[key]
        if implementation == "attnkit":
            made[key] = architectures(TINY)[name].make("attnkit")
        else:
            model = made[key] = copy.deepcopy(make(name))
            model.set_attn_implementation(implementation)
        assert made[key].config._attn_implementation == implementation
        return made[key]

    return make


@pytest.fixture
def exact(make: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``exact(name)``: the model with eager attention in float64, all of it; ``exact(name, **inputs)``: what it gives.

    ``stored`` is the dtype its weights are rounded to first.
    """
    softmax = torch.nn.functional.softmax

    def in_its_own_dtype(x: Tensor, dim: int = -1, dtype: Any = None) -> Tensor:
        return softmax(x, dim=dim)  # models ask for float32 here

    def run(name: str, stored: torch.dtype = torch.float32, **inputs: Any) -> Any:
        wide = copy.deepcopy(make(name, "eager")).to(stored).double()
        if hasattr(wide.config, "num_experts_per_tok"):
            wide.set_experts_implementation("eager")  # the faster one knows no float64

        def call(**inputs: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "softmax", in_its_own_dtype)
                return wide(
                    **{
                        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                        for k, v in inputs.items()
                    }
                )

        call.parameters = wide.named_parameters
        return call(**inputs) if inputs else call

    return run
