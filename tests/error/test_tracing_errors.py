# ruff: noqa: B008, T201 -- the functions are written as their users write them
"""What cannot be traced is refused by a typed error that names the user's line and says what to write instead."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attnkit as ak

TABLE = torch.arange(12.0).reshape(3, 4)
VECTOR = torch.arange(4.0)
NUMBERS = torch.arange(4)
LONG = torch.zeros(4, 1000)


@torch.library.custom_op("attnkit_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


# name: (code, what the error says, the function)
SCORES: dict[str, tuple[str, str, Any]] = {
    "if": ("AK301", "torch.where", lambda s, b, h, q, kv: s if q > kv else 0.0),
    "and": ("AK301", "& |", lambda s, b, h, q, kv: torch.where(q > kv and q < 3, s, 0.0)),
    "not": ("AK301", "& |", lambda s, b, h, q, kv: torch.where(not q > kv, s, 0.0)),
    "chained comparison": ("AK301", "& |", lambda s, b, h, q, kv: torch.where(0 < q < kv, s, 0.0)),
    "assertion": ("AK301", "torch.where", lambda s, b, h, q, kv: s if bool(s > 0) else -s),
    "while": ("AK301", "torch.where", lambda s, b, h, q, kv: next(s for _ in itertools.count() if q)),
    "min": ("AK301", "torch.minimum", lambda s, b, h, q, kv: s * min(q, kv)),
    "in": ("AK301", "torch.where", lambda s, b, h, q, kv: s if q in (1, 2) else 0.0),
    "range": ("AK301", "constant number of turns", lambda s, b, h, q, kv: sum(s for _ in range(q))),
    "list": ("AK301", "captured tensor", lambda s, b, h, q, kv: s * [1.0, 2.0][h]),
    "item": ("AK301", "as it is", lambda s, b, h, q, kv: s * q.item()),
    "tolist": ("AK301", "as it is", lambda s, b, h, q, kv: s * q.tolist()),
    "int": ("AK301", ".to(torch.int32)", lambda s, b, h, q, kv: s * int(s)),
    "float": ("AK301", ".float()", lambda s, b, h, q, kv: s * float(q)),
    "math": ("AK301", "torch.exp", lambda s, b, h, q, kv: math.exp(s)),
    "numpy": ("AK301", "as it is", lambda s, b, h, q, kv: np.exp(s)),
    "to numpy": ("AK301", "as it is", lambda s, b, h, q, kv: s.numpy()),
    "numpy table": ("AK301", "as it is", lambda s, b, h, q, kv: s * np.ones(4)[q]),
    "tensor of numbers": ("AK302", "tensor", lambda s, b, h, q, kv: s * torch.tensor([q, kv])[0]),
    "unknown function": ("AK302", "cumsum", lambda s, b, h, q, kv: torch.cumsum(s, 0)),
    "unknown method": ("AK302", "cumprod", lambda s, b, h, q, kv: s.cumprod(0)),
    "unknown of modules": ("AK302", "dropout", lambda s, b, h, q, kv: F.dropout(s)),
    "random": ("AK302", "rand_like", lambda s, b, h, q, kv: s + torch.rand_like(s)),
    "stack": ("AK302", "stack", lambda s, b, h, q, kv: torch.stack([s, s])[0]),
    "narrow cast": ("AK302", "float32, int32, int64, bool", lambda s, b, h, q, kv: s.to(torch.bfloat16)),
    "half": ("AK302", "half", lambda s, b, h, q, kv: s.half()),
    "unknown keyword": ("AK302", "out", lambda s, b, h, q, kv: torch.exp(s, out=s)),
    "keyword of a composed one": ("AK302", "square", lambda s, b, h, q, kv: torch.square(s, out=s)),
    "where of one": ("AK302", "where of 1", lambda s, b, h, q, kv: torch.where(q > kv)),
    "rounding": ("AK302", "up", lambda s, b, h, q, kv: torch.div(s, 2, rounding_mode="up")),
    "decimals": ("AK302", "round", lambda s, b, h, q, kv: torch.round(s, decimals=1)),
    "new dimensions": ("AK302", "outside", lambda s, b, h, q, kv: s + s.new_ones(3)[0]),
    "an operator of theirs": ("AK302", "double", lambda s, b, h, q, kv: double(s)),
    "float64": ("AK303", "x.float()", lambda s, b, h, q, kv, t=VECTOR.double(): s + t[h]),
    "int8": ("AK303", "x.int()", lambda s, b, h, q, kv, t=NUMBERS.to(torch.int8): s + t[h]),
    "complex": ("AK303", "", lambda s, b, h, q, kv, t=VECTOR.to(torch.complex64): s + t[h].real),
    "slice": ("AK304", "outside", lambda s, b, h, q, kv: s + TABLE[:, h][0]),
    "new dimension": ("AK304", "outside", lambda s, b, h, q, kv: s + TABLE[None, h]),
    "too many indices": ("AK304", "rank 1", lambda s, b, h, q, kv: s + VECTOR[h, q]),
    "bool as an index": ("AK304", "ints", lambda s, b, h, q, kv: s + VECTOR[q > kv]),
    "float as an index": ("AK304", "ints", lambda s, b, h, q, kv: s + VECTOR[s]),
    "constant index": ("AK304", "below 4", lambda s, b, h, q, kv: s + TABLE[h, 4]),
    "index into computed": ("AK304", "index the captured", lambda s, b, h, q, kv: s + (TABLE[h] * 2)[q]),
    "index of a number": ("AK304", "", lambda s, b, h, q, kv: s[0]),
    "nothing returned": ("AK305", "score", lambda s, b, h, q, kv: None),
    "two returned": ("AK305", "score", lambda s, b, h, q, kv: (s, s)),
    "row returned": ("AK305", "score", lambda s, b, h, q, kv: TABLE[h]),
    "tensor and number": ("AK306", "bias[h", lambda s, b, h, q, kv: s + VECTOR),
    "string": ("AK306", "str", lambda s, b, h, q, kv: s + "no"),
    "numpy array": ("AK306", "index it", lambda s, b, h, q, kv, t=np.ones(3): s + t),
    "param alone": ("AK306", "value outside", lambda s, b, h, q, kv, p=ak.param("p", 1.0): s * torch.exp(p)),
    "written elements": ("AK308", "read only", lambda s, b, h, q, kv: TABLE.__setitem__((h, q), 0.0)),
    "written tensor": ("AK308", "read only", lambda s, b, h, q, kv: VECTOR.add_(s)),
    "written as another kind": ("AK308", "float into a traced int", lambda s, b, h, q, kv: s * q.add_(0.5)),
    "long row": ("AK309", "outside", lambda s, b, h, q, kv: s + LONG[h].sum()),
    "matrix": ("AK309", "one dimension", lambda s, b, h, q, kv: s + LONG[None][0].sum() + torch.ones(2, 3, 4)[h].sum()),
    "vectors of two lengths": ("AK309", "4, 2", lambda s, b, h, q, kv, t=torch.ones(4, 2): s + torch.dot(TABLE[h], t[q])),
    "kept dimension": ("AK309", "leaves dimensions", lambda s, b, h, q, kv: s + TABLE[h].sum(0, keepdim=True)),
    "float for bool": ("AK201", "!= 0", lambda s, b, h, q, kv: torch.where(s, s, 0.0)),
    "bits of a float": ("AK201", "!= 0", lambda s, b, h, q, kv: s & 1),
}  # fmt: skip


Q = torch.zeros(1, 1, 2, 4)


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_cannot_be_traced(name: str) -> None:
    code, says, score = SCORES[name]
    with pytest.raises(ak.AttnkitError) as caught:
        ak.attention(Q, Q, Q, score=score)
    exc = caught.value
    assert exc.code == code, exc
    assert says in str(exc)
    if code != "AK305" and name != "param alone":  # they name the function's result, and torch's function
        path, _, line = exc.where.rpartition(":")
        assert path == __file__
        assert abs(int(line) - score.__code__.co_firstlineno) < 2


MASKS: dict[str, tuple[str, str, Any]] = {
    "if": ("AK301", "torch.where", lambda b, h, q, kv: q >= kv if h else kv >= q),
    "or": ("AK301", "& |", lambda b, h, q, kv: q >= kv or kv == 0),
    "an int": ("AK305", "compare with something", lambda b, h, q, kv: q - kv),
    "a float": ("AK305", "compare with something", lambda b, h, q, kv: (q >= kv).float()),
    "a python function of bools": ("AK301", "& |", lambda b, h, q, kv: all([q >= kv, kv > 0])),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_cannot_be_traced(name: str) -> None:
    code, says, mask = MASKS[name]
    with pytest.raises(ak.AttnkitError) as caught:
        ak.attention(Q, Q, Q, mask=mask)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_the_line_named_is_the_users_own() -> None:
    def helper(x: Any) -> Any:
        return x if x > 0 else -x  # this line

    with pytest.raises(ak.AttnkitTypeError, match=r"test_tracing_errors\.py:(\d+)") as caught:
        ak.trace(lambda s, b, h, q, kv: torch.exp(helper(s)))
    assert caught.value.where.endswith(f":{helper.__code__.co_firstlineno + 1}")


def test_traced_numbers_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        print(s, f"{q - kv}", s.dtype, q.dtype, (q > kv).dtype, s.device, s.shape, q.dim(), s.numel(), q.ndim)
        return s

    ak.trace(score)
    assert capsys.readouterr().out == (
        "<traced float s> <traced int t0> torch.float32 torch.int32 torch.bool cpu torch.Size([]) 0 1 0\n"
    )
