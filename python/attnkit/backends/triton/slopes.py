"""What kernels share that recompute weights from lse: derivatives of the score, and the lines that come of them.

What scores add to captured tensors comes as sums over rows (dq's kernel), over columns (dk's), pair by pair, or at indices that are
computed (`scattered`). Every sum has a fixed order, or is one of integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnkit.analysis.canonical import fold
from attnkit.analysis.derivative import gradient
from attnkit.backends.triton.pairs import LOG2E, Pairs, number
from attnkit.backends.triton.parts import LOGITS, OWNER, TILE, VISITS
from attnkit.backends.triton.source import Arguments, part
from attnkit.ir.expr import Expr, const, topological, var
from attnkit.plan.triton import Printer

Holes = dict[str, list[str] | str]
OfLoads = tuple[tuple[Expr, Expr], ...]  # loads, with the derivative of the score by each

AXES = {"b": "b", "h": "h", "q_idx": "q", "kv_idx": "k"}  # of sums, by the index that goes along them

# In the loop of a fold: a pair's weight,
WEIGHTS = """
        #if unnormalized
        gone = (logit == float("-inf")) | ({log_sums} == float("inf"))
        weights = tl.where(gone, 0.0, logit)
        #else
        #if raw
        weights = tl.exp2(logit * {scale_log2e} - {log_sums})
        #else
        weights = tl.exp2((logit - {log_sums}) * 1.4426950408889634)
        #end
        #end
"""
# what comes of that of the weight for the logit,
D_LOGIT = """
        #if unnormalized
        d_logit = tl.where(gone, 0.0, d_weights)
        #else
        d_logit = weights * (d_weights - {deltas})
        #end
"""
# and for what it is made from.
SLOPES = """
        $d_logit
        if PARTIAL:
            d_logit = tl.where(exists, d_logit, 0.0)
        $sums
        #if slope
        d_logit = tl.where(d_logit == 0.0, 0.0, d_logit * {slope_name})
        #end
"""


@dataclass(frozen=True)
class Sums:
    """The derivative of the score by the logit, and by loads that are summed over rows, over columns, pair by pair, or anyhow.

    ``of_rows``, ``of_columns``, ``of_pairs`` and ``scattered`` hold the loads with the derivative by each.
    """

    slope: Expr
    of_rows: OfLoads = ()
    of_columns: OfLoads = ()
    of_pairs: OfLoads = ()
    scattered: OfLoads = ()


def is_plain(load: Expr, packed: bool) -> bool:
    """Whether a load's indices are b, h, q_idx, kv_idx themselves, each once, or constants; of packed sequences h alone."""
    read = [str(arg.attr) for arg in load.args if arg.op == "var"]
    plain = all(arg.op == "const" or (arg.op == "var" and arg.attr in AXES) for arg in load.args)
    return plain and len(set(read)) == len(read) and not (packed and set(read) - {"h"})


def sums(pairs: Pairs, wanted: frozenset[int]) -> Sums:
    """The derivatives of a score, with those by its loads from ``wanted`` buffers."""
    score = pairs.attend.score
    loads = [n for n in topological([score]) if n.op == "load" and n.dtype == "float" and n.attr in wanted]
    slope, *of_loads = (fold(root) for root in gradient(score, [var("s"), *loads]))
    packed = pairs.program.inputs[pairs.attend.k].kind == "packed"
    kinds: dict[str, list[tuple[Expr, Expr]]] = {"rows": [], "columns": [], "pairs": [], "scattered": []}
    for load, slope_of_load in zip(loads, of_loads, strict=True):
        read = {str(arg.attr) for arg in load.args if arg.op == "var"}
        kind = "rows" if "kv_idx" not in read else "pairs" if "q_idx" in read else "columns"
        kinds[kind if is_plain(load, packed) else "scattered"].append((load, slope_of_load))
    return Sums(slope, *(tuple(found) for found in kinds.values()))


# (printer of the kernel, number of a load, what a pair adds to it) -> the line that adds it
Add = Callable[[Printer, int, str], str]


def over_rows(inner: Printer, i: int, value: str) -> str:
    """What a load gets from a tile, summed over its rows."""
    return f"sum{i} += tl.sum({value}, 1)"


def recomputed(
    pairs: Pairs, inner: Printer, scale: float, found: Sums, of_loads: OfLoads, add: Add
) -> tuple[set[str], Holes]:
    """The flags and holes of everything that recomputes weights, and adds what ``of_loads`` get."""
    kv = pairs.program.inputs[pairs.attend.k]
    score, score_name = pairs.score(inner)
    score += inner.lines([found.slope, *(root for _, root in of_loads)])
    lines: list[str] = []
    for i, (_, root) in enumerate(of_loads):
        value = (
            "d_logit"
            if root is const(1.0)
            else f"tl.where(d_logit == 0.0, 0.0, d_logit * {inner.name(root)})"
        )
        lines.append(add(inner, i, value))
    has_slope = found.slope is not const(1.0)
    mask, exists, poison = pairs.mask(inner)
    raw = pairs.raw(scale)
    flags = {
        "score": pairs.has_score, "raw": raw, "unnormalized": pairs.attend.unnormalized, "indices": pairs.reads_indices, "slope": has_slope, "packed": kv.kind == "packed",
        "lengths": kv.kind == "padded", "dropout": pairs.attend.dropout is not None,
    }  # fmt: skip
    holes: Holes = {
        "counter": pairs.counter, "int": "tl.int64" if pairs.wide else "tl.int32", "score": score, "score_name": score_name, "mask": mask,
        "exists": exists, "poison": poison, "scale": number(scale), "scale_log2e": number(scale * LOG2E),
        "to_raw": f" * {LOG2E}" if raw else "", "slope_name": inner.name(found.slope) if has_slope else "", "sums": lines,
    }  # fmt: skip
    return {name for name, held in flags.items() if held}, holes


