"""`attn_implementation="attnkit"`: architectures of transformers with random weights, against eager in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnkit as ak

transformers = pytest.importorskip("transformers")
import attnkit.integrations.transformers  # noqa: E402 -- registers "attnkit"
from attnkit.bench.architectures import TINY, architectures  # noqa: E402 -- as above

pytestmark = pytest.mark.shows

ARCHITECTURES = architectures(TINY)
DECODERS = [name for name, arch in ARCHITECTURES.items() if arch.kind == "decoder"]
ENCODERS = [name for name, arch in ARCHITECTURES.items() if arch.kind == "encoder"]
LAYERS, WINDOW = TINY.layers, TINY.window
MIXTURES = ("gpt_oss", "mixtral", "deepseek_v3")

Make = Callable[..., Any]


class Spy(TorchDispatchMode):
    """Which torch operators make something of one element per query and key."""

    def __init__(self, q_len: int, kv_len: int) -> None:
        super().__init__()
        self.pairs = (q_len, kv_len)
        self.dense: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and tuple(t.shape[-2:]) == self.pairs:
                self.dense.append(str(func))
        return out


@contextmanager
def kernels(calls: int) -> Iterator[None]:
    """Inside, attnkit's kernel runs ``calls`` times, and torch's attention never in its place."""
    before = ak.installed_report()
    yield
    after = ak.installed_report()
    assert after.kernel_runs - before.kernel_runs == calls
    assert after.torch == before.torch


@pytest.fixture
def compare(make: Make, judge: Callable[..., None], exact: Callable[..., Any]) -> Callable[..., Tensor]:
    """``compare(name, inputs, live)``: logits of the three implementations; ``live`` picks what is no padding."""

    def run(name: str, inputs: dict[str, Tensor], live: Tensor | None = None) -> Tensor:
        field = "logits_per_image" if name == "clip" else "logits"
        torchs = make(name, "sdpa" if ARCHITECTURES[name].sdpa else "eager")(**inputs)[field]
        with kernels(ARCHITECTURES[name].calls):
            ours: Tensor = make(name)(**inputs)[field]
        judge(*(x if live is None else x[live] for x in (ours, torchs, exact(name, **inputs)[field])))
        return ours

    return run


def test_at_least_twelve_architectures() -> None:
    assert len(ARCHITECTURES) >= 12


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_language_models(name: str, compare: Any, tokens: Any) -> None:
    inputs = tokens(37, 37)
    whole = compare(name, inputs)
    assert torch.equal(compare(name, {"input_ids": inputs["input_ids"]}), whole)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_padded_batches(name: str, left: bool, compare: Any, tokens: Any) -> None:
    inputs = tokens(37, 7, 1, 20, left=left)
    compare(name, inputs, live=inputs["attention_mask"].bool())


def test_vision_and_two_towers(compare: Any, tokens: Any) -> None:
    pixels = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    compare("vit", {"pixel_values": pixels})
    compare("clip", {"pixel_values": pixels, **tokens(17, 5, 9)})


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder(name: str, compare: Any, tokens: Any) -> None:
    compare(name, {**tokens(17, 5, 9), "decoder_input_ids": tokens(11, 11, 11)["input_ids"]})


@pytest.mark.parametrize("left", [None, False, True], ids=["whole", "right", "left"])
@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_no_mask_is_materialised(name: str, left: bool | None, make: Make, tokens: Any) -> None:
    inputs = tokens(37, 37) if left is None else tokens(37, 20, left=left)
    with Spy(37, 37) as spy:
        make(name)(**inputs)
    assert spy.dense == []


def test_the_spy_sees_a_mask(make: Make, tokens: Any) -> None:
    for implementation in ("eager", "sdpa"):
        with Spy(37, 37) as spy:
            make("llama", implementation)(**tokens(37, 20))
        assert spy.dense != []


@pytest.mark.parametrize("name", DECODERS)
def test_no_earlier_logit_depends_on_a_later_token(name: str, make: Make, tokens: Any) -> None:
    inputs = tokens(23, 9, left=True)
    for changed in (inputs, {"input_ids": inputs["input_ids"]}):
        before = make(name)(**changed).logits
        ids = changed["input_ids"].clone()
        ids[:, 15] += 1
        after = make(name)(**{**changed, "input_ids": ids}).logits
        if name in MIXTURES:  # experts multiply as many tokens at once as come to them
            torch.testing.assert_close(before[:, :15], after[:, :15], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(before[:, :15], after[:, :15])
        assert not torch.equal(before[:, 15], after[:, 15])
        assert not torch.equal(before[:, 16], after[:, 16])


SETTINGS: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True},
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_token_for_token(name: str, cache: str, make: Make, tokens: Any) -> None:
    """Prompts longer and shorter than the window, which generation leaves far behind."""
    inputs = tokens(17, 4, 9, left=True)
    eager = make(name, "eager").generate(**inputs, **SETTINGS, **CACHES[cache])
    with kernels(LAYERS * (eager.shape[1] - 17)):
        ours = make(name).generate(**inputs, **SETTINGS, **CACHES[cache])
    assert torch.equal(ours, eager)
    assert ours.shape[1] > 17 + 2 * WINDOW
    assert len(ours[:, 17:].unique()) > 10  # not one token for ever


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_across_attention(name: str, make: Make, tokens: Any) -> None:
    inputs = tokens(17, 5, 9)
    for more in (*CACHES.values(), {"num_beams": 3}):
        settings = {**SETTINGS, "min_new_tokens": 20, **more}
        assert torch.equal(
            make(name).generate(**inputs, **settings), make(name, "eager").generate(**inputs, **settings)
        )


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen2", "llama4"])
def test_prompts_in_pieces(name: str, static: bool, make: Make, tokens: Any, judge: Any, exact: Any) -> None:
    """Several queries after what a cache holds, shorter and longer pieces than the window."""
    inputs = tokens(31, 25, left=True)
    ids, mask = inputs.values()

    def logits(model: Any) -> Tensor:
        config = model.config
        cache = (
            transformers.StaticCache(config=config, max_cache_len=40)
            if static
            else transformers.DynamicCache(config=config)
        )
        pieces, at = [], 0
        for size in (9, 3, 1, 10, 1, 1, 6):
            end = at + size
            out = model(input_ids=ids[:, at:end], attention_mask=mask[:, :end], past_key_values=cache)
            pieces.append(out.logits)
            at = end
        return torch.cat(pieces, dim=1)[mask.bool()]

    with kernels(7 * LAYERS):
        ours = logits(make(name))
    judge(ours, logits(make(name, "eager")), exact(name, **inputs).logits[mask.bool()])


def test_packed_sequences(make: Make, tokens: Any, judge: Any, exact: Any) -> None:
    """position_ids that restart keep sequences apart, with no mask."""
    ids = tokens(30)["input_ids"]
    lengths = (13, 8, 9)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for name in ("llama", "mistral"):
        packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with Spy(30, 30) as spy:
            ours = make(name)(**packed).logits
        assert spy.dense == []
        judge(ours, make(name, "eager")(**packed).logits, exact(name, **packed).logits)
        alone = [make(name)(input_ids=part).logits for part in ids.split(lengths, dim=1)]
        torch.testing.assert_close(ours, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_masks_of_the_caller(make: Make, tokens: Any, judge: Any, exact: Any) -> None:
    """Four-dimensional masks go through as they are: bool as sdpa takes them, float as eager does."""
    ids = tokens(19, 19)["input_ids"]
    visible = torch.rand(2, 1, 19, 19, generator=torch.Generator().manual_seed(3)) < 0.5
    visible |= torch.eye(19, dtype=torch.bool)
    additive = torch.zeros(2, 1, 19, 19).masked_fill(~visible, torch.finfo(torch.float32).min)
    inputs = {"input_ids": ids, "attention_mask": additive}
    torchs, truth = make("llama", "eager")(**inputs).logits, exact("llama", **inputs).logits
    for mask in (visible, additive):
        with kernels(LAYERS):
            ours = make("llama")(input_ids=ids, attention_mask=mask).logits
        judge(ours, torchs, truth)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "clip", "t5"])
def test_attention_weights_are_refused(name: str, make: Make, tokens: Any) -> None:
    inputs = tokens(7, 5)
    if name == "clip":
        inputs["pixel_values"] = torch.zeros(2, 3, 40, 40)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with pytest.raises(ak.AttnkitNotImplementedError, match="AK504") as caught:
        make(name)(**inputs, output_attentions=True)
    assert caught.value.where == "output_attentions"
    make(name)(**inputs)  # nothing stays behind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3", "gpt2", "bert", "t5", "vit"]
)
def test_16_bit_models(name: str, dtype: torch.dtype, make: Make, tokens: Any, exact: Any) -> None:
    """Against the same rounded weights in float64, the error is at most twice that of eager in the same dtype."""
    inputs, live = tokens(33, 20), tokens(33, 20)["attention_mask"].bool()
    if name == "vit":
        pixels = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))
        inputs, live = {"pixel_values": pixels.to(dtype)}, torch.ones(3, dtype=torch.bool)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]

    def logits(implementation: str) -> Tensor:
        out: Tensor = copy.deepcopy(make(name, implementation)).to(dtype)(**inputs).logits
        assert out.dtype == dtype
        return out[live].double()

    with kernels(ARCHITECTURES[name].calls):
        ours = logits("attnkit")
    want = exact(name, stored=dtype, **inputs).logits[live]
    assert (ours - want).norm() <= 2 * (logits("eager") - want).norm()
    assert 0 < (ours - want).norm() <= 0.2 * want.norm()


def test_other_dtypes_are_refused(make: Make, tokens: Any) -> None:
    with pytest.raises(ak.AttnkitNotImplementedError, match="AK502"):
        copy.deepcopy(make("llama")).double()(**tokens(7, 5))


def test_models_with_attention_of_their_own_do_not_get_a_wrong_mask() -> None:
    config = transformers.BloomConfig(vocab_size=211, hidden_size=64, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="attnkit").eval()
    with pytest.raises(ak.AttnkitTypeError, match="AK416"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long))


def compiled(model: Any) -> tuple[Any, Any]:
    """The model compiled without a break, and the counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


