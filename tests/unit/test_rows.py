"""Vectors inside score functions: rows of captured tensors, unrolled; against torch's own vmap."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attnkit.backends.reference.evaluate import Evaluation  # noqa: E402
from attnkit.ir.text import parse  # noqa: E402
from attnkit.ir.trace import build_text  # noqa: E402
from attnkit.ops.tracing import trace_mods  # noqa: E402

TABLE = torch.sin(torch.arange(60.0)).view(3, 4, 5)
OTHER = torch.cos(torch.arange(20.0)).view(4, 5)
LISTS = torch.tensor([[0, 3, 2], [1, 1, 0], [2, 0, 3]])
MARKS = TABLE > 0
Q, KV = (x.ravel() for x in np.meshgrid([0, 1, 2], [0, 1, 2, 3]))

ROWS: dict[str, Callable[[Any, Any], Any]] = {
    "in two steps": lambda q, kv: TABLE[q][kv, 2],
    "in three steps": lambda q, kv: TABLE[q][kv][q + 1],
    "whole rest": lambda q, kv: TABLE[q, ..., :][kv, 4] + OTHER[kv, :][q],
    "dot": lambda q, kv: torch.dot(TABLE[q, kv], OTHER[kv]),
    "matmul": lambda q, kv: TABLE[q, kv] @ OTHER[q] + OTHER[kv].dot(OTHER[q]),
    "sum": lambda q, kv: TABLE[q, kv].sum() + torch.sum(OTHER[q], dim=-1) + OTHER[kv].sum(0),
    "sum of products": lambda q, kv: (TABLE[q, kv] * OTHER[kv] * 2 + q).sum(-1),
    "largest": lambda q, kv: OTHER[kv].amax() - TABLE[q, kv].amin(-1),
    "any": lambda q, kv: (LISTS[q] == kv).any().float(),
    "all": lambda q, kv: torch.all(LISTS[q] >= kv, dim=0).float(),
    "marks": lambda q, kv: MARKS[q, kv].any().float() + torch.all(MARKS[q, kv]).float(),
    "count": lambda q, kv: (LISTS[q] == kv).sum() + MARKS[q, kv].sum(-1),
    "elements": lambda q, kv: (OTHER[q] * kv)[2] + (OTHER[q] - OTHER[kv])[-1],
    "functions": lambda q, kv: torch.where(OTHER[q] > 0, torch.tanh(OTHER[kv]), 0.5).sum() + OTHER[q].exp().sum(),
    "sizes": lambda q, kv: q * OTHER[kv].shape[0] + len(OTHER[q]) * kv + OTHER[q].size(0) + TABLE[q].dim() + OTHER[q].ndim,
    "embedding": lambda q, kv: torch.nn.functional.embedding(kv, OTHER)[q],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    function = ROWS[name]
    traced = trace_mods(lambda s, b, h, q_idx, kv_idx: function(q_idx, kv_idx) * 1.0, None)
    root = parse(build_text(traced)).attend.score
    actual = Evaluation([root], {"q_idx": Q, "kv_idx": KV}, [b.numpy() for b in traced.buffers])[root]
    expected = torch.vmap(function)(torch.from_numpy(Q), torch.from_numpy(KV)).double()
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-6, atol=1e-6)


def test_rows_can_be_gone_through() -> None:
    """Which torch.vmap does not allow."""
    traced = trace_mods(
        lambda s, b, h, q, kv: sum(x * y for x, y in zip(OTHER[q], OTHER[kv], strict=True)), None
    )
    dot = trace_mods(lambda s, b, h, q, kv: 0 + torch.dot(OTHER[q], OTHER[kv]), None)
    roots = [parse(build_text(t)).attend.score for t in (traced, dot)]
    values = [Evaluation([r], {"q_idx": Q, "kv_idx": KV}, [OTHER.numpy()])[r] for r in roots]
    np.testing.assert_allclose(*values, rtol=1e-12)


def test_take_is_an_index() -> None:
    texts = [
        parse(build_text(trace_mods(score, None)))
        for score in (
            lambda s, b, h, q, kv: torch.take(OTHER[0], q),
            lambda s, b, h, q, kv: OTHER[0].take(q),
            lambda s, b, h, q, kv: OTHER[0][q],
        )
    ]
    assert texts[0] is texts[1] is texts[2]
