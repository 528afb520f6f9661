"""``make compile-check``: every default kernel, compiled for every architecture without a GPU, and what it takes of one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnkit.backends.triton import launch, words
from attnkit.backends.triton.append import source as append_source
from attnkit.backends.triton.backend import space
from attnkit.backends.triton.blocks import blocks
from attnkit.backends.triton.delta import delta
from attnkit.backends.triton.dq import scatter
from attnkit.backends.triton.forward import Shape, forward
from attnkit.backends.triton.gradients import SWEEPS
from attnkit.backends.triton.kernel import TritonKernel
from attnkit.backends.triton.lints import lint
from attnkit.backends.triton.merge import merge
from attnkit.backends.triton.pair_sums import of_pairs
from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.resources import SHARED, Resources, ceiling, resources
from attnkit.backends.triton.schedule import ARCHITECTURES
from attnkit.backends.triton.slopes import sums
from attnkit.backends.triton.source import Arguments
from attnkit.backends.triton.words import BITS
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.plan.spec import KernelSpec

# Programs by what they add to attention: buffers, score, mask, attributes, layout.
CAUSAL = "mask = kv_idx <= q_idx + (kv_len - q_len)"
PROGRAMS: dict[str, dict[str, str]] = {
    "full": {},
    "causal": {"body": CAUSAL},
    "window": {
        "body": "mask = (kv_idx <= q_idx + (kv_len - q_len)) & (q_idx + (kv_len - q_len) - kv_idx <= 1024)"
    },
    "softcap": {"body": f"score = 30 * tanh(s / 30)\n{CAUSAL}"},
    "alibi": {
        "buffers": "b0: f32[1]",
        "body": f"score = s - b0[h] * abs(q_idx + (kv_len - q_len) - kv_idx)\n{CAUSAL}",
    },
    "bias": {"buffers": "b0: f32[4]", "body": "score = s + b0[b, h, q_idx, kv_idx]"},
    "distance": {
        "buffers": "b0: f32[2]",
        "body": f"score = s + b0[h, min(abs(q_idx - kv_idx), 127)]\n{CAUSAL}",
    },
    "document": {"buffers": "b0: i32[2]", "body": "mask = b0[b, q_idx] == b0[b, kv_idx]"},
    "sink": {"buffers": "b0: f32[1]", "body": CAUSAL, "normalizer": "softmax(sink = b0)"},
    "sigmoid": {"body": f"score = sigmoid(s - log(float(kv_len)))\n{CAUSAL}", "normalizer": "none"},
    "dropout": {"body": CAUSAL, "attributes": ", dropout = 0.1"},
    "packed": {
        "layouts": "packed[b0] | packed[b1] | packed[b1]",
        "buffers": "b0: i32[1], b1: i32[1]",
        "body": CAUSAL,
    },
    "paged": {
        "layouts": "bhsd | paged[b0,b1] | paged[b0,b1]",
        "buffers": "b0: i32[2], b1: i32[1]",
        "body": CAUSAL,
    },
    "padded": {"layouts": "bhsd | padded[b0] | padded[b0]", "buffers": "b0: i32[1]"},
    "int8": {"layouts": "bhsd | bhsd int8(token, 0) | bhsd int8(token, 0)", "body": CAUSAL},
    "paged int8": {
        "layouts": "bhsd | paged[b0,b1] int8(token, 0) | paged[b0,b1] int8(token, 0)",
        "buffers": "b0: i32[2], b1: i32[1]",
        "body": CAUSAL,
    },
    "fp8": {"layouts": "bhsd | bhsd fp8(head, 0) | bhsd fp8(head, 0)", "body": CAUSAL},
    "int4": {
        "layouts": "bhsd | padded[b0] int4(channel, 32) | padded[b0] int4(token, 32)",
        "buffers": "b0: i32[1]",
        "body": CAUSAL,
    },
    "paged int2": {
        "layouts": "bhsd | paged[b0,b1] int2(channel, 32) | paged[b0,b1] int2(token, 32)",
        "buffers": "b0: i32[2], b1: i32[1]",
        "body": CAUSAL,
    },
}
# Types of codes and of scales, to be read and to be written.
_CODES = {"int8": ("*i8", "*bf16", "*i16"), "fp8": ("*u8", "*fp32", "*fp32")}
_CODES |= dict.fromkeys(BITS, ("*i32", "*bf16", "*i16"))
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FORWARD = ("paged", "int8", "paged int8", "fp8", "int4", "paged int2")  # programs without a backward
_ALIKE = ("window", "sink", "padded", "distance")  # programs that other kernels have no more lines for
_APPENDS = [("append", name) for name in ("paged", "paged int8", "fp8", "int4", "paged int2")]
_APPENDS += [(f"encode {x}", name) for name in ("int4", "paged int2") for x in "kv"]
# Bytes a thread that a kernel may spill; they are recorded.
_STACK = {"dq": 64, "dkv": 64, "pairs": 64, "scatter": 64, "dq mend": 64, "dkv mend": 64}
_GROUP = 4  # query heads of a kv head


@dataclass(frozen=True)
class Case:
    """One kernel of one program for one architecture."""

    kernel: str
    program: str
    dtype: str
    head_dim: int
    v_head_dim: int
    arch: int
    precision: str = "highest"


@dataclass(frozen=True)
class Row:
    """What came of a case; ``roofline`` as `resources.ceiling`."""

    case: Case
    config: dict[str, int]
    resources: Resources
    roofline: float | None
    findings: list[str]


def program(name: str) -> Program:
    """One of `PROGRAMS`."""
    row = PROGRAMS[name]
    q, k, v = row.get("layouts", "bhsd | bhsd | bhsd").split("|")
    buffers = f" buffers({row['buffers']})" if "buffers" in row else ""
    normalizer = row.get("normalizer", "softmax")
    results = "o" if normalizer == "none" else "o, lse"
    return parse(
        f"attnkit 1\nprogram (q: {q}, k: {k}, v: {v}){buffers} {{\n"
        f"  {results} = attend(q, k, v, scale = default{row.get('attributes', '')}) {{\n"
        f"{row.get('body', '')}\nnormalizer = {normalizer}\n}}\n  return {results}\n}}\n"
    )


def kernel_of(case: Case) -> TritonKernel:
    """The kernels of a case's program with the defaults of its architecture."""
    spec = KernelSpec(
        program(case.program), case.dtype, case.head_dim, case.v_head_dim, "cuda", case.precision
    )
    config = {name: field.default for name, field in space(spec, case.arch).items()}
    return TritonKernel(spec, config)


