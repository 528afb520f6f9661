// Tokens of a cache as rows of floats, a tile at a time: for products that have no way of their own with codes.

ATTNKIT_INLINE float widen_bits_one(uint16_t bits) { return widen_one(Bf16{bits}); }

// Element e of every word as a number.
template <bool kIsKeys, int kBits>
ATTNKIT_INLINE vf code_of(vi words, int32_t e) {
  const int32_t field = field_of(kIsKeys, kBits, e);
  if constexpr (kBits == 8) return to_float((words << (24 - field)) >> 24);
  return to_float((words >> field) & ((1 << kBits) - 1));
}

ATTNKIT_INLINE vi load_words(const char* p) { return *reinterpret_cast<const vi_u*>(p); }

// Each of these: a run of tokens, `padded` channels wide, zeros where there are none.
template <int kBits>
void decode_keys(const Store& s, const char* codes, const uint16_t* scales, int32_t padded, float* to) {
  constexpr int32_t kPerWord = 32 / kBits;
  const int32_t stored = stored_channels(s);
  for (int32_t t = 0; t < kRun; t += kLanes)
    for (int32_t c = 0; c < padded; c += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int32_t channel = c + i;
        r[i] = vf{};
        if (channel >= s.channels) continue;
        r[i] = code_of<true, kBits>(load_words(codes + (channel / kPerWord * kRun + t) * 4), channel % kPerWord);
        if constexpr (kBits < 8)
          r[i] = fma(r[i], set1(widen_bits_one(scales[channel])), set1(widen_bits_one(scales[stored + channel])));
      }
      transpose_square(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if constexpr (kBits == 8) r[i] *= set1(widen_bits_one(scales[t + i]));
        store(to + (t + i) * padded + c, r[i]);
      }
    }
}

// `first`: of the tokens, among those that share a stretch of scales.
template <int kBits>
void decode_values(const Store& s, const char* codes, const uint16_t* scales, int32_t first, int32_t padded,
                   float* to) {
  constexpr int32_t kPerWord = 32 / kBits;
  const int32_t stored = stored_channels(s);
  for (int32_t t = 0; t < kRun; t += kPerWord)
    for (int32_t c = 0; c < padded; c += kLanes) {
      const vi words = load_words(codes + (t / kPerWord * stored + c) * 4);
      const uint16_t* of_group = kBits == 8 ? scales + t : scales + c / s.group * 2 * kScaleRun + first + t;
#pragma GCC unroll 16
      for (int i = 0; i < kPerWord; ++i) {
        const vf code = code_of<false, kBits>(words, i), scale = set1(widen_bits_one(of_group[i]));
        vf x = code * scale;
        if constexpr (kBits < 8) x = fma(code, scale, set1(widen_bits_one(of_group[kScaleRun + i])));
        store(to + (t + i) * padded + c, x);
      }
    }
}

// e4m3: the exponent is rebiased by a multiplication, which makes subnormals normal; there is a NaN and no infinity.
ATTNKIT_INLINE float widen_e4m3(uint8_t x) {
  if ((x & 0x7f) == 0x7f) return __builtin_nanf("");
  const float size = __builtin_bit_cast(float, (x & 0x7fu) << 20) * 0x1p120f;
  return x & 0x80 ? -size : size;
}

inline void decode_fp8(const Store& s, const char* codes, float scale, int32_t padded, float* to) {
  for (int32_t t = 0; t < kRun; ++t, codes += s.channels, to += padded) {
    for (int32_t d = 0; d < s.channels; ++d) to[d] = widen_e4m3(static_cast<uint8_t>(codes[d])) * scale;
    for (int32_t d = s.channels; d < padded; ++d) to[d] = 0;
  }
}

inline void decode_run(const Store& s, const Pages& pages, int32_t batch, int32_t head, int64_t token, int32_t padded,
                       float* to) {
  const Place place = place_of(pages, batch, token);
  const char* codes = codes_at(s, place, head);
  if (s.codec == Codec::plain)
    return with_elements(s.dtype, [&](auto* type) {
      widen_rows(reinterpret_cast<const std::remove_pointer_t<decltype(type)>*>(codes), s.channels, 1, kRun, s.channels,
                 padded, to);
    });
  if (s.codec == Codec::fp8) return decode_fp8(s, codes, s.head_scale == nullptr ? 1 : s.head_scale[head], padded, to);
  const uint16_t* scales = scales_at(s, place, head);
  const auto first = static_cast<int32_t>(place.token % kScaleRun);
  if (s.codec == Codec::int8)
    return s.is_keys ? decode_keys<8>(s, codes, scales, padded, to) : decode_values<8>(s, codes, scales, 0, padded, to);
  if (s.codec == Codec::int4)
    return s.is_keys ? decode_keys<4>(s, codes, scales, padded, to)
                     : decode_values<4>(s, codes, scales, first, padded, to);
  return s.is_keys ? decode_keys<2>(s, codes, scales, padded, to)
                   : decode_values<2>(s, codes, scales, first, padded, to);
}

// Rows of tokens first .. first + count - 1 and on to a whole run, `first` at the beginning of one.
inline void decode_tile(const Store& s, const Pages& pages, const Sequence& sequence, int32_t head, int64_t first,
                        int32_t count, int32_t padded, float* to) {
  for (int32_t n = 0; n < count; n += kRun, to += static_cast<int64_t>(kRun) * padded) {
    const int64_t token = first + n;
    if (s.newest != nullptr && token >= sequence.num_coded)
      widen_rows(reinterpret_cast<const Bf16*>(newest_at(s, sequence.batch, head, token)), s.channels, 1, kRun,
                 s.channels, padded, to);
    else
      decode_run(s, pages, sequence.batch, head, token, padded, to);
  }
}
