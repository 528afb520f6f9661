// Few queries over codes, of bfloat16 where codes are multiplied as pairs of them: what does not depend on whose
// registers multiply.

// The compiler's own widening takes five instructions.
ATTNKIT_INLINE vf widen_scales(const uint16_t* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}

template <class Products>
class PairCodes : public CodeDecode<Products> {
 public:
  using CodeDecode<Products>::CodeDecode;

 protected:
  using Products::at_;
  using Products::c_;
  using Products::ld_;
  using Products::p_;
  using Products::t_;
  using Products::width_;
  using Products::ws_;
  using CodeDecode<Products>::by_query;
  using CodeDecode<Products>::values_;

  // Values of int4 and int2 are weighed a stretch of scales at a time.
  bool takes_values(int64_t first, int32_t count) const override {
    const bool whole = values_.codec == Codec::int8 || (first % kScaleRun == 0 && count % kScaleRun == 0);
    return is_words(values_.codec) && p_.v_head_dim % 32 == 0 && whole;
  }

  float* query(int32_t m) const { return ws_ + at_.code_q + m * width_; }
  char* codes_of_weights() const { return reinterpret_cast<char*>(ws_ + at_.code_weights); }

  // Weights times the scales of each group of 32 channels, for int4 and int2: bfloat16 [two runs][query][group][2
  // kRun]. Codes are read `base` larger than they are. Returns what is to be added to each group, [query][group].
  const float* scale_weights(const CodeTile& v, float base) const {
    const int32_t groups = at_.dv / 32;
    float* rest = ws_ + at_.code_weights + static_cast<int64_t>(kFewLanes) * c_.tile_kv * (at_.dv / 64 + 1);
    for (int32_t g = 0; g < groups; ++g)
      by_rows(t_.lanes(),
              [&]<int kRows>(int32_t m) { scale_weights_of<kRows>(v, base, g, groups, m, rest + m * groups + g); });
    return rest;
  }

 private:
  // Of one group. Codes are weighed from their middle, of which less is lost by rounding weights.
  template <int kRows>
  void scale_weights_of(const CodeTile& v, float base, int32_t g, int32_t groups, int32_t first, float* rest) const {
    const float middle = values_.codec == Codec::int4 ? 7.5f : 1.5f;
    const int32_t at = g * 32 / values_.group * 2 * kScaleRun;
    const vf ones = as_float(set1_int(0x3f803f80));
    const int32_t count = v.count, ld = ld_;
    const int64_t step = int64_t{4} * kRun * groups, block = step * t_.lanes();
    const float* w = by_query(first);
    char* to = codes_of_weights() + first * step + g * 4 * kRun;
    vf zeros[kFewRows] = {}, weights[kFewRows] = {};
    for (int32_t r = 0; r < count; r += 2, w += 2 * kRun, to += block) {
      vf scale[2], zero[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const uint16_t* scales = v.scales[r] + at + i * kRun;
        scale[i] = widen_scales(scales);
        zero[i] = fma(scale[i], set1(middle), widen_scales(scales + kScaleRun));
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const vf x = load(w + m * ld), y = load(w + m * ld + kLanes);
        const vf rounded = (vf)_mm512_cvtne2ps_pbh((__m512)(y * scale[1]), (__m512)(x * scale[0]));
        store(reinterpret_cast<float*>(to + m * step), rounded);
        weights[m] = PairDot::run(rounded, ones, weights[m]);
        zeros[m] = fma(x, zero[0], fma(y, zero[1], zeros[m]));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) zeros[m] = fma(set1(-base - middle), weights[m], zeros[m]);
    const vf sum = sums_of_four(zeros);
    for (int m = 0; m < kRows; ++m) rest[m * groups] = sum[m];
  }
};