Printed = tuple[
    str, str, Arguments, dict[str, Any], str
]  # entry, text, arguments, numbers, prefix of its fields


def _forward(kernel: TritonKernel, pairs: Pairs, mend: bool = False) -> Printed:
    lists = kernel.attend.mask is not None and pairs.stretch is None
    shape = Shape(lists=lists, care=kernel.care[-1] if mend else kernel.care[0])
    numbers = kernel.numbers(_GROUP) | {"PRECISION": kernel.precision} | _page(kernel)
    return "attend", *forward(pairs, kernel.scale, shape), numbers, ""


def _decode(kernel: TritonKernel, pairs: Pairs) -> Printed:
    config, numbers = kernel.config, kernel.numbers(_GROUP) | {"PRECISION": kernel.precision}
    numbers |= {
        "TILE_Q": config["decode_tile_q"],
        "TILE_KV": config["decode_tile_kv"],
        "SPLIT_KV": config["split_kv"],
    } | _page(kernel)
    return (
        "attend",
        *forward(pairs, kernel.scale, Shape(need_lse=False, grouped=True, split=True)),
        numbers,
        "decode_",
    )


def _merge(kernel: TritonKernel, pairs: Pairs) -> Printed:
    numbers = {name: kernel.numbers(_GROUP)[name] for name in ("V_HEAD_DIM", "V_PADDED")}
    attend = kernel.attend
    return "merge", *merge(attend.normalizer.sink is not None, True, attend.unnormalized), numbers, "merge_"


def _blocks(kernel: TritonKernel, pairs: Pairs) -> Printed:
    return (
        "blocks",
        *blocks(pairs),
        {name: kernel.numbers(_GROUP)[name] for name in ("TILE_Q", "TILE_KV")},
        "blocks_",
    )


def _backward(kind: str, mend: bool = False) -> Callable[[TritonKernel, Pairs], Printed]:
    def printed(kernel: TritonKernel, pairs: Pairs) -> Printed:
        pairs = replace(pairs, streamed="kv_idx" if kind == "dq" else "q_idx")
        lists = kernel.attend.mask is not None and pairs.stretch is None
        found = sums(pairs, frozenset(range(len(kernel.program.buffers))))
        config, prefix = kernel.config, kind + "_"
        numbers = kernel.numbers(_GROUP) | {"PRECISION": kernel.precision}
        numbers |= {"TILE_Q": config[prefix + "tile_q"], "TILE_KV": config[prefix + "tile_kv"]}
        numbers |= kernel.sweeps(kind)[0]
        return f"attend_{kind}", *SWEEPS[kind](pairs, kernel.scale, found, lists, mend), numbers, prefix

    return printed


