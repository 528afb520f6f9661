"""Tracing: Python and torch functions become programs, in eager mode and inside torch.compile alike."""

import math
from typing import Any

import numpy as np
import pytest

from attnkit.analysis.canonical import canonical
from attnkit.errors import AttnkitError
from attnkit.ir import alibi, bias, causal, document, prefix, softcap, window
from attnkit.ir.optable import OPS
from attnkit.ir.text import parse
from attnkit.ir.trace import Context, build_text, trace

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounter  # noqa: E402

from attnkit.ops import attention, param  # noqa: E402
from attnkit.ops.tracing import trace_mods  # noqa: E402

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.arange(256.0).reshape(4, 8, 8)
IDS = torch.arange(8, dtype=torch.int32) // 3
SCALAR = torch.tensor(2.0)
NUMBER = torch.tensor(3)
CAP = param("cap", 30.0)


def body(score: Any = None, mask: Any = None) -> Any:
    """The canonical lines of the traced functions."""
    text = parse(build_text(trace_mods(score, mask))).text
    return [line.strip() for line in text.splitlines()[3:-4]]


def test_alibi_of_flex_attention() -> None:
    assert body(lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q)) == [
        "score = s + b0[h] * float(kv_idx - q_idx)"
    ]


def test_softcap_of_flex_attention() -> None:
    assert body(lambda s, b, h, q, kv: 30 * torch.tanh(s / 30)) == ["score = tanh(s / 30.0) * 30.0"]


