#include "kv_append.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "run.h"

namespace attnkit::cpu {
namespace {
#include "half-inl.h"
#include "store-inl.h"

// ---- numbers ----

uint16_t to_bf16(double x) {  // an exact float or the quotient of two: rounded once more at most, away from ties
  Bf16 to{};
  narrow_to(&to, static_cast<float>(x));
  return to.bits;
}

// The largest bfloat16 that is not above x.
uint16_t below(float x) {
  const uint16_t bits = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16);  // towards zero
  return x < widen_one(Bf16{bits}) ? static_cast<uint16_t>(bits + 1) : bits;            // away from it
}

// Ties go to even; what is below 2^51.
double rounded(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// Ties go away from zero.
double rounded_away(double x) {
  const double size = std::fabs(x), even = rounded(size);
  return std::copysign(even + (size - even == 0.5 ? 1 : 0), x);
}

uint8_t to_e4m3(float x) {
  if (x != x) return 0x7f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const double size = std::min(std::fabs(static_cast<double>(x)), 448.0);
  int exponent = 0;
  std::frexp(size, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 1, -6) - 3), units = rounded(size / unit);
  const auto value = static_cast<float>(units * unit * 0x1p-120);  // the exponent's bias is 120 less than float's
  return static_cast<uint8_t>(sign | __builtin_bit_cast(uint32_t, value) >> 20);
}

// ---- one token, or one group of them, of one head ----

void put_fields(char* codes, int64_t word, int32_t field, int32_t bits, uint32_t code) {
  uint32_t x;
  std::memcpy(&x, codes + 4 * word, 4);
  const uint32_t mask = ((uint32_t{1} << bits) - 1) << field;
  x = (x & ~mask) | (code << field & mask);
  std::memcpy(codes + 4 * word, &x, 4);
}

struct Writer {
  const Store& s;
  int32_t head, stored = stored_channels(s), bits = bits_of(s.codec), per_word = 32 / bits;

  void put(char* codes, int64_t token, int32_t channel, uint32_t code) const {
    const auto t = static_cast<int32_t>(token % kRun);
    if (s.is_keys)
      put_fields(codes, channel / per_word * kRun + t, field_of(true, bits, channel % per_word), bits, code);
    else
      put_fields(codes, t / per_word * stored + channel, field_of(false, bits, t % per_word), bits, code);
  }

  void plain(Place p, const float* x) const {
    char* to = codes_at(s, p, head) + p.token % kRun * s.channels * element_size(s.dtype);
    for (int32_t d = 0; d < s.channels; ++d) {
      if (s.dtype == DType::f32) narrow_to(reinterpret_cast<float*>(to) + d, x[d]);
      if (s.dtype == DType::bf16) narrow_to(reinterpret_cast<Bf16*>(to) + d, x[d]);
      if (s.dtype == DType::f16) narrow_to(reinterpret_cast<F16*>(to) + d, x[d]);
    }
  }

  void fp8(Place p, const float* x) const {
    char* to = codes_at(s, p, head) + p.token % kRun * s.channels;
    const float scale = s.head_scale == nullptr ? 1 : s.head_scale[head];
    for (int32_t d = 0; d < s.channels; ++d) to[d] = static_cast<char>(to_e4m3(x[d] / scale));
  }

  // A number that is not finite makes the whole token NaN.
  void int8(Place p, const float* x) const {
    float most = 0, zero = 0;
    for (int32_t d = 0; d < s.channels; ++d) {
      most = std::max(most, std::fabs(x[d]));
      zero += x[d] * 0;
    }
    const uint16_t bits_of_scale = zero == 0 ? to_bf16(most / 127.0) : 0x7fc0;
    *scales_at(s, p, head) = bits_of_scale;
    const double scale = widen_one(Bf16{bits_of_scale});
    const bool none = zero != 0 || scale == 0;
    char* codes = codes_at(s, p, head);
    for (int32_t d = 0; d < stored; ++d) {
      const double code = none || d >= s.channels ? 0 : std::clamp(rounded_away(x[d] / scale), -127.0, 127.0);
      put(codes, p.token, d, static_cast<uint32_t>(static_cast<int32_t>(code)));
    }
  }

  // Scale and zero of what lies between two numbers; false where all codes are 0.
  bool range(float low, float high, bool finite, uint16_t* scale, uint16_t* zero) const {
    *zero = finite ? below(low) : uint16_t{0x7fc0};
    *scale = 0;
    if (!finite || low == high) return false;
    const double top = (1 << bits) - 1;
    *scale = to_bf16((static_cast<double>(high) - widen_one(Bf16{*zero})) / top);
    return widen_one(Bf16{*scale}) != 0;
  }
  uint32_t code(float x, uint16_t scale, uint16_t zero) const {
    const double steps = (static_cast<double>(x) - widen_one(Bf16{zero})) / widen_one(Bf16{scale});
    return static_cast<uint32_t>(std::clamp(rounded(steps), 0.0, static_cast<double>((1 << bits) - 1)));
  }

  // `x`: s.group rows, for keys; each channel has a scale.
  void key_group(const Place* places, const float* x) const {
    uint16_t *scales = scales_at(s, places[0], head), *zeros = scales + stored;
    for (int32_t d = 0; d < stored; ++d) {
      float low = 0, high = 0, zero = 0;
      if (d < s.channels) {
        low = high = x[d];
        for (int32_t t = 0; t < s.group; ++t) {
          const float y = x[t * s.channels + d];
          low = std::min(low, y);
          high = std::max(high, y);
          zero += y * 0;
        }
      }
      const bool some = range(low, high, zero == 0, &scales[d], &zeros[d]);
      for (int32_t t = 0; t < s.group; ++t)
        put(codes_at(s, places[t], head), places[t].token, d,
            some ? code(x[t * s.channels + d], scales[d], zeros[d]) : 0);
    }
  }

