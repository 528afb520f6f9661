"""One result of the parts that split keys left, in the order of the splits: the law of the fold.

A part is weighted sums, its largest logit and its sum of weights, not lse: in a logit of many digits a logarithm is lost.
"""

from __future__ import annotations

from attnkit.backends.triton.source import Arguments, render, whole

MERGE = '''
@triton.jit
def merge(
    {arguments}
    V_HEAD_DIM: tl.constexpr, V_PADDED: tl.constexpr,
):
    """o and lse of one query and head; the sink is added here, once."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    entry, place = row // q_total, row % q_total
    channels = tl.arange(0, V_PADDED)
    parts += entry * part_sb + head * part_sh + place * part_ss
    row_at = entry * row_sb + head * row_sh + place
    #if sink
    top = tl.load(sinks + head).to(tl.float32)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    #else
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    #end
    acc = tl.zeros([V_PADDED], tl.float32)
    for i in tl.range(0, splits):
        found, size = tl.load(tops + row_at), tl.load(totals + row_at)
        part = tl.load(parts + channels, mask=channels < V_HEAD_DIM, other=0.0)
        row_at += row_split
        parts += part_split
        above = tl.maximum(top, found)
        pivot = tl.where(above == float("-inf"), 0.0, above)
        shrink = tl.exp2((top - pivot) * 1.4426950408889634)
        weight = tl.exp2((found - pivot) * 1.4426950408889634)
        total = total * shrink + weight * size
        acc = acc * shrink + tl.where(size == 0.0, 0.0, weight * part)
        top = above
    #if not unnormalized
    acc = tl.where(total == 0.0, 0.0, acc / tl.where(total == 0.0, 1.0, total))
    #end
    o_at = o + entry * o_sb + head * o_sh + place * o_ss
    tl.store(o_at + channels * o_sd, acc.to(o.dtype.element_ty), mask=channels < V_HEAD_DIM)
    #if lse
    pivot = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse + entry * whole_sb + head * whole_sh + place, pivot + tl.log(total))
    #end
'''


def merge(sink: bool, need_lse: bool, unnormalized: bool) -> tuple[str, Arguments]:
    """The text of the kernel ``merge`` and its arguments."""
    pointers = ["parts", "tops", "totals", "o", *["sinks"] * sink, *["lse"] * need_lse]
    sizes = [
        "part_split",
        "part_sb",
        "part_sh",
        "part_ss",
        "row_split",
        "row_sb",
        "row_sh",
        "splits",
        "q_total",
    ]
    sizes += ["whole_sb", "whole_sh"] * need_lse
    strides = [f"o_s{d}" for d in "bhsd"]
    arguments = (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
    )  # fmt: skip
    on = {name for name, held in (("sink", sink), ("lse", need_lse), ("unnormalized", unnormalized)) if held}
    return whole(
        render(MERGE, on, {"arguments": "".join(f"{n}, " for n, _ in arguments).rstrip()})
    ), arguments
