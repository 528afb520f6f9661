// The bytecode interpreter: one switch per instruction, then straight loops over vectors. Scalars, per-query and
// per-key values are short vectors computed when their index changes; tile values are strips of kStrip keys by bm
// queries. A strip's rows are keys, its lanes are queries.

struct Operand {
  const float* p;
  int32_t step;  // floats from one row to the next
  bool vec;      // lanes differ; else one value per row
};

struct Shape {
  int32_t rows, lanes;
};

template <bool kVec>
struct Row {
  const float* p;
  vf value;
  ATTNKIT_INLINE Row(const Operand& o, int32_t r) : p(o.p + static_cast<int64_t>(r) * o.step), value{} {
    if constexpr (!kVec) value = set1_bits(p);
  }
  ATTNKIT_INLINE vf at(int32_t j) const {
    if constexpr (kVec) return load(p + j);
    return value;
  }
};

// Whether an operand looks the same when the rows of a tile are taken as one long row.
ATTNKIT_INLINE bool flat(const Operand& o, Shape s) { return o.step == (o.vec ? s.lanes : 0); }

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
// Calls f with the flag as a type.
template <class F>
ATTNKIT_INLINE void with(bool flag, F f) {
  flag ? f(Flag<true>{}) : f(Flag<false>{});
}

template <bool... kVec, class F, int... kArg>
ATTNKIT_INLINE void map_rows(float* dst, Shape s, const Operand* operands, F f, std::integer_sequence<int, kArg...>) {
  const Operand a[] = {operands[kArg]...};  // or the compiler would think that dst may be where they are
  for (int32_t r = 0; r < s.rows; ++r)
    [&](const Row<kVec>&... row) {
      for (int32_t j = 0; j < s.lanes; j += kLanes) store(dst + r * s.lanes + j, f(row.at(j)...));
    }(Row<kVec>(a[kArg], r)...);
}

// dst = f(a[0], a[1], ...), element by element; dst may be one of them. Each combination of vectors and broadcasts gets
// a loop of its own.
template <int kArity, bool... kVec, class F>
ATTNKIT_INLINE void map(float* dst, Shape s, const Operand* a, F f) {
  constexpr int kNext = sizeof...(kVec);
  if constexpr (kNext < kArity) {
    with(a[kNext].vec, [&](auto vec) { map<kArity, kVec..., vec.value>(dst, s, a, f); });
  } else {
    bool all_flat = true;
    for (int i = 0; i < kArity; ++i) all_flat &= flat(a[i], s);
    if (all_flat) s = {1, s.rows * s.lanes};
    map_rows<kVec...>(dst, s, a, f, std::make_integer_sequence<int, kArity>{});
  }
}

template <class F>
ATTNKIT_INLINE void map1(float* dst, Shape s, const Operand& a, F f) {
  map<1>(dst, s, &a, f);
}

template <class F>
ATTNKIT_INLINE void map2(float* dst, Shape s, const Operand& a, const Operand& b, F f) {
  const Operand both[] = {a, b};
  map<2>(dst, s, both, f);
}

inline void select_rows(float* dst, Shape s, const Operand& mask, const Operand& a, const Operand& b) {
  const Operand all[] = {mask, a, b};
  map<3>(dst, s, all, [](vf m, vf x, vf y) { return select(as_int(m), x, y); });
}

template <class F>
vf each_lane(vf a, F f) {
  vf r{};
  for (int i = 0; i < kLanes; ++i) r[i] = f(a[i]);
  return r;
}

template <class F>
vf each_lane2(vf a, vf b, F f) {
  vf r{};
  for (int i = 0; i < kLanes; ++i) r[i] = f(a[i], b[i]);
  return r;
}

// Python's integer division. The quotient of two 32-bit integers as a double is never rounded up to an integer. The
// analysis has excluded a zero divisor, here one, and a quotient beyond 32 bits.
typedef double vd __attribute__((vector_size(2 * kBytes)));
struct Divided {
  vi floor, rest;
};
ATTNKIT_INLINE Divided divide(vi x, vi y) {
  y = y == 0 ? set1_int(1) : y;
  const vi whole = __builtin_convertvector(__builtin_convertvector(x, vd) / __builtin_convertvector(y, vd), vi);
  const vi rest = vi(vu(x) - vu(whole) * vu(y));
  const vi below = (rest != 0) & ((rest ^ y) < 0);
  return {whole + below, vi(vu(rest) + vu(y & below))};
}

