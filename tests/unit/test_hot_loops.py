"""What the compiler made of the innermost loops: sums stay in registers, none is spilled to the stack."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

OBJECTS = sorted(
    path
    for path in Path(__file__).parents[2].glob("build/*/CMakeFiles/engine.dir/csrc/cpu/isa_avx*.o")
    if not {"sanitize", "fuzz"} & set(path.parts)
    and "amx" not in path.name  # whose sums the compiler does not place
)
# A loop of a matrix product holds many of these, each adding to a register that stays what it is.
ACCUMULATES = re.compile(r"vfmadd231ps|vdpbf16ps|vpdpbusd|vpmaddwd")
HOT = 12
# Not so an exponential: a polynomial, a power of two.
EXPONENTIAL = re.compile("213ps|vscalefps|vcvttps2dq")
# Those of few queries fetch ahead, in loops of their own inside: there the whole function is looked at, and at whole
# vectors, for addresses of rows are computed in narrower ones.
FEW = re.compile(r"few_tile<4, \d, .*(float|Bf16)>\(|few_values_tile<.*(float|Bf16)>\(|dot_rows<4>\(")


class Instruction(NamedTuple):
    address: int
    text: str


def functions(path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    for part in re.split(r"\n\n(?=[0-9a-f]+ <)", listing):
        head, *lines = part.splitlines() or [""]
        found = re.fullmatch(r"[0-9a-f]+ <(.*)>:", head)
        if found is not None:
            pairs = (re.match(r" *([0-9a-f]+):\s+(\S.*)", line) for line in lines)
            yield found[1], [Instruction(int(pair[1], 16), pair[2]) for pair in pairs if pair is not None]


def straight_loops(body: list[Instruction]) -> Iterator[list[Instruction]]:
    """Loops with no other jump inside, as those of the products are: their bodies are unrolled."""
    start = 0
    for at, instruction in enumerate(body):
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", instruction.text)
        if jump is None:
            continue
        if body[start].address <= int(jump[1], 16) <= instruction.address:
            yield [i for i in body[start : at + 1] if i.address >= int(jump[1], 16)]
        start = at + 1


def spills(path: Path) -> tuple[int, list[str]]:
    """The number of hot loops, and those that touch the stack with a vector."""
    hot, bad = 0, []
    for name, body in functions(path):
        for loop in straight_loops(body):
            products = sum(bool(ACCUMULATES.match(i.text)) for i in loop)
            if products < HOT or any(EXPONENTIAL.search(i.text) for i in loop):
                continue
            hot += 1
            bad += [
                f"{name}: {i.text}"
                for i in loop
                if re.search(r"\(%r[sb]p", i.text) and re.search("%[xyz]mm", i.text)
            ]
    return hot, bad


@pytest.mark.shows
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name.split(".")[0])
def test_no_vector_is_spilled_in_a_hot_loop(path: Path) -> None:
    hot, bad = spills(path)
    assert hot >= 6  # products of scores and of values, at several widths
    assert bad == []


@pytest.mark.shows
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name.split(".")[0])
def test_no_vector_is_spilled_where_queries_are_few(path: Path) -> None:
    whole = r"vmov\w+ .*%zmm" if "avx512" in path.name else r"vmov\w+ .*%ymm"
    few = [(name, body) for name, body in functions(path) if FEW.search(name)]
    assert len(few) >= 4  # scores and values, of two types
    for name, body in few:
        spilled = [i.text for i in body if re.match(whole, i.text) and re.search(r"\(%r[sb]p", i.text)]
        # With 16 registers both squares of keys, 8 vectors, may be stored once and loaded twice: docs/design/decode.md.
        most = 24 if "avx2" in path.name and "few_tile" in name else 0
        assert len(spilled) <= most, (name, spilled)


def test_there_is_something_to_look_at() -> None:
    assert shutil.which("objdump") is not None
    assert OBJECTS or not list(Path(__file__).parents[2].glob("build/cp*"))
