// Few queries over a cache that keeps codes, which no tile of floats is made of. `Products` attend few queries to keys
// that are numbers; what multiplies codes is a class derived from this. What expressions change, and pairs that do not
// exist, take values as a tile of floats; so do values of codecs that have no product.

// Whether keys are codes whose products with a query are summed in 32 bits: of int8 that takes half of the channels.
inline bool are_codes(const Store& keys, int32_t channels, int32_t most) {
  if (keys.codec == Codec::int8 && most > kMostCodeChannels / 2) most = kMostCodeChannels / 2;
  return is_words(keys.codec) && channels % 32 == 0 && channels <= most;
}

template <class Products>
class CodeDecode : public Products {
 protected:
  using Products::at_;
  using Products::c_;
  using Products::kv_head_;
  using Products::ld_;
  using Products::p_;
  using Products::seq_;
  using Products::t_;
  using Products::ws_;

 public:
  template <class... Few>
  CodeDecode(const Call& c, const Task& t, float* workspace, Few... few) : Products(c, t, workspace, few...) {}

  void keys(int64_t first, int32_t count, bool full, int64_t next) {
    const int32_t k_codes = codes_of(keys_, first, count), v_codes = codes_of(values_, first, count);
    const bool direct = full && !this->thinned() && takes_values(first, v_codes);
    CodeTile k = ahead_k_, v = ahead_v_;
    if (first != ahead_) {
      k = codes_from(keys_, first);
      v = codes_from(values_, first);
    }
    k.count = blocks_of_runs(k_codes);
    v.count = direct ? blocks_of_runs(v_codes) : 0;
    ahead_ = next;
    ahead_k_ = codes_from(keys_, next);
    ahead_v_ = codes_from(values_, next);
    const CodeTile& then = ahead_k_;
    open_pages(then);
    ld_ = round_up(round_up(count, kRun), kBlockVecs * kLanes);
    this->tile_.narrow(0, ld_);
    if (!full) this->find_live_by_key(first, count);
    code_scores(k, first, v);
    if (k_codes < count) newest_scores(newest(keys_, p_.head_dim, first + k_codes, count - k_codes), k_codes);
    this->modify_by_key(first, count, full);
    this->hide_tail(0, count);
    if (!direct) {
      const Lines values = this->values_of(first, count);
      return this->add_few(first, values, 0, count, full, {values, kNoLines});
    }
    this->weigh_by_key(0, count);
    open_pages(ahead_v_);
    if (v.count > 0) code_sums(v, v_codes, then);
    if (v_codes == count) return;
    for (int32_t m = 0; v_codes > 0 && m < kFewLanes; ++m) ws_[at_.alpha + m] = 1;  // what was before has been scaled
    newest_sums(newest(values_, p_.v_head_dim, first + v_codes, count - v_codes), v_codes);
  }

 protected:
  // S^T of the codes of a tile, whose first key is `first`. Fetches `next` meanwhile.
  virtual void code_scores(const CodeTile& k, int64_t first, const CodeTile& next) = 0;
  // S^T of keys that are bfloat16, from column `at` on.
  virtual void newest_scores(const Lines& keys, int32_t at) = 0;
  // Whether so many values from `first` on are multiplied as codes.
  virtual bool takes_values(int64_t first, int32_t count) const = 0;
  // Adds the first `count` values, which are codes, with the weights that S^T has become.
  virtual void code_sums(const CodeTile& v, int32_t count, const CodeTile& next) = 0;

  // Adds values that are bfloat16, with the weights that S^T has from column `at` on.
  virtual void newest_sums(const Lines& values, int32_t at) {
    few_by_key(ws_ + at_.st + at, ld_, values.count, t_.lanes(), ws_ + at_.s, [](int32_t, vf) {});
    few_values<Bf16>(ws_ + at_.s, at_.bm, values, 0, values.count, ws_ + at_.guarded, ws_ + at_.alpha, ws_ + at_.o,
                     at_.dv, t_.lanes(), kNothing);
  }

  float* by_query(int32_t m) const { return ws_ + at_.st + m * ld_; }

  // The groups of keys of which some share scales, counted from the tile's first: of each run.
  void groups_of_runs(const CodeTile& k, int64_t first, int32_t* groups) const {
    int32_t left = keys_.group - static_cast<int32_t>(first % keys_.group), group = 0;
    for (int32_t r = 0; r < k.count; ++r, left -= kRun) {
      if (left == 0) {
        left = keys_.group;
        ++group;
      }
      groups[r] = group;
    }
  }

  const Store& keys_ = p_.stores[0];
  const Store& values_ = p_.stores[1];

 private:
  int64_t ahead_ = -1;  // the first token of the tile that comes next, and where it lies
  CodeTile ahead_k_, ahead_v_;

  static int32_t blocks_of_runs(int32_t tokens) { return (tokens + kRun - 1) / kRun; }

  // How many of the tokens from `first` on are codes.
  int32_t codes_of(const Store& s, int64_t first, int32_t count) const {
    if (s.newest == nullptr || first + count <= seq_.num_coded) return count;
    return first < seq_.num_coded ? static_cast<int32_t>(seq_.num_coded - first) : 0;
  }

  // Of as many tokens from `first` on as a tile has: they need not all be seen. Nothing if there is none (-1).
  CodeTile codes_from(const Store& s, int64_t first) const {
    if (first < 0 || !is_words(s.codec)) return {};
    const int64_t left = seq_.kv_len - first;
    const int32_t count = left < c_.tile_kv ? static_cast<int32_t>(left) : c_.tile_kv;
    return {s, p_.pages, seq_, kv_head_, first, codes_of(s, first, count)};
  }

  // Tokens that are kept as they are, `first` at the beginning of a run.
  Lines newest(const Store& s, int32_t channels, int64_t first, int32_t count) const {
    Lines lines(newest_at(s, seq_.batch, kv_head_, first), 2 * channels, 2 * channels, count);
    for (int32_t n = 0; n < count; n += kRun)
      lines.run[n / kRun] = reinterpret_cast<const char*>(newest_at(s, seq_.batch, kv_head_, first + n));
    return lines;
  }
};
