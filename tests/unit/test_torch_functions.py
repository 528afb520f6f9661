"""Every torch function that score and mask functions may use, on a grid of special values, against torch itself."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from attnkit.backends.reference.evaluate import Evaluation  # noqa: E402
from attnkit.ir.functions import FUNCTIONS  # noqa: E402
from attnkit.ir.text import parse  # noqa: E402
from attnkit.ir.trace import build_text  # noqa: E402
from attnkit.ops.tracing import trace_mods  # noqa: E402

Function = Callable[[Any, Any, Any], Any]  # of a float, and of two ints that are not negative

_FLOATS = (0.0, 1e-30, 1e-8, 0.3, 0.5, 1.0, 1.5, 2.5, 3.5, 19.5, 20.5, 100.0, 3e4, math.inf)
S, Q, KV = (
    x.ravel()
    for x in np.meshgrid([-x for x in _FLOATS[::-1]] + [*_FLOATS, math.nan], [0, 1, 2, 5, 13, 40], [0, 1, 3, 6, 31], indexing="ij")
)  # fmt: skip


@pytest.fixture(autouse=True)
def _ints_become_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same_as_torch(function: Function, *, rtol: float = 1e-12) -> None:
    """Traced and evaluated in float64, and computed by torch in float64, ``function`` gives the same."""

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = function(s, q_idx, kv_idx)
        return result.to(torch.float32) if result.kind == "bool" else result

    program = parse(build_text(trace_mods(score, None)))
    root = program.attend.score
    actual = Evaluation([root], {"s": S, "q_idx": Q, "kv_idx": KV})[root]
    expected = function(torch.from_numpy(S), torch.from_numpy(Q), torch.from_numpy(KV)).double()
    torch.testing.assert_close(
        torch.from_numpy(actual).expand_as(expected), expected, rtol=rtol, atol=1e-300, equal_nan=True
    )


# Operands for each of some names: s is the float, q and kv the ints. A name without a row here is of one float.
_OPERANDS: dict[str, list[Callable[[Any, Any, Any], tuple[Any, ...]]]] = {
    "add sub subtract rsub": [lambda s, q, kv: (s, q), lambda s, q, kv: (q, kv)],
    "mul multiply div divide true_divide": [lambda s, q, kv: (s, q), lambda s, q, kv: (q, kv + 1)],
    "floor_divide remainder": [lambda s, q, kv: (q - 7, kv + 1), lambda s, q, kv: (7 - q, -kv - 2)],
    "fmod": [lambda s, q, kv: (q - 7, kv + 1), lambda s, q, kv: (q - kv, -3), lambda s, q, kv: (q * 0.75 - 7, kv + 1.5)],
    "minimum maximum min max": [lambda s, q, kv: (s, q * 1.0), lambda s, q, kv: (q, kv)],
    "clamp_min clamp_max": [lambda s, q, kv: (s, 1.0), lambda s, q, kv: (q, 5)],
    "clamp clip": [lambda s, q, kv: (s, -1.0, 2.0), lambda s, q, kv: (q - kv, 2), lambda s, q, kv: (q, None, 5)],
    "pow": [
        lambda s, q, kv: (s, 2), lambda s, q, kv: (s, 3), lambda s, q, kv: (s.abs(), 0.5), lambda s, q, kv: (q - kv, 3),
        lambda s, q, kv: (q, 0), lambda s, q, kv: (q - kv, 5), lambda s, q, kv: (q % 4, kv % 6),
    ],
    "float_power": [lambda s, q, kv: (q + 1, kv)],
    "eq ne not_equal lt less le less_equal gt greater ge greater_equal": [lambda s, q, kv: (s, 0.5), lambda s, q, kv: (q, kv), lambda s, q, kv: (s, q)],
    "logical_and logical_or logical_xor": [lambda s, q, kv: (s > 0, q > 3), lambda s, q, kv: (q, kv), lambda s, q, kv: (s, kv > 2)],
    "logical_not": [lambda s, q, kv: (s > 0,), lambda s, q, kv: (q,), lambda s, q, kv: (s,)],
    "bitwise_and bitwise_or bitwise_xor": [
            lambda s, q, kv: (s > 0, q > 3), lambda s, q, kv: (q, 5), lambda s, q, kv: (q, -8), lambda s, q, kv: (q - kv, 0x1B),
            lambda s, q, kv: (q - kv, -3), lambda s, q, kv: (q, kv), lambda s, q, kv: (q & 12, kv & 3), lambda s, q, kv: (q & 6, kv - q),
            lambda s, q, kv: (q, 0), lambda s, q, kv: (q, -1), lambda s, q, kv: (q, kv > 3), lambda s, q, kv: (q % 8, kv // 4), lambda s, q, kv: (q - kv, kv - 5),
        ],
    "bitwise_not": [lambda s, q, kv: (q > kv,), lambda s, q, kv: (q,), lambda s, q, kv: (q - kv,)],
    "bitwise_left_shift": [lambda s, q, kv: (q, 3), lambda s, q, kv: (q - kv, 0), lambda s, q, kv: (q - 3, kv % 9)],
    "bitwise_right_shift": [
        lambda s, q, kv: (q, 2), lambda s, q, kv: (q - kv, 1), lambda s, q, kv: (q - kv, 0), lambda s, q, kv: (q * 1001, kv),
        lambda s, q, kv: (q - 20, kv), lambda s, q, kv: (q - 20, 40),
    ],
    "where": [lambda s, q, kv: (q > kv, s, -math.inf), lambda s, q, kv: (s > 0, q, kv), lambda s, q, kv: (s, q > kv, 0.0)],
    "masked_fill": [lambda s, q, kv: (s, q > kv, -math.inf), lambda s, q, kv: (q, s > 0, 7)],
    "addcmul": [lambda s, q, kv: (s, q * 0.5, kv * 0.5)],
    "lerp": [lambda s, q, kv: (q * 1.0, kv * 1.0, 0.25)],
    "logaddexp": [lambda s, q, kv: (s, q * 1.0), lambda s, q, kv: (s, -s), lambda s, q, kv: (s, s)],
    "abs absolute neg negative square sign sgn": [lambda s, q, kv: (s,), lambda s, q, kv: (q - kv,)],
    "floor ceil trunc fix round": [lambda s, q, kv: (s,), lambda s, q, kv: (q - kv,)],
    "full_like": [lambda s, q, kv: (s, 2.5), lambda s, q, kv: (q, 3)],
    "new_full": [lambda s, q, kv: (s, (), 2.5)],
    "new_ones new_zeros": [lambda s, q, kv: (s, ()), lambda s, q, kv: (q, (), )],
    "zeros_like ones_like": [lambda s, q, kv: (s,), lambda s, q, kv: (q,), lambda s, q, kv: (q > kv,)],
    "to": [
        lambda s, q, kv: (q, torch.float32), lambda s, q, kv: (s, torch.bool), lambda s, q, kv: (q, "cpu"), lambda s, q, kv: (q > kv, torch.int32),
        lambda s, q, kv: (s.clamp(-9, 9).nan_to_num(), torch.int64), lambda s, q, kv: (q, s), lambda s, q, kv: (q, "cpu", torch.bool),
    ],
    "type": [lambda s, q, kv: (q > kv, torch.int64)],
    "type_as": [lambda s, q, kv: (q > kv, q)],
    "int long": [lambda s, q, kv: (q * 1.75 - 9,), lambda s, q, kv: (q > kv,)],
    "float": [lambda s, q, kv: (q,), lambda s, q, kv: (q > kv,)],
    "bool": [lambda s, q, kv: (q,), lambda s, q, kv: (s,)],
    "nan_to_num": [lambda s, q, kv: (s, 1.0, 2.0, 3.0)],
    "erf": [lambda s, q, kv: (s * 0.1,)],
    "sin cos tan": [lambda s, q, kv: (q * 0.3 - kv,)],
}  # fmt: skip
OPERANDS = {name: rows for names, rows in _OPERANDS.items() for name in names.split()}
# Python's way to call what has another name
OPERATORS: dict[str, Function] = {
    "1 - s": lambda s, q, kv: 1 - s,
    "1 / s": lambda s, q, kv: 1 / s,
    "s / q": lambda s, q, kv: s / (q + 1),
    "7 // q": lambda s, q, kv: 7 // (q + 1) + (q - 9) // 4,
    "7 % q": lambda s, q, kv: 7 % (q + 1) + (q - 9) % 4,
    "2 ** q": lambda s, q, kv: 2 ** (q % 11) + 2.0**-q,
    "3 ** q": lambda s, q, kv: 3 ** (q % 7),
    "100 ** q": lambda s, q, kv: 100 ** (q % 4),
    "q ** 2": lambda s, q, kv: (q - kv) ** 2 + s**3,
    "-q": lambda s, q, kv: -q + +kv - -s,
    "abs": lambda s, q, kv: abs(q - kv) + abs(s),
    "1 << q": lambda s, q, kv: (1 << (q % 5)) + (q << 2),
    "q >> 1": lambda s, q, kv: (1001 >> (q % 5)) + ((q - kv) >> 1),
    "bits": lambda s, q, kv: (q & 6 | kv & 9) ^ (q >> 1) ^ ~kv,
    "bools": lambda s, q, kv: ((q > 3) & (kv > 2)) | ~(s > 0) ^ (q == kv),
    "sum of bools": lambda s, q, kv: (q > 3) + (kv > 2),
    "product of bools": lambda s, q, kv: (q > 3) * (kv > 2),
    "bool and number": lambda s, q, kv: (q > 3) * 2 + (kv > 2) * 0.5,
    "comparisons": lambda s, q, kv: (q > 1) & (q <= kv) | (kv <= 3) & (q != 2),
    "trunc": lambda s, q, kv: torch.div(q - 20, kv + 1, rounding_mode="trunc"),
    "trunc of floats": lambda s, q, kv: torch.div(q - 20.5, kv + 1, rounding_mode="trunc"),
    "floor": lambda s, q, kv: torch.div(q - 20, kv + 1, rounding_mode="floor"),
    "alpha": lambda s, q, kv: torch.add(s, q, alpha=2) - torch.sub(q, kv, alpha=3) + torch.rsub(q, kv, alpha=2),
    "softplus": lambda s, q, kv: F.softplus(s, beta=2, threshold=5),
    "gelu": lambda s, q, kv: F.gelu(s.clamp(-30, 30), approximate="tanh"),
    "elu": lambda s, q, kv: F.elu(s, 0.5) + F.leaky_relu(s, 0.2) + F.hardtanh(s, -2, 3),
    "value": lambda s, q, kv: torch.addcmul(s, q, kv, value=0.5),
    "clamp": lambda s, q, kv: torch.clamp(q, max=kv) + torch.clamp(s, min=0.5) + q.clamp(min=1, max=4),
    "in place": lambda s, q, kv: (s * 1).add_(q).mul_(2).clamp_(min=-3) + (q * 1).sub_(kv),
}  # fmt: skip
HOMES = (torch, F, torch.special, torch.Tensor)
NAMED = [
    (name, home) for name in FUNCTIONS for home in HOMES
    if not name.startswith("__") and callable(getattr(home, name, None)) and not isinstance(getattr(home, name), type(torch.float32))
]  # fmt: skip


def test_every_name_exists_in_torch() -> None:
    assert {name for name in FUNCTIONS if not name.startswith("__")} == {name for name, _ in NAMED}


@pytest.mark.parametrize(("name", "home"), NAMED, ids=[f"{h.__name__}.{n}" for n, h in NAMED])
def test_named_functions(name: str, home: Any) -> None:
    function = getattr(home, name)
    rows = OPERANDS.get(name, [lambda s, q, kv: (s,)])
    taken = [operands for operands in rows if _takes(function, operands)]
    assert taken
    for operands in taken:
        same_as_torch(lambda s, q, kv, operands=operands: function(*operands(s, q, kv)))


def _takes(function: Any, operands: Any) -> bool:
    """Some of torch's functions want a tensor where others take a number, or floats alone."""
    try:
        function(*operands(torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)))
    except (TypeError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_keywords(name: str) -> None:
    same_as_torch(OPERATORS[name])
