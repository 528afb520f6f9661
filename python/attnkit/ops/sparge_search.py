"""Thresholds of `sparge_attention`, head by head: the sparsest that keep an error which the caller names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import (
    check_flag,
    check_function,
    check_number,
    check_qkv,
    check_scale,
    check_values_of,
)
from attnkit.ops.dense import dense_attention
from attnkit.ops.sparge_family import sparge_attention
from attnkit.tune.key import dumps
from attnkit.tune.store import write_whole

Sample = tuple[Tensor, Tensor, Tensor]
RULES = ("topk", "cdf")
SIMILARITIES = (-1.0, 0.0, 0.2, 0.4, 0.6, 0.8)
STEPS = 8  # halvings of what the share, or the mass, may be
MOST_SKIPPED = 64.0  # powers of two: what lies farther below weighs nothing
DENSE_FROM = 0.9  # a head that keeps more keeps all: predicting would cost more than it saves


@dataclass(frozen=True)
class SpargeThresholds:
    """What `tune_sparge` found; each tuple has a number for every query head, and pv_threshold is of all.

    ``sparge_attention(q, k, v, **found.arguments)`` uses it. ``bound`` is the relative error that was allowed, ``error`` the largest
    of any sample, ``density`` the mean share of tiles that is left. The others are arguments of `sparge_attention`.
    """

    bound: float
    causal: bool
    int8: bool
    smooth_k: bool
    scale: float | None
    topk: tuple[float | None, ...]
    cdf: tuple[float | None, ...]
    similarity: tuple[float, ...]
    error: tuple[float, ...]
    density: tuple[float, ...]
    pv_threshold: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of `sparge_attention`."""
        return {
            "causal": self.causal, "int8": self.int8, "smooth_k": self.smooth_k, "scale": self.scale,
            "topk": list(self.topk), "cdf": list(self.cdf), "similarity": list(self.similarity),
            "pv_threshold": self.pv_threshold,
        }  # fmt: skip

    def save(self, path: Path | str) -> None:
        """Write a file that `load` reads. OSError if it cannot be written."""
        write_whole(Path(path), dumps(asdict(self)).encode("ascii"), 0o644)

    @classmethod
    def load(cls, path: Path | str) -> SpargeThresholds:
        """What `save` wrote.

        Raises:
            OSError: the file cannot be read.
            AttnkitValueError: AK401, it is no such file.
        """
        try:
            held: dict[str, Any] = json.loads(Path(path).read_bytes())
            made: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in held.items()}
            return cls(**made)
        except (ValueError, TypeError, AttributeError) as exc:
            raise error(
                "AK401", where="path", given=f"{path}: {exc}", allowed="a file of SpargeThresholds.save"
            ) from exc