def test_a_score_of_minus_infinity() -> None:
    lines = body(lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf")))
    assert lines == ["score = where(q_idx >= kv_idx, s, -inf)"]


def test_masks() -> None:
    assert body(None, lambda b, h, q, kv: (q - kv <= 3) & (IDS[q] == IDS[kv])) == [
        "mask = (q_idx - kv_idx <= 3) & (b0[q_idx] == b0[kv_idx])"
    ]
    assert body(None, lambda b, h, q, kv: ~(kv < 4) ^ torch.logical_or(q == 0, kv == 1)) == [
        "mask = ~(kv_idx < 4) ^ (q_idx == 0 | kv_idx == 1)".replace(
            "q_idx == 0 | kv_idx == 1", "(q_idx == 0) | (kv_idx == 1)"
        )
    ]


def test_constant_results() -> None:
    assert body(lambda s, b, h, q, kv: 0.0, lambda b, h, q, kv: True) == ["score = 0.0"]
    assert body(None, lambda b, h, q, kv: False) == ["mask = false"]
    assert body(lambda s, b, h, q, kv: q - kv) == ["score = float(q_idx - kv_idx)"]
    assert body(lambda s, b, h, q, kv: SCALAR) == ["score = b0[]"]


def test_conjunctions_that_begin_with_a_constant() -> None:
    """As transformers joins masks: the constant is of the index tensors' device, and leaves nothing behind."""

    def all_of(b: Any, h: Any, q: Any, kv: Any) -> Any:
        seen = q.new_ones((), dtype=torch.bool)
        for mask in (kv <= q, h.new_zeros(()) == 0, kv >= 2):
            seen = seen & mask.to(seen.device)
        return kv.new_zeros((), dtype=torch.bool) | seen

    traced = trace_mods(None, all_of)
    assert str(canonical(parse(build_text(traced))).attend.mask) == "<bool (kv_idx <= q_idx) & (kv_idx >= 2)>"
    with pytest.raises(AttnkitError, match="AK302"):
        body(None, lambda b, h, q, kv: q.new_ones((3,)) == kv)


def test_zero_dimensional_tensors_are_scalars() -> None:
    assert body(lambda s, b, h, q, kv: SCALAR * s - SCALAR + NUMBER) == [
        "score = s * b0[] - b0[] + float(b1[])"
    ]


def test_captures_are_collected_once_by_identity() -> None:
    twin = SLOPES.clone()
    traced = trace_mods(lambda s, b, h, q, kv: s + SLOPES[h] + twin[h] + SLOPES[0] + SLOPES[h], None)
    assert [x is y for x, y in zip(traced.buffers, [SLOPES, twin], strict=False)] == [True, True]
    shared = trace_mods(lambda s, b, h, q, kv: s + IDS[kv], lambda b, h, q, kv: IDS[kv] > 0)
    assert len(shared.buffers) == 1


def test_negative_and_tensor_indices() -> None:
    assert body(lambda s, b, h, q, kv: s + TABLE[h, -1, NUMBER]) == ["score = s + b1[h, 7, b0[]]"]


def test_params() -> None:
    traced = trace_mods(lambda s, b, h, q, kv: CAP * torch.tanh(s / CAP), None)
    assert traced.params == [CAP]
    assert "score = tanh(s / p0) * p0" in parse(build_text(traced)).text
    CAP.value = 20.0
    assert traced.params[0].value == 20.0
    CAP.value = 30.0
    with pytest.raises(AttnkitError, match="AK401"):
        _ = param("unset").value


ROWS = [op for op in OPS if op not in ("where", "float", "int", "and", "or", "xor", "not")]


@pytest.mark.parametrize("op", ROWS)
def test_every_torch_name_of_the_table_traces(op: str) -> None:
    info = OPS[op]
    others = (SLOPES[0],) * (info.arity - 1)
    for name in info.torch:
        functions = [f for home in (torch, torch.special) if callable(f := vars(home).get(name))]
        calls = [lambda s, f=function: f(s, *others) for function in functions]
        if hasattr(torch.Tensor, name):
            calls.append(lambda s, n=name: getattr(s, n)(*others))
        if others and (method := getattr(torch.Tensor, name, None)):
            calls.append(lambda s, m=method: m(*others, s))
        for call in calls:
            assert info.symbol in body(lambda s, b, h, q, kv, call=call: call(s) * 1.0)[0]


def test_swapped_operators_keep_their_order() -> None:
    assert body(lambda s, b, h, q, kv: 1 - s) == ["score = 1.0 - s"]
    assert body(lambda s, b, h, q, kv: 1 / s) == ["score = 1.0 / s"]
    assert body(lambda s, b, h, q, kv: 2**s) == ["score = pow(2.0, s)"]
    assert body(lambda s, b, h, q, kv: s * (7 // (q + 1) + 7 % (q + 1))) == [
        "t0 = q_idx + 1",
        "score = s * float(7 // t0 + 7 % t0)",
    ]
    assert body(lambda s, b, h, q, kv: SLOPES[1] - s) == ["score = b0[] - s"]
    assert body(lambda s, b, h, q, kv: torch.rsub(s, 2.0)) == ["score = 2.0 - s"]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (lambda s, q: s.clamp(-1, 1), "min(max(s, -1.0), 1.0)"),
        (lambda s, q: torch.clamp(s, max=1.0), "min(s, 1.0)"),
        (lambda s, q: torch.relu(s), "max(s, 0.0)"),
        (lambda s, q: s.square(), "s * s"),
        (lambda s, q: s**3, "s * s * s"),
        (lambda s, q: s**0.5, "pow(s, 0.5)"),
        (lambda s, q: (q**2).float(), "float(q_idx * q_idx)"),
        (lambda s, q: s.reciprocal(), "1.0 / s"),
        (lambda s, q: q.to(torch.float32), "float(q_idx)"),
        (lambda s, q: q.to(s.dtype) + s.int() + s.long(), "float(q_idx) + t0 + t0"),
        (lambda s, q: s.where(q.bool(), 0.0), "where(q_idx != 0, s, 0.0)"),
        (lambda s, q: s.masked_fill(q > 1, -math.inf), "where(q_idx > 1, -inf, s)"),
        (lambda s, q: torch.div(s, 2, rounding_mode="floor"), "s // 2.0"),
        (lambda s, q: abs(+(-s)), "abs(-s)"),
        (lambda s, q: s * np.float32(0.5) * np.int64(2), "s * 0.5 * 2.0"),
    ],
)
def test_composed_functions(score: Any, expected: Any) -> None:
    lines = body(lambda s, b, h, q, kv: score(s, q))
    assert lines[-1] == f"score = {expected}"


