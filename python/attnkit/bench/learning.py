"""Suite learning: small language models whose layers fold keys and values into a state, beside one that attends.

All learn in turn, step by step, from the same batches; what they have learnt is read off text that they have not seen. Layers
are written with the public functions, as a model author would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnkit
from attnkit.bench import machine
from attnkit.bench.bars import verdict
from attnkit.bench.measure import Interval, interval
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.bench.report import drawing
from attnkit.bench.rows import Bar
from attnkit.bench.runner import Progress, use_threads
from attnkit.bench.training import Attention, Model, Recipe, batches, held_out, learner, on_attnkit

_PIECES = 64  # of the text that nobody learns
_TAPS = 4  # tokens of a short convolution
_FEATURES = 16  # channels of Based's queries and keys
_WINDOW = 64  # keys of its exact layers
_WARM_STEPS = 5
_SMOOTH = 10  # steps that a point of the curves is the mean of


class GatedDelta(nn.Module):
    """Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464): short convolutions, a decay and a delta rule, a gated output."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, self.heads = recipe.width, recipe.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.taps = nn.Conv1d(3 * width, 3 * width, _TAPS, groups=3 * width, padding=_TAPS - 1, bias=False)
        self.rates = nn.Linear(width, 2 * recipe.heads)
        self.speed = nn.Parameter(torch.zeros(recipe.heads))
        self.norm = nn.RMSNorm(width // recipe.heads)
        self.gate = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, W]`` to the same."""
        batch, length, _ = x.shape
        near = functional.silu(self.taps(self.qkv(x).mT)[..., :length]).mT
        q, k, v = near.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        beta, rate = self.rates(x).mT.chunk(2, dim=1)  # [B, H, S]
        gate = -self.speed.exp()[:, None] * functional.softplus(rate)
        o: Any = attnkit.linear_attention(q, k, v, gate=gate, beta=beta.sigmoid(), qk_norm="l2")
        o = self.norm(o).transpose(1, 2).reshape(batch, length, -1)
        out: Tensor = self.merge(o * functional.silu(self.gate(x)))
        return out


class Taylor(nn.Module):
    """The linear layers of Based (Arora et al., arXiv 2402.18668): the exponential's series to the second order, few channels."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.heads = recipe.heads
        self.qk = nn.Linear(recipe.width, 2 * recipe.heads * _FEATURES, bias=False)
        self.v = nn.Linear(recipe.width, recipe.width, bias=False)
        self.merge = nn.Linear(recipe.width, recipe.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, W]`` to the same."""
        batch, length, _ = x.shape
        q, k = self.qk(x).view(batch, length, 2, self.heads, _FEATURES).permute(2, 0, 3, 1, 4)
        v = self.v(x).view(batch, length, self.heads, -1).transpose(1, 2)
        temperature = _FEATURES**0.5
        o: Any = attnkit.factorizable_attention(q, k, v, causal=True, qk_norm=None, temperature=temperature)
        out: Tensor = self.merge(o.transpose(1, 2).reshape(batch, length, -1))
        return out


def _near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = attnkit.attention(q, k, v, mask=attnkit.window(_WINDOW - 1))
    assert isinstance(o, Tensor)
    return o


def models(recipe: Recipe) -> dict[str, Callable[[], Model]]:
    """What makes each model: the layers of Based take turns with exact attention to the last few keys."""

    def window() -> nn.Module:
        return Attention(recipe, _near)

    return {
        "dense": lambda: Model.attending(recipe, on_attnkit),
        "Gated DeltaNet": lambda: Model(recipe, [lambda: GatedDelta(recipe)] * recipe.layers),
        "Based": lambda: Model(
            recipe, [window if i % 2 else lambda: Taylor(recipe) for i in range(recipe.layers)]
        ),
        f"window {_WINDOW}": lambda: Model(recipe, [window] * recipe.layers),
    }


@dataclass
class Run:
    """One model on its way."""

    name: str
    model: Model
    learn: Callable[[Tensor], float]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Tensor) -> None:
        """Train on a batch, and note what that gave and took."""
        start = time.perf_counter()
        self.losses.append(self.learn(batch))
        self.seconds.append(time.perf_counter() - start)


def run(
    recipe: Recipe,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Train all models; the result file's content. ``runs`` holds losses in nats a byte, that of unseen text, seconds a step.

    Nothing is promised: ``bars`` are ratios to look at.
    """
    document: Document = {
        "schema_version": SCHEMA_VERSION, "suite": "learning", "how": "models trained in turn, step by step, on the same batches",
        "machine": machine.describe(), "commit": machine.commit(), "recipe": asdict(recipe), "seed": seed,
        "records": [], "runs": [], "bars": [], "skipped": [],
    }  # fmt: skip
    text, pieces = held_out(recipe, _PIECES)
    with use_threads(threads) as used, torch.enable_grad():
        document["threads"] = used
        runs = []
        for name, make in models(recipe).items():
            torch.manual_seed(seed)
            model = make()
            runs.append(Run(name, model, learner(model, recipe)))
        for i, batch in enumerate(batches(recipe, text)):
            for j in range(len(runs)):
                runs[(i + j) % len(runs)].step(batch)
            progress("learning", (i + 1) / recipe.steps)
        with torch.no_grad():
            document["runs"] = [_record(each, pieces) for each in runs]
    first = document["runs"][0]["held_out"]
    for r in document["runs"][1:]:
        share = r["held_out"] / first
        document["bars"].append(
            verdict(f"{r['model']}: loss of unseen text", Bar("dense"), Interval(share, share, share, 1))
        )
    return document


def _record(run: Run, pieces: Tensor) -> dict[str, Any]:
    logits = run.model(pieces[:, :-1])
    return {
        "model": run.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "held_out": float(functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())),
        "seconds_per_step": asdict(interval(run.seconds[min(_WARM_STEPS, len(run.seconds) - 1) :])),
        "losses": run.losses,
    }


def plot(document: Document, paths: list[Path]) -> None:
    """The losses while learning, into each of ``paths``.

    Raises:
        OSError, ValueError: as `report.drawing`.
    """
    with drawing(document, paths, (7, 3.6)) as figure:
        axes = figure.subplots()
        for r in document["runs"]:
            label = f"{r['model']}: {r['held_out']:.3f} on unseen text"
            axes.plot(_means(r["losses"]), label=label, linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a byte")
        axes.grid(axis="y")
        axes.legend()


def _means(losses: Sequence[float]) -> list[float]:
    return [
        sum(part) / len(part)
        for part in (losses[max(0, i - _SMOOTH + 1) : i + 1] for i in range(len(losses)))
    ]
