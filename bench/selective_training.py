"""A small language model trained with dense and with selective attention: losses, and losses against the keys that are kept.

Both learn in turn, step by step, from the same batches of the first nine tenths of the text, from the same first weights (selective
attention has no parameters of its own), with several seeds; losses are those of the last tenth. Then the keys that a query sees are
limited: the selective model forgets what its own head has selected against (`budget`), the dense one keeps the newest and the first,
which is what one does with a model that learnt nothing about it. (Leviathan, Kalman, Matias, arXiv 2410.02703.)

    python bench/selective_training.py --json FILE.json [--plot FILE.svg] [--steps 250] [--seeds 0 1]

Seeds that the file has already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import attnkit as ak
from attnkit.bench import machine
from attnkit.bench.report import drawing
from attnkit.bench.training import TEXT, Model, Recipe, batches, learner

BUDGETS = (8, 16, 32, 64, 128, 256)
KINDS = ("dense", "selective")
_WINDOWS = 64  # of held-out text


class Attention:
    """Causal attention of one kind, with a budget that can be set while it is in use."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.budget: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "selective":
            o = ak.selective_attention(q, k, v, budget=self.budget)
        elif self.budget is None:
            o = ak.attention(q, k, v, mask=ak.causal())
        else:
            o = ak.attention(q, k, v, mask=ak.causal() & newest(self.budget))
        assert isinstance(o, Tensor)
        return o


def newest(budget: int) -> Callable[..., Any]:
    """The newest keys and the first one, so many together."""
    return ak.window(budget - 2) | ak.prefix(1)


def trained(kind: str, recipe: Recipe, seed: int) -> tuple[Model, Attention, Callable[[Tensor], float]]:
    """A model, its attention, and what trains it on a batch and gives its loss."""
    torch.manual_seed(seed)
    attention = Attention(kind)
    model = Model.attending(recipe, attention)
    return model, attention, learner(model, recipe)


@torch.no_grad()
def held_out(model: Model, recipe: Recipe, text: bytes) -> float:
    """Nats a byte, of the second half of every window: each of these has a context of at least half of one."""
    data = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    starts = torch.linspace(0, len(data) - recipe.context - 1, _WINDOWS).long()
    windows = torch.stack([data[i : i + recipe.context + 1] for i in starts.tolist()])
    half = recipe.context // 2
    return float(
        functional.cross_entropy(
            model(windows[:, :-1])[:, half:].flatten(0, 1), windows[:, half + 1 :].flatten()
        )
    )


def measure(recipe: Recipe, seeds: list[int], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file's content, of ``runs`` that are there and of more seeds."""
    text = TEXT.read_bytes()
    cut = len(text) * 9 // 10
    for seed in seeds:
        if any(r["seed"] == seed for r in runs):
            continue
        models = {kind: trained(kind, recipe, seed) for kind in KINDS}
        losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for batch in batches(recipe, text[:cut]):
            for kind, (_, _, step) in models.items():
                losses[kind].append(step(batch))
        for kind, (model, attention, _) in models.items():
            full = held_out(model, recipe, text[cut:])
            limited = {}
            for budget in BUDGETS:
                attention.budget = budget
                limited[budget] = held_out(model, recipe, text[cut:])
            runs.append(
                {"kind": kind, "seed": seed, "losses": losses[kind], "held_out": full, "budgets": limited}
            )
            shown = "".join(f"  {b}: {x:.4f}" for b, x in limited.items())
            sys.stdout.write(f"{kind}, seed {seed}: {full:.4f}{shown}\n")
    return {
        "schema_version": 1, "suite": "selective-training", "machine": machine.describe(), "commit": machine.commit(),
        "text": TEXT.name, "recipe": asdict(recipe), "runs": runs,
    }  # fmt: skip


def plot(document: dict[str, Any], path: Path) -> None:
    """Losses while training, and held-out losses against the keys that are kept."""
    with drawing(document, [path], (9, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        for i, kind in enumerate(KINDS):
            mine = [r for r in document["runs"] if r["kind"] == kind]
            losses = np.mean([r["losses"] for r in mine], axis=0)
            left.plot(np.convolve(losses, np.ones(10) / 10, "valid"), color=f"C{i}", label=kind, linewidth=1)
            at = {int(b): [r["budgets"][b] for r in mine] for b in mine[0]["budgets"]}
            right.plot(list(at), [np.mean(x) for x in at.values()], "o-", color=f"C{i}", label=kind)
            right.axhline(
                float(np.mean([r["held_out"] for r in mine])), color=f"C{i}", linestyle=":", linewidth=1
            )
        left.set_xlabel("step")
        left.set_ylabel("loss, nats a byte")
        right.set_xscale("log", base=2)
        right.set_xlabel("keys that a query sees, at most")
        right.set_ylabel("held-out loss, nats a byte")
        for axes in (left, right):
            axes.grid(axis="y")
            axes.legend()


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    there = json.loads(given.json.read_text(encoding="utf-8"))["runs"] if given.json.exists() else []
    document = measure(replace(Recipe(), steps=given.steps), given.seeds, there)
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if given.plot is not None:
        plot(json.loads(given.json.read_text(encoding="utf-8")), given.plot)


if __name__ == "__main__":
    main()