def dropout_arguments(on: set[str]) -> Arguments:
    """Those of a kernel that draws again what the forward drew."""
    return (("dropped_below", "size"), ("kept_times", "float")) if "dropout" in on else ()


@dataclass(frozen=True)
class Sweep:
    """What sets the two kernels apart that visit tiles: of dq, which own queries, and of dk and dv, which own keys.

    ``own`` are the names of what is owned, ``results`` what is made of it. ``tensors`` is what `fold` takes before captured
    tensors, ``numbers`` and ``careful`` are its tiles. Sums for captured tensors lie at ``row``, where it is ``live``.
    """

    own: dict[str, str]
    results: tuple[str, ...]
    tensors: str
    numbers: str
    careful: str
    log_sums: str
    deltas: str
    row: str
    live: str


def swept(
    sweep: Sweep,
    pairs: Pairs,
    scale: float,
    found: Sums,
    of_loads: OfLoads,
    lists: bool,
    mend: bool,
    add: Add = over_rows,
    targets: Arguments = (),
) -> tuple[set[str], Holes, Arguments]:
    """The flags, holes and arguments of a kernel that sweeps over tiles, but for the parts `filled` makes of them.

    What ``of_loads`` get is carried from tile to tile and stored by rows, unless there are ``targets`` to add it to.
    """
    inner, outer = pairs.printer(), pairs.printer()
    on, holes = recomputed(pairs, inner, scale, found, of_loads, add)
    carried = 0 if targets else len(of_loads)
    held = {
        "lists": lists,
        "mend": mend,
        "sums": carried > 0,
        "unknown": not lists and pairs.stretch is None,
    }
    on |= {name for name, is_held in held.items() if is_held}
    roots = [pairs.attend.score, pairs.attend.mask, found.slope, *(root for _, root in of_loads)]
    captured = (*pairs.captured([root for root in roots if root is not None]), *targets)
    names = "".join(f"{name}, " for name, _ in captured)
    dropout = "seed, dropped_below, kept_times, " if "dropout" in on else ""
    full = "tiles + list_length - 1, -1, full" if lists else "full, whole_first, full, 0"
    partial = "tiles, 1, partial" if lists else "partial, first, whole_first - first, full"
    widths = ", HEAD_DIM, V_HEAD_DIM, PADDED, V_PADDED, PRECISION"
    arguments = _arguments(sweep, on, captured, carried)
    sums_at = "entry.to(tl.int64) * sums_sb + heads.to(tl.int64) * sums_sh"
    count = range(carried)
    holes |= {
        **sweep.own, "head": "heads", "times": "", "captured": names, "dropout": dropout, "deltas": sweep.deltas, "log_sums": sweep.log_sums,
        "tiles": "tiles, step, count" if lists else "count, first, before, between",
        "fold_full": sweep.tensors + names + dropout + full, "fold_partial": sweep.tensors + names + dropout + partial,
        "numbers": sweep.numbers + widths, "careful": sweep.careful + widths,
        "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip(),
        "sums_in": "".join(f"sum{i}, " for i in count), "sums_out": "".join(f", sum{i}" for i in count),
        "sums_start": "no_sum, " * carried, "sums_lost": ", _" * carried,
        "store_sums": [f"tl.store(sums{i} + {sums_at} + {sweep.row}, sum{i}, mask={sweep.live})" for i in count],
        "bounds": [] if lists else pairs.bounds(outer),
    }  # fmt: skip
    return on, holes, arguments


def filled(on: set[str], holes: Holes, *more: tuple[str, str]) -> Holes:
    """All holes of a sweep's template; ``more`` are parts of its own."""
    pieces = (
        ("owner", OWNER),
        ("visits", VISITS),
        ("tile", TILE),
        ("logits", LOGITS),
        ("weights", WEIGHTS),
        ("d_logit", D_LOGIT),
        ("slopes", SLOPES),
        *more,
    )
    for name, template in pieces:
        holes[name] = part(template, on, holes)
    return holes


def _arguments(sweep: Sweep, on: set[str], captured: Arguments, sums: int) -> Arguments:
    own = sweep.own["own"]
    pointers = [
        "q",
        "k",
        "v",
        "d_o",
        "lse",
        "deltas",
        *["flags"] * bool(sweep.results),
        *sweep.results,
        *(f"sums{i}" for i in range(sums)),
    ]
    pointers += ["cu_q", "cu_kv"] * ("packed" in on) + ["lengths"] * ("lengths" in on)
    pointers += ["lists", "counts"] * ("lists" in on) + ["seed_at"] * ("dropout" in on)
    strides = [f"{x}_s{d}" for x in ("q", "k", "v", "d_o", *sweep.results) for d in "bhsd"]
    sizes = ["lse_sb", "lse_sh"] + ["sums_sb", "sums_sh"] * bool(sums)
    sizes += ["list_length", "list_sb", "list_sh"] * ("lists" in on)
    sizes += (
        ["sequences"] if "packed" in on else [f"{own}_tiles", "q_len", *["kv_len"] * ("lengths" not in on)]
    )
    return (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
        *dropout_arguments(on), *captured,
    )  # fmt: skip
