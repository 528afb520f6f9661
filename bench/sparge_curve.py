"""Error, density and speed of sparge attention whose thresholds were searched, on attention of real models.

For each of a few errors `ak.tune_sparge` searches every layer of two models on one stretch of text: the pretrained MiniLM
(`attnkit.bench.captured`), and a causal language model of bytes trained here for a minute or two (`attnkit.bench.training`). What
it found is measured on another stretch. Searches are kept in --folder, and go on where they were interrupted.

    python bench/sparge_curve.py --folder out/sparge [--search] [--json bench/results/FILE.json] [--plot docs/sparge.svg]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import attnkit as ak
from attnkit.bench import captured, machine, training
from attnkit.bench.captured import Sample
from attnkit.bench.report import drawing

BOUNDS = (0.05, 0.1, 0.2, 0.4)
TOKENS, THREADS, ROUNDS = 4096, 2, 3
RECIPE = training.Recipe(steps=200, batch=1, context=TOKENS)
FIRST = {"searched": 0, "measured": 30000}  # tokens into the text


def language_model(folder: Path) -> training.Model:
    """The model, trained once."""
    path = folder / "language-model.safetensors"
    torch.manual_seed(0)
    model = training.Model.attending(RECIPE, training.on_attnkit)
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    learn = training.learner(model, RECIPE)
    for batch in training.batches(RECIPE, training.TEXT.read_bytes()):
        learn(batch)
    save_file(model.state_dict(), path)
    return model


def layers(folder: Path, first: int, dtype: torch.dtype) -> dict[str, list[Sample]]:
    """Of both models the q, k and v of each layer."""
    found = {
        "MiniLM": captured.of_minilm(first, TOKENS),
        "language model": captured.of_language_model(language_model(folder), first, TOKENS),
    }
    return {
        name: [tuple(x.to(dtype).contiguous() for x in sample) for sample in of] for name, of in found.items()
    }


def search(folder: Path, name: str, samples: list[Sample], bound: float) -> list[ak.SpargeThresholds]:
    """The thresholds of each layer."""
    return [
        ak.tune_sparge([sample], bound, causal=name != "MiniLM", path=folder / f"{name}-{bound}-{i}.json")
        for i, sample in enumerate(samples)
    ]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, samples: list[Sample], found: list[ak.SpargeThresholds]) -> dict[str, Any]:
    """All layers of a model: errors, densities, and how much faster they are than dense attention of the same tensors."""
    causal = name != "MiniLM"
    errors, densities, dense, sparse = [], [], [], []
    for sample, thresholds in zip(samples, found, strict=True):
        exact: Any = ak.dense_attention(*(x.float() for x in sample), causal=causal)
        o, density = ak.sparge_attention(*sample, **thresholds.arguments, return_density=True)
        errors += ((o.float() - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3))).tolist()
        densities += density.flatten().tolist()
    for _ in range(ROUNDS):
        dense.append(sum(seconds(lambda x=x: ak.dense_attention(*x, causal=causal)) for x in samples))
        sparse.append(
            sum(
                seconds(lambda x=x, t=t: ak.sparge_attention(*x, **t.arguments))
                for x, t in zip(samples, found, strict=True)
            )
        )
    ratios = sorted(a / b for a, b in zip(dense, sparse, strict=True))
    return {
        "model": name, "bound": found[0].bound, "heads": len(errors),
        "searched": {"error": max(max(t.error) for t in found)},
        "error": {"mean": statistics.fmean(errors), "max": max(errors)}, "density": statistics.fmean(densities),
        "speedup": {"median": statistics.median(ratios), "lo": ratios[0], "hi": ratios[-1], "n": len(ratios)},
        "dense_ms": 1e3 * statistics.median(dense),
    }  # fmt: skip


def plot(document: dict[str, Any], paths: list[Path]) -> None:
    """Error against density, and speed against error."""
    with drawing(document, paths, (9, 3.4)) as figure:
        left, right = figure.subplots(1, 2)
        for name in dict.fromkeys(r["model"] for r in document["runs"]):
            mine = [r for r in document["runs"] if r["model"] == name]
            error = [r["error"]["mean"] for r in mine]
            left.plot([r["density"] for r in mine], error, "o-", label=name)
            spread = [
                [r["speedup"]["median"] - r["speedup"]["lo"] for r in mine],
                [r["speedup"]["hi"] - r["speedup"]["median"] for r in mine],
            ]
            right.errorbar(error, [r["speedup"]["median"] for r in mine], yerr=spread, fmt="o-", label=name)
        left.set_xlabel("share of tiles kept")
        left.set_ylabel("relative L1 error, mean of heads")
        right.set_xlabel("relative L1 error, mean of heads")
        right.set_ylabel("times faster than dense")
        for axes in (left, right):
            axes.grid()
            axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("out/sparge"), help="where searches are kept")
    parser.add_argument("--search", action="store_true", help="search alone; measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, action="append", default=[])
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="sparge_attention")
    torch.set_num_threads(THREADS)
    given.folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16
    searched = layers(given.folder, FIRST["searched"], dtype)
    found = {(n, b): search(given.folder, n, of, b) for n, of in searched.items() for b in BOUNDS}
    if given.search:
        return
    measured = layers(given.folder, FIRST["measured"], dtype)
    document = {
        "schema_version": 1, "suite": "sparge curve", "how": f"thresholds searched on {TOKENS} tokens, measured on others",
        "machine": machine.describe(), "commit": machine.commit(), "threads": THREADS, "dtype": "bfloat16", "tokens": TOKENS,
        "runs": [measure(name, measured[name], of) for (name, _), of in found.items()],
    }  # fmt: skip
    for run in document["runs"]:
        sys.stdout.write(json.dumps(run) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(document, given.plot)


if __name__ == "__main__":
    main()
