"""Models of diffusers with random weights on ``set_attention_backend("attnkit")``, against torch's and against float64."""

import copy
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch as dispatch  # noqa: E402 -- as above

from attnkit.integrations import diffusers as integration  # noqa: E402 -- as above

REGISTRY, NAMES = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
B, S, TEXT, H, D = 2, 70, 77, 4, 16
LIVE = torch.arange(TEXT) < torch.tensor([[TEXT], [20]])  # text tokens that are no padding

Inputs = dict[str, Any]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux() -> tuple[nn.Module, Inputs]:
    """Joint attention of text and image; then of both at once."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=D, num_attention_heads=H,
        joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": rand(B, S, 8), "encoder_hidden_states": rand(B, TEXT, 24), "pooled_projections": rand(B, 8),
        "timestep": torch.tensor([0.3, 0.7]), "img_ids": rand(S, 3), "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip


def wan() -> tuple[nn.Module, Inputs]:
    """Video: attention within it, and across to text."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=H, attention_head_dim=D, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
        ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": rand(B, 4, 3, 10, 8), "timestep": torch.tensor([30, 700]),
        "encoder_hidden_states": rand(B, TEXT, 24),
    }  # fmt: skip


def qwen() -> tuple[nn.Module, Inputs]:
    """Joint attention under a bool mask."""
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, attention_head_dim=D, num_attention_heads=H,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": rand(B, 64, 8), "encoder_hidden_states": rand(B, TEXT, 24),
        "encoder_hidden_states_mask": LIVE, "timestep": torch.tensor([0.3, 0.7]), "img_shapes": [[(1, 8, 8)]] * B,
    }  # fmt: skip


def ltx() -> tuple[nn.Module, Inputs]:
    """Attention across to text under a mask that is added."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=H, attention_head_dim=D, cross_attention_dim=H * D,
        num_layers=2, caption_channels=24,
    )  # fmt: skip
    return model, {
        "hidden_states": rand(B, 60, 8), "encoder_hidden_states": rand(B, TEXT, 24),
        "encoder_attention_mask": LIVE.long(), "timestep": torch.tensor([30, 700]), "num_frames": 3, "height": 4, "width": 5,
    }  # fmt: skip


def unet() -> tuple[nn.Module, Inputs]:
    model = diffusers.UNet2DConditionModel(
        sample_size=12, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, {
        "sample": rand(B, 4, 12, 12), "timestep": 10, "encoder_hidden_states": rand(B, TEXT, 24),
        "encoder_attention_mask": LIVE,
    }  # fmt: skip


def sd3() -> tuple[nn.Module, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=12, in_channels=4, num_layers=2, attention_head_dim=D, num_attention_heads=H,
        joint_attention_dim=24, caption_projection_dim=H * D, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    return model, {
        "hidden_states": rand(B, 4, 12, 12), "encoder_hidden_states": rand(B, TEXT, 24),
        "pooled_projections": rand(B, 8), "timestep": torch.tensor([30, 700]),
    }  # fmt: skip


def vae() -> tuple[nn.Module, Inputs]:
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, {"sample": rand(B, 3, 16, 16)}


# How often each calls attention, forward. The first ask for a backend, the others call torch's op whatever has been set.
DISPATCHED: dict[str, tuple[Callable[[], Any], int]] = {
    "flux": (flux, 2), "wan": (wan, 4), "qwen": (qwen, 2), "ltx": (ltx, 4)
}  # fmt: skip
DIRECT: dict[str, tuple[Callable[[], Any], int]] = {"unet": (unet, 8), "sd3": (sd3, 2), "vae": (vae, 2)}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Setting a model's backend makes it that of all models which have none of their own."""
    logger = logging.getLogger("diffusers")
    level, active = logger.level, REGISTRY._active_backend
    logger.setLevel(logging.ERROR)
    REGISTRY.set_active_backend(NAMES.NATIVE)
    yield
    logger.setLevel(level)
    REGISTRY.set_active_backend(active)


def made(make: Callable[[], tuple[nn.Module, Inputs]]) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    model, inputs = make()
    return model.eval(), inputs


