"""torch.ops.attnkit.select beside the definition in float64: rules, expressions, traps, threads, opcheck, every error."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.reference import run
from attnkit.ir.text import parse
from attnkit.ops.select import select

Randn = Callable[..., Tensor]

RULES = {
    "top_k": "top_k = 3", "fraction": "top_fraction = 0.4", "cdf": "top_cdf = 0.6", "threshold": "threshold = 0.1",
    "none": "top_k = 0", "more_than_there_are": "top_k = 1000", "everything": "top_cdf = 1.01", "least": "top_cdf = 1e-9",
}  # fmt: skip
BODIES = {
    "": "",
    "mask": "{ mask = kv_idx < q_idx + 2 }",
    "force": "{ force = (kv_idx == q_idx) | (kv_idx == 0) }",
    "both": "{ mask = (kv_idx < q_idx) & (h > 0)  force = kv_idx == q_idx }",
    "buffers": "{ mask = b0[b, kv_idx] > q_idx  force = b0[b, kv_idx] == kv_len }",
}


def text(rule: str, body: str = "", *, q: int = 4, k: int = 3, smooth: bool = False, extra: str = "") -> str:
    """A selection among means of q and of k, of so many tokens (0: of the tokens themselves)."""
    buffers, params = "buffers(b0: i32[2])" * ("b0" in body), "params(p0: f32)" * ("p0" in rule)
    lines = [
        *(
            ["m = pool(k, size = 2147483647, how = mean)", "s = map(k, m) { value = x - y }"]
            if smooth
            else []
        ),
        *([f"rows = pool(q, size = {q}, how = mean)"] if q else []),
        *([f"columns = pool({'s' if smooth else 'k'}, size = {k}, how = mean)"] if k else []),
        f"chosen = select({'rows' if q else 'q'}, {'columns' if k else 's' if smooth else 'k'}, scale = 1.0, {rule}{extra})",
        body,
        "return chosen",
    ]
    return "\n".join([f"attnkit 1\nprogram (q: bhsd, k: bhsd) {buffers} {params} {{", *lines, "}"])


def check(program: str, q: Tensor, k: Tensor, buffers: Any = (), params: Any = ()) -> Tensor:
    """What the engine chooses is what the definition does."""
    found = select(q, k, program, list(buffers), list(params))
    arrays = [t.double().numpy() for t in (q, k)]
    (expected,) = run(parse(program), arrays, [t.numpy() for t in buffers], list(params))
    np.testing.assert_array_equal(found.numpy(), expected[:, :, 0])
    return found


@pytest.fixture
def qk(randn: Randn) -> tuple[Tensor, Tensor]:
    return randn(2, 4, 23, 20), randn(2, 2, 100, 20)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_rules_and_expressions(rule: str, body: str, qk: tuple[Tensor, Tensor]) -> None:
    buffers = [torch.randint(0, 9, (2, 34), dtype=torch.int32)] if "b0" in body else []
    check(text(rule, body), *qk, buffers)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_query_heads_that_share_keys_choose_together(rule: str, qk: tuple[Tensor, Tensor]) -> None:
    rule = rule.replace("0.1", "0.03")  # of weights
    found = check(text(rule, BODIES["mask"], q=0, extra=", heads = group"), *qk)
    assert found.shape == (2, 2, 23, 34)


@pytest.mark.parametrize("least", [-0.1, 0.05, 0.3, 2.0])
@pytest.mark.parametrize("smooth", [False, True])
def test_incoherent_tiles_are_kept_whole(least: float, smooth: bool, randn: Randn) -> None:
    q, k = randn(1, 4, 50, 16), randn(1, 2, 70, 16) + 2 * randn(1, 2, 1, 16)
    q[:, :, :20] += 3 * randn(1, 4, 1, 16)
    k[0, 0, 30:40] = 0  # tokens without a direction
    found = check(
        text(
            "top_fraction = 0.3",
            BODIES["mask"],
            q=8,
            k=5,
            smooth=smooth,
            extra=f", scale = default, incoherent = {least}".replace(", scale = default", ""),
        ),
        q,
        k,
    )
    assert smooth or bool(found[0, :2, :, 6].all())


@pytest.mark.parametrize("sizes", [(0, 0), (0, 7), (5, 0), (200, 1), (1, 200)])
def test_rows_and_columns_of_any_size(sizes: tuple[int, int], qk: tuple[Tensor, Tensor]) -> None:
    for smooth in (False, True):
        check(text("top_k = 2", q=sizes[0], k=sizes[1], smooth=smooth), *qk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_with_sums_in_float32(dtype: torch.dtype, qk: tuple[Tensor, Tensor], isa: str) -> None:
    q, k = (t.to(dtype) for t in qk)
    check(text("top_k = 3"), q, k)
    check(text("top_cdf = 0.5"), q.transpose(2, 3).contiguous().transpose(2, 3), k[:, :, ::2])


def test_every_instruction_set(qk: tuple[Tensor, Tensor], isa: str) -> None:
    for rule in RULES.values():
        check(text(rule, BODIES["both"], extra=", incoherent = 0.2"), *qk)
    check(text("top_k = 2", BODIES["mask"], q=0, extra=", heads = group"), *qk)


def test_ties_go_to_the_first_and_nan_comes_last() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 3, 3, -0.0, 0.0, 3, float("nan"), -1]).view(1, 1, 8, 1)

    def kept(rule: str, body: str = "") -> list[int]:
        return check(text(rule, body, q=0, k=0), q, k)[0, 0, 0].nonzero().flatten().tolist()  # type: ignore[no-any-return]

    assert kept("top_k = 1") == [1]
    assert kept("top_k = 2") == [1, 2]
    assert kept("top_k = 5") == [0, 1, 2, 3, 5]
    assert kept("top_k = 6") == [0, 1, 2, 3, 4, 5]
    assert kept("top_k = 7") == [0, 1, 2, 3, 4, 5, 7]
    assert kept("top_k = 8") == list(range(8))
    assert kept("top_k = 3", "{ mask = kv_idx > 5 }") == [6, 7]  # more than there are: all of them, NaN too
    assert kept("top_k = 1", "{ mask = kv_idx > 5 }") == [7]
    assert kept("top_k = 1", "{ mask = kv_idx == 6 }") == [6]
    assert kept("threshold = 2.5") == [1, 2, 5]
    assert kept("threshold = -5.0", "{ mask = kv_idx > 5 }") == [7]


def test_mass_is_the_longest_prefix_that_does_not_exceed_it() -> None:
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])  # variants.md D7
    q, k = torch.ones(1, 1, 1, 1), p.log().view(1, 1, 4, 1)
    for cdf, expected in ((0.79, [1]), (0.81, [1, 3]), (0.3, [1]), (0.96, [1, 2, 3]), (1.5, [0, 1, 2, 3])):
        found = check(text(f"top_cdf = {cdf}", q=0, k=0), q, k)
        assert found.flatten().nonzero().flatten().tolist() == expected


def test_params_and_the_default_scale(qk: tuple[Tensor, Tensor]) -> None:
    program = text("top_cdf = p0").replace("scale = 1.0", "scale = default")
    few, many = (check(program, *qk, params=[p]).sum() for p in (0.2, 0.9))
    assert few < many


def test_threads_and_batches_change_nothing(randn: Randn) -> None:
    q, k = randn(3, 4, 300, 16), randn(3, 2, 900, 16)
    program = text("top_cdf = 0.5", BODIES["mask"], q=0, k=16, smooth=True)
    found = select(q, k, program, [], [])
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        assert torch.equal(select(q, k, program, [], []), found)
        assert torch.equal(select(q[1:2], k[1:2], program, [], []), found[1:2])


def test_no_tokens(randn: Randn) -> None:
    assert select(randn(1, 2, 0, 8), randn(1, 2, 9, 8), text("top_k = 1"), [], []).shape == (1, 2, 0, 3)
    assert select(randn(1, 2, 9, 8), randn(1, 2, 0, 8), text("top_k = 1"), [], []).shape == (1, 2, 3, 0)
    assert select(randn(0, 2, 9, 8), randn(0, 2, 9, 8), text("top_k = 1"), [], []).shape == (0, 2, 3, 3)


def test_opcheck(qk: tuple[Tensor, Tensor]) -> None:
    q, k = (t.requires_grad_() for t in qk)
    buffers = [torch.zeros(2, 34, dtype=torch.int32)]
    torch.library.opcheck(torch.ops.attnkit.select, (q, k, text("top_k = 1", BODIES["buffers"]), buffers, []))
    assert not select(q, k, text("top_k = 1"), [], []).requires_grad


def test_autocast_and_graphs(qk: tuple[Tensor, Tensor]) -> None:
    program = text("top_k = 2", BODIES["mask"])
    q, k = qk
    halves = select(q.bfloat16(), k.bfloat16(), program, [], [])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select(q, k, program, [], []), halves)
    compiled = torch.compile(lambda q, k: select(q, k, program, [], []), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), select(q, k, program, [], []))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("AK402", {"q": None}),
        ("AK403", {"q": torch.ones(2, 2)}),
        ("AK404", {"k": torch.ones(1, 2, 8, 4, dtype=torch.float16)}),
        ("AK407", {"q": torch.ones(1, 3, 8, 4)}),
        ("AK401", {"params": [1.0]}),
        ("AK401", {"buffers": [torch.ones(1)]}),
        ("AK404", {"program": text("top_k = 1", BODIES["buffers"]), "buffers": [torch.ones(1, 3)]}),
        ("AK601", {"program": text("top_k = 1", BODIES["buffers"]),
                   "buffers": [torch.full((1, 2), 9, dtype=torch.int32)]}),
        ("AK605", {"program": text("top_k = 1", "{ mask = kv_idx // (q_idx - 1) > 0 }")}),
        ("AK502", {"program": text("top_k = 1", "{ score = s * s }")}),
        ("AK502", {"program": text("top_k = 1", extra=", per = column")}),
        ("AK502", {"program": text("top_k = 1", k=0, extra=", prefix = 4")}),
        ("AK502", {"program": text("top_k = 1").replace("mean", "max")}),
        ("AK502", {"program": text("top_k = 1").replace("select(rows, columns", "select(columns, rows")}),
        ("AK502", {"q": torch.ones(1, 2, 8, 4).double(), "k": torch.ones(1, 2, 8, 4).double()}),
    ],
)  # fmt: skip
def test_errors(code: str, change: dict[str, Any]) -> None:
    given = {
        "q": torch.ones(1, 2, 8, 4), "k": torch.ones(1, 2, 8, 4), "program": text("top_k = 1"), "buffers": [], "params": [],
    }  # fmt: skip
    with pytest.raises(ak.AttnkitError, match=code) as caught:
        select(**(given | change))
    assert caught.value.code == code
