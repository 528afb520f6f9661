"""Suite variants: its rows are right and judged."""

import numpy as np
import pytest
import torch

from attnkit.bench import variants
from attnkit.bench.measure import Contender
from attnkit.bench.peers import recurrences
from attnkit.bench.rows import Bar
from attnkit.bench.variants import block_sparse
from attnkit.bench.variants.jobs import Job, Prepared
from attnkit.bench.variants.linear import MEMBERS
from attnkit.variants import linear


@pytest.mark.parametrize("name", MEMBERS)
def test_torch_formulations_are_the_equation(name: str) -> None:
    given = {x: t[:, :2].double() for x, t in MEMBERS[name].inputs(128, 0).items()}
    found = MEMBERS[name].peer(**given)
    expected = linear.naive(**{x: t.numpy() for x, t in given.items()}).o
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert recurrences.CHUNK < 128  # so that states were carried


def test_a_run_is_judged() -> None:
    chosen = variants.jobs(["scalar gate*fwdbwd"]) + [
        job for job in variants.jobs(["linear*lengths"]) if job.length in (4096, 8192)
    ]
    document = variants.run(chosen, rounds=1, seconds=0.0)
    assert [r["workload"] for r in document["runs"]] == [job.title for job in chosen]
    assert all(error < 1e-4 for error in document["runs"][0]["error"].values())
    against = ["torch", "time a token, most over least", "MiB beyond inputs and results, at any length"]
    assert [bar["against"] for bar in document["bars"]] == against
    assert all(bar["measured"] is not None for bar in document["bars"])


def test_who_is_wrong_is_not_judged() -> None:
    def prepare(seed: int) -> Prepared:
        rivals = {"attnkit": Contender(lambda: None), "torch": Contender(lambda: None)}
        return Prepared(rivals, lambda: {"attnkit": 0.0, "torch": float("nan")}, facts={"density": 0.5})

    bars = (Bar("torch", least=0.0), Bar("attnkit", most=10.0))
    document = variants.run([Job("x", prepare, bars)], rounds=1, seconds=0.0)
    assert [(bar["met"], bar["note"]) for bar in document["bars"]] == [(False, "wrong: torch"), (True, None)]
    assert document["runs"][0]["facts"] == {"density": 0.5}


def test_rows_are_picked_by_name() -> None:
    assert [job.title for job in variants.jobs(["gated delta*d64 fwdbwd"])] == [
        "gated delta b1 h8 s4096 d64 fwdbwd"
    ]
    titles = [job.title for job in variants.jobs()]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("name", block_sparse.PATTERNS)
def test_maps_of_blocks_are_a_tenth(name: str) -> None:
    make, block, causal = block_sparse.PATTERNS[name]
    layout = make(block, np.random.default_rng(0))
    assert layout.shape == (8, 8192 // block, 8192 // block)
    assert abs(layout.mean() - 0.1) < (0.025 if causal else 0.001)
    if causal:
        assert not np.triu(layout, 1).any()
        assert layout[:, :, 0].all()
        assert layout.diagonal(axis1=1, axis2=2).all()
    else:
        assert np.ptp(layout.sum(-1)) <= 1
    assert not np.array_equal(layout[0], layout[1])
