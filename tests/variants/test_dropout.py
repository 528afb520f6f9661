"""Philox 4x32-10 against the vectors that Random123 publishes, and which pairs it drops."""

import numpy as np
import pytest

from attnkit.variants.dropout import kept, philox

pytestmark = pytest.mark.shows

# Random123, tests/kat_vectors, the three lines "philox4x32 10": counter, key, result.
VECTORS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", VECTORS)
def test_published_vectors(line: str) -> None:
    c0, c1, c2, c3, k0, k1, *result = (int(word, 16) for word in line.split())
    assert list(philox((c0, c1, c2, c3), (k0, k1))) == result


def test_a_pair_is_kept_by_its_own_indices() -> None:
    """Seed, sequence, head, query and key all count; the shape around the pair does not."""
    base = kept(7, 0.5, 1, 2, 16, 16)
    np.testing.assert_array_equal(kept(7, 0.5, 1, 2, 9, 5), base[:9, :5])
    for other in (kept(8, 0.5, 1, 2, 16, 16), kept(7, 0.5, 0, 2, 16, 16), kept(7, 0.5, 1, 3, 16, 16), base.T):
        assert (other != base).any()
    high = kept(7 + (5 << 32), 0.5, 1, 2, 16, 16)
    assert (high != base).any(), "the high word of the seed is part of the key"
    negative = kept(-1, 0.5, 0, 0, 1, 1)[0, 0]
    assert negative == (philox((0, 0, 0, 0), (2**32 - 1, 2**32 - 1))[0] >= 2**31)


def test_limits_and_share() -> None:
    assert kept(3, 0.0, 0, 0, 20, 20).all()
    assert not kept(3, 1.0, 0, 0, 20, 20).any()
    dropped = 1 - kept(3, 0.3, 0, 0, 100, 100).mean()
    assert abs(dropped - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1e4)
    lenient, strict = kept(3, 0.2, 0, 0, 20, 20), kept(3, 0.6, 0, 0, 20, 20)
    assert (lenient | ~strict).all(), "what is kept at a high p is kept at a lower one"
