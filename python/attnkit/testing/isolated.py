"""Random cases that may crash or hang, in a process of their own: a dead process is a failed test, with its seed.

The same file is the test and the script of the child::

    def case(rng: np.random.Generator) -> str: ...  # does something risky, says how it ended, raises if that is wrong

    def test_many() -> None:
        tally = isolated.run(__file__, seed=1, count=1000)

    if __name__ == "__main__":
        isolated.main(case)
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_POLL = 0.02  # seconds


def main(case: Callable[[np.random.Generator], str]) -> None:
    """Run cases one after another, each with a generator of its own, and print how often each ending came up.

    ``python FILE --seed S --first N --count 1`` repeats case N of seed S.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument(
        "--progress", type=int, help="descriptor of eight bytes, the number of the present case"
    )
    args = parser.parse_args()
    faulthandler.enable()
    progress = None if args.progress is None else mmap.mmap(args.progress, 8)
    tally: Counter[str] = Counter()
    for number in range(args.first, args.first + args.count):
        if progress is not None:
            progress[:] = number.to_bytes(8, "little")
        tally[case(np.random.default_rng([args.seed, number]))] += 1
    sys.stdout.write(json.dumps(tally))
    sys.stdout.flush()
    os._exit(0)  # what else happens at exit is not what is tested


def run(
    script: str, *, seed: int, count: int, patience: float = 120, environment: Mapping[str, str] | None = None
) -> Counter[str]:
    """Run ``count`` cases of ``script`` in a child; how often each ending came up.

    Raises:
        AssertionError: a case raised, crashed, or took longer than ``patience`` seconds; says how to repeat it.
    """
    with (
        tempfile.TemporaryFile() as progress,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        progress.truncate(8)
        memory = mmap.mmap(progress.fileno(), 8)
        options = ["--seed", str(seed), "--count", str(count), "--progress", str(progress.fileno())]
        child = subprocess.Popen(  # noqa: S603 -- our own script
            [sys.executable, script, *options], stdout=out, stderr=err, pass_fds=[progress.fileno()],
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        code = _watch(child, memory, patience)
        number = int.from_bytes(memory[:], "little")
        err.seek(0)
        said = err.read().decode(errors="replace")[-4000:]
        repeat = f"{Path(script).name} --seed {seed} --first {number} --count 1"
        assert code is not None, f"case {number} took longer than {patience} s; repeat: {repeat}\n{said}"
        assert code == 0, f"exit code {code} in case {number} of {count}; repeat: {repeat}\n{said}"
        out.seek(0)
        tally: Counter[str] = Counter(json.loads(out.read()))
        assert tally.total() == count, tally
        return tally


def _watch(child: subprocess.Popen[bytes], memory: mmap.mmap, patience: float) -> int | None:
    """The exit code; None if one case took too long, and the child was killed."""
    seen, since = memory[:], time.monotonic()
    while (code := child.poll()) is None:
        if memory[:] != seen:
            seen, since = memory[:], time.monotonic()
        elif time.monotonic() - since > patience:
            child.kill()
            child.wait()
            return None
        time.sleep(_POLL)
    return code
