"""Suites: what is measured beside whom, and what is asked of it, all of it data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from attnkit.bench.peers import (
    FLEX,
    FOLDED,
    FOLDED_GPU,
    FUSED,
    GQA,
    LLAMA,
    LLAMA_PRODUCTS,
    MHA,
    OPENVINO,
    TORCH,
    ZENTORCH,
    Peer,
)
from attnkit.bench.workloads import Shape, Workload
from attnkit.variants import dense


@dataclass(frozen=True)
class Bar:
    """What is asked of attnkit in a row: a ratio of at least ``least``, or at most ``most``; ``stretch`` is the wish.

    ``against`` says of what: a peer's name or ``best`` (the fastest correct peer): its time over ours, ``least``;
    ``ceiling``: the share of the binding ceiling probed in the same round, ``least``; ``beside``: our time for a unit
    of work over that in the workload that the row has beside it, ``most``.
    """

    against: str
    least: float | None = None
    most: float | None = None
    stretch: float | None = None


@dataclass(frozen=True)
class Row:
    """A workload, the peers that run it in attnkit's rounds (the first that can is the baseline), and its bars.

    ``beside`` is another workload of attnkit's own in the same rounds.
    """

    workload: Workload
    peers: tuple[Peer, ...] = (TORCH,)
    bars: tuple[Bar, ...] = ()
    beside: Workload | None = None

    @property
    def name(self) -> str:
        """The workload's."""
        return self.workload.name


ALL = (TORCH, OPENVINO, ZENTORCH, MHA, GQA)
DECODERS = (TORCH, FOLDED, OPENVINO, ZENTORCH, MHA, GQA)
MODS = (FLEX, TORCH)


def _s(d: int, s: int = 4096) -> Shape:
    return Shape.of(1, 8, s, d)


def _best(best: float, torch: float, stretch: float | None = None) -> tuple[Bar, Bar]:
    return Bar("best", least=best, stretch=stretch), Bar("torch", least=torch)


def _row(variant: str, shape: Shape, peers: tuple[Peer, ...], *bars: Bar, **changes: Any) -> Row:
    return Row(Workload(variant, shape, **changes), peers, bars)


FP32, BF16 = "float32", "bfloat16"
PEAK = Bar("ceiling", least=0.88, stretch=0.94)
BANDWIDTH = Bar("ceiling", least=0.85, stretch=0.95)

_FORWARD = [
    _row("full", _s(64), ALL, *_best(1.15, 2.3), PEAK),
    _row("full", _s(128), ALL, *_best(1.10, 2.3), PEAK),
    _row("causal", _s(64), ALL, *_best(1.55, 2.5, 1.8)),
    _row("causal", _s(128), ALL, *_best(1.4, 2.5, 1.8)),
]
_FORWARD += [
    _row(variant, _s(d, s), ALL, *_best(best, 4.0, stretch), dtype=BF16)
    for variant, s, best, stretch in (
        ("full", 4096, 1.3, 1.5), ("full", 1024, 1.15, 1.5), ("causal", 4096, 1.4, 1.6), ("causal", 1024, 1.4, 1.6),
    )
    for d in (64, 128)
]  # fmt: skip

_TRAINING = [
    _row("causal", _s(d), (TORCH,), Bar("torch", least=least, stretch=stretch), dtype=dtype, direction="fwdbwd")
    for dtype, d, least, stretch in ((FP32, 64, 2.5, 2.9), (FP32, 128, 2.0, 2.9), (BF16, 64, 4.0, 5.0), (BF16, 128, 3.2, 5.0))
]  # fmt: skip

# Against FlexAttention compiled: those with causal structure, then those in which every query may look both ways.
_CAUSAL_MODS = ("causal_alibi", "causal_softcap", "document", "window", "prefix")
_FULL_MODS = ("alibi", "softcap", "two_way_document", "two_way_window")
_MODS = [
    _row(variant, _s(d), MODS, Bar("flex", least=least if dtype == FP32 else 5.0), dtype=dtype)
    for dtype in (FP32, BF16)
    for variants, least in ((_CAUSAL_MODS, 2.8), (_FULL_MODS, 4.0))
    for variant in variants
    for d in (64, 128)
]

# The cost of a score, of the same blocks; and of a narrow window, of the pairs that it leaves.
_OVERHEAD = [
    Row(
        Workload("alibi_softcap", _s(d), dtype=dtype),
        (),
        (Bar("beside", most=1 + cost, stretch=1 + cost / 2),),
        beside=Workload("full", _s(d), dtype=dtype),
    )
    for dtype, d, cost in ((FP32, 64, 0.18), (FP32, 128, 0.10), (BF16, 64, 0.26), (BF16, 128, 0.15))
] + [
    Row(
        Workload("window", _s(64, 16384), dtype=dtype),
        (),
        (Bar("beside", most=1.4, stretch=1.2),),
        beside=Workload("full", _s(64, 16384), dtype=dtype),
    )
    for dtype in (FP32, BF16)
]

_DECODE = [
    _row(
        "full", Shape(1, 32, 8, 1, kv, 128, 128), DECODERS, *bars, BANDWIDTH, dtype=dtype, direction="decode"
    )
    for kv in (8192, 32768)
    for dtype, bars in (
        (FP32, (Bar("torch-folded", least=2.5),)),
        (BF16, (Bar("torch", least=15.0), Bar("torch-folded", least=3.5))),
    )
]

# What pages cost a decoder, beside a cache without them.
_PAGES = [
    Row(
        Workload("full", shape, direction="decode", dtype=dtype, pages=64, shuffled=shuffled),
        (),
        (Bar("beside", most=1.03),),
        beside=Workload("full", shape, direction="decode", dtype=dtype, pages=0),
    )
    for shape in (Shape(1, 32, 8, 1, 8192, 128, 128),)
    for dtype in (FP32, BF16)
    for shuffled in (False, True)
]

