"""Spaces and what is chosen from them."""

from itertools import pairwise

import numpy as np
import pytest

from attnkit import backends
from attnkit.ir.text import parse
from attnkit.plan.space import (
    DIRECTIONS,
    Field,
    Space,
    configs,
    contains,
    default_config,
    of_direction,
    pinned,
    rank,
    same_bits,
)
from attnkit.plan.spec import KernelSpec
from attnkit.tune.choose import choose
from attnkit.tune.entry import Measurement, entry
from attnkit.tune.key import Key, bucket, buckets
from attnkit.tune.statistics import Interval
from attnkit.variants import dense

SPACE: Space = {
    "tile_q": Field("schedule", 96, (32, 48, 96)),
    "tile_kv": Field("numeric", 64, (32, 64, 128)),
}
KEY = Key("cpu", "forward", "", "float32", 64, 64, "highest", 1, 1, (), ())


def measured(tile_q: int, tile_kv: int, ratio: float, width: float = 0.005) -> Measurement:
    found = Interval(ratio, ratio - width, ratio + width, 20)
    return Measurement.of({"tile_q": tile_q, "tile_kv": tile_kv}, 1, found, 1e-3)


def chosen(*measurements: Measurement, space: Space = SPACE) -> tuple[int, int]:
    config = choose(space, entry(KEY, {}, measurements))
    return config["tile_q"], config["tile_kv"]


DEFAULT = measured(96, 64, 1.0)


def test_configs_start_with_the_default_and_come_in_order() -> None:
    found = list(configs(SPACE))
    assert found[0] == default_config(SPACE)
    assert len(found) == 9
    assert all(rank(SPACE, a) < rank(SPACE, b) for a, b in pairwise(found))
    assert all(contains(SPACE, config) for config in found)


@pytest.mark.parametrize(
    "config", [{}, {"tile_q": 96}, {"tile_q": 96, "tile_kv": 65}, {"tile_q": 96, "tile_kv": 64, "x": 1}]
)
def test_what_is_no_config_of_a_space(config: dict[str, int]) -> None:
    assert not contains(SPACE, config)


def test_pinned_spaces_have_one_value_of_what_orders_sums() -> None:
    found = list(configs(pinned(SPACE)))
    assert {config["tile_kv"] for config in found} == {64}
    assert {config["tile_q"] for config in found} == {32, 48, 96}
    assert all(same_bits(SPACE, found[0], config) for config in found)
    assert not same_bits(SPACE, found[0], {"tile_q": 96, "tile_kv": 32})


def test_nothing_measured_is_the_default() -> None:
    assert choose(SPACE, None) == default_config(SPACE)
    assert chosen() == chosen(DEFAULT) == (96, 64)


def test_the_fastest_is_chosen() -> None:
    assert chosen(DEFAULT, measured(48, 64, 0.9), measured(32, 64, 0.8)) == (32, 64)


def test_ties_go_to_the_default() -> None:
    assert chosen(DEFAULT, measured(48, 64, 0.985)) == (96, 64)


def test_what_is_uncertain_is_not_faster() -> None:
    assert chosen(DEFAULT, measured(48, 64, 0.9, width=0.11)) == (96, 64)


def test_noise_of_the_default_beside_itself_is_no_gain() -> None:
    assert chosen(measured(96, 64, 1.0, width=0.2), measured(48, 64, 0.85)) == (96, 64)


def test_of_equally_good_configs_the_one_with_the_same_bits_is_taken() -> None:
    near = (measured(96, 32, 0.800), measured(48, 64, 0.805), measured(32, 64, 0.81))
    assert chosen(DEFAULT, *near) == (32, 64)
    assert chosen(DEFAULT, *reversed(near)) == (32, 64)


def test_pinning_keeps_what_was_measured_of_the_schedule() -> None:
    measurements = (DEFAULT, measured(96, 32, 0.5), measured(48, 64, 0.9))
    assert chosen(*measurements) == (96, 32)
    assert chosen(*measurements, space=pinned(SPACE)) == (48, 64)


def test_values_that_are_no_longer_in_the_space_do_not_count() -> None:
    assert chosen(DEFAULT, measured(48, 65, 0.5), measured(33, 64, 0.5)) == (96, 64)


def test_what_was_wrong_is_never_chosen() -> None:
    assert chosen(DEFAULT, Measurement.refused({"tile_q": 32, "tile_kv": 32}, "wrong")) == (96, 64)


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spaces_of_backends_hold_their_defaults(name: str, dtype: str) -> None:
    spec = KernelSpec(
        parse(dense.program(causal=True)[0]), dtype, 64, 64, "cuda" if name == "triton" else "cpu"
    )
    space = backends.get(name).space(spec)
    assert contains(space, default_config(space))
    parts = [of_direction(space, direction) for direction in DIRECTIONS]
    assert {**parts[0], **parts[1]} == space


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [0, 1, 2, 4, 4, 8, 1024, 2048]


def test_keys_with_lengths_of_their_own_have_no_bucket() -> None:
    whole, padded = (
        KernelSpec(parse(dense.program(causal=True, **lengths)[0]), "float32", 64, 64)
        for lengths in ({}, {"kv_lens": np.array([3, 5], np.int32)})
    )
    assert buckets(whole, (1000, 2000)) == (1024, 2048)
    assert buckets(padded, (1000, 2000)) == (1024, 0)