def _pairs(kernel: TritonKernel, pairs: Pairs) -> Printed:
    found = sums(pairs, frozenset([0]))
    numbers = kernel.numbers(_GROUP) | {"PRECISION": kernel.precision}
    numbers |= {"TILE_Q": kernel.config["pairs_tile_q"], "TILE_KV": kernel.config["pairs_tile_kv"]}
    if found.scattered:
        return "attend_scatter", *scatter(pairs, kernel.scale, found, False), numbers, "pairs_"
    return "attend_pairs", *of_pairs(pairs, kernel.scale, found, 0), numbers, "pairs_"


def _append(kernel: TritonKernel, pairs: Pairs) -> Printed:
    codecs = [kernel.program.inputs[i].codec for i in (kernel.attend.k, kernel.attend.v)]
    k, v = ("bf16" if codec is None else codec.name for codec in codecs)
    own = kernel.numbers(_GROUP)
    widths = {"K_WIDTH": own["HEAD_DIM"], "K_PADDED": own["PADDED"], "V_WIDTH": own["V_HEAD_DIM"]}
    numbers = {"TOKENS": 16, "PAGE": 16, **widths, "V_PADDED": own["V_PADDED"]}
    return "append", *append_source((k, v), kernel.kv_layout.table is not None, True), numbers, "append_"


def _encode(x: str) -> Callable[[TritonKernel, Pairs], Printed]:
    def printed(kernel: TritonKernel, pairs: Pairs) -> Printed:
        codec = kernel.program.inputs[kernel.attend.k if x == "k" else kernel.attend.v].codec
        assert codec is not None
        width = kernel.spec.head_dim if x == "k" else kernel.spec.v_head_dim
        page = _page(kernel)
        numbers = words.numbers(x, codec.name, codec.group, width, page.get("PAGE", 1))
        return f"encode_{x}", *words.source(x, bool(page)), numbers, "append_"

    return printed


def _delta(kernel: TritonKernel, pairs: Pairs) -> Printed:
    numbers = {name: kernel.numbers(_GROUP)[name] for name in ("V_HEAD_DIM", "V_PADDED")}
    return "delta", *delta(True, kernel.attend.normalizer.sink is not None), {"TILE": 64} | numbers, "delta_"


KERNELS: dict[str, Callable[[TritonKernel, Pairs], Printed]] = {
    "forward": _forward, "forward mend": lambda kernel, pairs: _forward(kernel, pairs, mend=True),
    "decode": _decode, "merge": _merge, "blocks": _blocks,
    "dq": _backward("dq"), "dkv": _backward("dkv"), "dq mend": _backward("dq", True), "dkv mend": _backward("dkv", True),
    "pairs": _pairs, "scatter": _pairs, "delta": _delta, "append": _append,
    "encode k": _encode("k"), "encode v": _encode("v"),
}  # fmt: skip


def cases(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Case]:
    """The default kernels: every program at one shape, causal attention at all."""
    for arch in architectures:
        for kernel in ("forward", "decode", "dq", "dkv"):
            programs = [name for name in PROGRAMS if kernel in ("forward", "decode") or name not in FORWARD]
            for width in (64, 128, 256):
                yield Case(kernel, "causal", "bfloat16", width, width, arch)
            yield Case(kernel, "causal", "bfloat16", 192, 128, arch)
            yield Case(kernel, "causal", "float16", 128, 128, arch)
            for precision in ("highest", "high"):
                yield Case(kernel, "causal", "float32", 64, 64, arch, precision)
                yield Case(kernel, "causal", "float32", 128, 128, arch, precision)
            for name in programs:
                if name != "causal" and (kernel == "forward" or name not in _ALIKE):
                    yield Case(kernel, name, "bfloat16", 128, 128, arch)
        for kernel in ("forward", "decode"):
            for name in ("int8", "fp8", "int4"):
                yield Case(kernel, name, "bfloat16", 256, 256, arch)
        yield Case("forward mend", "causal", "bfloat16", 256, 256, arch)
        for width in (128, 256):
            yield Case("dq mend", "causal", "bfloat16", width, width, arch)
            yield Case("dkv mend", "causal", "bfloat16", width, width, arch)
        yield Case("merge", "sink", "bfloat16", 128, 128, arch)
        yield Case("delta", "sink", "bfloat16", 128, 128, arch)
        yield Case("pairs", "bias", "bfloat16", 128, 128, arch)
        for kernel in ("dq", "scatter"):
            yield Case(kernel, "distance", "bfloat16", 128, 128, arch)
        for kernel, name in _APPENDS:
            yield Case(kernel, name, "bfloat16", 128, 128, arch)
        yield Case("blocks", "document", "bfloat16", 128, 128, arch)


