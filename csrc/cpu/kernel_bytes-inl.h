// Codes on the byte dot product, four channels to a unit. It takes one unsigned operand: queries are read 128 larger
// than they are, and what that adds to a key's sums they start with.

struct ByteProduct : ByteUnits {
  struct Dot {
    const int32_t* starts;
    const float *factor, *shift;

    static ATTNKIT_INLINE vf run(vf key, vf queries, vf sum) {
      dot_bytes(sum, queries, key);
      return sum;
    }
    ATTNKIT_INLINE Dot at(int32_t key, int32_t lane) const { return {starts + key, factor + lane, shift + lane}; }
    ATTNKIT_INLINE vf start(int32_t key) const { return set1_bits(starts + key); }
    ATTNKIT_INLINE vf finish(vf sum, int32_t, int v, bool first) const {
      return fma(to_float(as_int(sum)), load(factor + v * kLanes), first ? load(shift + v * kLanes) : vf{});
    }
  };

  static void pack(const int8_t* const* rows, int32_t queries, int32_t channels, float* qt, int32_t bm) {
    const auto unsigned_bytes = [](auto x) { return __builtin_bit_cast(decltype(x), flip(x)); };
    pack_units(rows, queries, channels, unsigned_bytes, qt, bm);
  }
  static ATTNKIT_INLINE vf code(const float* qt, int32_t channel, int32_t bm) {
    const vi units = load_int(qt + channel / 4 * bm);
    return to_float((units >> channel % 4 * 8 & 0xff) - 128);
  }

 private:
  static ATTNKIT_INLINE vi flip(vf x) { return as_int(x) ^ static_cast<int32_t>(0x80808080); }
  static ATTNKIT_INLINE uint32_t flip(float x) { return __builtin_bit_cast(uint32_t, x) ^ 0x80808080; }
};

int32_t run_by_dtype(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, const Parts* parts,
                     float* workspace) {
  const Problem& p = *c.problem;
  const bool pairs = multiplies_pairs(p), few = has_few_queries(p, t) && p.skip == 0;
  const auto run_it = [&] {
    if (p.codes != nullptr)
      return pairs ? run<EncodedUnits<PairForward, ByteProduct>> : run<EncodedUnits<FloatForward, ByteProduct>>;
    if (p.stores != nullptr && p.dtype == DType::bf16 && few && ByteCodes::takes(p)) return run<ByteCodes>;
    if (pairs && !few) return run<PairForward>;
    if (pairs && p.stores == nullptr) return run<PairDecode>;
    return kAvx512Kernel.run;
  }();
  return run_it(c, t, ranges, num_ranges, parts, workspace);
}

int32_t gather_by_dtype(const Call& c, const Task& t, const Pieces& pieces, float* workspace) {
  return (c.problem->dtype == DType::bf16 ? gather<PairForward> : kAvx512Kernel.gather)(c, t, pieces, workspace);
}

// What heads select, as `run_by_dtype` has it.
int32_t select_by_dtype(const Call& c, const Task& t, const KeyRange* ranges, size_t num_ranges, float* sums,
                        float* workspace) {
  const auto select = selects_pairs(*c.problem, t) ? select_keys<PairForward> : kAvx512Kernel.carry.select;
  return select(c, t, ranges, num_ranges, sums, workspace);
}