// NaN in either argument gives NaN, as torch.minimum and numpy have it.
ATTNKIT_INLINE vf max_nan(vf a, vf b) { return (a > b) | (a != a) ? a : b; }
ATTNKIT_INLINE vf min_nan(vf a, vf b) { return (a < b) | (a != a) ? a : b; }

// An integer element as a lane; float32 is read as integers of the same bits, bytes are bools.
template <class T>
ATTNKIT_INLINE int32_t lane_bits(T x) {
  return sizeof(T) == 1 ? (x != 0 ? ~0 : 0) : static_cast<int32_t>(x);
}
ATTNKIT_INLINE int32_t lane_bits(Bf16 x) { return __builtin_bit_cast(int32_t, widen_one(x)); }
ATTNKIT_INLINE int32_t lane_bits(F16 x) { return __builtin_bit_cast(int32_t, widen_one(x)); }

inline int32_t read_int(const Buffer& buf, int64_t offset) {
  switch (buf.dtype) {
    case DType::i32: return static_cast<const int32_t*>(buf.data)[offset];
    case DType::i64: return static_cast<int32_t>(static_cast<const int64_t*>(buf.data)[offset]);
    case DType::u8: return static_cast<const uint8_t*>(buf.data)[offset] != 0 ? ~0 : 0;
    case DType::bf16: return lane_bits(static_cast<const Bf16*>(buf.data)[offset]);
    case DType::f16: return lane_bits(static_cast<const F16*>(buf.data)[offset]);
    case DType::byte:  // of no buffer
    case DType::f32: break;
  }
  return __builtin_bit_cast(int32_t, static_cast<const float*>(buf.data)[offset]);
}

ATTNKIT_INLINE int32_t int_at(const float* p) {
  int32_t i;
  __builtin_memcpy(&i, p, 4);
  return i;
}

// kLanes elements that follow each other, as `lane_bits` has each.
template <class T>
ATTNKIT_INLINE vf load_bits(const T* p) {
  if constexpr (sizeof(T) == 4) return load(reinterpret_cast<const float*>(p));
  if constexpr (sizeof(T) == 2) return widen(p);
  vi bits{};
  for (int i = 0; i < kLanes; ++i) bits[i] = lane_bits(p[i]);
  return as_float(bits);
}

// Adds to each of kCount offsets what an index adds, by its own value. Unsigned: nobody looks at those past the end.
template <int kCount>
ATTNKIT_INLINE void add_offsets(uint64_t* offset, const float* index, int64_t stride) {
  for (int i = 0; i < kCount; ++i)
    offset[i] += static_cast<uint64_t>(int64_t{int_at(index + i)}) * static_cast<uint64_t>(stride);
}
template <int kCount>
ATTNKIT_INLINE bool adjacent(const uint64_t* offset) {
  uint64_t apart = 0;
  for (int i = 0; i < kCount; ++i) apart |= offset[i] ^ (offset[0] + static_cast<uint64_t>(i));
  return apart == 0;
}