def test_tracing_needs_no_torch() -> None:
    slopes = np.array([0.5, 0.25], np.float32)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (s / 30.0).tanh() * 30.0 - h.context.load(slopes, h) * abs(q - kv)

    traced = trace(score, None, Context())
    assert traced.buffers == [slopes]
    assert parse(build_text(traced)).attend.score.dtype == "float"


def test_build_text_appends_what_the_layout_needs() -> None:
    sink, cu, lens = (
        torch.zeros(4),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
    )
    traced = trace_mods(lambda s, b, h, q, kv: s + SLOPES[h], None)
    text = build_text(traced, scale=0.5, sink=sink, cu_seqlens_q=cu, cu_seqlens_kv=cu, return_lse=False)
    program = parse(text)
    assert program.text.splitlines()[1:3] == [
        "program (q: packed[b2], k: packed[b2], v: packed[b2]) buffers(b0: f32[1], b1: f32[1], b2: i32[1]) {",
        "  o, lse = attend(q, k, v, scale = 0.5) {",
    ]
    assert "softmax(sink = b1)" in program.text
    assert program.ops[-1].operands == (3,)
    assert len(traced.buffers) == 3
    padded = trace_mods(None, None)
    assert "k: padded[b0], v: padded[b0]" in build_text(padded, kv_lens=lens)
    assert padded.buffers == [lens]


def test_ready_made_mods() -> None:
    assert body(softcap(30.0)) == ["score = tanh(s / 30.0) * 30.0"]
    assert body(softcap(0.0)) == body(softcap(math.inf)) == []
    assert body(bias(TABLE[:1])) == ["score = s + b0[0, q_idx, kv_idx]"]
    assert body(None, causal("top_left")) == ["mask = kv_idx <= q_idx"]
    assert body(None, causal()) == ["mask = kv_idx <= q_idx + (kv_len - q_len)"]
    assert body(None, window(3)) == [
        "t0 = q_idx + (kv_len - q_len)",
        "mask = (kv_idx >= t0 - 3) & (kv_idx <= t0 + 0)",
    ]
    assert body(None, (lambda b, h, q, kv: kv > 2) | prefix(torch.tensor([1, 2]))) == [
        "mask = (kv_idx > 2) | (kv_idx < b0[b])"
    ]
    assert body(None, ~document(IDS)) == ["mask = ~(b0[q_idx] == b0[kv_idx])"]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: causal("middle"), "AK401"),
        (lambda: window(-2), "AK401"),
        (lambda: softcap(-1.0), "AK401"),
        (lambda: alibi([0.5]), "AK402"),
        (lambda: alibi(TABLE), "AK403"),
        (lambda: bias(SLOPES), "AK403"),
        (lambda: document(TABLE), "AK403"),
        (lambda: prefix(TABLE), "AK403"),
    ],
)
def test_mods_refuse(make: Any, code: str) -> None:
    with pytest.raises(AttnkitError) as caught:
        make()
    assert caught.value.code == code


# --- under torch.compile --------------------------------------------------------------------------------

