"""From measurements to a config: a pure function, so that everybody who has the same entry runs the same kernel."""

from __future__ import annotations

from attnkit.plan.space import Config, Space, contains, default_config, rank, same_bits
from attnkit.tune.entry import Entry, Measurement
from attnkit.tune.statistics import LEAST_ROUNDS

# Configs whose times differ by less are equally good.
TIE = 0.02
# A config whose numeric fields are not the default's gives other bits, and has to be worth them.
NUMERIC = 0.05


def choose(space: Space, entry: Entry | None) -> Config:
    """The best config of a space that was measured; the default unless another is faster beyond noise, by 5 % if its bits differ.

    Measurements that do not fit the space do not count. Among configs within a tie of the best, the first by `rank`.
    """
    default = default_config(space)
    if entry is None:
        return default
    least = noise(entry, default)
    fitting = [(m, dict(m.config)) for m in entry.measurements if contains(space, dict(m.config))]
    faster = [
        (m.ratio.median, config)
        for m, config in fitting
        if m.ratio is not None
        and is_faster(m, least if same_bits(space, config, default) else max(least, NUMERIC))
    ]
    if not faster:
        return default
    best = min(median for median, _ in faster)
    return min(
        (config for median, config in faster if median <= best * (1 + TIE)), key=lambda c: rank(space, c)
    )


def noise(entry: Entry, default: Config) -> float:
    """How far from 1 the ratio of the default to itself was, or a tie if that is more."""
    known = entry.measured(default)
    if known is None or known.ratio is None:
        return TIE
    return max(TIE, known.ratio.hi - 1, 1 - known.ratio.lo)


def is_faster(m: Measurement, noise: float) -> bool:
    """Whether a config is faster than the default, by more than noise and for certain: fewer rounds have no interval."""
    return m.ratio is not None and m.ratio.n >= LEAST_ROUNDS and m.ratio.hi < 1 and m.ratio.median < 1 - noise
