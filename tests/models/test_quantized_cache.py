"""Models that generate on caches of codes: `attnkit.integrations.transformers_cache`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.errors import AttnkitError

transformers = pytest.importorskip("transformers")
from attnkit.integrations.transformers_cache import QuantizedCache  # noqa: E402

CODECS: list[Any] = [None, "f32", "int8", "int4", "int2", "fp8", ("int8", "int4")]


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=211, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    config._attn_implementation = "attnkit"
    return transformers.LlamaForCausalLM(config).eval()


def prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, ids: Tensor, cache: Any, count: int = 12, **other: Any) -> Tensor:
    found: Tensor = model.generate(
        ids, attention_mask=other.pop("attention_mask", torch.ones_like(ids)), past_key_values=cache,
        max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **other,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_generate(llama: Any, codec: Any) -> None:
    """Exact elements give the tokens of transformers' own cache; codes give tokens."""
    ids = prompt(300)
    cache = QuantizedCache(llama.config, codec, max_len=512)
    got = generate(llama, ids, cache)
    assert got.shape == (1, 312)
    assert cache.get_seq_length() == 311
    if codec in (None, "f32"):
        assert torch.equal(got, generate(llama, ids, None))


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.02), ("fp8", 0.1), ("int4", 0.1), ("int2", 0.5)])
def test_logits_are_near(llama: Any, codec: str, most: float) -> None:
    ids = prompt(700)
    want = llama(ids).logits[:, -100:]
    cache = QuantizedCache(llama.config, codec)
    llama(ids[:, :600], past_key_values=cache)
    got = llama(ids[:, 600:], past_key_values=cache).logits
    assert (got - want).norm() <= most * want.norm()


def test_a_long_context(llama: Any) -> None:
    ids = prompt(8000)
    sizes = {}
    for codec in ("bf16", "int8", "int4", "int2"):
        cache = QuantizedCache(llama.config, codec)
        generate(llama.to(torch.bfloat16), ids, cache, count=4)
        sizes[codec] = cache.nbytes
    llama.float()
    assert sizes["bf16"] > 1.8 * sizes["int8"]
    assert sizes["int8"] > 1.4 * sizes["int4"] > 1.4 * sizes["int2"]


def test_beams_padding_and_several_rows(llama: Any) -> None:
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for more in ({}, {"num_beams": 3}):
        cache = QuantizedCache(llama.config, "f32", max_len=128)
        got = generate(llama, ids, cache, attention_mask=mask, **more)
        assert torch.equal(got, generate(llama, ids, None, attention_mask=mask, **more))


def test_going_back(llama: Any) -> None:
    ids = prompt(60)
    cache = QuantizedCache(llama.config, "int4", max_len=256, residual=32)
    llama(ids, past_key_values=cache)
    want = llama(ids[:, :5], past_key_values=cache).logits
    cache.crop(-5)
    assert cache.get_seq_length() == 60
    assert torch.equal(llama(ids[:, :5], past_key_values=cache).logits, want)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_refused(llama: Any) -> None:
    cache = QuantizedCache(llama.config, "int8", max_len=32)
    with pytest.raises(AttnkitError, match="AK602"):
        llama(prompt(40), past_key_values=cache)
    llama(prompt(8), past_key_values=(cache := QuantizedCache(llama.config, "int8", max_len=32)))
    for call in (
        lambda: cache.crop(3),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(AttnkitError, match="AK504"):
            call()
