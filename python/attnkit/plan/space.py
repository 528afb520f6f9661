"""What may be chosen about a kernel: fields, the space they span, and one choice of them.

A space is data: a backend answers `space(spec)` with a field for each number, and everything that handles configs (search,
store, cost model) goes by the fields alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

FieldKind = Literal["numeric", "schedule"]
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Field:
    """One number a tuner may choose.

    ``numeric`` fields change the order of sums and so the last bits of a result; ``schedule`` fields never do.
    ``direction`` says which kernel reads it: each is tuned by itself.
    """

    kind: FieldKind
    default: int
    values: tuple[int, ...]
    direction: Direction = "forward"


Space = dict[str, Field]
Config = dict[str, int]


def default_config(space: Space) -> Config:
    """The config of an untuned kernel: the default of every field."""
    return {name: field.default for name, field in space.items()}


def of_direction(space: Space, direction: Direction) -> Space:
    """The fields that one direction reads."""
    return {name: field for name, field in space.items() if field.direction == direction}


def pinned(space: Space) -> Space:
    """The same space with its numeric fields at their defaults: every config of it gives the same bits."""
    return {
        name: replace(field, values=(field.default,)) if field.kind == "numeric" else field
        for name, field in space.items()
    }


def contains(space: Space, config: Mapping[str, int]) -> bool:
    """Whether a config has exactly the fields of a space, each with one of its values."""
    return config.keys() == space.keys() and all(config[n] in field.values for n, field in space.items())


def configs(space: Space) -> Iterator[Config]:
    """Every config of a space once, the default first, then in the order of `rank`."""
    every = (dict(zip(space, values, strict=True)) for values in product(*(f.values for f in space.values())))
    return iter(sorted(every, key=lambda config: rank(space, config)))


def rank(space: Space, config: Mapping[str, int]) -> tuple[int, ...]:
    """The order in which equally good configs are preferred, the same everywhere: as few fields as possible that are not the
    default, numeric ones before all, then the smaller values.
    """  # fmt: skip
    changed = [field.kind for name, field in space.items() if config[name] != field.default]
    return (changed.count("numeric"), len(changed), *(config[name] for name in space))


def same_bits(space: Space, a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    """Whether two configs differ in schedule alone, and so may not differ in a bit of a result."""
    return all(a[name] == b[name] for name, field in space.items() if field.kind == "numeric")