def run(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What a model computes, and one vector of the gradients of its weights."""
    model.zero_grad()
    with torch.enable_grad():
        o = model(**inputs, return_dict=False)[0]
        (o * rand(*o.shape, seed=2).to(o.dtype)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return o.detach(), torch.cat(grads)


def wide(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    doubled = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    return run(copy.deepcopy(model).double(), doubled)


@pytest.mark.parametrize("name", DISPATCHED)
def test_results_and_gradients(name: str, judge: Callable[..., None]) -> None:
    make, calls = DISPATCHED[name]
    model, inputs = made(make)
    exact, torchs = wide(model, inputs), run(model, inputs)
    model.set_attention_backend("attnkit")
    before = ak.installed_report().kernel_runs
    model(**inputs)
    assert ak.installed_report().kernel_runs - before == calls
    for one in zip(run(model, inputs), torchs, exact, strict=True):
        judge(*one)


@pytest.mark.parametrize("name", DIRECT)
def test_models_that_call_torch_run_on_what_is_installed(name: str, judge: Callable[..., None]) -> None:
    make, calls = DIRECT[name]
    model, inputs = made(make)
    exact, torchs = wide(model, inputs), run(model, inputs)
    with ak.installed():
        ours, report = run(model, inputs), ak.installed_report()
    assert report.torch == {}
    assert report.attnkit == calls
    for one in zip(ours, torchs, exact, strict=True):
        judge(*one)


@pytest.mark.parametrize("name", ["qwen", "ltx"])
def test_padding_is_not_seen(name: str) -> None:
    model, inputs = made(DISPATCHED[name][0])
    other = {
        **inputs,
        "encoder_hidden_states": inputs["encoder_hidden_states"].where(LIVE[..., None], torch.tensor(9.0)),
    }
    with dispatch.attention_backend("attnkit"):
        whole, same = (model(**x, return_dict=False)[0] for x in (inputs, other))
        mask = "encoder_hidden_states_mask" if name == "qwen" else "encoder_attention_mask"
        unmasked = model(**{**other, mask: torch.ones_like(other[mask])}, return_dict=False)[0]
    torch.testing.assert_close(whole, same, rtol=0, atol=1e-6)
    assert (unmasked[1] - same[1]).abs().max() > 1e-3


# --- one call of diffusers' attention ---------------------------------------------------------------------


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float = D**-0.5, mask: Tensor | None = None) -> Tensor:
    """In float64, over ``[B, S, H, D]``; ``mask`` broadcasts to ``[B, H, Sq, Skv]``."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def qkv(kv_heads: int = H, queries: int = S, keys: int = TEXT) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, queries, H, D), (B, keys, kv_heads, D), (B, keys, kv_heads, D)
    q, k, v = (rand(*shape, seed=i) for i, shape in enumerate(shapes))
    return q, k, v


def attend(*args: Any, backend: str = "attnkit", **kwargs: Any) -> Tensor:
    found: Tensor = dispatch.dispatch_attention_fn(*args, backend=NAMES(backend), **kwargs)
    return found


BIAS = rand(B, H, S, TEXT, seed=4)
MASKS = {
    "none": None,
    "keys": LIVE,
    "keys, added": torch.where(LIVE, 0.0, -10000.0),
    "heads": BIAS > 0,
    "added": BIAS,
    "pairs": BIAS[0, 0] > 0,
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    given = MASKS[mask]
    meant = given[:, None, None] if given is not None and mask.startswith("keys") else given
    q, k, v = qkv()
    o = attend(q, k, v, attn_mask=given)
    torch.testing.assert_close(o.double(), eager(q, k, v, mask=meant), rtol=1e-5, atol=1e-5)
    assert o.is_contiguous()


def test_causal_scale_and_grouped_heads() -> None:
    q, k, v = qkv(kv_heads=2)
    seen = torch.arange(TEXT) <= torch.arange(S)[:, None]
    o = attend(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(o.double(), eager(q, k, v, 0.3, seen), rtol=1e-5, atol=1e-5)


def test_dropout() -> None:
    q, k, v = qkv()
    torch.manual_seed(3)
    o = attend(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    same = ak.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.4)
    assert torch.equal(o, same.transpose(1, 2))
    assert not torch.allclose(o, attend(q, k, v), atol=0.1)


def test_nothing_is_copied_on_the_way() -> None:
    met: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Any, *how: Any) -> Tensor:
        met.extend((q, k, v, mask))
        return ak.scaled_dot_product_attention(q, k, v, mask, *how)

    integration.register("spy", spy)
    given = (*qkv(), LIVE)
    o = attend(*given, backend="spy")
    assert [t.data_ptr() for t in met] == [t.data_ptr() for t in given]
    assert o.is_contiguous()
    assert torch.equal(o, attend(*given))


def test_compiled_as_one_graph() -> None:
    q, k, v = qkv()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, attn_mask=LIVE), attend(q, k, v, attn_mask=LIVE))


# --- sparge -----------------------------------------------------------------------------------------------


def test_sparge_in_a_model() -> None:
    """Of four tiles of keys two are attended to, and weights get gradients."""
    model, inputs = made(flux)
    inputs |= {"hidden_states": rand(B, 400, 8), "img_ids": rand(400, 3)}
    (exact, exact_grad), before = run(model, inputs), ak.installed_report().kernel_runs
    model.set_attention_backend("attnkit_sparge")
    o, grad = run(model, inputs)
    assert ak.installed_report().kernel_runs > before
    for ours, theirs in ((o, exact), (grad, exact_grad)):
        error = (ours - theirs).norm() / theirs.norm()
        assert 1e-4 < error < 0.5


