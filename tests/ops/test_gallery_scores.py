# ruff: noqa: ANN001, ANN002, ANN202, B008, RET504 -- the functions are written as their users write them
"""Score functions of FlexAttention's documentation, its blog and public galleries, written down from what they mean.

Each runs unchanged through `ak.flex_attention`, eager and compiled, and is compared with torch's own flex_attention on
float64 tensors.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.shows

B, H, S = 2, 4, 24
Score = Callable[..., Any]
GALLERY: dict[str, Callable[[], Score]] = {}


def score(make: Callable[[], Score]) -> Callable[[], Score]:
    """A gallery entry: called when its test runs, with a seed of its own."""
    GALLERY[make.__name__.replace("_", " ")] = make
    return make


# --- positions ----------------------------------------------------------------------------------------------


@score
def noop() -> Score:
    return lambda score, b, h, q_idx, kv_idx: score


@score
def relative_position() -> Score:
    def relative(score, b, h, q_idx, kv_idx):
        return score + (q_idx - kv_idx)

    return relative


@score
def relative_position_for_the_past_only() -> Score:
    def relative(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score + (q_idx - kv_idx) * 0.125, -float("inf"))

    return relative


@score
def bias_by_distance() -> Score:
    table = torch.randn(2 * S - 1)

    def biased(score, b, h, q_idx, kv_idx):
        return score + table[q_idx - kv_idx + S - 1]

    return biased


@score
def bias_by_head_and_distance() -> Score:
    table = torch.randn(H, 2 * S - 1)
    return lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx + (S - 1)]


@score
def bias_by_absolute_distance() -> Score:
    table = torch.randn(S)
    return lambda score, b, h, q, kv: score + table[torch.abs(q - kv)]


@score
def bias_inside_a_window() -> Score:
    width = 5
    table = torch.randn(2 * width + 1)

    def biased(score, b, h, q_idx, kv_idx):
        return score + table[torch.clamp(q_idx - kv_idx + width, 0, 2 * width)]

    return biased


@score
def bias_of_all_four_dimensions() -> Score:
    table = torch.randn(B, H, S, S)
    return lambda score, b, h, q_idx, kv_idx: score + table[b, h, q_idx, kv_idx]


@score
def bias_indexed_in_steps() -> Score:
    table = torch.randn(B, H, S, S)

    def biased(score, b, h, q_idx, kv_idx):
        of_head = table[b, h]
        return score + of_head[q_idx][kv_idx]

    return biased


@score
def bias_with_a_constant_index() -> Score:
    table, which = torch.randn(B, H, 4, S), torch.tensor(2)
    return lambda score, b, h, q, kv: score + table[b, h, which, q] + table[b, h, -1, kv] + table[0, 1, 2, 3]


@score
def bias_through_a_permutation() -> Score:
    table, order = torch.randn(S), torch.randperm(S)
    return lambda score, b, h, q_idx, kv_idx: score + table[order[q_idx]] * table[order[kv_idx]]


@score
def factor_per_query() -> Score:
    factor = torch.rand(S) + 0.5
    return lambda score, b, h, q_idx, kv_idx: score * factor[q_idx]


@score
def alibi() -> Score:
    def alibi(score, b, h, q_idx, kv_idx):
        slope = torch.exp2(-((h + 1) * 8.0 / H))
        bias = (kv_idx - q_idx) * slope
        return score + bias

    return alibi


@score
def alibi_from_a_table() -> Score:
    slopes = 2.0 ** (-8.0 * torch.arange(1, H + 1) / H)
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * torch.abs(q_idx - kv_idx)


@score
def alibi_by_powers_of_two() -> Score:
    return lambda score, b, h, q_idx, kv_idx: score - (q_idx - kv_idx).abs() / (2 ** (h + 1))


@score
def t5_buckets() -> Score:
    """Half of the buckets for near distances, one each, half for far ones on a log scale."""
    buckets, furthest = 16, 64
    table = torch.randn(buckets, H)

    def biased(score, b, h, q_idx, kv_idx):
        distance = kv_idx - q_idx
        half = buckets // 2
        bucket = (distance > 0).to(torch.long) * half
        distance = torch.abs(distance)
        near = half // 2
        far = near + (torch.log(distance.float() / near) / math.log(furthest / near) * (half - near)).to(
            torch.long
        )
        far = torch.min(far, torch.full_like(far, half - 1))
        bucket += torch.where(distance < near, distance, far)
        return score + table[bucket, h]

    return biased


@score
def two_dimensional_bias() -> Score:
    """Relative position bias of windows of an image, 4 high and 6 wide."""
    height, width = 4, 6
    table = torch.randn((2 * height - 1) * (2 * width - 1), H)

    def biased(score, b, h, q_idx, kv_idx):
        rows = q_idx // width - kv_idx // width + height - 1
        columns = q_idx % width - kv_idx % width + width - 1
        return score + table[rows * (2 * width - 1) + columns, h]

    return biased


@score
def sandwich() -> Score:
    """Inner products of sinusoidal positions, by distance, compressed per head."""
    frequencies = 10000.0 ** (-2 * torch.arange(16) / 32)
    table = torch.cos(torch.arange(1 - S, S)[:, None] * frequencies).sum(-1)
    ratio = H / (8.0 * torch.arange(1, H + 1))
    return lambda score, b, h, q_idx, kv_idx: score + table[q_idx - kv_idx + S - 1] * ratio[h]


@score
def kerple_logarithm() -> Score:
    scale, rate = torch.rand(H) + 0.5, torch.rand(H) + 0.5
    return lambda s, b, h, q, kv: s - scale[h] * torch.log1p(rate[h] * (q - kv).abs())


@score
def kerple_power() -> Score:
    scale, power = torch.rand(H) * 0.3, torch.rand(H) + 0.5
    return lambda s, b, h, q, kv: s - scale[h] * (q - kv).abs() ** power[h]


@score
def distance_decay() -> Score:
    def decayed(score, b, h, q_idx, kv_idx):
        return score * torch.exp(-0.1 * (q_idx - kv_idx).abs().float())

    return decayed


@score
def rotary_difference() -> Score:
    """The angle between two positions, as a function of their distance."""
    return lambda s, b, h, q, kv: s * torch.cos((q - kv) * 0.1) + torch.sin((q - kv).float() / 7) ** 2


# --- values -------------------------------------------------------------------------------------------------


@score
def softcap() -> Score:
    def softcap(score, b, h, q_idx, kv_idx):
        score = score / 20
        score = torch.tanh(score)
        score = score * 20
        return score

    return softcap


@score
def softcap_in_place() -> Score:
    def softcap(score, b, h, q_idx, kv_idx):
        score /= 20
        score.tanh_()
        score *= 20
        score += kv_idx
        return score

    return softcap


@score
def softcap_by_a_rational_function() -> Score:
    """An approximation of tanh, as hardware has it."""

    def tanh(x):
        x = x.clamp(-4.97, 4.97)
        x2 = x.square()
        return x * (135135 + x2 * (17325 + x2 * (378 + x2))) / (135135 + x2 * (62370 + x2 * (3150 + x2 * 28)))

    return lambda score, b, h, q_idx, kv_idx: 2 * tanh(score / 2)


@score
def softcap_by_sigmoid() -> Score:
    return lambda score, b, h, q, kv: 3 * (2 * torch.sigmoid(2 * score / 3) - 1)


@score
def checkerboard() -> Score:
    def checkerboard(score, batch, head, token_q, token_kv):
        score = torch.where(torch.abs(token_kv - token_q) % 2 == 1, score * 0.5, score)
        score = torch.where(torch.abs(token_kv - token_q) % 2 == 0, score * 2.0, score)
        return score

    return checkerboard


@score
def head_offset() -> Score:
    def offset(score, b, h, q_idx, kv_idx):
        return score + 2**h / H

    return offset


@score
def temperature_per_head() -> Score:
    temperature = nn.Parameter(torch.rand(H) + 0.5)
    return lambda score, b, h, q_idx, kv_idx: score / temperature[h]


@score
def length_dependent_temperature() -> Score:
    """Scalable softmax: the logits grow with the logarithm of the number of keys."""
    scale = torch.tensor(0.7)
    return lambda score, b, h, q_idx, kv_idx: score * scale * torch.log(q_idx + 2.0)


@score
def learned_bias_and_scale_per_head() -> Score:
    weight, bias = torch.rand(H) + 0.5, torch.randn(H)
    return lambda score, b, h, q_idx, kv_idx: torch.addcmul(bias[h], weight[h], score)


@score
def token_types() -> Score:
    """Relations between kinds of tokens, different in each batch entry."""
    kinds, relation = torch.randint(0, 3, (B, S)), torch.randn(3, 3, H)

    def biased(score, b, h, q_idx, kv_idx):
        return score + relation[kinds[b, q_idx], kinds[b, kv_idx], h]

    return biased


@score
def causal_as_a_score() -> Score:
    def causal(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, float("-inf"))

    return causal


@score
def causal_by_masked_fill() -> Score:
    return lambda s, b, h, q, kv: s.masked_fill(q < kv, -math.inf)


@score
def smallest_number_as_a_mask() -> Score:
    def masked(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, torch.finfo(torch.float32).min)

    return masked


@score
def graph_distances() -> Score:
    """Graphormer's spatial encoding."""
    distance, table = torch.randint(0, 5, (B, S, S), dtype=torch.int32), torch.randn(H, 5)
    return lambda score, b, h, q_idx, kv_idx: score + table[h, distance[b, q_idx, kv_idx]]


