"""Shared by the tests of whole models: quiet, without gradients, padded batches, and one way to judge a run."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

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
