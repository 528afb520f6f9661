"""Quantised KV caches: the codecs by hand, what they promise, the cache step by step, and attention over them."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit.variants import dense, kv_quant
from attnkit.variants.kv_quant import INT8, KIVI2, KIVI4, Codec, decode, quantise

pytestmark = pytest.mark.shows

ASYMMETRIC = [
    Codec(f"int{bits}", axis, group)
    for bits in (2, 4)
    for axis in ("token", "channel")
    for group in (3, 8, 0)
]
SYMMETRIC = [INT8, Codec("int8", "tile", 4), Codec("int8", "head"), Codec("int8", "channel", 4)]


def tokens(rng: np.random.Generator, tokens: int = 11, channels: int = 11) -> Any:
    """Channels of very different size and offset, as keys have them; groups of 3 and 8 leave no group of one."""
    x = rng.standard_normal((2, 2, tokens, channels))
    return x * np.exp(2 * rng.standard_normal(channels)) + 5 * rng.standard_normal(channels)


def per_element(encoded: Any, codec: Codec) -> tuple[Any, Any]:
    """Scale and zero of every element."""
    ones = encoded._replace(codes=np.ones_like(encoded.codes), zero=None)
    zero = encoded._replace(codes=np.zeros_like(encoded.codes))
    return decode(ones, codec), decode(zero, codec)


# --- numbers ----------------------------------------------------------------------------------------------


def test_a_group_by_hand() -> None:
    """[0, 1, 2.2, 3] in two bits: zero 0, scale 1, codes 0 1 2 3, the byte 0xE4."""
    x = np.array([0, 1, 2.2, 3]).reshape(1, 1, 4, 1)
    encoded = quantise(x, Codec("int2", "channel", 4))
    assert encoded.codes.ravel().tolist() == [0, 1, 2, 3]
    assert (encoded.scale.item(), encoded.zero.item()) == (1, 0)  # type: ignore[union-attr]
    assert kv_quant.pack(encoded.codes, 2, axis=2).ravel().tolist() == [0xE4]


def test_bfloat16_is_torchs(rng: np.random.Generator) -> None:
    x = (rng.standard_normal(4000) * np.exp2(rng.integers(-130, 120, 4000))).astype(np.float32)
    x = np.concatenate([x, [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf]]).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16().double().numpy()
    np.testing.assert_array_equal(kv_quant.to_bfloat16(x), expected)
    finite = x[np.isfinite(x)].astype(np.float64)
    down = np.array([kv_quant.rounded_down_to_bfloat16(one) for one in finite])
    np.testing.assert_array_equal(down, kv_quant.to_bfloat16(down))
    assert (down <= finite).all()
    nearest = kv_quant.to_bfloat16(finite)
    np.testing.assert_array_equal(down[nearest <= finite], nearest[nearest <= finite])


def test_e4m3_is_torchs(rng: np.random.Generator) -> None:
    """Every byte means what torch means by it; rounding agrees, ties too; torch does not saturate, we do."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    means = bytes_.view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(kv_quant._E4M3, means)
    values = np.sort(means[:127])
    x = np.concatenate(
        [rng.standard_normal(2000) * 100, rng.standard_normal(2000) / 100, (values[1:] + values[:-1]) / 2]
    )
    x = np.concatenate([x, -x, [0.0, -0.0, np.nan]])
    x = np.where(abs(x) > 448, 0, x).astype(np.float32)
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(kv_quant.e4m3_bytes(x), expected)
    far = kv_quant.e4m3_bytes(np.array([449.0, 1e30, np.inf, -464.0, -np.inf]))
    np.testing.assert_array_equal(kv_quant._E4M3[far], [448, 448, 448, -448, -448])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [2, 3])
