"""`ak.tune_sparge`: it meets the error it is given, keeps what it has tried, and goes on where it was interrupted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError
from attnkit.ops import sparge_search

pytestmark = pytest.mark.filterwarnings("ignore:sparge_attention:UserWarning")
Sample = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparge_search, "SIMILARITIES", (-1.0, 0.2))
    monkeypatch.setattr(sparge_search, "STEPS", 5)


def sample(rng: np.random.Generator, length: int = 1024) -> Sample:
    """Topics in stretches: head 0 looks for its own, head 1 for everything."""
    topics = np.repeat(rng.standard_normal((1, 2, -(-length // 128), 16)), 128, axis=2)[:, :, :length]
    q, k, v = (topics + 0.3 * rng.standard_normal(topics.shape) for _ in range(3))
    q[:, 0] *= 6
    q[:, 1] *= 0.05
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (q, k, v))  # type: ignore[return-value]


def error(found: ak.SpargeThresholds, given: Sample) -> Tensor:
    exact = ak.dense_attention(*given, causal=found.causal)
    o = ak.sparge_attention(*given, **found.arguments)
    assert isinstance(exact, Tensor)
    assert isinstance(o, Tensor)
    return (o - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3))


@pytest.mark.shows
@pytest.mark.parametrize("causal", [False, True])
def test_it_meets_the_error(causal: bool, rng: np.random.Generator) -> None:
    samples = [sample(rng), sample(rng, 900)]
    densities = []
    for bound in (0.05, 0.2):
        found = ak.tune_sparge(samples, bound, causal=causal)
        for h in range(2):
            worst = max(float(error(found, each)[h]) for each in samples)
            assert worst <= bound
            assert found.error[h] == pytest.approx(worst, rel=1e-4)
        assert (error(found, sample(rng)) <= 1.5 * bound).all()  # of what it has not seen
        densities.append(found.density)
    assert densities[1][0] <= densities[0][0] < 0.5  # what is sparse is found
    assert densities[0][1] == 1  # what is not keeps all


def test_what_may_be_skipped(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparge_search, "MOST_SKIPPED", 16.0)
    samples, path = [sample(rng), sample(rng, 900)], tmp_path / "0.json"
    plain = ak.tune_sparge(samples, 0.05, path=path)
    assert plain.pv_threshold is None
    found = ak.tune_sparge(samples, 0.05, pv_bound=0.07, path=path)
    assert found.topk == plain.topk
    assert found.cdf == plain.cdf
    assert found.pv_threshold is not None
    worst = torch.stack([error(found, each) for each in samples]).amax(0)
    np.testing.assert_allclose(found.error, worst, rtol=1e-4)
    assert worst.max() <= 0.07
    step = 16 / 2**5
    if found.pv_threshold > step:  # a step less is too little
        less = replace(found, pv_threshold=found.pv_threshold - step)
        assert max(float(error(less, each).max()) for each in samples) > 0.07
    tight = ak.tune_sparge(samples, 0.05, pv_bound=0.05, path=path)
    assert tight.pv_threshold is None or tight.pv_threshold >= found.pv_threshold
    monkeypatch.setattr(sparge_search, "sparge_attention", None)  # it had ended
    assert ak.tune_sparge(samples, 0.05, pv_bound=0.07, path=path) == found
    with pytest.raises(AttnkitError, match="AK401"):
        ak.tune_sparge(samples, 0.05, pv_bound=0.04)


def test_it_goes_on_where_it_was_interrupted(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, path = [sample(rng)], tmp_path / "layers" / "0.json"
    wanted = ak.tune_sparge(samples, 0.1)
    calls = []
    halve = sparge_search._Search.halve

    def interrupted(
        self: sparge_search._Search, rule: str, similarity: float
    ) -> list[tuple[float, float, float]]:
        calls.append((rule, similarity))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return halve(self, rule, similarity)

    monkeypatch.setattr(sparge_search._Search, "halve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ak.tune_sparge(samples, 0.1, path=path)
    assert ak.tune_sparge(samples, 0.1, path=path) == wanted
    assert calls[2:] == [("topk", 0.2), ("topk", 0.2), ("cdf", 0.2)]
    assert ak.tune_sparge(samples, 0.1, path=path) == wanted  # it had ended
    assert len(calls) == 5
    for damaged in (b"", b"{", path.read_bytes().replace(b"0", b"1", 1), b"[1]"):
        path.write_bytes(damaged)
        assert ak.tune_sparge(samples, 0.1, path=path) == wanted
    ak.tune_sparge(samples, 0.2, path=path)  # another search
    assert ak.tune_sparge(samples, 0.1, path=path) == wanted


def test_thresholds_are_saved(rng: np.random.Generator, tmp_path: Path) -> None:
    found = ak.tune_sparge([sample(rng)], 0.1, scale=0.3)
    found.save(tmp_path / "thresholds.json")
    assert ak.SpargeThresholds.load(tmp_path / "thresholds.json") == found
    for damaged in ("", "[]", '{"bound": 1}'):
        (tmp_path / "thresholds.json").write_text(damaged)
        with pytest.raises(AttnkitError, match="AK401"):
            ak.SpargeThresholds.load(tmp_path / "thresholds.json")


def test_what_cannot_be_met_is_said(rng: np.random.Generator) -> None:
    with pytest.raises(AttnkitError, match=r"(?s)AK401.*int8=False"):
        ak.tune_sparge([sample(rng)], 1e-4)
    assert max(ak.tune_sparge([sample(rng)], 1e-4, int8=False).error) <= 1e-4
    for wrong in ((([sample(rng)]), 0.0), ([], 0.1)):
        with pytest.raises(AttnkitError, match="AK401"):
            ak.tune_sparge(*wrong)
    with pytest.raises(AttnkitError, match=r"(?s)AK402.*samples"):
        ak.tune_sparge([sample(rng)[:2]], 0.1)  # type: ignore[list-item]
