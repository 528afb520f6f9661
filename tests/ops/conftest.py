"""Shared by the tests of the torch face: random tensors, the float64 oracle in torch, the state torch keeps."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

import attnkit as ak

Randn = Callable[..., Tensor]
Oracle = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def randn(rng: np.random.Generator) -> Randn:
    """``randn(*shape)``: float32, the same for a test whichever others run."""

    def make(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    return make


@pytest.fixture
def qkv(randn: Randn) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``qkv(batch, heads, length, head_dim, kv_heads=, kv_len=, v_head_dim=)``."""

    def make(
        batch: int = 2,
        heads: int = 4,
        length: int = 19,
        head_dim: int = 8,
        *,
        kv_heads: int | None = None,
        kv_len: int | None = None,
        v_head_dim: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads, kv_len = kv_heads or heads, length if kv_len is None else kv_len
        return (
            randn(batch, heads, length, head_dim),
            randn(batch, kv_heads, kv_len, head_dim),
            randn(batch, kv_heads, kv_len, v_head_dim or head_dim),
        )

    return make


@pytest.fixture
def oracle() -> Oracle:
    """The equation in float64. Score and mask functions run on whole index tensors, as Python meant them."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        score: Callable[..., Any] | None = None,
        mask: Callable[..., Any] | None = None,
        scale: float | None = None,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        index = [torch.arange(n).view([-1 if i == at else 1 for i in range(4)]) for at, n in enumerate(sizes)]
        z = (q.shape[3] ** -0.5 if scale is None else scale) * (q @ k.mT)
        if score is not None:
            z = score(z, *index).expand(sizes)
        if mask is not None:
            z = z.masked_fill(~torch.as_tensor(mask(*index)).expand(sizes), -torch.inf)
        if sink is not None:  # one more column, without a value
            z = torch.cat([z, sink.double().view(1, -1, 1, 1).expand(*sizes[:3], 1)], dim=-1)
        lse = z.logsumexp(-1)
        weights = (z - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        return weights[..., : sizes[3]] @ v, lse

    return attend


@pytest.fixture
def three_ways() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``three_ways(q, k, v, mask, ...)``: torch's attention by our function, which is the override's, by torch, and in float64."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = mask.double() if mask is not None and mask.is_floating_point() else mask
        expected = sdpa(q.double(), k.double(), v.double(), wide, **keywords)
        torchs = sdpa(q, k, v, mask, **keywords)
        with ak.installed():
            installed = sdpa(q, k, v, mask, **keywords)
            report = ak.installed_report()
        assert (report.attnkit, report.kernel_runs, report.torch) == (1, 1, {})
        ours = ak.scaled_dot_product_attention(q, k, v, mask, **keywords)
        assert torch.equal(ours, installed)
        return ours, torchs, expected

    return run


@pytest.fixture
def dispatched() -> Callable[[], AbstractContextManager[list[str]]]:
    """``with dispatched() as seen``: the names of the ops that a dispatch mode sees inside."""
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    @contextmanager
    def watch() -> Iterator[list[str]]:
        seen.clear()
        with Mode():
            yield seen

    return watch


@pytest.fixture
def same_as_flex(
    qkv: Callable[..., tuple[Tensor, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """``compare(score_mod, mask_mod, (B, Hq, Hkv, L, S))``: ours, eager and compiled, against torch's own in float64."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # the equation, materialised

    def compare(score: Any, mask: Any, sizes: tuple[int, int, int, int, int]) -> None:
        batch, heads, kv_heads, length, kv_len = sizes
        q, k, v = qkv(batch, heads, length, kv_heads=kv_heads, kv_len=kv_len, v_head_dim=5)
        blocks = None
        if mask is not None:
            blocks = flex.create_block_mask(mask, batch, heads, length, kv_len, device="cpu", BLOCK_SIZE=8)
        keywords = {"score_mod": score, "block_mask": blocks, "enable_gqa": heads != kv_heads}

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return ak.flex_attention(q, k, v, **keywords, return_aux=flex.AuxRequest(lse=True))

        with torch.no_grad():
            expected = flex.flex_attention(
                q.double(), k.double(), v.double(), **keywords, return_aux=flex.AuxRequest(lse=True)
            )
            o, aux = ours(q, k, v)
            torch.testing.assert_close(o.double(), expected[0], rtol=1e-5, atol=3e-6)
            torch.testing.assert_close(aux.lse.double(), expected[1].lse, rtol=1e-5, atol=3e-6)
            compiled, its_aux = torch.compile(ours, fullgraph=True, backend="eager")(q, k, v)
        assert torch.equal(compiled, o)
        assert torch.equal(its_aux.lse, aux.lse)

    return compare


@pytest.fixture(autouse=True)
def _leaves_torch_as_it_was() -> Iterator[None]:
    """Nothing stays installed or compiled from one test to the next."""
    yield
    assert not ak.installed_report().active, "a test left attnkit installed"
    torch.compiler.reset()