// A tile whose indices each depend on the query or on the key alone, such as bias[h, q_idx, kv_idx]. Where the elements
// of a lane are adjacent, squares of the tile are read along its lanes and transposed; where those of a row are, they
// are read as they lie.
template <class T>
void load_separable(float* dst, Shape s, const Buffer& buf, const Operand* index) {
  const T* data = static_cast<const T*>(buf.data);
  uint64_t of_row[kStrip] = {};
  for (int d = 0; d < buf.rank; ++d) {
    const Operand& x = index[d];
    if (x.vec) continue;
    if (x.step == 0)
      data += int_at(x.p) * buf.stride[d];
    else
      add_offsets<kStrip>(of_row, x.p, buf.stride[d]);
  }
  const auto element = [&](uint64_t offset) { return data + static_cast<int64_t>(offset); };
  for (int32_t j = 0; j < s.lanes; j += kLanes) {
    uint64_t of_lane[kLanes] = {};
    for (int d = 0; d < buf.rank; ++d)
      if (index[d].vec) add_offsets<kLanes>(of_lane, index[d].p + j, buf.stride[d]);
    float* to = dst + j;
    int32_t r = 0;
    if (adjacent<kLanes>(of_lane))
      for (; r < s.rows; ++r) store(to + r * s.lanes, load_bits(element(of_lane[0] + of_row[r])));
    for (; r + kLanes <= s.rows && adjacent<kLanes>(of_row + r); r += kLanes) {
      vf x[kLanes];
#pragma GCC unroll 16
      for (int m = 0; m < kLanes; ++m) x[m] = load_bits(element(of_lane[m] + of_row[r]));
      transpose_square(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (r + i) * s.lanes, x[i]);
    }
    for (; r < s.rows; ++r)
      for (int m = 0; m < kLanes; ++m) {
        const int32_t bits = lane_bits(*element(of_lane[m] + of_row[r]));
        __builtin_memcpy(to + r * s.lanes + m, &bits, 4);
      }
  }
}

// dst = buffer[args...]. Indices not proven in bounds are clamped, and `bad` (as many lanes as dst) marks them.
inline void load_buffer(float* dst, Shape s, const Buffer& buf, const Operand* index, float* bad) {
  const bool gathered = buf.dtype == DType::f32 || buf.dtype == DType::i32;
  bool separable = (s.rows > 1 || !gathered) && bad == nullptr;
  for (int d = 0; d < buf.rank; ++d) separable &= !(index[d].vec && index[d].step != 0);
  if (separable) switch (buf.dtype) {
      case DType::f32:
      case DType::i32: return load_separable<int32_t>(dst, s, buf, index);
      case DType::i64: return load_separable<int64_t>(dst, s, buf, index);
      case DType::u8: return load_separable<uint8_t>(dst, s, buf, index);
      case DType::bf16: return load_separable<Bf16>(dst, s, buf, index);
      case DType::f16: return load_separable<F16>(dst, s, buf, index);
      case DType::byte: break;
    }
  bool empty = false;
  for (int d = 0; d < buf.rank; ++d) empty |= buf.size[d] == 0;
  // The lanes' part of the offset fits 32 bits unless the buffer is enormous.
  bool narrow = gathered;
  int64_t span = 0;
  for (int d = 0; d < buf.rank; ++d) span += (buf.size[d] - 1) * (buf.stride[d] < 0 ? -buf.stride[d] : buf.stride[d]);
  narrow &= span < INT32_MAX && bad == nullptr;
  for (int32_t r = 0; r < s.rows; ++r) {
    int64_t base = 0;
    for (int d = 0; d < buf.rank; ++d)
      if (!index[d].vec && bad == nullptr)
        base += int_at(index[d].p + static_cast<int64_t>(r) * index[d].step) * buf.stride[d];
    for (int32_t j = 0; j < s.lanes; j += kLanes) {
      float* out = dst + r * s.lanes + j;
      if (narrow) {
        vi offset{};
        for (int d = 0; d < buf.rank; ++d)
          if (index[d].vec)
            offset += load_int(index[d].p + static_cast<int64_t>(r) * index[d].step + j) *
                      set1_int(static_cast<int32_t>(buf.stride[d]));
        store(out, gather(static_cast<const float*>(buf.data) + base, offset));
        continue;
      }
      vi lanes{}, outside{};
      for (int l = 0; l < kLanes; ++l) {
        int64_t offset = base;
        for (int d = 0; d < buf.rank; ++d) {
          if (!index[d].vec && bad == nullptr) continue;
          const int32_t i = int_at(index[d].p + static_cast<int64_t>(r) * index[d].step + (index[d].vec ? j + l : 0));
          const int64_t last = buf.size[d] - 1;
          const int64_t inside = i < 0 ? 0 : (i > last ? last : i);
          if (inside != i) outside[l] = ~0;
          offset += inside * buf.stride[d];
        }
        if (!empty) lanes[l] = read_int(buf, offset);
      }
      store_int(out, lanes);
      if (bad != nullptr) store_int(bad + r * s.lanes + j, load_int(bad + r * s.lanes + j) | outside);
    }
  }
}

