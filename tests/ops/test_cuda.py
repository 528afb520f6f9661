"""How tensors on a GPU reach the Triton backend, with tensors that are nowhere: shapes, dispatch, gradients, refusals."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkit as ak
from attnkit.backends.triton import launch
from attnkit.backends.triton.backend import TritonBackend
from attnkit.errors import AttnkitError
from attnkit.runtime.prepare import clear, prepare


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend believes that there is a Hopper GPU."""
    monkeypatch.setattr(TritonBackend, "available", lambda self: None)
    monkeypatch.setattr(launch, "architecture", lambda: 90)
    clear()
    yield
    clear()


def tensors(dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    return [torch.empty(2, h, n, 32, device="cuda", dtype=dtype) for h, n in ((4, 64), (2, 80), (2, 80))]


def test_shapes_and_devices(a_gpu: None) -> None:
    with FakeTensorMode():
        o, lse = ak.attention(*tensors(), mask=ak.causal(), return_lse=True)
    assert (o.shape, o.dtype, o.device.type) == ((2, 4, 64, 32), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == ((2, 4, 64), torch.float32, "cuda")


def test_gradients_have_the_dtype_and_device_of_their_tensors(a_gpu: None) -> None:
    """The op alone: autograd itself asks a torch without CUDA for its device, and ends the process."""
    from attnkit.ops.functional import plain_text

    with FakeTensorMode():
        q, k, v = tensors()
        o, lse = torch.empty_like(q), torch.empty(2, 4, 64, device="cuda")
        args = (o, None, q, k, v, o, lse, plain_text(), [], [], None, [])
        found = torch.ops.attnkit.attend_backward(*args)[:3]
    assert [(g.shape, g.device.type, g.dtype) for g in found] == [
        (t.shape, "cuda", t.dtype) for t in (q, k, v)
    ]


def test_autocast_is_that_of_the_device(a_gpu: None) -> None:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        assert ak.attention(*tensors(torch.float32)).dtype == torch.float32


def test_the_drop_in_takes_them(a_gpu: None) -> None:
    with FakeTensorMode(), ak.installed():
        o = torch.nn.functional.scaled_dot_product_attention(*tensors()[:1] * 3, is_causal=True)
        assert o.shape == (2, 4, 64, 32)
        assert ak.installed_report().attnkit == 1


def test_torchs_word_for_float32_products_decides(a_gpu: None) -> None:
    from attnkit.ops.functional import plain_text

    kernels = {
        word: prepare(plain_text(), "float32", 64, 64, "cuda", precision=word).kernel.precision
        for word in ("highest", "high", "medium")
    }
    assert kernels == {"highest": "ieee", "high": "tf32", "medium": "tf32"}


def test_without_a_gpu_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "available", lambda self: "there is no NVIDIA GPU here")
    clear()
    from attnkit.ops.functional import plain_text

    with pytest.raises(AttnkitError) as raised:
        prepare(plain_text(), "float32", 64, 64, "cuda")
    assert raised.value.code == "AK502"
    assert "triton: not available: there is no NVIDIA GPU here" in raised.value.given


@pytest.mark.parametrize(
    ("codec", "page_size"),
    [
        *product(["bf16", "int8", "fp8", ("int8", "fp8"), ("fp8", "bf16")], [None, 16]),
        *product(["int4", ("int8", "int2")], [None, 32]),  # whole groups
    ],
)
def test_a_cache(a_gpu: None, codec: Any, page_size: int | None) -> None:
    with FakeTensorMode():
        q, k, v = tensors()
        cache = ak.KVCache(2, 2, 32, max_len=96, codec=codec, page_size=page_size, device="cuda")
        assert all(t.device.type == "cuda" for t in (*cache._storage, cache.lengths))
        cache.append(k, v)
        one = torch.empty(2, 2, 1, 32, device="cuda")
        cache.append(one, one, lens=torch.empty(2, dtype=torch.int32, device="cuda"))
        o, lse = ak.attention(q, cache, mask=ak.causal(), return_lse=True)
        with torch.autocast("cpu", torch.float16):  # which is another device's
            assert ak.attention(q, cache).dtype == torch.bfloat16
    assert (o.shape, o.dtype, o.device.type) == ((2, 4, 64, 32), torch.bfloat16, "cuda")
    assert (lse.shape, lse.device.type) == ((2, 4, 64), "cuda")


def test_a_cache_over_pages_of_others(a_gpu: None) -> None:
    with FakeTensorMode():
        q = tensors()[0]
        pages = torch.empty(9, 16, 2, 32, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        table, lengths = (torch.empty(*n, device="cuda", dtype=torch.int32) for n in ((2, 4), (2,)))
        cache = ak.KVCache.from_pages(pages, pages, table, lengths)
        assert ak.attention(q, cache).device.type == "cuda"


def test_caches_that_are_refused(a_gpu: None) -> None:
    def code(make: Any) -> str:
        with FakeTensorMode(), pytest.raises(AttnkitError) as raised:
            make()
        return raised.value.code

    assert code(lambda: ak.KVCache(2, 2, 32, max_len=96, device="meta")) == "AK504"
    made = ak.KVCache(2, 2, 32, max_len=96, codec="int8")
    assert code(lambda: ak.attention(tensors()[0], made)) == "AK405"


def test_a_cache_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "available", lambda self: "there is no NVIDIA GPU here")
    with pytest.raises(AttnkitError) as raised:
        ak.KVCache(2, 2, 32, max_len=96, device="cuda")
    assert raised.value.code == "AK501"
    assert "no NVIDIA GPU" in raised.value.given
