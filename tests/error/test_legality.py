"""Programs that the verifier refuses, hundreds of them, each with the code of the rule that it breaks.

A program here is one line too many: everything before it is legal, as a test checks, and so is its legal twin.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from attnkit.errors import CODES
from attnkit.ir.program import CODECS
from attnkit.ir.text import parse
from attnkit.ir.verify import verify

INPUTS = """q: bhsd, k: bhsd, v: bhsd, shared: hsd, number: bhs, carried: bs, head: h, row: hd, norm: bhd,
  state: bhdv, pq: packed[cu], pk: packed[cu], pv: packed[cu], other: packed[cu2], dk: padded[lens],
  dv: padded[lens], long: padded[cu2], gk: paged[table, lens], gv: paged[table, lens], coded: bhsd int8(token, 0)"""
BUFFERS = "logits: f32[1], cu: i32[1], cu2: i32[1], lens: i32[1], table: i32[2], flags: bool[1], wide: i64[2]"
PRELUDE = """
  rows = pool(q, size = 4)
  columns = pool(k, size = 2)
  packed_rows = pool(pq, size = 4)
  blocks = select(rows, columns, top_k = 2)
  tokens = select(q, k, top_k = 2)
  ahead = select(q, k, top_k = 2, prefix = 4)
  of_q = select(shared, q, top_k = 2)
  of_k = select(shared, k, top_k = 2)
  o, lse, density, weights, column = attend(q, k, v, outputs = (o, lse, density, weights, column_sum)) {
    normalizer = softmax(sink = logits) }
  o1, lse1 = attend(q, k, v)
  o2, lse2 = attend(k, q, q)
  o3, lse3 = attend(q, k, v) { normalizer = softmax(sink = logits) }
  o4 = attend(q, k, v) { normalizer = none }
  o5 = attend(q, k, v, groups = (of_q, of_k))
  o6 = map(q, o1) { value = x * y }
  lse6 = map(lse1) { value = x + 0.5 }
  o7, lse7 = merge(o1, lse1, o, lse)