def test_packing_is_little_endian(rng: np.random.Generator, bits: int, axis: int) -> None:
    """Element e is at bits ``bits * (e % (32 / bits))`` of 32-bit words; unpacking gives the codes back."""
    codes = rng.integers(0, 2**bits, (1, 2, 32, 16)).astype(np.uint8)
    packed = kv_quant.pack(codes, bits, axis)
    np.testing.assert_array_equal(kv_quant.unpack(packed, bits, axis, codes.shape[axis]), codes)
    line = np.moveaxis(packed, axis, -1)[0, 1, 3].tobytes()
    words = np.frombuffer(line, "<u4")
    fields = [int(words[e * bits // 32]) >> e * bits % 32 & 2**bits - 1 for e in range(codes.shape[axis])]
    assert fields == np.moveaxis(codes, axis, -1)[0, 1, 3].tolist()
    odd = codes[:, :, :5, :7]
    np.testing.assert_array_equal(
        kv_quant.unpack(kv_quant.pack(odd, bits, axis), bits, axis, odd.shape[axis]), odd
    )


def test_bits_per_element() -> None:
    """What api.md says a cache holds, at D = 128 and groups of 32."""
    assert INT8.bits_per_element(1000, 128) == 8.125
    assert [codec.bits_per_element(32, 128) for codec in (*KIVI4, *KIVI2)] == [5, 5, 3, 3]


# --- what a codec promises --------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*ASYMMETRIC, *SYMMETRIC], ids=str)
def test_within_half_a_scale(rng: np.random.Generator, codec: Codec) -> None:
    """Also where the offset is large: zeros are rounded down, so nothing is out of reach."""
    for offset in (0.0, 100.0, -1000.0):
        x = tokens(rng) + offset
        encoded = quantise(x, codec)
        scale, zero = per_element(encoded, codec)
        assert (abs(x - decode(encoded, codec)) <= scale / 2 * (1 + 1e-12)).all()
        assert (scale > 0).all()
        np.testing.assert_array_equal(kv_quant.to_bfloat16(scale), scale)
        np.testing.assert_array_equal(kv_quant.to_bfloat16(zero), zero)
        assert encoded.codes.max() <= (2**codec.bits - 1 if codec.has_zero else 127)


@pytest.mark.parametrize("codec", [*ASYMMETRIC, *SYMMETRIC], ids=str)
def test_constant_groups(codec: Codec) -> None:
    """Code 0 and scale 0, no 0 / 0; the constant comes back, to bfloat16. int8 has no zero point: zeros alone."""
    constants = [0.0, 1.5, -3.0, 0.1] if codec.has_zero else [0.0]
    for constant in constants:
        encoded = quantise(np.full((1, 1, 5, 6), constant), codec)
        assert not encoded.codes.any()
        assert not encoded.scale.any()
        np.testing.assert_allclose(decode(encoded, codec), constant, rtol=2**-7)
    if codec.has_zero:
        np.testing.assert_array_equal(decode(quantise(np.full((1, 1, 5, 6), 1.5), codec), codec), 1.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", [*KIVI4, INT8], ids=str)
def test_what_is_not_finite_destroys_its_block_alone(
    rng: np.random.Generator, codec: Codec, bad: float
) -> None:
    x = rng.standard_normal((1, 2, 70, 40))
    clean = decode(quantise(x, codec), codec)
    x[0, 1, 33, 35] = bad
    got = decode(quantise(x, codec), codec)
    rows, columns = codec.block(70, 40)
    i, j = 33 // rows * rows, 35 // columns * columns
    hit = np.zeros(x.shape, bool)
    hit[0, 1, i : i + rows, j : j + columns] = True
    assert np.isnan(got[hit]).all()
    np.testing.assert_array_equal(got[~hit], clean[~hit])


def test_fp8_saturates_and_takes_its_scale_as_given(rng: np.random.Generator) -> None:
    x = tokens(rng) * 100
    codec = Codec("fp8", "head")
    plain = decode(quantise(x, codec), codec)
    assert abs(plain).max() == 448 < abs(x).max()
    scale = abs(x).max(axis=(0, 2, 3)) / 448  # per head
    calibrated = decode(quantise(x, codec, scale), codec)
    large = abs(x) > scale[:, None, None] * 2.0**-6  # normal numbers: 3 bits and the hidden one
    assert (abs(calibrated - x)[large] <= 2.0**-4 * abs(x)[large]).all()


# --- the cache, step by step ------------------------------------------------------------------------------


@pytest.mark.parametrize("codecs", [KIVI4, KIVI2], ids=["int4", "int2"])
def test_one_by_one_is_bulk(rng: np.random.Generator, codecs: tuple[Codec, Codec]) -> None:
    """Appending tokens singly, in uneven chunks, or all at once gives the same codes, and the split that is promised."""
    residual, group = 40, 32
    k, v = rng.standard_normal((2, 1, 2, 170, 40))
    bulk = kv_quant.Cache(codecs, residual, group)
    bulk.append(k, v)
    quantised = kv_quant.quantised_length(170, residual, group)
    assert quantised == 128
    for chunks in ([1] * 170, [7, 100, 3, 60]):
        cache = kv_quant.Cache(codecs, residual, group)
        for start, size in zip(np.cumsum([0, *chunks[:-1]]), chunks, strict=True):
            cache.append(k[:, :, start : start + size], v[:, :, start : start + size])
            held = cache.residual[0].shape[2]  # type: ignore[index]
            assert held == start + size - kv_quant.quantised_length(start + size, residual, group)
            assert held < residual + group
            assert held >= min(residual, start + size)
        for got, want, x, codec in zip(cache.encoded(), bulk.encoded(), (k, v), codecs, strict=True):
            for a, b, c in zip(got, want, quantise(x[:, :, :quantised], codec), strict=True):
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(a, c)
        for a, b, x in zip(cache.residual, bulk.residual, (k, v), strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, x[:, :, quantised:])


def test_rolling_back_is_exact(rng: np.random.Generator) -> None:
    """Up to R tokens may be taken back; what is appended in their place leaves no trace of them."""
    k, v = rng.standard_normal((2, 1, 1, 120, 32))
    draft = rng.standard_normal((2, 1, 1, 40, 32))
    cache, straight = (kv_quant.Cache(KIVI2, 40, 32) for _ in range(2))
    cache.append(k[:, :, :90], v[:, :, :90])
    cache.append(*draft)
    cache.truncate(40)
    cache.append(k[:, :, 90:], v[:, :, 90:])
    straight.append(k, v)
    for got, want in zip(cache.encoded(), straight.encoded(), strict=True):
        np.testing.assert_array_equal(decode(got, KIVI2[0]), decode(want, KIVI2[0]))
    with pytest.raises(ValueError, match="in the residual"):
        cache.truncate(90)


# --- attention --------------------------------------------------------------------------------------------


def attention(rng: np.random.Generator, kv_len: int = 64, channels: int = 32) -> Any:
    q = rng.standard_normal((2, 4, 3, channels))
    k, v = rng.standard_normal((2, 2, 2, kv_len, channels))
    return q, k * np.exp(rng.standard_normal(channels)) + 3 * rng.standard_normal(channels), v


@pytest.mark.parametrize("codecs", [KIVI4, KIVI2], ids=["int4", "int2"])
def test_folding_zero_points_and_scales(rng: np.random.Generator, codecs: tuple[Codec, Codec]) -> None:
    """No token is ever decoded: K's scales go into q, its zeros into a number per group; V's scales into the weights."""
    q, k, v = attention(rng)
    ck, cv = (quantise(x, codec) for x, codec in zip((k, v), codecs, strict=True))
    expected, expected_lse = kv_quant.naive(q, [(decode(ck, codecs[0]), decode(cv, codecs[1]))], causal=False)
    assert ck.zero is not None
    assert cv.zero is not None
    g = 32
    for b, h in np.ndindex(q.shape[:2]):
        n = h // 2
        logits = np.concatenate(
            [
                (q[b, h] * ck.scale[b, n, t]) @ ck.codes[b, n, t * g : (t + 1) * g].T.astype(float)
                + (q[b, h] @ ck.zero[b, n, t])[:, None]
                for t in range(k.shape[2] // g)
            ],
            axis=1,
        )
        p = np.exp(logits * q.shape[3] ** -0.5)
        total = p.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.log(total[:, 0]), expected_lse[b, h], rtol=1e-12, atol=1e-12)
        folded = (p * cv.scale[b, n, :, 0]) @ cv.codes[b, n].astype(float) + p @ cv.zero[b, n]
        np.testing.assert_allclose(folded / total, expected[b, h], rtol=1e-12, atol=1e-12)


def test_folding_token_scales(rng: np.random.Generator) -> None:
    """int8: the key's scale multiplies its column of logits, the value's its column of weights. fp8: scale and epilogue."""
    q, k, v = attention(rng)
    ck, cv = quantise(k, INT8), quantise(v, INT8)
    expected, _ = kv_quant.naive(q, [(decode(ck, INT8), decode(cv, INT8))], causal=False)
    logits = (q[0, 0] @ ck.codes[0, 0].T.astype(float)) * ck.scale[0, 0, :, 0] * 32**-0.5
    p = np.exp(logits)
    np.testing.assert_allclose(
        (p * cv.scale[0, 0, :, 0]) @ cv.codes[0, 0] / p.sum(axis=1, keepdims=True), expected[0, 0]
    )
    fp8 = kv_quant.FP8
    fk, fv = quantise(k, fp8, 0.5), quantise(v, fp8, 0.25)
    expected, _ = kv_quant.naive(q, [(decode(fk, fp8), decode(fv, fp8))], causal=False)
    means_k, means_v = (decode(quantise(x / s, fp8), fp8) for x, s in ((k, 0.5), (v, 0.25)))
    got, _ = dense.naive(q, means_k, means_v, scale=0.5 * 32**-0.5)
    np.testing.assert_allclose(0.25 * got, expected, rtol=1e-12)


def test_rotations_change_nothing(rng: np.random.Generator) -> None:
    """An orthogonal map of q and k outside the op (a Hadamard matrix here) leaves the result; of v, comes out again."""
    q, k, v = attention(rng)
    hadamard = np.ones((1, 1))
    while len(hadamard) < q.shape[3]:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    r = hadamard / np.sqrt(len(hadamard))
    expected, lse = dense.naive(q, k, v, causal=True)
    got, got_lse = dense.naive(q @ r, k @ r, v @ r, causal=True)
    np.testing.assert_allclose(got @ r.T, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-12)
    spiked = k.copy()
    spiked[..., 5] *= 50  # an outlier channel: rotated, it no longer sets every token's scale
    error = [abs(decode(quantise(x, INT8), INT8) - x).max() for x in (spiked, spiked @ r)]
    assert error[1] < error[0]


def test_smoothing_keys_moves_lse_alone(rng: np.random.Generator) -> None:
    """Keys less their mean: every logit of a query falls by ``scale q . mean``."""
    q, k, v = attention(rng)
    mean = k.mean(axis=2, keepdims=True)
    expected, lse = dense.naive(q, k, v)
    got, got_lse = dense.naive(q, k - mean, v)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    moved = q.shape[3] ** -0.5 * np.einsum("bhid,bhd->bhi", q, mean.repeat(2, axis=1)[:, :, 0])
    np.testing.assert_allclose(got_lse + moved, lse, rtol=1e-12)