def tune_sparge(
    samples: Sequence[Sample],
    bound: float,
    *,
    causal: bool = False,
    int8: bool = True,
    smooth_k: bool = True,
    scale: float | None = None,
    pv_bound: float | None = None,
    path: Path | str | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> SpargeThresholds:
    """Search, for every query head, the ``topk`` or ``cdf``, and ``similarity``, that keep the fewest tiles within an error.

    The error of a head is ``sum |o - exact| / sum |exact|``, exact being dense attention in float32, and counts where it is
    largest among the samples (SpargeAttn's measure, of 0.06 to 0.08 in its own tuning). For both rules and each of a few
    similarities the least share, or mass, is found by halving, all heads in the same calls: about a hundred calls a sample. A
    head for which nothing is enough keeps all.

    Args:
        samples: ``(q, k, v)`` as `sparge_attention` takes them, of one attention layer: what it meets in use, a few of them.
        bound: the largest error of any head of any sample, above 0.
        causal: as in `sparge_attention`, like int8, smooth_k and scale.
        int8: see causal.
        smooth_k: see causal.
        scale: see causal.
        pv_bound: then also the least ``pv_threshold``, one for all heads, with which no head's error is larger than this;
            at least ``bound``, which the shares found use up. What skips has no gradients.
        path: a file that what has been tried is kept in, after each similarity: the same search goes on where one was
            interrupted, and does nothing where it had ended. Damaged, or of another search, it is begun again.
        progress: called with the share that is done.

    Returns:
        The thresholds; `SpargeThresholds.save` keeps them.

    Raises:
        AttnkitError: AK401, int8 by itself exceeds the bound in some head, the bound is not above 0 or pv_bound below it; AK402, a
            sample is no (q, k, v); as `sparge_attention`.
        OSError: ``path`` cannot be written.
    """
    bound, scale = check_number("bound", bound), check_scale(scale)
    if not 0 < bound < math.inf:
        raise error("AK401", where="bound", given=str(bound), allowed="a finite number above 0")
    pv_bound = None if pv_bound is None else check_number("pv_bound", pv_bound)
    if pv_bound is not None and not bound <= pv_bound < math.inf:
        given, allowed = str(pv_bound), f"a finite number of at least the bound, {bound:g}"
        raise error("AK401", where="pv_bound", given=given, allowed=allowed)
    for name, flag in (("causal", causal), ("int8", int8), ("smooth_k", smooth_k)):
        check_flag(name, flag)
    if path is not None and not isinstance(path, (str, Path)):
        raise error("AK402", where="path", given=type(path).__name__, allowed="a path, or None")
    check_function("progress", progress)
    if progress is None:
        raise error("AK402", where="progress", given="None", allowed="a function of a number")
    _check_samples(samples)
    settings = {"causal": causal, "int8": int8, "smooth_k": smooth_k, "scale": scale}
    search = _Search(samples, bound, settings)
    notes = _Notes(None if path is None else Path(path), search.identity)
    heads = range(samples[0][0].shape[1])
    dense = notes.take("dense", partial(search.measure, {"topk": 1.0, "similarity": 1.0}))
    if max(e for e, _ in dense) > bound:
        worst = max(heads, key=lambda h: dense[h][0])
        given = f"{bound:g}, and keeping everything costs {dense[worst][0]:.3g} in head {worst}"
        raise error(
            "AK401",
            where="bound",
            given=given,
            allowed="more than that",
            hint="int8=False rounds nothing" if int8 else "",
        )
    best = [_Best(1.0, "topk", 1.0, 1.0, e) for e, _ in dense]
    tries = [(rule, similarity) for similarity in SIMILARITIES for rule in RULES]
    for i, (rule, similarity) in enumerate(tries):
        found = notes.take(f"{rule} {similarity}", partial(search.halve, rule, similarity))
        for h, (share, e, density) in enumerate(found):
            if density < best[h].density and density <= DENSE_FROM:
                best[h] = _Best(density, rule, share, similarity, e)
        progress((i + 1) / len(tries))
    topk, cdf = (tuple(b.share if b.rule == rule else None for b in best) for rule in RULES)
    thresholds = SpargeThresholds(
        bound, causal, int8, smooth_k, scale, topk, cdf, tuple(b.similarity for b in best),
        tuple(b.error for b in best), tuple(b.density for b in best),
    )  # fmt: skip
    if pv_bound is None:
        return thresholds
    skipping = notes.take(f"pv_threshold within {pv_bound!r}", partial(search.skip, thresholds, pv_bound))
    return (
        replace(thresholds, pv_threshold=skipping[-1][0], error=tuple(skipping[-1][1:]))
        if skipping
        else thresholds
    )


def _check_samples(samples: Any) -> None:
    if not isinstance(samples, (tuple, list)):
        raise error("AK402", where="samples", given=type(samples).__name__, allowed="a list of (q, k, v)")
    if not samples:
        raise error("AK401", where="samples", given="none", allowed="at least one (q, k, v)")
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or len(sample) != 3:
            raise error("AK402", where="samples", given=type(sample).__name__, allowed="tuples (q, k, v)")
        check_qkv(*sample)
        for t in sample:
            check_values_of("samples", t)
    heads = [sample[0].shape[1] for sample in samples]
    if len(set(heads)) > 1:
        raise error("AK403", where="samples", given=f"q of {heads[:8]} heads", allowed="samples of one layer")


class _Best(NamedTuple):
    density: float
    rule: str
    share: float  # or mass
    similarity: float
    error: float


class _Search:
    def __init__(self, samples: Sequence[Sample], bound: float, settings: dict[str, Any]) -> None:
        self.samples, self.bound, self.settings = samples, bound, settings
        self.heads = samples[0][0].shape[1]
        with torch.no_grad():
            self.exact: list[Any] = [
                dense_attention(
                    *(x.float() for x in sample), causal=settings["causal"], scale=settings["scale"]
                )
                for sample in samples
            ]

    @property
    def identity(self) -> str:
        """A digest of all that decides what is found."""
        known = {
            "bound": self.bound, **self.settings, "rules": RULES, "similarities": SIMILARITIES, "steps": STEPS, "dense_from": DENSE_FROM,
        }  # fmt: skip
        digest = hashlib.sha256(dumps(known).encode())
        for x in (x for sample in self.samples for x in sample):
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            digest.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def measure(self, chosen: dict[str, Any]) -> list[tuple[float, float]]:
        """The largest error and the mean density of each head, with these thresholds."""
        errors, densities = torch.zeros(self.heads), torch.zeros(self.heads)
        for sample, exact in zip(self.samples, self.exact, strict=True):
            with torch.no_grad():
                given: dict[str, Any] = self.settings | chosen | {"return_density": True}
                o, density = sparge_attention(*sample, **given)
            off = (o.float() - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3)).clamp(min=1e-30)
            errors = torch.maximum(errors, off.nan_to_num(nan=torch.inf))
            densities += density.mean(0) / len(self.samples)
        return list(zip(errors.tolist(), densities.tolist(), strict=True))

    def halve(self, rule: str, similarity: float) -> list[tuple[float, float, float]]:
        """Of each head the least share found that is enough, with its error and its density; all of it if none is."""
        low, high = [0.0] * self.heads, [1.0] * self.heads
        found = [(1.0, 0.0, 1.0)] * self.heads
        for _ in range(STEPS):
            middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
            for h, (off, density) in enumerate(self.measure({rule: middle, "similarity": similarity})):
                if off <= self.bound:
                    high[h], found[h] = middle[h], (middle[h], off, density)
                else:
                    low[h] = middle[h]
        return found

    def skip(self, chosen: SpargeThresholds, bound: float) -> list[tuple[float, ...]]:
        """Each pv_threshold, smaller and smaller, that is enough for all heads beside these thresholds; and their errors."""
        low, high = 0.0, MOST_SKIPPED
        found: list[tuple[float, ...]] = []
        for _ in range(STEPS):
            middle = (low + high) / 2
            errors = [off for off, _ in self.measure(chosen.arguments | {"pv_threshold": middle})]
            if max(errors) <= bound:
                high = middle
                found.append((middle, *errors))
            else:
                low = middle
        return found


class _Notes:
    """What a search has tried, kept in a file; another search's, or a damaged one, is nothing."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.tried: dict[str, list[Any]] = {}
        if path is not None and path.is_file():
            try:
                held = json.loads(path.read_bytes())
                if held["identity"] == identity and held["sha256"] == _checksum(held["tried"]):
                    self.tried = held["tried"]
            except (ValueError, TypeError, KeyError):
                self.tried = {}

    def take(self, name: str, find: Callable[[], list[Any]]) -> list[Any]:
        """What was noted under a name, or is found, and noted, now."""
        if name not in self.tried:
            self.tried[name] = [list(x) for x in find()]
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                note = {
                    "identity": self.identity,
                    "tried": self.tried,
                    "sha256": _checksum(self.tried),
                }
                write_whole(self.path, dumps(note).encode("ascii"), 0o644)
        return self.tried[name]


def _checksum(tried: Any) -> str:
    return hashlib.sha256(dumps(tried).encode()).hexdigest()
