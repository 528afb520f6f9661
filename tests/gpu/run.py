"""``make gpu``: what a machine with a GPU is asked, the most important first, within a time, resumable, as JSON.

Each step writes ``OUT/STEP.json`` when it is done; a step whose file is there is not run again, so a run that was cut off
goes on where it stopped. Measurements lie beside it, ``OUT/STEP.records.json``, as `attnkit bench` writes them. Needs no
network: what is missing is said, not fetched. ``--dry-run`` compiles what the first steps would launch, for an architecture
that need not be here, and launches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEWER = 13  # the least major version of another assembler that is tried: 12.8 is Triton's own


@dataclass(frozen=True)
class Step:
    """A module to run, and the seconds that it may take.

    ``newer``: with another assembler, if there is one here. ``beside``: while the tests run; measurements wait for it.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    newer: bool = False
    beside: bool = False


def tests(which: str, *more: str) -> tuple[str, ...]:
    """Tests on the GPU, in processes side by side: most of the time goes into compiling."""
    beside = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    return ("pytest", "-q", *beside, "tests/gpu/test_attention.py", "-k", which, *more)


def bench(rows: str, seconds: int) -> tuple[str, ...]:
    """Rows of the suite; ``{records}`` is where their JSON goes."""
    return (
        "attnkit",
        "bench",
        "--suite",
        "gpu",
        "--rows",
        rows,
        "--seconds",
        str(seconds),
        "--json",
        "{records}",
    )


# The engine of the CPU is not needed: without it the rest runs as well.
STEPS = (
    Step("build", ("pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."), 120),
    # Kernels that are measured later: compiled by now.
    Step("warm-forward", ("attnkit.bench.gpu", "d128 bfloat16"), 180, beside=True),
    Step("warm-backward", ("attnkit.bench.gpu", "fwdbwd"), 240, beside=True),
    Step("warm-decode", ("attnkit.bench.gpu", "decode"), 180, beside=True),
    Step("forward", tests("test_forward"), 180),
    Step("backward", tests("test_backward"), 180),
    Step("rest", tests("not test_forward and not test_backward and not classes"), 60),
    Step("classes", tests("classes"), 120),
    Step("newer-assembler", tests("(test_forward or test_backward) and causal and bfloat16"), 90, newer=True),
    Step("bench-forward", bench("d128 bfloat16", 30), 150),
    Step("bench-backward", bench("fwdbwd", 20), 120),
    Step("bench-decode", bench("decode", 10), 60),
    Step("bench-newer-assembler", bench("causal*s8192 d128*bfloat16", 10), 60, newer=True),
)  # fmt: skip
DRY = (
    Step("dry-run", ("pytest", "-q", "tests/compile/test_triton.py", "-k", "down_to_the_launch"), 300),
    Step("dry-run-kernels", ("attnkit.backends.triton.check", "--arch", "90", "--only", "causal bfloat16 128/128"), 300),
)  # fmt: skip


def machine() -> dict[str, object]:
    """What the numbers are of."""
    import torch

    found: dict[str, object] = {"torch": torch.__version__, "gpu": None, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = list(torch.cuda.get_device_capability())
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found | {"commit": commit.stdout.strip()}


def assembler() -> Path | None:
    """The newest ptxas on this machine, if it is of `NEWER` or later."""
    nvidia = find_spec("nvidia")
    found = [Path(here) for here in (shutil.which("ptxas"),) if here]
    found += Path("/usr/local").glob("cuda*/bin/ptxas")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        found += Path(folder).glob("**/bin/ptxas")
    versions = {path: version(path) for path in found}
    newest = max(versions, key=lambda path: versions[path], default=None)
    return newest if newest is not None and versions[newest] >= (NEWER, 0) else None


def version(ptxas: Path) -> tuple[int, int]:
    """Of an assembler; (0, 0) if it does not say."""
    try:
        said = subprocess.run([str(ptxas), "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0, 0
    numbers = re.search(r"release (\d+)\.(\d+)", said)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def run(step: Step, seconds: float, out: Path) -> dict[str, object]:
    """Run a step in a process of its own; how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    environment.pop("TRITON_INTERPRET", None)
    if step.newer:
        other = assembler()
        if other is None:
            return {"code": 0, "seconds": 0.0, "said": f"no ptxas {NEWER} or later here: not run"}
        environment["TRITON_PTXAS_PATH"] = str(other)
    command = [part.format(records=(out / f"{step.name}.records.json").resolve()) for part in step.command]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            timeout=seconds,
        )  # fmt: skip
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as exc:
        code, said = 124, str(exc.stdout or "")
    return {
        "command": command, "code": code, "seconds": time.monotonic() - start, "said": said[-20000:],
        "assembler": environment.get("TRITON_PTXAS_PATH"),
    }  # fmt: skip


def main() -> int:
    """Run the steps that are not done yet; 0 if all that ran went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, here, worst = time.monotonic() + args.seconds, machine(), 0
    if not args.dry_run and here["gpu"] is None:
        sys.stdout.write("there is no GPU here; --dry-run goes as far as the launch\n")
        return 1

    def do(step: Step) -> int:
        """Run a step that is not done, and keep what it said; its exit code."""
        file = args.out / f"{step.name}.json"
        left = end - time.monotonic()
        if file.exists() or left < 10:
            sys.stdout.write(f"{step.name}: {'done before' if file.exists() else 'no time left'}\n")
            return 0
        found = run(step, min(step.seconds, left), args.out)
        if found["code"] != 124:  # what was cut off is run again
            file.write_text(json.dumps({"schema_version": 1, "machine": here, **found}, indent=1) + "\n")
        sys.stdout.write(f"{step.name}: exit code {found['code']} after {found['seconds']:.0f} s\n")
        sys.stdout.flush()
        return int(str(found["code"]))

    with ThreadPoolExecutor() as pool:
        beside = []
        for step in DRY if args.dry_run else STEPS:
            if step.beside:
                beside.append(pool.submit(do, step))
                continue
            if "--json" in step.command:  # a measurement: nothing else runs
                wait(beside)
            worst = max(worst, do(step))
        worst = max([worst, *(each.result() for each in beside)])
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