COMPILED = {
    "alibi": (lambda cap, n: lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q).abs(), None),
    "softcap": (lambda cap, n: lambda s, b, h, q, kv: cap * torch.tanh(s / cap), None),
    "relative bias": (lambda cap, n: lambda s, b, h, q, kv: s + TABLE[h, q, kv], None),
    "last row": (lambda cap, n: lambda s, b, h, q, kv: s + TABLE[h, 0, -1], None),
    "causal": (None, lambda cap, n: lambda b, h, q, kv: q >= kv),
    "constant window": (None, lambda cap, n: lambda b, h, q, kv: (q >= kv) & (q - kv <= 3)),
    "shifted": (None, lambda cap, n: lambda b, h, q, kv: kv <= q + n),
    "document": (None, lambda cap, n: lambda b, h, q, kv: (IDS[q] == IDS[kv]) & (q >= kv)),
    "prefix": (None, lambda cap, n: lambda b, h, q, kv: torch.logical_or(kv < 4, q >= kv)),
    "where": (
        lambda cap, n: lambda s, b, h, q, kv: torch.where((kv <= q) & (q <= 3), s, -float("inf")),
        None,
    ),
    "exp2": (lambda cap, n: lambda s, b, h, q, kv: s + torch.exp2(-((h + 1) * 8.0 / cap)) * (kv - q), None),
    "scalar": (lambda cap, n: lambda s, b, h, q, kv: SCALAR * s / (SCALAR - s) - (q - NUMBER), None),
    "reflected": (
        lambda cap, n: lambda s, b, h, q, kv: 2**s - 1 / s + 7 % (q + 1) - SCALAR // s + SCALAR**s,
        None,
    ),
    "param": (lambda cap, n: lambda s, b, h, q, kv: CAP * (s / CAP).tanh().clamp(min=-1.0), None),
    "methods": (
        lambda cap, n: lambda s, b, h, q, kv: s.where(q > kv, 0.0).square() + q.to(torch.float32),
        None,
    ),
    "not": (None, lambda cap, n: lambda b, h, q, kv: torch.logical_not(q > kv).logical_or(kv == 0)),
    "mods": (lambda cap, n: softcap(cap), lambda cap, n: causal() & window(n) | prefix(n)),
    "more mods": (lambda cap, n: alibi(SLOPES), lambda cap, n: document(IDS) & causal("top_left")),
    "bias mod": (
        lambda cap, n: bias(TABLE[None]),
        lambda cap, n: (causal() & (lambda b, h, q, kv: q > kv)).logical_not(),
    ),
    "compared with a number": (
        None,
        lambda cap, n: lambda b, h, q, kv: (kv == n) | (kv < n) | (n <= q) | (q - n == 1),
    ),
    "absolute": (
        lambda cap, n: lambda s, b, h, q, kv: s * -abs(abs(q - kv)) + abs(s) * abs(kv - n).float(),
        lambda cap, n: lambda b, h, q, kv: abs(q - kv) <= n,
    ),
    "halves": (
        lambda cap, n: lambda s, b, h, q, kv: s * cap + (q >> 1) // n - n * (kv & 3) + (n - kv) ** 2,
        None,
    ),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_compute_what_they_do_in_eager_mode(name: str, dynamic: bool | None) -> None:
    """Bit for bit, with two compilations at most for the three values of what they captured."""
    make_score, make_mask = COMPILED[name]

    def run(q: Any, cap: Any, n: int) -> Any:
        score, mask = make_score and make_score(cap, n), make_mask and make_mask(cap, n)
        return attention(q, q, q, score=score, mask=mask, return_lse=True)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    q = torch.sin(torch.arange(128.0).reshape(1, 4, 8, 4))
    for cap, n in [(30.0, 3), (20.0, 2), (15.5, 5)]:
        assert all(map(torch.equal, compiled(q, cap, n), run(q, cap, n)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda s, b, h, i, j: s * i.item(), "AK301"),
        (lambda s, b, h, i, j: torch.cumsum(s, 0), "AK302"),
        (lambda s, b, h, i, j: s * abs(TABLE[h, i]).sum(), "AK302"),  # which dynamo computes without asking
        (lambda s, b, h, i, j: s if i > j else 0.0, "AK301: use torch.where for if"),
        (lambda s, b, h, i, j: sum(s for _ in range(i)), "range"),
    ],
)
def test_errors_inside_compile_name_the_line(score: Any, message: str) -> None:
    def run(q: Any) -> Any:
        return build_text(trace_mods(score, None))

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message) as caught:
        torch.compile(run, fullgraph=True, backend="eager")(torch.ones(1))
    assert f'{__file__}", line {score.__code__.co_firstlineno}' in str(caught.value)


@pytest.mark.parametrize("number", [int, float, bool])
def test_values_are_never_made_up_inside_compile(number: Any) -> None:
    def run(q: Any) -> Any:
        return build_text(trace_mods(lambda s, b, h, i, j: s * number(i), None))

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(run, fullgraph=True, backend="eager")(torch.ones(1))
