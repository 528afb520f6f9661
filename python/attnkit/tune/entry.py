"""What is known about one key: every measurement, and the line of JSON that holds them.

A line is ``{"entry": {...}, "sha256": "..."}`` in the one form of `dumps`. It is read only if writing what was read gives the same
line again, so no byte of it can change unnoticed. A file of the store is one line; a pack is many.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from attnkit.plan.space import Config
from attnkit.tune.key import Key, dumps
from attnkit.tune.statistics import Interval

MAX_LINE = 4 << 20  # bytes; a longer one is damaged
_KEY_TYPES: dict[str, type] = {
    field.name: int if field.name in ("head_dim", "v_head_dim", "q_bucket", "kv_bucket") else str
    for field in fields(Key)
    if field.name not in ("device", "toolchain")
}


@dataclass(frozen=True)
class Measurement:
    """One config beside the default, in the same rounds.

    ``ratio`` is its time over the default's, ``seconds`` its median time, ``rung`` how far the search took it (`search`).
    ``wrong`` says why it can never be chosen; it was then not timed. The default itself is measured beside itself: its ratio is
    what noise alone makes of 1.
    """

    config: tuple[tuple[str, int], ...]
    rung: int
    ratio: Interval | None
    seconds: float | None
    wrong: str = ""

    @classmethod
    def of(cls, config: Mapping[str, int], rung: int, ratio: Interval, seconds: float) -> Measurement:
        """What was measured of a config."""
        return cls(_items(config), rung, ratio, seconds)

    @classmethod
    def refused(cls, config: Mapping[str, int], reason: str) -> Measurement:
        """A config that does not run, or runs wrong."""
        return cls(_items(config), 0, None, None, reason)

    @property
    def better_known(self) -> tuple[Any, ...]:
        """Of two of the same config, the one that is kept: that of the higher rung, of more rounds, of the closer interval."""
        if self.ratio is None:
            return (1, self.wrong)
        width = self.ratio.hi - self.ratio.lo
        return (0, self.rung, self.ratio.n, -width, -self.ratio.median, -(self.seconds or 0.0))


@dataclass(frozen=True)
class Entry:
    """A key and its measurements, each config once. ``problem`` is what was measured: shape, threads, variant."""

    key: Key
    problem: tuple[tuple[str, str | int], ...]
    measurements: tuple[Measurement, ...]

    @property
    def line(self) -> str:
        """The entry as a line of JSON, without its end."""
        return _line(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        measured = [_measurement(m) for m in self.measurements]
        return {"key": self.key.to_dict(), "problem": dict(self.problem), "measured": measured}

    def measured(self, config: Mapping[str, int]) -> Measurement | None:
        """What is known of a config."""
        wanted = _items(config)
        return next((m for m in self.measurements if m.config == wanted), None)

    def with_(self, *more: Measurement) -> Entry:
        """The entry with more measurements."""
        return Entry(self.key, self.problem, _kept((*self.measurements, *more)))


def entry(key: Key, problem: Mapping[str, str | int], measurements: Iterable[Measurement] = ()) -> Entry:
    """An entry in canonical order."""
    return Entry(key, tuple(sorted(problem.items())), _kept(measurements))


def merge(a: Entry, b: Entry) -> Entry:
    """What two entries of one key know together: commutative, associative, idempotent.

    Times of different problems are not compared: one of the two is kept whole, the same whichever comes first.
    """
    if a.problem == b.problem:
        return a.with_(*b.measurements)
    return max(a, b, key=lambda e: e.problem)


def parse(line: str | bytes) -> Entry:
    """The entry of a line.

    Raises:
        ValueError: the line is damaged, or not of this version; says how.
    """
    if len(line) > MAX_LINE:
        raise ValueError("too long")
    text = line.decode("ascii") if isinstance(line, bytes) else line
    try:
        document = json.loads(text)
        found = _entry(document["entry"])
        same = found.line == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
        raise ValueError(f"not an entry: {type(exc).__name__}") from exc
    if not same:
        raise ValueError("checksum does not match")
    return found


def _line(content: dict[str, Any]) -> str:
    text = dumps(content)
    return dumps({"entry": content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def _items(config: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(config.items()))


def _kept(measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    best: dict[tuple[tuple[str, int], ...], Measurement] = {}
    for m in measurements:
        known = best.get(m.config)
        if known is None or m.better_known > known.better_known:
            best[m.config] = m
    return tuple(best[config] for config in sorted(best))


def _measurement(m: Measurement) -> dict[str, Any]:
    if m.ratio is None:
        return {"config": dict(m.config), "wrong": m.wrong}
    return {"config": dict(m.config), "rung": m.rung, "ratio": asdict(m.ratio), "seconds": m.seconds}


# --- from JSON: whatever is not exactly right is an error ---------------------------------------------------


def _entry(value: Any) -> Entry:
    key = dict(value["key"])
    prints: dict[str, Any] = {name: _pairs(key.pop(name), str) for name in ("device", "toolchain")}
    if key.keys() != _KEY_TYPES.keys() or any(type(key[n]) is not t for n, t in _KEY_TYPES.items()):
        raise ValueError("not a key")
    return Entry(
        Key(**key, **prints),
        _pairs(value["problem"], str, int),
        _kept(_measured(m) for m in value["measured"]),
    )


def _measured(value: Any) -> Measurement:
    config: Config = dict(_pairs(value["config"], int))
    if "wrong" in value:
        return Measurement.refused(config, _typed(value["wrong"], str))
    numbers = {name: _number(value["ratio"][name]) for name in ("median", "lo", "hi")}
    ratio = Interval(**numbers, n=_typed(value["ratio"]["n"], int))
    return Measurement.of(config, _typed(value["rung"], int), ratio, _number(value["seconds"]))


def _pairs(value: Any, *types: type) -> tuple[tuple[str, Any], ...]:
    if type(value) is not dict or any(type(x) not in types for x in value.values()):
        raise ValueError("not names and values")
    return tuple(sorted(value.items()))


def _typed(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:
        raise ValueError(f"not a {wanted.__name__}")
    return value


def _number(value: Any) -> float:
    number: float = _typed(value, float)
    if not math.isfinite(number) or number <= 0:
        raise ValueError("not a positive number")
    return number
