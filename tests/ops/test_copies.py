"""Ready-made masks and scores that are pickled or copied with a model compute the same, from the copy's tensors."""

import copy
import pickle  # noqa: TID251 -- models that hold masks are sent to processes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak

IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
MASKS: dict[str, Callable[[], Any]] = {
    "causal": ak.causal,
    "top-left": lambda: ak.causal(align="top_left"),
    "window": lambda: ak.window(2, 1),
    "to the left alone": lambda: ak.window(2, None),
    "document": lambda: ak.document(IDS),
    "prefix": lambda: ak.prefix(3) | ak.causal(),
    "prefixes": lambda: ak.prefix(torch.tensor([2, 5])) & ~ak.window(1),
    "tree": lambda: ak.tree(torch.tensor([-1, 0, 0, 1, 1, 2, 5, 6])),
    "blocks": lambda: ak.block_mask(ak.causal(), 1, 1, 8, 8, q_block=4, kv_block=4),
    "a map": lambda: ak.BlockMask.from_dense(
        torch.tensor([[1, 0], [2, 1]], dtype=torch.uint8), q_block=4, kv_block=4, mask=ak.causal()
    ),
}
SCORES: dict[str, Callable[[], Any]] = {
    "softcap": lambda: ak.softcap(3.0),
    "no softcap": lambda: ak.softcap(0.0),
    "softcap by a param": lambda: ak.softcap(ak.param("cap", 3.0)),
    "alibi": lambda: ak.alibi(torch.tensor([0.5, 0.25])),
    "bias": lambda: ak.bias(torch.arange(64.0).view(8, 8) / 16),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301
    "deepcopy": copy.deepcopy,
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def attend(q: Tensor, **given: Any) -> Tensor:
    found = ak.attention(q, q.flip(2), q.flip(1), **given)
    assert isinstance(found, Tensor)
    return found


@EVERY_WAY
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, way: Callable[[Any], Any], randn: Any) -> None:
    q, mask = randn(2, 2, 8, 16), MASKS[name]()
    expected = attend(q, mask=mask)
    assert not torch.equal(expected, attend(q))
    twin = way(mask)
    torch.testing.assert_close(attend(q, mask=twin), expected, rtol=0, atol=0)
    torch.testing.assert_close(attend(q, mask=twin & ak.window(1)), attend(q, mask=mask & ak.window(1)), rtol=0, atol=0)  # fmt: skip


@EVERY_WAY
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, way: Callable[[Any], Any], randn: Any) -> None:
    q, score = randn(2, 2, 8, 16), SCORES[name]()
    expected = attend(q, score=score)
    assert torch.equal(expected, attend(q)) == (name == "no softcap")
    torch.testing.assert_close(attend(q, score=way(score)), expected, rtol=0, atol=0)


@EVERY_WAY
@pytest.mark.parametrize("normalizer", [ak.softmax(torch.tensor([0.5, 1.5])), ak.sigmoid(-1.0)], ids=["sink", "sigmoid"])  # fmt: skip
def test_normalizers(normalizer: Any, way: Callable[[Any], Any], randn: Any) -> None:
    q = randn(1, 2, 8, 16)
    backend = "auto" if normalizer.kind == "softmax" else "reference"
    expected = attend(q, normalizer=normalizer, backend=backend)
    torch.testing.assert_close(attend(q, normalizer=way(normalizer), backend=backend), expected, rtol=0, atol=0)  # fmt: skip


class Slopes(nn.Module):
    """A layer whose score holds a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]))
        self.score, self.mask = ak.alibi(self.slopes), ak.causal() & ak.window(5)

    def forward(self, q: Tensor) -> Tensor:
        return attend(q, score=self.score, mask=self.mask)


@EVERY_WAY
def test_the_copy_of_a_layer_learns_by_itself(way: Callable[[Any], Any], randn: Any) -> None:
    q, layer = randn(1, 2, 8, 16), Slopes()
    twin = way(layer)
    expected = layer(q)
    with torch.no_grad():
        twin.slopes += 1
    assert torch.equal(layer(q), expected)
    assert not torch.equal(twin(q), expected)
    twin(q).sum().backward()
    assert layer.slopes.grad is None
    assert twin.slopes.grad is not None
    assert bool(twin.slopes.grad.abs().max() > 0)