@score
def graph_paths() -> Score:
    """Graphormer's edge encoding: the mean over the edges of a path."""
    longest = 3
    edges = torch.randint(0, 6, (B, S, S, longest), dtype=torch.int32)
    lengths = torch.randint(0, longest + 1, (B, S, S), dtype=torch.int32)
    tables = list(torch.randn(longest, H, 6))

    def biased(score, b, h, q_idx, kv_idx):
        length, total = lengths[b, q_idx, kv_idx], 0.0
        for n, table in enumerate(tables):
            total = total + torch.where(length > n, table[h, edges[b, q_idx, kv_idx, n]], 0.0)
        return score + total / torch.clamp(length, min=1)

    return biased


@score
def latent_attention() -> Score:
    """MLA: the rotary part of the logit, from vectors of its own; one key head for all."""
    q_rope, k_rope = torch.randn(B, H, S, 8), torch.randn(B, 1, S, 8)

    def rope(score, b, h, q_idx, kv_idx):
        return score + 0.3 * torch.dot(q_rope[b, h, q_idx], k_rope[b, h // H, kv_idx])

    return rope


@score
def latent_attention_by_a_sum() -> Score:
    q_rope, k_rope = torch.randn(B, H, S, 8), torch.randn(B, S, 8)
    return lambda s, b, h, q, kv: s + (q_rope[b, h, q] * k_rope[b, kv]).sum(-1) / 4


@score
def an_activation_instead_of_softmax() -> Score:
    return lambda score, b, h, q, kv: torch.log(F.gelu(score) + 1.0)


@score
def other_activations() -> Score:
    def mixed(score, b, h, q_idx, kv_idx):
        near = F.silu(score) + F.softplus(score) + F.leaky_relu(score, 0.1) + F.elu(score)
        far = F.gelu(score, approximate="tanh") + torch.relu(score) - F.logsigmoid(score)
        return torch.where((q_idx - kv_idx).abs() < 4, near, far)

    return mixed


# --- how functions are written ----------------------------------------------------------------------------


def scaled(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, factor: Any, *, shift: float = 0.0) -> Any:
    return score * factor + shift


class Bias(nn.Module):
    """A module that holds its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, S))
        self.register_buffer("order", torch.randperm(S))
        self.strength = 0.5

    def forward(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + self.strength * self.table[h, self.order[kv_idx]]

    def method(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self(score, b, h, q_idx, kv_idx) * self.strength


class Embedded(nn.Module):
    """A bias held as an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * S, H)

    def forward(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + self.bias(q_idx - kv_idx + S)[h]


@dataclass
class Slopes:
    """A callable object."""

    slopes: Tensor
    power: int = 1

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - self.slopes[h] * (q_idx - kv_idx).abs() ** self.power


@score
def a_module() -> Score:
    return Bias()


@score
def a_bound_method() -> Score:
    return Bias().method


@score
def an_embedding() -> Score:
    return Embedded()


@score
def a_callable_object() -> Score:
    return Slopes(torch.rand(H) / 4, power=2)


@score
def a_partial() -> Score:
    return functools.partial(scaled, factor=torch.tensor(0.5), shift=1.5)


@score
def default_arguments() -> Score:
    return lambda score, b, h, q, kv, factor=0.5, table=torch.ones(H): score * factor + table[h]


@score
def a_wrapper_around_another() -> Score:
    inner = alibi()

    @functools.wraps(inner)
    def capped(score, *index):
        return torch.tanh(inner(score, *index) / 5) * 5

    return capped


@score
def several_in_turn() -> Score:
    parts = [softcap(), alibi_from_a_table(), token_types()]

    def all_of_them(score, b, h, q_idx, kv_idx):
        for part in parts:
            score = part(score, b, h, q_idx, kv_idx)
        return score

    return all_of_them


@score
def different_for_some_heads() -> Score:
    first, second = distance_decay(), checkerboard()

    def chosen(score, b, h, q_idx, kv_idx):
        return torch.where(h % 2 == 0, first(score, b, h, q_idx, kv_idx), second(score, b, h, q_idx, kv_idx))

    return chosen


@score
def constants_like_tensors() -> Score:
    def biased(score, b, h, q_idx, kv_idx):
        zero, one = torch.zeros_like(score), score.new_ones(())
        two = torch.full((), 2.0, device=score.device, dtype=score.dtype)
        sign = torch.where(q_idx > kv_idx, one, zero) + torch.ones_like(score) * two
        return score * sign.to(score.dtype) + torch.sign(q_idx - kv_idx).type_as(score)

    return biased


@score
def bools_as_numbers() -> Score:
    def biased(score, b, h, q_idx, kv_idx):
        before, near = q_idx > kv_idx, (q_idx - kv_idx).abs() < 3
        either = before + near  # of bools, the sum is "or" and the product "and"
        return score + either.float() * 2 - (before * near).int() + (before & ~near) * 0.5

    return biased


@score
def physical_pages() -> Score:
    """Paged attention: a wrapper turns physical positions into logical ones before it asks another function."""
    page, logical = 4, torch.stack([torch.randperm(S // 4) for _ in range(B)])
    logical[1, 3] = -1
    inner = alibi_from_a_table()

    def paged(score, b, h, q_idx, physical_kv_idx):
        block = logical[b, physical_kv_idx // page]
        kv_idx = block * page + physical_kv_idx % page
        return torch.where(block >= 0, inner(score, b, h, q_idx, kv_idx), -float("inf"))

    return paged


@pytest.mark.parametrize("name", GALLERY)
def test_scores_of_the_gallery(name: str, same_as_flex: Any) -> None:
    torch.manual_seed(len(name))
    same_as_flex(GALLERY[name](), None, (B, H, 2, S, S))