def test_sparge_is_that_of_attnkit() -> None:
    q, k, v = qkv(queries=300, keys=300)
    o, density = ak.sparge_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3, return_density=True)
    assert density.max() < 1
    assert torch.equal(attend(q, k, v, scale=0.3, backend="attnkit_sparge"), o.transpose(1, 2))


def test_layers_with_thresholds_of_their_own() -> None:
    integration.register("all_tiles", partial(integration.sparge, topk=1.0, int8=False))
    model, inputs = made(wan)
    model.set_attention_backend("attnkit")
    dense = model(**inputs, return_dict=False)[0]
    model.blocks[0].attn1.set_attention_backend("attnkit_sparge")
    assert not torch.equal(model(**inputs, return_dict=False)[0], dense)
    model.blocks[0].attn1.set_attention_backend("all_tiles")
    assert torch.equal(model(**inputs, return_dict=False)[0], dense)


# --- what raises ------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "return_lse": {"attention_kwargs": {"return_lse": True}},
    "return_attn_probs": {"attention_kwargs": {"return_attn_probs": True}},
    "window_size": {"attention_kwargs": {"window_size": (8, 8)}},
    "softcap": {"attention_kwargs": {"softcap": 30.0}},
    "parallel_config": {"parallel_config": object()},
    "scaled_dot_product_attention": {"is_causal": True, "attn_mask": LIVE},
}
SPARGE: dict[str, dict[str, Any]] = {
    "attn_mask": {"attn_mask": LIVE}, "dropout_p": {"dropout_p": 0.1}, "is_causal": {"is_causal": True}
}  # fmt: skip


@pytest.mark.parametrize("where", [*REFUSED, *SPARGE])
def test_what_is_not_built(where: str) -> None:
    backend = "attnkit_sparge" if where in SPARGE else "attnkit"
    with pytest.raises(ak.AttnkitNotImplementedError, match="AK504") as caught:
        attend(*qkv(), backend=backend, **(REFUSED | SPARGE)[where])
    assert caught.value.where == where


def test_float64_is_not_handed_to_torch() -> None:
    with pytest.raises(ak.AttnkitNotImplementedError, match="AK504"):
        attend(*(x.double() for x in qkv()))


def test_no_argument_of_another_backend_is_ignored() -> None:
    """diffusers leaves out what a backend has no name for: of what others take, only what changes no result."""
    ours = REGISTRY._supported_arg_names[NAMES("attnkit")]
    others = set().union(*REGISTRY._supported_arg_names.values())
    assert others - ours == {"deterministic"}
    attend(*qkv(), attention_kwargs={"return_lse": False, "window_size": (-1, -1), "softcap": 0.0})


def test_context_parallelism_is_refused_by_diffusers() -> None:
    assert not REGISTRY._is_context_parallel_available(NAMES("attnkit"))


def fresh() -> ModuleType:
    source = importlib.util.spec_from_file_location("fresh", integration.__file__)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def test_registered_twice() -> None:
    ours, names = NAMES("attnkit"), list(NAMES)
    fresh()
    assert list(NAMES) == names
    assert NAMES("attnkit") is ours is NAMES.ATTNKIT is NAMES["ATTNKIT"] is copy.deepcopy(ours)
    assert REGISTRY.list_backends().count("attnkit") == 1
    assert isinstance(ours, NAMES)
    assert ours == "attnkit"


@pytest.mark.parametrize("state", ["missing", "too old", "another registry", "another enumeration"])
def test_diffusers_missing_or_another(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = ModuleType(dispatch.__name__)
    if state != "too old":
        other._AttentionBackendRegistry = REGISTRY
        other.AttentionBackendName = NAMES
    if state == "another registry":
        other._AttentionBackendRegistry = object()
    if state == "another enumeration":
        other.AttentionBackendName = str
    monkeypatch.setitem(sys.modules, dispatch.__name__, None if state == "missing" else other)
    with pytest.raises(ak.AttnkitNotImplementedError) as caught:
        fresh()
    assert caught.value.code == "AK501"
    assert "diffusers" in caught.value.where
    assert caught.value.given
    assert "pip install" in caught.value.hint


def test_the_arguments_are_those_of_diffusers() -> None:
    ours = inspect.signature(REGISTRY._backends[NAMES("attnkit")]).parameters
    native = inspect.signature(REGISTRY._backends[NAMES.NATIVE]).parameters
    assert set(native) <= set(ours)
    assert {n: p.default for n, p in native.items()} == {n: ours[n].default for n in native}