  // A token's values; each group of channels has a scale.
  void values(Place p, const float* x) const {
    uint16_t* scales = scales_at(s, p, head) + p.token % kScaleRun;
    char* codes = codes_at(s, p, head);
    for (int32_t first = 0; first < stored; first += s.group) {
      const int32_t end = std::min(first + s.group, s.channels);
      float low = first < end ? x[first] : 0, high = low, zero = 0;
      for (int32_t d = first; d < end; ++d) {
        low = std::min(low, x[d]);
        high = std::max(high, x[d]);
        zero += x[d] * 0;
      }
      uint16_t* of_group = scales + first / s.group * 2 * kScaleRun;
      const bool some = first < end && range(low, high, zero == 0, of_group, of_group + kScaleRun);
      for (int32_t d = first; d < std::min(first + s.group, stored); ++d)
        put(codes, p.token, d, some && d < end ? code(x[d], of_group[0], of_group[kScaleRun]) : 0);
    }
  }
};

// ---- the tokens of one row ----

struct Source {
  const View& view;
  DType dtype;
  int64_t batch, head;

  void read(int64_t token, int32_t channels, float* to) const {
    const auto each = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* x = reinterpret_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1] +
                   token * view.stride[2];
      for (int32_t d = 0; d < channels; ++d) to[d] = widen_one(x[d * view.stride[3]]);
    };
    if (dtype == DType::f32) each(static_cast<float*>(nullptr));
    if (dtype == DType::bf16) each(static_cast<Bf16*>(nullptr));
    if (dtype == DType::f16) each(static_cast<F16*>(nullptr));
  }
};

void round_to_bf16(float* x, int32_t count) {
  for (int32_t d = 0; d < count; ++d) {
    Bf16 y{};
    narrow_to(&y, x[d]);
    x[d] = widen_one(y);
  }
}

void append_codes(const Writer& writer, const Pages& pages, const Appended& row, const Source& from) {
  const Store& s = writer.s;
  std::vector<float> x(static_cast<size_t>(s.channels));
  for (int64_t i = 0; i < row.count; ++i) {
    from.read(i, s.channels, x.data());
    const Place place = place_of(pages, static_cast<int32_t>(from.batch), row.length + i);
    switch (s.codec) {
      case Codec::plain: writer.plain(place, x.data()); break;
      case Codec::fp8: writer.fp8(place, x.data()); break;
      default: writer.int8(place, x.data());
    }
  }
}

// Groups leave the newest tokens, some of them before they were there.
void append_newest(const Writer& writer, const Pages& pages, const Appended& row, const Source& from) {
  const Store& s = writer.s;
  const int32_t rows = s.is_keys ? s.group : kScaleRun;
  std::vector<float> x(static_cast<size_t>(rows * s.channels));
  std::vector<Place> places(static_cast<size_t>(rows));
  for (int64_t first = row.num_coded; first < row.num_coded_after; first += rows) {
    for (int32_t t = 0; t < rows; ++t) {
      const int64_t token = first + t;
      float* to = x.data() + t * s.channels;
      places[static_cast<size_t>(t)] = place_of(pages, static_cast<int32_t>(from.batch), token);
      if (token >= row.length) {
        from.read(token - row.length, s.channels, to);
        round_to_bf16(to, s.channels);
      } else {
        const uint16_t* held = newest_at(s, from.batch, writer.head, token);
        for (int32_t d = 0; d < s.channels; ++d) to[d] = widen_one(Bf16{held[d]});
      }
    }
    if (s.is_keys)
      writer.key_group(places.data(), x.data());
    else
      for (int32_t t = 0; t < rows; ++t) writer.values(places[static_cast<size_t>(t)], x.data() + t * s.channels);
  }
  for (int64_t i = std::max<int64_t>(row.count - s.slots, 0); i < row.count; ++i) {
    from.read(i, s.channels, x.data());
    uint16_t* to = newest_at(s, from.batch, writer.head, row.length + i);
    for (int32_t d = 0; d < s.channels; ++d) {
      Bf16 y{};
      narrow_to(&y, x[static_cast<size_t>(d)]);
      to[d] = y.bits;
    }
  }
}

constexpr double kFlopsPerElement = 50;  // about what it takes to make a code

}  // namespace

void append(const Store& store, const Pages& pages, const Appended* rows, int64_t batch, int64_t heads,
            const View& tokens, DType dtype, int threads) {
  double elements = 0;
  for (int64_t b = 0; b < batch; ++b)
    elements += static_cast<double>(rows[b].count) * static_cast<double>(heads) * store.channels;
  const int worth_it = worth(threads, elements * kFlopsPerElement);
  const bool enough = each_task(batch * heads, worth_it, 0, [&](int64_t i, float*) {
    const Source from{tokens, dtype, i / heads, i % heads};
    const Writer writer{store, static_cast<int32_t>(from.head)};
    if (store.newest == nullptr)
      append_codes(writer, pages, rows[from.batch], from);
    else
      append_newest(writer, pages, rows[from.batch], from);
  });
  if (!enough) throw std::bad_alloc();
}

}  // namespace attnkit::cpu
