// Vectors of kLanes 4-byte lanes, on the compiler's vector types. Included once per instruction set, inside that set's
// anonymous namespace and after kLanes is defined. No <algorithm>, no <vector>: a template of the standard library
// instantiated here would be compiled with this file's instruction set and could be picked by the linker for everybody.
//
// What the compiler cannot see by itself follows in the isa_*.cc file, in that set's intrinsics:
//   fma(a, b, c)                   a * b + c, rounded once where the machine can
//   max_or_second, min_or_second   of a and b; b when either is NaN
//   round_nearest, floor, sqrt     as IEEE has them; ties to even
//   scale_by_power(p, n)           p * 2^floor(n); over- and underflows as IEEE does
//   scale_or_zero(p, n, least)     the same, but 0 where n < least
//   look_up(table, i)              table[i % n] of each lane, of a table of n = 16 or 32
//   any(mask)                      whether a bit of any lane is set
//   lane_bits(mask)                a bit for each lane, from its sign
//   gather(base, offset)           base[offset] of each lane
//   load_halves(low, high)         half a vector from each of two places, of floats or of 16-bit elements
//   widen_halves(x)                float16 as float32, NaN quiet
//   multiply_low(a, b)             the products of the low halves of 64-bit lanes
//   dot_halves(sum, a, b)          sum + the products of both signed 16-bit halves of each lane

inline constexpr int kBytes = 4 * kLanes;
typedef float vf __attribute__((vector_size(kBytes), may_alias));
typedef int32_t vi __attribute__((vector_size(kBytes), may_alias));
typedef uint32_t vu __attribute__((vector_size(kBytes), may_alias));  // wraps
typedef uint16_t vh __attribute__((vector_size(2 * kLanes), may_alias, aligned(2)));
typedef uint64_t vl __attribute__((vector_size(kBytes), may_alias));
typedef float vf_u __attribute__((vector_size(kBytes), may_alias, aligned(2)));  // pairs of 16-bit elements too
typedef int32_t vi_u __attribute__((vector_size(kBytes), may_alias, aligned(4)));

#define ATTNKIT_INLINE inline __attribute__((always_inline))

// The compiler no longer knows what x is made of. It would compute the addresses of all rows of a tile before a loop
// over tiles, which are more than there are registers.
template <class T>
ATTNKIT_INLINE void forget(T& x) {
  asm("" : "+r"(x));
}

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
ATTNKIT_INLINE vf magnitude(vf x) { return as_float(as_int(x) & 0x7fffffff); }
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

// The sum of a vector's lanes, as a tree: a chain of scalar additions would wait for each.
template <int... kLane>
ATTNKIT_INLINE vf rotate_lanes(vf x, int by, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(x, (vi{kLane...} + by) & (kLanes - 1));
}
ATTNKIT_INLINE float sum_of_lanes(vf x) {
#pragma GCC unroll 4
  for (int by = kLanes / 2; by > 0; by /= 2) x += rotate_lanes(x, by, std::make_integer_sequence<int, kLanes>{});
  return x[0];
}

// The six shuffles of a transposition, by their lanes. Within 128 bits: the low or high elements of two vectors in
// turn, one or two at a time. Across: the even or the odd quarters of both.
enum Step { kLow1, kHigh1, kLow2, kHigh2, kEven4, kOdd4 };
constexpr int step_lane(Step step, int lane) {
  const int quad = lane & ~3, at = lane & 3;
  switch (step) {
    case kLow1: return quad + at / 2 + at % 2 * kLanes;
    case kHigh1: return quad + 2 + at / 2 + at % 2 * kLanes;
    case kLow2: return quad + at % 2 + at / 2 * kLanes;
    case kHigh2: return quad + 2 + at % 2 + at / 2 * kLanes;
    case kEven4: return quad * 2 % kLanes + at + quad * 2 / kLanes * kLanes;
    default: return quad * 2 % kLanes + 4 + at + quad * 2 / kLanes * kLanes;
  }
}
template <Step kStep, int... kLane>
ATTNKIT_INLINE vf shuffle_lanes(vf a, vf b, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(a, b, vi{step_lane(kStep, kLane)...});
}
template <Step kStep>
ATTNKIT_INLINE vf shuffle(vf a, vf b) {
  return shuffle_lanes<kStep>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Of four vectors at once what `f`, a sum or a maximum, makes of the lanes of each: lane i is that of x[i % 4].
template <class F>
ATTNKIT_INLINE vf fold_lanes(const vf* x, F f) {
  const auto both = [&]<Step kFirst, Step kSecond>(vf a, vf b)
                        __attribute__((always_inline)) { return f(shuffle<kFirst>(a, b), shuffle<kSecond>(a, b)); };
  vf y = both.template operator()<kLow2, kHigh2>(both.template operator()<kLow1, kHigh1>(x[0], x[1]),
                                                 both.template operator()<kLow1, kHigh1>(x[2], x[3]));
#pragma GCC unroll 4
  for (int quads = kLanes / 4; quads > 1; quads /= 2) y = both.template operator()<kEven4, kOdd4>(y, y);
  return y;
}

// Within each quad of lanes, r[i][j] of four vectors becomes r[j][i].
ATTNKIT_INLINE void transpose_quads(vf* r) {
  const vf a = shuffle<kLow1>(r[0], r[1]), b = shuffle<kHigh1>(r[0], r[1]);
  const vf c = shuffle<kLow1>(r[2], r[3]), d = shuffle<kHigh1>(r[2], r[3]);
  r[0] = shuffle<kLow2>(a, c);
  r[1] = shuffle<kHigh2>(a, c);
  r[2] = shuffle<kLow2>(b, d);
  r[3] = shuffle<kHigh2>(b, d);
}

// Of two groups of four vectors, their even quads and their odd ones.
ATTNKIT_INLINE void part_quads(vf* r) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vf a = r[j], b = r[4 + j];
    r[j] = shuffle<kEven4>(a, b);
    r[4 + j] = shuffle<kOdd4>(a, b);
  }
}

// kLanes vectors as the rows of a square matrix become its columns.
ATTNKIT_INLINE void transpose_square(vf* r) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) transpose_quads(r + i);
  // r[4 g + j] holds column 4 q + j of rows 4 g .. 4 g + 3 in its quarter q.
  if constexpr (kLanes == 8) part_quads(r);
  if constexpr (kLanes == 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf a = shuffle<kEven4>(r[j], r[4 + j]), b = shuffle<kOdd4>(r[j], r[4 + j]);
      const vf c = shuffle<kEven4>(r[8 + j], r[12 + j]), d = shuffle<kOdd4>(r[8 + j], r[12 + j]);
      r[j] = shuffle<kEven4>(a, c);
      r[8 + j] = shuffle<kOdd4>(a, c);
      r[4 + j] = shuffle<kEven4>(b, d);
      r[12 + j] = shuffle<kOdd4>(b, d);
    }
  }
}
