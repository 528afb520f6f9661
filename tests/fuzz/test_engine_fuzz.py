"""Bytecode that nobody's compiler wrote: the native fuzzer for a while, and for ever what it once found."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from attnkit import _engine

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.txt"))


def fuzz(engine_fuzz: Path, *arguments: object) -> str:
    command = [str(engine_fuzz), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def cases(said: str) -> tuple[int, int]:
    """(cases, accepted) of the last line."""
    run, _, accepted, _ = said.split()[-4:]
    return int(run), int(accepted)


def test_random_and_damaged_bytecode(
    engine_fuzz: Path, fuzzed_levels: list[str], seed: int, effort: int
) -> None:
    count = 4000 * effort
    said = fuzz(engine_fuzz, "--seed", seed, "--cases", count, "--seconds", 3600)
    run, accepted = cases(said)
    assert run == count
    assert all(f" {isa}" in said for isa in fuzzed_levels)
    assert run / 2 < accepted < run * 0.9  # most run, and many are refused


def test_corpus(engine_fuzz: Path) -> None:
    """Each file is a case that once crashed, or that nobody should ever find to crash."""
    assert cases(fuzz(engine_fuzz, *CORPUS))[0] == len(CORPUS) > 0


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus_through_the_binding(path: Path) -> None:
    """The verifier says the same through Python: accepted or ValueError."""
    _, score, mask, num_buffers, num_params, *words = map(int, path.read_text().split())
    try:
        program = _engine.Program(np.array(words, np.int32), score, mask, num_buffers, num_params)
    except ValueError:
        return
    assert program.num_instructions == len(words) // 8
