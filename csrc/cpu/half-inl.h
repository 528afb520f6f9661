// The 16-bit floats, one at a time. Included inside an anonymous namespace, as everything that some file compiles with
// the flags of an instruction set.

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
inline float widen_one(float x) { return x; }
inline float widen_one(Bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float widen_one(F16 x) {
  const int32_t magnitude = x.bits & 0x7fff;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  uint32_t bits = static_cast<uint32_t>(magnitude + (112 << 10)) << 13;
  if (magnitude < 0x400) bits = __builtin_bit_cast(uint32_t, subnormal);
  if (magnitude >= 0x7c00) bits |= 0x7f800000;
  return __builtin_bit_cast(float, bits | (x.bits & 0x8000u) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline void narrow_to(float* to, float x) { *to = x; }
inline void narrow_to(Bf16* to, float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  to->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}
inline void narrow_to(F16* to, float x) {
  auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 is halfway to what would follow the largest
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: adding a half leaves multiples of 2^-24 in the last bits
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, bits) + 0.5f) - 0x3f000000;
  } else {
    half = (bits + 0xc8000fff + (bits >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}
