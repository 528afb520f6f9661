"""Suite variants: its rows are right and judged."""

import pytest
import torch

from attnkit.bench import variants
from attnkit.bench.peers import recurrences
from attnkit.variants import linear


@pytest.mark.parametrize("member", variants.MEMBERS)
def test_torch_formulations_are_the_equation(member: str) -> None:
    given = {
        x: t[:, :2, :128].double() for x, t in variants._inputs(variants.Job(member, "fwd", 128), 0).items()
    }
    found = variants.MEMBERS[member].peer(**given)
    expected = linear.naive(**{x: t.numpy() for x, t in given.items()}).o
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert recurrences.CHUNK < 128  # so that states were carried


def test_a_run_is_judged() -> None:
    chosen = [
        variants.Job("scalar gate", "fwdbwd", 1024),
        *(variants.Job("linear", "fwd", n, True) for n in (4096, 8192)),
    ]
    document = variants.run(chosen, rounds=1, seconds=0.0)
    assert [r["workload"] for r in document["runs"]] == [job.title for job in chosen]
    assert all(error < 1e-4 for error in document["runs"][0]["error"].values())
    assert [bar["against"] for bar in document["bars"]] == ["torch", "time a token, most over least"]
    assert all(bar["measured"] is not None for bar in document["bars"])


def test_rows_are_picked_by_name() -> None:
    assert {job.member for job in variants.jobs(["delta*fwd"])} == {"gated delta"}
    assert len(variants.jobs()) == 2 * len(variants.MEMBERS) + 2 * len(variants._LENGTHS)