def test_compiled_prefill(make: Make, tokens: Any) -> None:
    model, counter = compiled(make("llama"))
    for inputs in (tokens(17, 9), tokens(23, 4, left=True)):
        live = inputs["attention_mask"].bool()
        with kernels(2 * LAYERS):
            ours, ordinary = model(**inputs).logits, make("llama")(**inputs).logits
        torch.testing.assert_close(ours[live], ordinary[live], rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("outside", [False, True], ids=["mask-inside", "mask-outside"])
def test_compiled_decoding(outside: bool, make: Make, tokens: Any) -> None:
    """A static cache past its window; masks made in the graph, or before it as `generate` does."""
    config = make("gemma2").config
    model, counter = compiled(make("gemma2"))
    ids, mask = tokens(26, 20, left=True).values()
    caches = [transformers.StaticCache(config=config, max_cache_len=28) for _ in range(2)]
    for cache in caches:
        make("gemma2")(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    for at in range(5, 26):
        one, seen = ids[:, at : at + 1], mask[:, : at + 1]
        known: Any = torch.nn.functional.pad(seen, (0, 28 - seen.shape[1]))
        if outside:
            embeds = torch.empty(2, 1, 0)
            known = transformers.masking_utils.create_masks_for_generate(config, embeds, seen, caches[0])
        ours = model(input_ids=one, attention_mask=known, past_key_values=caches[0]).logits
        ordinary = make("gemma2")(input_ids=one, attention_mask=seen, past_key_values=caches[1]).logits
        torch.testing.assert_close(ours, ordinary, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3
    torch._dynamo.reset()