// c * tanh(x / c). One c for all and of ordinary size, as it is but for oddities, is divided by once.
inline void softcap(float* dst, Shape s, const Operand* a) {
  const Operand &x = a[0], &c = a[1];
  if (!c.vec && c.step == 0) {
    const float size = __builtin_fabsf(*c.p);
    if (size > 0x1p-100f && size < 0x1p100f) {
      const vf height = set1(size), steps = set1(1 / (size * kTanhStep)), limit = set1(31 * kTanhStep * size);
      return map1(dst, s, x, [=](vf v) { return height * tanh_in_steps(v, steps, limit); });
    }
  }
  map2(dst, s, x, c, [](vf v, vf w) { return w * tanh(v / w); });
}

// dst = f(x, y, i - j), the difference as a float.
template <class F>
void from_gap(float* dst, Shape s, const Operand* a, F f) {
  map<4>(dst, s, a, [=](vf x, vf y, vf i, vf j) { return f(x, y, to_float(vi(vu(as_int(i)) - vu(as_int(j))))); });
}

// Of a divisor that is one power of two for all its logarithm, else -1.
inline int shift_of(const Operand& divisor) {
  const int32_t y = int_at(divisor.p);
  return !divisor.vec && divisor.step == 0 && y > 0 && (y & (y - 1)) == 0 ? __builtin_ctz(static_cast<uint32_t>(y))
                                                                          : -1;
}