# A long cache of elements, beside llama.cpp's of float16. And of codes: beside our own of bfloat16 (our time over its time), and
# beside llama.cpp's codes.
_LLAMA = (LLAMA, LLAMA_PRODUCTS)
_PLAIN = [
    _row(
        "full", Shape(1, 32, 8, 1, 32768, 128, 128), _LLAMA, Bar("best", least=1.0),
        direction="decode", dtype=dtype, pages=0,
    )
    for dtype in (BF16, "float16")
]  # fmt: skip
_CODES = [
    Row(
        Workload(
            "full", Shape(1, 32, 8, 1, kv, 128, 128), direction="decode", dtype=BF16, pages=0, codec=codec
        ),
        () if codec == "int2" else _LLAMA,  # which keeps nothing like int2
        (Bar("beside", most=1 / least, stretch=1 / stretch), *more),
        beside=Workload("full", Shape(1, 32, 8, 1, kv, 128, 128), direction="decode", dtype=BF16, pages=0),
    )
    for kv, codec, least, stretch, more in (
        (32768, "int8", 1.6, 1.9, (BANDWIDTH, Bar("llama.cpp", least=2.5))),
        (32768, "int4", 2.5, 3.1, (BANDWIDTH, Bar("llama.cpp", least=5.0))),
        (32768, "int2", 3.2, 4.2, (BANDWIDTH,)),
        (512, "int8", 1.0, 1.1, ()),
        (512, "int4", 1.0, 1.1, ()),
        (512, "int2", 1.0, 1.1, ()),
    )
]

# Through Python: without gradients; in grad mode, forward alone; and a whole training step.
_SMALL = [
    _row("full", Shape.of(b, 12, s, 64), (TORCH,), Bar("torch", least=least, stretch=stretch), **changes)
    for least, stretch, changes in (
        (2.0, 3.0, {}), (1.3, None, {"grad": True}), (1.3, None, {"direction": "fwdbwd"}),
    )
    for b in (1, 32)
    for s in (16, 64, 128)
]  # fmt: skip

_QUICK = [
    Row(Workload("full", _s(64))),
    Row(Workload("full", _s(128))),
    Row(Workload("causal", _s(64))),
    Row(Workload("causal", _s(128))),
    Row(Workload("alibi_softcap", _s(64))),
    Row(Workload("window", _s(64))),
    Row(Workload("causal", Shape.of(1, 16, 1024, 64, hkv=4))),
    Row(Workload("full", Shape.of(1, 12, 128, 64))),
]

# As other people's tables have it: 16k tokens, 16 heads of 128 channels.
_GPU_FORWARD = [
    _row(variant, Shape.of(16384 // s, 16, s, 128), FUSED, dtype=BF16)
    for variant, s in (("causal", 8192), ("full", 8192), ("causal", 16384), ("causal", 4096), ("full", 16384), ("full", 4096))
]  # fmt: skip
_GPU_TRAINING = [
    _row(variant, Shape.of(16384 // s, 16, s, 128), FUSED, dtype=BF16, direction="fwdbwd")
    for variant, s in (("causal", 8192), ("full", 8192), ("causal", 16384), ("causal", 4096))
]
_GPU_DECODE = [
    _row("full", Shape(b, 32, 8, 1, 32768, 128, 128), (FOLDED_GPU, *FUSED), dtype=BF16, direction="decode")
    for b in (1, 4)
]

LENGTHS = tuple(1 << i for i in range(10, 17))  # 1k ... 64k

suites: dict[str, list[Row]] = {
    "quick": _QUICK,
    "demo": [_QUICK[i] for i in (0, 2, 5, 4, 6, 7)],
    # Every named variant on a shape small enough for tests: all paths, no meaningful times.
    "smoke": [Row(Workload(name, Shape(1, 2, 1, 96, 130, 16, 16))) for name in dense.CASES],
    # What is promised of the CPU engine.
    "cpu": [*_FORWARD, *_TRAINING, *_MODS, *_OVERHEAD, *_DECODE, *_PAGES, *_SMALL],
    # On a GPU, beside whoever computes attention there: the most important first, for a run that is cut off.
    "gpu": [*_GPU_FORWARD, *_GPU_TRAINING, *_GPU_DECODE],
    "kv": [*_PLAIN, *_CODES],
    # Time and memory against length: attnkit alone, a head for each of two threads.
    "scaling": [
        Row(Workload("causal", Shape.of(1, 2, s, 64), direction=direction), ())
        for direction in ("fwd", "fwdbwd")
        for s in LENGTHS
    ],
}
SECONDS = {
    "cpu": 900.0,
    "gpu": 120.0,
    "scaling": 120.0,
}  # what a suite takes if nobody says; 24 for the others


def select(
    suite: str,
    *,
    variants: Sequence[str] = (),
    patterns: Sequence[str] = (),
    dtype: str | None = None,
    seed: int | None = None,
) -> list[Row]:
    """The rows of a suite, narrowed to some variants and names, with another dtype or seed.

    A pattern is a part of a row's name; ``*`` and ``?`` stand for anything in between. Bars are promised of one dtype:
    rows that have any are left out where another is asked for.
    """
    changes: dict[str, Any] = {k: v for k, v in (("dtype", dtype), ("seed", seed)) if v is not None}
    return [
        replace(
            row,
            workload=replace(row.workload, **changes),
            beside=None if row.beside is None else replace(row.beside, **changes),
        )
        for row in suites[suite]
        if (not row.bars or dtype in (None, row.workload.dtype))
        and (not variants or row.workload.variant in variants)
        and (not patterns or any(fnmatchcase(row.name, f"*{p}*") for p in patterns))
    ]