"""
# One value of every kind that there is.
KINDS = {
    "q": "tokens", "shared": "tokens", "pq": "tokens", "dk": "tokens", "gk": "tokens", "coded": "tokens",
    "rows": "tokens", "o": "tokens", "number": "bhs", "lse": "bhs", "carried": "bs",
    "head": "h", "row": "hd", "norm": "bhd", "state": "bhdv", "blocks": "relation", "tokens": "relation",
    "of_q": "relation", "density": "bh", "weights": "weights",
}  # fmt: skip


def text_of(line: str) -> str:
    result = line.partition("=")[0].partition(",")[0].strip()
    return (
        f"attnkit 1\nprogram ({INPUTS}) buffers({BUFFERS}) params(p: f32) {{{PRELUDE}  {line}\n"
        f"  return {result}\n}}"
    )


def others(*kinds: str) -> list[str]:
    """Values of all kinds but these."""
    return [name for name, kind in KINDS.items() if kind not in kinds]


def wrong_operands() -> Iterator[tuple[str, str]]:
    """Every kind of value in every place where it has no meaning."""
    for x in others("tokens"):
        for call in (
            "r = pool({})", "r = encode({}, codec = int8(tile, 64))", "r = select({}, k, top_k = 1)",
            "r = select(q, {}, top_k = 1)", "r, l = attend({}, k, v)", "r, l = attend(q, {}, v)",
            "r, l = attend(q, k, {})", "r, l = attend(q, k, v, {}, v)", "r, l = attend(q, k, v, k, {})",
            "r, s, n = recur({}, k, v)", "r, s, n = recur(q, {}, v)", "r, s, n = recur(q, k, {})",
            "r, l = merge({}, lse1)",
        ):  # fmt: skip
            yield "AK217", call.format(x)
    for x in others("tokens", "bhs", "h", "hd"):
        yield "AK217", f"r = map({x})"
        yield "AK217", f"r = map(q, {x}) {{ value = x + y }}"
    for x in others("bhs"):
        yield "AK217", f"r, l = merge(o1, {x})"
        yield "AK217", f"r, s, n = recur(q, k, v, beta = {x})"
    for x in others("relation"):
        yield "AK217", f"r, l = attend(q, k, v, blocks = {x})"
        yield "AK217", f"r = attend(q, k, v, groups = ({x}, of_k))"
        yield "AK217", f"r = attend(q, k, v, groups = (of_q, {x}))"
    for x in others("tokens", "bhs", "h"):
        yield "AK217", f"r, s, n = recur(q, k, v, gate = {x})"
    for keyword, kind in (("bonus", "hd"), ("initial", "bhdv")):
        for x in others(kind):
            yield "AK217", f"r, s, n = recur(q, k, v, {keyword} = {x})"
    for x in others("bhd"):
        yield "AK217", f"r, s, n = recur(q, k, v, normalize = true, initial_norm = {x})"
    for x in others("bs"):
        yield "AK223", f"r, l = attend(q, k, v, initial = {x}) {{ carry = s score = s + f }}"


def layouts() -> Iterator[tuple[str, str]]:
    """Tokens that lie in ways that do not go together."""
    packed, plain = ("pq", "other"), ("q", "dk", "gk", "coded", "o")
    for p in packed:
        for x in plain:
            yield "AK211", f"r = select({p}, {x}, top_k = 1)"
            yield "AK211", f"r = select({x}, {p}, top_k = 1)"
            yield "AK211", f"r, l = attend({p}, {x}, {x})"
            yield "AK211", f"r, l = attend(shared, {p}, {p}, {x}, {x})"
    for x in ("dk", "gk", "long"):
        yield "AK211", f"r, l = attend({x}, k, v)"
        yield "AK211", f"r, l = attend({x}, {x}, {x})"
    for k, v in (
        ("k", "dv"), ("dk", "v"), ("dk", "gv"), ("gk", "dv"), ("dk", "long"), ("k", "shared"), ("columns", "v"),
        ("k", "columns"), ("rows", "columns"), ("gk", "v"), ("shared", "gv"),
    ):  # fmt: skip
        yield "AK211", f"r, l = attend(q, {k}, {v})"
        yield "AK211", f"r, l = attend(q, k, v, {k}, {v})"
    yield "AK211", "r, l = attend(pq, pk, other)"
    for q, k, v in (
        ("pq", "k", "v"), ("q", "pk", "v"), ("q", "k", "pv"), ("dk", "dk", "dk"), ("gk", "gk", "gk"),
        ("shared", "shared", "shared"), ("q", "shared", "v"), ("pq", "pk", "other"), ("rows", "k", "v"),
        ("q", "columns", "v"), ("packed_rows", "pk", "pv"),
    ):  # fmt: skip
        yield "AK211", f"r, s, n = recur({q}, {k}, {v})"
    for x in ("pq", "dk", "gk", "shared", "rows"):
        yield "AK211", f"r, s, n = recur(q, k, v, gate = {x})"


def other_tokens() -> Iterator[tuple[str, str]]:
    """Relations, merges and maps of tokens that they know nothing of."""
    for q, k in (("k", "q"), ("q", "dk"), ("q", "gk"), ("q", "long"), ("shared", "k"), ("q", "shared")):
        yield "AK219", f"r, l = attend({q}, {k}, {k}, blocks = blocks)"
        yield "AK219", f"r, l = attend({q}, {k}, {k}, blocks = tokens)"
        yield "AK219", f"r = attend({q}, {k}, {k}, groups = (of_q, of_k))"
    yield "AK219", "r, l = attend(q, k, v, blocks = ahead)"
    yield "AK219", "r, l = attend(rows, columns, columns, blocks = blocks)"
    for a, b in (("of_k", "of_q"), ("of_q", "of_q"), ("tokens", "of_k"), ("of_q", "tokens"), ("blocks", "of_k"),
                 ("of_q", "ahead"), ("ahead", "of_k"), ("of_q", "blocks")):  # fmt: skip
        yield "AK219", f"r = attend(q, k, v, groups = ({a}, {b}))"
    for pair in ("rows, lse1", "dk, lse1", "shared, lse1", "pq, lse1", "gk, lse2", "o1, lse1, rows, lse1",
                 "o1, lse1, dk, lse2", "o1, lse1, long, number"):  # fmt: skip
        yield "AK219", f"r, l = merge({pair})"
    for x in ("q, dk", "q, pq", "q, shared", "q, columns", "q, gk", "rows, q", "rows, columns", "dk, k", "dk, long",
              "number, lse"):  # fmt: skip
        yield "AK219", f"r = map({x}) {{ value = x * y }}"
    for x in ("q, columns", "rows, k", "q, k", "rows, o2", "o, columns"):
        yield "AK219", f"r = select({x}, top_k = 1, incoherent = 0.5)"


def counts() -> Iterator[tuple[str, str]]:
    """Too few operands, too many, and relations that come in the wrong number."""
    for n in (0, 5, 6):
        yield "AK217", f"r = map({', '.join(['q'] * n)})"
    for n in (0, 2, 3):
        yield "AK217", f"r = pool({', '.join(['q'] * n)})"
    for n in (2, 3):
        yield "AK217", f"r = encode({', '.join(['q'] * n)}, codec = int8(tile, 64))"
    for n in (1, 3):
        yield "AK217", f"r = select({', '.join(['q'] * n)}, top_k = 1)"
    for n in (0, 1, 2, 4, 6, 8):
        yield "AK217", f"r, l = attend({', '.join(['q'] * n)})"
    for n in (0, 1, 2, 4, 5):
        yield "AK217", f"r, s, n = recur({', '.join(['q'] * n)})"
    for operands in (
        "",
        "o1",
        "lse1",
        "o1, lse1, o1",
        "lse1, o1",
        "o1, o1",
        "lse1, lse1",
        "o1, lse1, lse1, o1",
    ):
        yield "AK217", f"r, l = merge({operands})"
    yield "AK217", "r, l = attend(q, k, v, k, v, blocks = blocks)"
    yield "AK217", "r = attend(q, k, v, k, v, groups = (of_q, of_k))"
    yield "AK217", "r = attend(q, k, v, blocks = blocks, groups = (of_q, of_k))"
    for held in ("", "of_q", "of_q, of_k, of_k"):
        yield "AK217", f"r = attend(q, k, v, groups = ({held}))"
    for first, second in (("head", "row"), ("head", "number"), ("row", "number"), ("number", "row"),
                          ("head", "q"), ("row", "q"), ("number", "q")):  # fmt: skip
        yield "AK217", f"r = map({first}, {second}) {{ value = x * y }}"
    for norm in ("l2", "layer"):
        for x in ("head", "row", "number", "lse"):
            yield "AK217", f"r = map({x}, norm = {norm})"


def keywords() -> Iterator[tuple[str, str]]:
    """Values that a keyword cannot have."""
    bad = {
        "top_k": ("-1", "2.5", "nan", "-inf", "inf", "1e12", "true", "s", "p + 1.0", "h"),
        "top_fraction": ("0", "-0.5", "1.5", "nan", "inf", "2", "true", "p * 2.0", "s"),
        "top_cdf": ("0", "-1.0", "nan", "-inf", "true", "kv_idx", "-p"),
        "threshold": ("nan", "false", "s", "p - 1.0"),
        "top_k = 1, incoherent": ("nan", "true", "s"),
    }
    for keyword, values in bad.items():
        for value in values:
            yield "AK218", f"r = select(rows, columns, {keyword} = {value})"
    rules = ("top_k = 1", "top_fraction = 0.5", "top_cdf = 0.5", "threshold = 0.5")
    yield "AK218", "r = select(q, k)"
    for i, a in enumerate(rules):
        for b in rules[i + 1 :]:
            yield "AK218", f"r = select(q, k, {a}, {b})"
        yield "AK218", f"r = select(q, k, {a}, heads = group, per = column)"
        yield "AK218", f"r = select(q, k, {a}, per = column, prefix = 2)"
        yield "AK218", f"r = select(q, columns, {a}, prefix = 2)"
        yield "AK218", f"r = select(q, k, {a}, prefix = 0)"


def more_keywords() -> Iterator[tuple[str, str]]:
    """The same of attention, pooling and recurrences."""
    for keyword, values in {
        "dropout": ("-0.1", "1.5", "nan", "inf", "2", "true", "s", "p + p"),
        "skip": ("-1.0", "nan", "false", "-inf"),
    }.items():
        for value in values:
            yield "AK218", f"r, l = attend(q, k, v, {keyword} = {value})"
    for value in ("0", "1"):
        yield "AK218", f"r, l = attend(q, k, v, budget = {value}) {{ carry = s score = s + f }}"
    for outputs in ("o, o", "o, lse, lse", "density, o, density"):
        names = ", ".join(f"r{i}" for i in range(outputs.count(",") + 1))
        yield "AK218", f"{names} = attend(q, k, v, outputs = ({outputs}))"
    yield "AK218", "r = pool(q, size = 0)"
    for value in ("-1.0", "inf", "nan", "-0.5"):
        yield "AK218", f"r, s, n = recur(q, k, v, normalize = true, epsilon = {value})"
    for value in ("", "1.0", "1.0, 2.0, 3.0, 4.0", "inf, 1.0", "1.0, nan", "1.0, 2.0, -inf"):
        yield "AK218", f"r, s, n = recur(q, k, v, coefficients = ({value}))"
    for value in ("0.0", "0", "-1.0", "inf", "nan", "-inf"):
        yield "AK212", f"r = select(q, k, scale = {value}, top_k = 1)"
        yield "AK212", f"r, l = attend(q, k, v, scale = {value})"
        yield "AK212", f"r, s, n = recur(q, k, v, scale = {value})"
    for line in ("r = select(q, k, top_k = 2147483648)", "r, l = attend(q, k, v, skip = 2147483648)"):
        yield "AK213", line


def recurrences() -> Iterator[tuple[str, str]]:
    """A state knows sums alone."""
    gates = ("gate = head", "gate = number", "gate = q")
    rest = ("beta = number", "bonus = row")
    moments = ("coefficients = (1.0, 0.5)", "coefficients = (1.0, 0.5, 0.25)")
    combined = [f"{a}, {b}" for a in moments for b in (*gates, *rest)]
    combined += [f"normalize = true, {a}" for a in rest]
    combined += [f"{a}, causal = false" for a in (*gates, *rest)]
    combined += [f"{a}, {b}, causal = false" for a in gates for b in rest]
    combined += ["beta = number, bonus = row", *(f"beta = number, bonus = row, {a}" for a in gates)]
    combined += ["epsilon = 0.5", "initial_norm = norm", "epsilon = 0.5, initial_norm = norm"]
    combined += [f"epsilon = 0.5, {a}" for a in gates] + [f"initial_norm = norm, {a}" for a in rest]
    for each in combined:
        yield "AK220", f"r, s, n = recur(q, k, v, {each})"


def normalizers() -> Iterator[tuple[str, str]]:
    """What a normaliser does not allow."""
    kinds = ("signed_softmax", "softmax_over_queries", "sum", "none")
    for kind in kinds:
        yield "AK226", f"r = attend(q, k, v, outputs = (o)) {{ normalizer = {kind}(sink = logits) }}"
        yield "AK226", f"r = attend(q, k, v, outputs = (o), skip = 1.0) {{ normalizer = {kind} }}"
    for kind in ("softmax", "signed_softmax", "none"):
        for epsilon in ("0.0", "0.5"):
            yield (
                "AK226",
                f"r = attend(q, k, v, outputs = (o)) {{ normalizer = {kind}(epsilon = {epsilon}) }}",
            )
    for kind in ("sum", "softmax_over_queries"):
        for epsilon in ("-1.0", "inf", "nan"):
            yield "AK226", f"r = attend(q, k, v) {{ normalizer = {kind}(epsilon = {epsilon}) }}"
    over = "{ normalizer = softmax_over_queries }"
    yield "AK226", f"r = attend(q, k, v, k, v) {over}"
    yield "AK226", f"r = attend(q, k, v, groups = (of_q, of_k)) {over}"
    yield "AK226", f"r = attend(q, k, v, dropout = 0.5) {over}"
    yield "AK226", f"r = attend(q, k, v, dropout = p) {over}"
    yield "AK226", "r = attend(q, k, v) { carry = s normalizer = softmax_over_queries }"
    yield "AK226", "r = attend(q, k, v, groups = (of_q, of_k)) { normalizer = softmax(sink = logits) }"
    yield "AK226", "r, l = attend(q, k, v, skip = 1.0) { normalizer = softmax(sink = logits) }"
    yield "AK226", "r, l = attend(q, k, v, skip = 1.0, dropout = 0.5)"
    yield "AK226", "r, l = attend(q, k, v, skip = 1.0) { carry = s }"
    yield "AK226", "r = attend(q, k, v, skip = 1.0, groups = (of_q, of_k))"
    for sink in ("cu", "table", "flags", "wide"):
        yield "AK209", f"r, l = attend(q, k, v) {{ normalizer = softmax(sink = {sink}) }}"
    for kind in ("sum", "none", "softmax_over_queries"):
        for output in ("lse", "row_max", "entropy"):
            yield "AK221", f"r = attend(q, k, v, outputs = ({output})) {{ normalizer = {kind} }}"
            yield "AK221", f"r, l = attend(q, k, v, outputs = (o, {output})) {{ normalizer = {kind} }}"
    for output in ("lse", "density", "weights", "column_sum", "column_max", "row_max", "entropy"):
        yield "AK221", f"r = attend(q, k, v, groups = (of_q, of_k), outputs = ({output}))"
        yield "AK221", f"r, l = attend(q, k, v, groups = (of_q, of_k), outputs = (o, {output}))"


def carries() -> Iterator[tuple[str, str]]:
    """A carry where there is none, and where there cannot be one."""
    for keyword in ("initial = carried", "budget = 4", "head = 1", "initial = carried, budget = 4"):
        yield "AK223", f"r, l = attend(q, k, v, {keyword})"
    yield "AK223", "r = attend(q, k, v, outputs = (carry))"
    yield "AK223", "r, c = attend(q, k, v, outputs = (o, carry))"
    yield "AK223", "r = attend(q, k, v, groups = (of_q, of_k)) { carry = s }"
    yield "AK223", "r = attend(q, k, v, groups = (of_q, of_k), budget = 2) { carry = s }"
    for body in ("score = s + f", "score = f", "mask = f < 1.0", "mask = f < 1.0 carry = s", "carry = f",
                 "carry = s + f score = s + f", "t = f * 2.0 score = s + t"):  # fmt: skip
        yield "AK223", f"r, l = attend(q, k, v) {{ {body} }}"


def sinks() -> Iterator[tuple[str, str]]:
    """A sink is added once."""
    for pairs in ("o, lse, o3, lse3", "o, lse, o, lse", "o1, lse1, o, lse, o3, lse3"):
        yield "AK222", f"r, l = merge({pairs})"


def others_sums() -> Iterator[tuple[str, str]]:
    """An o goes with the sum of its own attention, and with no other number a token."""
    for pairs in ("o, lse3, o3, lse", "o, lse3", "o1, lse", "q, lse", "o1, number", "o1, lse1, o, lse1",
                  "o1, lse1, q, lse", "o4, lse1", "o4, number", "o5, lse1", "o5, number", "o6, lse", "o, lse6", "o7, lse1",
                  "o1, lse7"):  # fmt: skip
        yield "AK227", f"r, l = merge({pairs})"


def variables() -> Iterator[tuple[str, str]]:
    """Variables in operations that know nothing of them, and roots of the wrong type."""
    for name in ("s", "kv_idx", "kv_len", "f"):
        yield "AK224", f"r = map(q) {{ value = x + {name} }}"
        yield "AK224", f"r = map(q, q) {{ value = where(float({name}) < 1.0, x, y) }}"
    for name in "xyzw":
        yield "AK224", f"r, l = attend(q, k, v) {{ score = s + {name} }}"
        yield "AK224", f"r, l = attend(q, k, v) {{ mask = {name} < 0.0 }}"
        yield "AK224", f"r, l = attend(q, k, v) {{ carry = {name} }}"
        yield "AK224", f"r = select(q, k, top_k = 1) {{ score = s * {name} }}"
        yield "AK224", f"r = select(q, k, top_k = 1) {{ force = {name} > 0.0 }}"
    for body in ("score = s + f", "mask = f < 0.0", "force = f < 0.0"):
        yield "AK224", f"r = select(q, k, top_k = 1) {{ {body} }}"
    for name in ("h", "q_idx", "q_idx < 3", "true", "3"):
        yield "AK203", f"r = map(q) {{ value = {name} }}"
        yield "AK203", f"r, l = attend(q, k, v) {{ score = {name} }}"
        yield "AK203", f"r, l = attend(q, k, v) {{ carry = {name} }}"
        yield "AK203", f"r = select(q, k, top_k = 1) {{ score = {name} }}"
    for name in ("h", "q_idx - kv_idx", "1", "0.5", "p"):
        yield "AK204", f"r, l = attend(q, k, v) {{ mask = {name} }}"
        yield "AK204", f"r = select(q, k, top_k = 1) {{ mask = {name} }}"
        yield "AK204", f"r = select(q, k, top_k = 1) {{ force = {name} }}"
    for name in ("s < 0.0", "exp(s) > p", "int(s) == h"):
        yield "AK205", f"r, l = attend(q, k, v) {{ mask = {name} }}"
        yield "AK205", f"r = select(q, k, top_k = 1) {{ mask = {name} }}"
        yield "AK205", f"r = select(q, k, top_k = 1) {{ force = {name} }}"


def codecs() -> Iterator[tuple[str, str]]:
    """Codes that keep no such scales, and tokens that are encoded already."""
    axes = {
        "int8": ("head", "row"),
        "int4": ("tile", "head"),
        "int2": ("tile", "head"),
        "fp8": ("channel", "tile"),
    }
    for name in CODECS:
        for axis in axes[name]:
            for group in (0, 32):
                yield "AK225", f"r = encode(q, codec = {name}({axis}, {group}))"
    for codec in ("int8(channel, 0)", "int8(tile, 0)", "int4(channel, 0)", "int2(channel, 0)", "fp8(head, 1)",
                  "fp8(head, 64)", "int8(token, 2147483648)"):  # fmt: skip
        yield "AK225", f"r = encode(q, codec = {codec})"
    yield "AK225", "r = encode(q)"
    for center in ("none", "mean"):
        yield "AK225", f"r = encode(coded, codec = int4(channel, 32), center = {center})"


GROUPS = (
    wrong_operands, layouts, other_tokens, counts, keywords, more_keywords, recurrences, normalizers, carries,
    sinks, others_sums, variables, codecs,
)  # fmt: skip
LINES = [(group.__name__, code, line) for group in GROUPS for code, line in group()]


@pytest.mark.parametrize("group", dict.fromkeys(name for name, _, _ in LINES))
def test_the_verifier_refuses_the_line(group: str, misjudged: Any) -> None:
    cases = [(code, line) for name, code, line in LINES if name == group]
    assert misjudged(lambda line: parse(text_of(line)), cases) == []


@pytest.mark.shows
def test_there_are_hundreds_of_them_and_every_rule_has_some() -> None:
    assert len({line for _, _, line in LINES}) == len(LINES)
    assert len(LINES) >= 300
    of_code = Counter(code for _, code, _ in LINES)
    assert all(of_code[code] >= 2 for code in CODES if "AK216" < code < "AK3")


TWINS = (
    "r = map(q, number, row, head) { value = x * y + z - w }", "r = map(o, norm = l2)", "r = pool(pq, size = 3)",
    "r = encode(q, codec = int8(tile, 64), center = mean)", "r = select(rows, columns, top_cdf = p, incoherent = 0.5)",
    "r = select(shared, pk, top_k = 2, prefix = 4)", "r, l = attend(q, dk, dv)", "r, l = attend(q, gk, gv, k, v)",
    "r, l = attend(pq, pk, pv)", "r, l = attend(shared, pk, pv)", "r, l = attend(q, k, v, blocks = blocks)",
    "r = attend(q, k, v, groups = (of_q, of_k))", "r, l = attend(q, k, v, dropout = p)",
    "r, l, c = attend(q, k, v, initial = carried, budget = 2, outputs = (o, lse, carry)) { carry = s score = s + f }",
    "r = attend(q, k, v) { normalizer = sum(epsilon = 0.5) }", "r, l = merge(o1, lse1, o, lse)",
    "r, l = merge(o6, lse6, o1, lse6, o7, lse7)", "r, l = merge(q, number, o1, lse1)",
    "r = attend(q, k, v) { normalizer = softmax_over_queries(epsilon = 0.0) }",
    "r, s, n = recur(pq, pk, pv, gate = number, beta = number)", "r, s, n = recur(q, k, v, gate = q, bonus = row)",
    "r, s, n = recur(q, k, v, coefficients = (1.0, 1.0, 0.5), normalize = true, epsilon = 0.5, initial_norm = norm)",
    "r, s, n = recur(q, k, v, initial = state, causal = false)", "r, l = attend(q, k, v, skip = p)",
)  # fmt: skip


@pytest.mark.parametrize("line", TWINS)
def test_their_legal_twins(line: str) -> None:
    verify(parse(text_of(line)))
