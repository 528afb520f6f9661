// Vectors of kLanes 4-byte lanes, on the compiler's vector types. Included once per instruction set, inside that set's
// anonymous namespace and after kLanes is defined. No <algorithm>, no <vector>: a template of the standard library
// instantiated here would be compiled with this file's instruction set and could be picked by the linker for everybody.
//
// What the compiler cannot see by itself follows in the isa_*.cc file, in that set's intrinsics:
//   fma(a, b, c)                   a * b + c, rounded once where the machine can
//   max_or_second, min_or_second   of a and b; b when either is NaN
//   round_nearest, floor, sqrt     as IEEE has them; ties to even
//   scale_by_power(p, n)           p * 2^floor(n); over- and underflows as IEEE does
//   look_up(table, i)              table[i % 16] of each lane
//   any(mask)                      whether a bit of any lane is set
//   lane_bits(mask)                a bit for each lane, from its sign
//   gather(base, offset)           base[offset] of each lane
//   multiply_low(a, b)             the products of the low halves of 64-bit lanes

inline constexpr int kBytes = 4 * kLanes;
typedef float vf __attribute__((vector_size(kBytes), may_alias));
typedef int32_t vi __attribute__((vector_size(kBytes), may_alias));
typedef uint32_t vu __attribute__((vector_size(kBytes), may_alias));  // wraps
typedef uint64_t vl __attribute__((vector_size(kBytes), may_alias));
typedef float vf_u __attribute__((vector_size(kBytes), may_alias, aligned(4)));
typedef int32_t vi_u __attribute__((vector_size(kBytes), may_alias, aligned(4)));

#define ATTNKIT_INLINE inline __attribute__((always_inline))

ATTNKIT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
ATTNKIT_INLINE vi load_int(const float* p) { return *reinterpret_cast<const vi_u*>(p); }
ATTNKIT_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
ATTNKIT_INLINE void store_int(float* p, vi x) { *reinterpret_cast<vi_u*>(p) = x; }
ATTNKIT_INLINE vf set1(float x) { return x - vf{}; }
// Four bytes of any kind at any address, in every lane. As an integer: a float copy would quiet a signalling NaN
// pattern.
ATTNKIT_INLINE vf set1_bits(const void* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return reinterpret_cast<vf>(bits - vi{});
}
ATTNKIT_INLINE vl load_long(const float* p) { return reinterpret_cast<vl>(load_int(p)); }
ATTNKIT_INLINE vl set1_long(uint64_t x) { return x - vl{}; }
ATTNKIT_INLINE vi set1_int(int32_t x) { return x - vi{}; }
ATTNKIT_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
ATTNKIT_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
ATTNKIT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
ATTNKIT_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
// The mask that lane_bits made bits of.
ATTNKIT_INLINE vi lane_mask(uint32_t bits) {
  vi bit{};
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  return (set1_int(static_cast<int32_t>(bits)) & bit) != 0;
}
// Lanes must lie within int32: callers clamp first.
ATTNKIT_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }

// scale_by_power where no instruction does it. Two factors, so that results near the ends of the
// exponent range neither overflow nor vanish too early; only the second product can round.
ATTNKIT_INLINE vf scale_in_two_steps(vf p, vi k) {
  const vi half = k >> 1;
  return p * as_float((half + 127) << 23) * as_float((k - half + 127) << 23);
}

// kLanes vectors as the rows of a square matrix become its columns: blocks of half the size change places, stage by
// stage.
ATTNKIT_INLINE void transpose_square(vf* rows) {
#pragma GCC unroll 8
  for (int half = 1; half < kLanes; half *= 2) {
    vi low{}, high{};
    for (int j = 0; j < kLanes; ++j) {
      low[j] = (j & half) == 0 ? j : kLanes + j - half;
      high[j] = (j & half) == 0 ? j + half : kLanes + j;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & half) != 0) continue;
      const vf a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}