def _page(kernel: TritonKernel) -> dict[str, int]:
    return {"PAGE": 32} if kernel.kv_layout.table is not None else {}


def compiled(case: Case) -> tuple[Any, TritonKernel, str]:
    """Triton's compiled kernel of a case, the kernel it belongs to, and the prefix of its fields."""
    kernel = kernel_of(case)
    pairs = Pairs(kernel.program)
    entry, text, arguments, numbers, prefix = KERNELS[case.kernel](kernel, pairs)
    short = "*" + _SHORT[case.dtype]
    types = dict.fromkeys(("q", "k", "v", "o", "d_o", "dk", "dv"), short)
    types |= dict.fromkeys(("k_codes", "v_codes"), short)
    if kernel.kv_layout.codec is not None:
        of_codes, of_scales, bits = _CODES[kernel.kv_layout.codec.name]
        appends = case.kernel.split()[0] in ("append", "encode")
        types |= {f"{x}_codes" if appends else x: of_codes for x in "kv"}
        types |= {f"{x}_scales": bits if appends else of_scales for x in "kv"}
        types |= {f"{x}_newest": bits if appends else of_scales for x in "kv"}
    types |= {
        f"b{i}": "*" + {"f32": "fp32", "bool": "i1"}.get(b.dtype, b.dtype)
        for i, b in enumerate(kernel.program.buffers)
    }
    types |= {"totals0": "*i64", "per_one0": "*fp64"}
    types |= dict.fromkeys(
        ("lists", "counts", "cu_q", "cu_kv", "lengths", "table", "coded_of", "before", "after"), "*i32"
    ) | {"seed_at": "*i64"}
    if case.kernel == "decode":
        types["o"] = "*fp32"
    described = launch.described_well(arguments, {name: types.get(name, "*fp32") for name, _ in arguments})
    made = launch.Program(text, entry, arguments, tuple(numbers.items()))
    target = launch.Target(case.arch, *kernel.layout(prefix))
    return launch.compile_kernel(made, described, target), kernel, prefix


def check(case: Case) -> Row:
    """Compile a case and look at what came of it."""
    found, kernel, prefix = compiled(case)
    taken = resources(found)
    config = {
        n: kernel.config[prefix + n]
        for n in ("tile_q", "tile_kv", "warps", "stages")
        if prefix + n in kernel.config
    }
    findings = lint(found, case.dtype, kernel.precision)
    if taken.shared > SHARED[case.arch]:
        findings.append(f"{taken.shared} bytes of shared memory, the architecture has {SHARED[case.arch]}")
    if taken.stack > _STACK.get(case.kernel, 0):
        findings.append(f"spills {taken.stack} bytes a thread")
    exact = kernel.precision if case.dtype == "float32" else ""
    roofline = ceiling(case.kernel, case.arch, exact, case.head_dim, case.v_head_dim)
    return Row(case, config, taken, roofline, findings)


def main() -> int:
    """Print the table; exit with 1 where a kernel does not do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument(
        "--arch", type=int, action="append", help="only this one (80, 90, 100); may be repeated"
    )
    parser.add_argument("--only", default="", help="only cases in whose name this occurs")
    args = parser.parse_args()
    head = f"{'kernel':64} {'numbers':44} {'regs':>4} {'spill':>5} {'shared':>7} {'on an SM':>2} {'roof':>4}"
    sys.stdout.write(f"{head}\n")
    rows = []
    for case in cases(tuple(args.arch or ARCHITECTURES)):
        name = f"sm_{case.arch} {case.kernel} {case.program} {case.dtype} {case.head_dim}/{case.v_head_dim} {case.precision}"
        if args.only not in name:
            continue
        row = check(case)
        rows.append(row)
        tiles = " ".join(f"{n}={x}" for n, x in row.config.items())
        r = row.resources
        findings, bound = "; ".join(row.findings), "  - " if row.roofline is None else f"{row.roofline:.2f}"
        sys.stdout.write(
            f"{name:64} {tiles:44} {r.registers:4} {r.stack:5} {r.shared:7} {r.blocks:2} {bound}  {findings}\n"
        )
        sys.stdout.flush()
    if args.json:
        held = [asdict(row) | {"resources": row.resources._asdict()} for row in rows]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema_version": 1, "tools": launch.tools(), "rows": held}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row.findings for row in rows))


if __name__ == "__main__":
    sys.exit(main())
