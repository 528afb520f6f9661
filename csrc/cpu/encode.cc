#include "encode.h"

#include <algorithm>

#include "run.h"

namespace attnkit::cpu {
namespace {
#include "half-inl.h"

constexpr int64_t kTileRows = 16;  // codes are read in tiles: rows after the last
constexpr int64_t kLine = 64;  // a row of codes begins at a cache line, and is whole vectors long

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
void decode_rows(const Codes& codes, const Problem& p, bool is_keys, std::vector<char>& to, View& view) {
  const int32_t channels = p.head_dim;
  int64_t tokens = 0, batch = 0;
  const auto start_of = [&](const Sequence& s) { return is_keys ? s.kv_start : s.q_start; };
  const auto length_of = [&](const Sequence& s) { return is_keys ? s.kv_len : s.q_len; };
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    const Sequence& s = p.sequences[i];
    tokens = std::max(tokens, start_of(s) + length_of(s));
    batch = std::max<int64_t>(batch, s.batch + 1);
  }
  to.assign(static_cast<size_t>(batch * codes.heads * tokens * channels) * sizeof(T), 0);
  view = {to.data(), {codes.heads * tokens * channels, tokens * channels, channels, 1}};
  for (int32_t i = 0; i < p.num_sequences; ++i)
    for (int32_t h = 0; h < codes.heads; ++h) {
      const Sequence& s = p.sequences[i];
      const float* mean = is_keys && p.encoding.center ? codes.means + (i * codes.heads + h) * codes.width : nullptr;
      T* x = reinterpret_cast<T*>(to.data()) + (s.batch * codes.heads + h) * tokens * channels;
      for (int64_t t = 0; t < length_of(s); ++t) {
        const int8_t* row = codes.data + codes.row(i, length_of(s), h, t) * codes.stride;
        const float step = codes.step(i, length_of(s), h, t);
        for (int32_t d = 0; d < channels; ++d)
          narrow_to(x + (start_of(s) + t) * channels + d, step * row[d] + (mean == nullptr ? 0 : mean[d]));
      }
    }
}

}  // namespace

bool Encoded::encode(Problem& p, const Kernel& kernel, int threads) {
  const int64_t width = up(p.head_dim, 16), stride = up(p.head_dim, kLine), n = p.num_sequences;
  const int32_t heads[] = {p.num_heads, p.num_kv_heads}, tiles[] = {p.encoding.q_tile, p.encoding.kv_tile};
  const auto length = [&](int side, int64_t i) { return side == 0 ? p.sequences[i].q_len : p.sequences[i].kv_len; };
  int64_t bytes = 0, at[2][4];  // codes, steps, starts, means
  for (int side = 0; side < 2; ++side) {
    Side& s = sides_[side];
    s.rows.assign(1, 0);
    s.tiles.assign(1, 0);
    for (int64_t i = 0; i < n; ++i) {
      s.rows.push_back(s.rows.back() + length(side, i) * heads[side]);
      s.tiles.push_back(s.tiles.back() + up(length(side, i), tiles[side]) / tiles[side] * heads[side]);
    }
    const int64_t sizes[] = {(s.rows.back() + kTileRows) * stride, s.tiles.back() * 4, s.rows.back() * 4,
                             n * heads[side] * width * 4};
    for (int part = 0; part < 4; ++part) {
      at[side][part] = bytes;
      bytes += up(sizes[part], kLine);
    }
  }
  char* memory = codes_memory(static_cast<size_t>(bytes));
  if (memory == nullptr) return false;
  for (int side = 0; side < 2; ++side) {
    const auto part = [&](int i) { return reinterpret_cast<float*>(memory + at[side][i]); };
    codes_[side] = {reinterpret_cast<int8_t*>(memory + at[side][0]),
                    part(1),
                    reinterpret_cast<int32_t*>(part(2)),
                    part(3),
                    sides_[side].rows.data(),
                    sides_[side].tiles.data(),
                    stride,
                    width,
                    heads[side],
                    tiles[side]};
  }

  const int64_t tasks[] = {n * heads[0], n * heads[1]};
  const bool enough =
      each_task(tasks[0] + tasks[1], threads, encode_floats(p.head_dim) * sizeof(float), [&](int64_t i, float* memory) {
        const int side = i < tasks[1] ? 1 : 0;  // keys first: they are few heads, and take longer
        const int64_t task = side == 1 ? i : i - tasks[1];
        const Codes& c = codes_[side];
        const auto sequence = static_cast<int32_t>(task / c.heads), head = static_cast<int32_t>(task % c.heads);
        const Sequence& s = p.sequences[sequence];
        const int64_t count = length(side, sequence), row = c.row(sequence, count, head, 0);
        const int64_t tile = c.tiles[sequence] + head * ((count + c.tile - 1) / c.tile);
        const bool keys = side == 1;
        kernel.encode({keys ? &p.k : &p.q, p.dtype, s.batch, head, p.head_dim, c.tile, keys ? s.kv_start : s.q_start,
                       count, c.data + row * stride, stride, c.steps + tile, keys ? c.starts + row : nullptr,
                       keys && p.encoding.center ? c.means + task * width : nullptr},
                      memory);
      });
  p.codes = codes_;
  return enough;
}

void Encoded::decode(Problem& p) {
  const auto as = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    decode_rows<T>(codes_[0], p, false, decoded_[0], p.q);
    decode_rows<T>(codes_[1], p, true, decoded_[1], p.k);
  };
  if (p.dtype == DType::bf16)
    as(static_cast<Bf16*>(nullptr));
  else if (p.dtype == DType::f16)
    as(static_cast<F16*>(nullptr));
  else
    as(static_cast<float*>(nullptr));
  p.codes = nullptr;
}

}  // namespace attnkit::cpu