// One instruction other than a leaf or a load. Integers wrap: the analysis has excluded it where a pair exists, and
// signed arithmetic may not.
inline void compute(Op op, float* dst, Shape s, const Operand* a) {
  const auto un = [&](auto f) { map1(dst, s, a[0], f); };
  const auto bin = [&](auto f) { map2(dst, s, a[0], a[1], f); };
  const auto un_i = [&](auto f) { map1(dst, s, a[0], [&](vf x) { return as_float(f(as_int(x))); }); };
  const auto bin_i = [&](auto f) {
    map2(dst, s, a[0], a[1], [&](vf x, vf y) { return as_float(f(as_int(x), as_int(y))); });
  };
  const auto cmp_f = [&](auto f) { map2(dst, s, a[0], a[1], [&](vf x, vf y) { return as_float(f(x, y)); }); };
  const vf one = set1(1.0f);
  switch (op) {
    case Op::neg_f: return un([](vf x) { return -x; });
    case Op::abs_f: return un([](vf x) { return magnitude(x); });
    case Op::add_f: return bin([](vf x, vf y) { return x + y; });
    case Op::sub_f: return bin([](vf x, vf y) { return x - y; });
    case Op::mul_f: return bin([](vf x, vf y) { return x * y; });
    case Op::div_f: return bin([](vf x, vf y) { return x / y; });
    case Op::floordiv_f: return bin([](vf x, vf y) { return floor(x / y); });
    case Op::mod_f: return bin([](vf x, vf y) { return x - floor(x / y) * y; });
    case Op::min_f: return bin([](vf x, vf y) { return min_nan(x, y); });
    case Op::max_f: return bin([](vf x, vf y) { return max_nan(x, y); });
    case Op::pow_f: return bin([](vf x, vf y) { return each_lane2(x, y, __builtin_powf); });
    case Op::exp_f: return un([](vf x) { return exp(x); });
    case Op::exp2_f: return un([](vf x) { return exp2(x); });
    case Op::log_f: return un([](vf x) { return each_lane(x, __builtin_logf); });
    case Op::log2_f: return un([](vf x) { return each_lane(x, __builtin_log2f); });
    case Op::sqrt_f: return un([](vf x) { return sqrt(x); });
    case Op::rsqrt_f: return un([one](vf x) { return one / sqrt(x); });
    case Op::tanh_f: return un([](vf x) { return tanh(x); });
    case Op::sigmoid_f: return un([](vf x) { return sigmoid(x); });
    case Op::erf_f: return un([](vf x) { return each_lane(x, __builtin_erff); });
    case Op::sin_f: return un([](vf x) { return each_lane(x, __builtin_sinf); });
    case Op::cos_f: return un([](vf x) { return each_lane(x, __builtin_cosf); });
    case Op::floor_f: return un([](vf x) { return floor(x); });
    case Op::neg_i: return un_i([](vi x) { return vi(-vu(x)); });
    case Op::abs_i: return un_i([](vi x) { return x < 0 ? vi(-vu(x)) : x; });
    case Op::add_i: return bin_i([](vi x, vi y) { return vi(vu(x) + vu(y)); });
    case Op::sub_i: return bin_i([](vi x, vi y) { return vi(vu(x) - vu(y)); });
    case Op::mul_i: return bin_i([](vi x, vi y) { return vi(vu(x) * vu(y)); });
    case Op::floordiv_i:
      if (const int by = shift_of(a[1]); by >= 0) return un_i([by](vi x) { return x >> by; });
      return bin_i([](vi x, vi y) { return divide(x, y).floor; });
    case Op::mod_i:
      if (const int by = shift_of(a[1]); by >= 0) return un_i([ones = (1 << by) - 1](vi x) { return x & ones; });
      return bin_i([](vi x, vi y) { return divide(x, y).rest; });
    case Op::min_i: return bin_i([](vi x, vi y) { return x < y ? x : y; });
    case Op::max_i: return bin_i([](vi x, vi y) { return x > y ? x : y; });
    case Op::lt_f: return cmp_f([](vf x, vf y) { return x < y; });
    case Op::le_f: return cmp_f([](vf x, vf y) { return x <= y; });
    case Op::gt_f: return cmp_f([](vf x, vf y) { return x > y; });
    case Op::ge_f: return cmp_f([](vf x, vf y) { return x >= y; });
    case Op::eq_f: return cmp_f([](vf x, vf y) { return x == y; });
    case Op::ne_f: return cmp_f([](vf x, vf y) { return x != y; });
    case Op::lt_i: return bin_i([](vi x, vi y) { return x < y; });
    case Op::le_i: return bin_i([](vi x, vi y) { return x <= y; });
    case Op::gt_i: return bin_i([](vi x, vi y) { return x > y; });
    case Op::ge_i: return bin_i([](vi x, vi y) { return x >= y; });
    case Op::eq_i:
    case Op::eq_b: return bin_i([](vi x, vi y) { return x == y; });
    case Op::ne_i:
    case Op::ne_b:
    case Op::xor_b: return bin_i([](vi x, vi y) { return x != y; });
    case Op::xor_i: return bin_i([](vi x, vi y) { return x ^ y; });
    case Op::and_i:
    case Op::and_b: return bin_i([](vi x, vi y) { return x & y; });
    case Op::or_i:
    case Op::or_b: return bin_i([](vi x, vi y) { return x | y; });
    case Op::not_b: return un_i([](vi x) { return ~x; });
    case Op::where_f:
    case Op::where_i:
    case Op::where_b: return select_rows(dst, s, a[0], a[1], a[2]);
    case Op::i_to_f: return un([](vf x) { return to_float(as_int(x)); });
    case Op::b_to_f: return un([one](vf x) { return as_float(as_int(x) & as_int(one)); });
    case Op::b_to_i: return un_i([](vi x) { return x & 1; });
    case Op::f_to_i: return un_i([](vi x) { return to_int(as_float(x)); });
    case Op::exp_weight: return un([](vf x) { return exp_weight(x); });
    case Op::softcap: return softcap(dst, s, a);
    case Op::mul_add: return map<3>(dst, s, a, [](vf x, vf y, vf z) { return fma(x, y, z); });
    case Op::mul_sub_from: return map<3>(dst, s, a, [](vf x, vf y, vf z) { return fma(-x, y, z); });
    case Op::add_ramp: return from_gap(dst, s, a, [](vf x, vf y, vf gap) { return fma(y, gap, x); });
    case Op::add_gap: return from_gap(dst, s, a, [](vf x, vf y, vf gap) { return fma(y, magnitude(gap), x); });
    case Op::sub_gap: return from_gap(dst, s, a, [](vf x, vf y, vf gap) { return fma(-y, magnitude(gap), x); });
    case Op::within:
      return map<3>(dst, s, a,
                    [](vf x, vf lo, vf hi) { return as_float((as_int(lo) <= as_int(x)) & (as_int(x) <= as_int(hi))); });
    default: __builtin_unreachable();  // leaves and loads have their own code
  }
}
