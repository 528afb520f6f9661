"""Suite learning: every model learns, and sees no token that comes later."""

import pytest
import torch

from attnkit.bench import learning
from attnkit.bench.training import BYTES, Recipe

SMALL = Recipe(steps=8, batch=2, context=96, layers=2, width=64, warmup=2)


def test_a_run() -> None:
    document = learning.run(SMALL)
    assert [r["model"] for r in document["runs"]] == list(learning.models(SMALL))
    for r in document["runs"]:
        assert len(r["losses"]) == SMALL.steps
        assert r["losses"][-1] < r["losses"][0]
        assert 0 < r["held_out"] < 1.2 * torch.log(torch.tensor(BYTES))


@pytest.mark.parametrize("name", learning.models(SMALL))
def test_models_are_causal(name: str) -> None:
    torch.manual_seed(0)
    model = learning.models(SMALL)[name]()
    ids = torch.randint(BYTES, (1, 96))
    changed = ids.clone()
    changed[:, 60:] = (changed[:, 60:] + 1) % BYTES
    with torch.no_grad():
        found, other = model(ids), model(changed)
    torch.testing.assert_close(found[:, :60], other[:, :60])
    assert not torch.allclose(found[:, 60:], other[:, 60:])
