"""``make gpu``: what a machine with a GPU is asked, the most important first, within a time, resumable, as JSON.

Each step writes ``OUT/STEP.json`` when it is done; a step whose file is there is not run again, so a run that was cut off
goes on where it stopped. Needs no network: what is missing is said, not fetched. ``--dry-run`` compiles what the first
step would launch, for an architecture that need not be here, and launches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Name, what it runs, and the seconds it may take. The engine of the CPU is not needed: without it the rest runs as well.
# Nothing is timed yet: that comes after these, when they have passed on a device.
STEPS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    (
        "build",
        ("pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."),
        200,
    ),
    ("forward", ("pytest", "-q", "tests/gpu/test_attention.py", "-k", "forward"), 240),
    ("backward", ("pytest", "-q", "tests/gpu/test_attention.py", "-k", "backward"), 240),
    ("rest", ("pytest", "-q", "tests/gpu/test_attention.py", "-k", "not forward and not backward"), 120),
)
DRY = ("pytest", "-q", "tests/compile/test_triton.py", "-k", "down_to_the_launch")


def machine() -> dict[str, object]:
    """What the numbers are of."""
    import torch

    found: dict[str, object] = {"torch": torch.__version__, "gpu": None}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = list(torch.cuda.get_device_capability())
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found | {"commit": commit.stdout.strip()}


def step(command: tuple[str, ...], seconds: float) -> dict[str, object]:
    """Run a module in a process of its own; how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    environment.pop("TRITON_INTERPRET", None)
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
        "command": list(command),
        "code": code,
        "seconds": time.monotonic() - start,
        "said": said[-20000:],
    }


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
    steps = (("dry-run", DRY, 300),) if args.dry_run else STEPS
    for name, command, most in steps:
        file = args.out / f"{name}.json"
        left = end - time.monotonic()
        if file.exists() or left < 10:
            sys.stdout.write(f"{name}: {'done before' if file.exists() else 'no time left'}\n")
            continue
        found = step(command, min(most, left))
        if found["code"] != 124:
            file.write_text(json.dumps({"schema_version": 1, "machine": here, **found}, indent=1) + "\n")
        sys.stdout.write(f"{name}: exit code {found['code']} after {found['seconds']:.0f} s\n")
        worst = max(worst, int(str(found["code"])))
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
