"""Queries, keys and values of real models on real text, to measure what depends on how attention lies."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnkit.bench import minilm, training

Sample = tuple[Tensor, Tensor, Tensor]  # [1, heads, tokens, head_dim] each
_WINDOW = 512  # tokens that MiniLM has positions for
_BATCH = 8


def of_minilm(first: int, tokens: int) -> list[Sample]:
    """Each layer's q, k and v for so many tokens of Newton's Opticks, from token ``first`` on.

    The pretrained model reads the text in windows of 512 tokens, all it has positions for; their queries, keys and values are
    put one after the other. So attention goes further than the model was trained to look, among tokens as it makes them.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = import_module(minilm.PACKAGE).MODEL_DIR
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, model_max_length=1 << 30
    )
    model = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    text = training.TEXT.read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[first : first + tokens].reshape(-1, _WINDOW)
    attentions = [layer.attention.self for layer in model.encoder.layer]
    heads = model.config.num_attention_heads
    held: dict[tuple[int, str], list[Tensor]] = {}

    def keep(layer: int, name: str) -> Any:
        def hook(module: Any, given: Any, out: Tensor) -> None:
            held.setdefault((layer, name), []).append(out)

        return hook

    hooks = [
        getattr(attention, name).register_forward_hook(keep(i, name))
        for i, attention in enumerate(attentions)
        for name in ("query", "key", "value")
    ]
    with torch.inference_mode():
        for at in range(0, len(windows), _BATCH):
            model(input_ids=windows[at : at + _BATCH])
    for hook in hooks:
        hook.remove()

    def whole(layer: int, name: str) -> Tensor:
        """``[1, heads, tokens, head_dim]``"""
        x = torch.cat(held[layer, name]).flatten(0, 1)
        return x.view(len(x), heads, -1).transpose(0, 1)[None].clone()

    return [(whole(i, "query"), whole(i, "key"), whole(i, "value")) for i in range(len(attentions))]


def of_language_model(model: training.Model, first: int, tokens: int) -> list[Sample]:
    """Each layer's rotated q and k, and v, for so many bytes of the same text, all of them in the model's context."""
    data = torch.frombuffer(bytearray(training.TEXT.read_bytes()), dtype=torch.uint8)
    held: list[Sample] = []

    def keep(attend: training.Attend) -> training.Attend:
        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            held.append((q, k, v))
            return attend(q, k, v)

        return attended

    layers = [part for part in model.modules() if isinstance(part, training.Attention)]
    before = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = keep(layer.attend)
    try:
        with torch.inference_mode():
            model(data[first : first + tokens].long()[None])
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend
    return [tuple(x.clone() for x in sample) for sample in held]  # type: ignore[misc]
