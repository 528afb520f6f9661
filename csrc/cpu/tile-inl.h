// The user's expressions on one tile of pairs: what the code says, evaluated in strips of kStrip rows by all lanes.

inline int32_t round_up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }

// Hands out a thread's workspace, in floats; every part starts on a cache line.
struct Places {
  size_t next = 0;
  size_t take(int64_t rows, int64_t columns) {
    const size_t at = next;
    next += (static_cast<size_t>(rows * columns) + 15) / 16 * 16;
    return at;
  }
};

// Where the values of the expressions lie in it.
struct TileLayout {
  int32_t bm;  // the most lanes of a tile, a whole number of vectors
  size_t scalars, per_query, per_key, strips, bad_scalar, bad_query, bad_key, bad_strip, carried;

  TileLayout(const CodeView& code, int32_t lanes, Places& places) : bm(lanes) {
    scalars = places.take(code.slots[kScalar], 16);
    per_query = places.take(code.slots[kPerQuery], kMaxTileQ);
    per_key = places.take(code.slots[kPerKey], kMaxTileKv);
    strips = places.take(code.slots[kTile], kStrip * bm);
    bad_scalar = places.take(1, 16);
    bad_query = places.take(1, kMaxTileQ);
    bad_key = places.take(1, kMaxTileKv);
    bad_strip = places.take(kStrip, bm);
    carried = places.take(code.carries ? kMaxTileKv : 0, kMostByQuery);
  }
};

class Tile {
 public:
  // `s`: the scaled logits, a row of lanes for each key (query) of the tile. `lanes`: what its lanes are, kPerQuery or
  // kPerKey; its rows are the other.
  Tile(const CodeView& code, const Problem& p, int32_t sequence, const TileLayout& at, float* workspace, float* s,
       Rank lanes)
      : code_(code), p_(p), sequence_(sequence), at_(at), ws_(workspace), s_(s), lane_rank_(lanes), lanes_(at.bm) {}

  // Once, before anything else. Not where nothing is visible: then no index of the sequence was proven.
  void begin() {
    clear(at_.bad_scalar, 16);
    run_section(kScalar, 16);
  }

  // The queries of the tiles to come,
  void queries(const Task& t) {
    t_ = &t;
    if (checked()) clear(at_.bad_query, kMaxTileQ);
    run_section(kPerQuery, round_up(t.lanes(), kLanes));
  }

  // and their keys. Where keys are its lanes, those past the end repeat the last one.
  void keys(int64_t first, int32_t count) {
    first_ = first;
    count_ = count;
    if (checked()) clear(at_.bad_key, kMaxTileKv);
    const int32_t lanes = round_up(count, kLanes);
    run_section(kPerKey, lane_rank_ == kPerKey && lanes < lanes_ ? lanes_ : lanes);
    if (code_.carries && lane_rank_ == kPerQuery && !t_->carried.by_key) turn_carried();
  }

  // Only `lanes` lanes, a whole number of vectors, are in the tile, from lane `first` on.
  void narrow(int32_t first, int32_t lanes) {
    lane_ = first;
    lanes_ = lanes;
  }

  void run_strip(int32_t strip, int32_t rows, bool score, bool mask) {
    if (checked()) clear(at_.bad_strip, static_cast<int64_t>(kStrip) * lanes_);
    for (int32_t i = 0; i < code_.order_size[kTile]; ++i) {
      const int32_t number = code_.order[kTile][i];
      const Instruction& in = code_.code[number];
      if ((score && in.for_score) || (mask && in.for_mask)) execute(number, {rows, lanes_}, strip);
    }
  }

  // How value `number` is read where a result of rank `rank` is computed, from row `strip` of the tile on.
  Operand operand(int32_t number, Rank rank, int32_t strip) {
    const Instruction& in = code_.code[number];
    if (in.op == Op::var_s || number == code_.in_place) return {scores(strip), lanes_, true};
    if (in.op == Op::var_f) return carried(strip);
    const float* p = value(in);
    if (in.rank == kTile) return {p, lanes_, true};
    if (in.rank == kScalar) return {p, 0, false};
    if (in.rank == rank) return {p, 0, true};
    return in.rank == lane_rank_ ? Operand{p + lane_, 0, true} : Operand{p + strip, 1, false};
  }

  // What was carried onto the keys of the tile.
  Operand carried(int32_t strip) const {
    const Carried& c = t_->carried;
    const auto ld = static_cast<int32_t>(c.ld);
    const int64_t key = first_ - c.first;
    if (lane_rank_ == kPerKey) return {c.f + strip * c.ld + key + lane_, t_->q_count == 1 ? 0 : ld, true};
    if (c.by_key) return {c.f + (key + strip) * c.ld, ld, true};
    return {ws_ + at_.carried + static_cast<int64_t>(strip) * kMostByQuery, kMostByQuery, true};
  }

  // Of lanes from `lane` on, in which the key of row r is not gone.
  vi stays(int32_t strip, int32_t r, int32_t lane) const {
    const Operand f = carried(strip);
    return load(f.p + static_cast<int64_t>(r) * f.step + lane) < set1(kInfinity);
  }

  bool live(int32_t strip, int32_t r, int32_t lane) {
    const Operand o = operand(code_.mask, kTile, strip);
    return int_at(o.p + static_cast<int64_t>(r) * o.step + (o.vec ? lane : 0)) != 0;
  }

  // A clamped load matters only where a pair exists. `lanes`: without those past the end.
  void check_loads(int32_t strip, int32_t rows, int32_t lanes, bool full) {
    if (!checked()) return;
    const bool queries = lane_rank_ == kPerQuery;
    const size_t of_lane = (queries ? at_.bad_query : at_.bad_key) + static_cast<size_t>(lane_),
                 of_row = (queries ? at_.bad_key : at_.bad_query) + static_cast<size_t>(strip);
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t m = 0; m < lanes; ++m)
        if ((full || live(strip, r, m)) &&
            (bits(at_.bad_scalar) | bits(at_.bad_strip + static_cast<size_t>(r * lanes_ + m)) |
             bits(of_lane + static_cast<size_t>(m)) | bits(of_row + static_cast<size_t>(r))) != 0)
          bad_load_ = bad_candidate_;
  }

  // Whether loads may be outside their buffers.
  bool checked() const { return !code_.all_loads_in_bounds; }

  int32_t bad_load() const { return bad_load_; }  // the instruction of a load outside its buffer, or -1

 private:
  void clear(size_t at, int64_t n) { __builtin_memset(ws_ + at, 0, static_cast<size_t>(n) * sizeof(float)); }
  int32_t bits(size_t at) const { return int_at(ws_ + at); }
  int32_t head_of(int32_t m) const { return t_->head + m / t_->q_count; }

  // Of a few queries: a row for each of them becomes a lane.
  void turn_carried() {
    const Carried& c = t_->carried;
    for (int32_t m = 0; m < t_->lanes(); ++m) {
      const float* f = c.f + m % t_->q_count * c.ld + first_ - c.first;
      for (int32_t n = 0; n < count_; ++n) ws_[at_.carried + static_cast<size_t>(n * kMostByQuery + m)] = f[n];
    }
  }

  float* scores(int32_t strip) { return s_ + static_cast<int64_t>(strip) * lanes_; }

  float* value(const Instruction& in) {
    switch (in.rank) {
      case kScalar: return ws_ + at_.scalars + static_cast<size_t>(in.slot) * 16;
      case kPerQuery: return ws_ + at_.per_query + static_cast<size_t>(in.slot) * kMaxTileQ;
      case kPerKey: return ws_ + at_.per_key + static_cast<size_t>(in.slot) * kMaxTileKv;
      default: return ws_ + at_.strips + static_cast<size_t>(in.slot) * static_cast<size_t>(kStrip * at_.bm);
    }
  }

  void fill(float* dst, int32_t bits) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(dst + i, &bits, 4);
  }

  template <class F>
  void fill_lanes(float* dst, int32_t lanes, int32_t count, F index) {
    for (int32_t i = 0; i < lanes; ++i) {
      const int32_t value = static_cast<int32_t>(index(i < count ? i : count - 1));
      __builtin_memcpy(dst + i, &value, 4);
    }
  }

  // The same where index(i) = first + i: once for every tile.
  void count_up(float* dst, int32_t lanes, int32_t count, int32_t first) {
    vi index{};
    for (int32_t i = 0; i < kLanes; ++i) index[i] = i;
    for (int32_t i = 0; i < lanes; i += kLanes, index += kLanes)
      store_int(dst + i, (index < count ? index : set1_int(count - 1)) + first);
  }

  void run_section(Rank rank, int32_t lanes) {
    for (int32_t i = 0; i < code_.order_size[rank]; ++i) execute(code_.order[rank][i], {1, lanes}, 0);
  }

  void execute(int32_t number, Shape shape, int32_t strip) {
    const Instruction& in = code_.code[number];
    const bool given = in.op == Op::var_s || in.op == Op::var_f;
    float* dst = given ? nullptr : number == code_.in_place ? scores(strip) : value(in);
    Operand a[kMaxArgs];
    for (int i = 0; i < in.nargs; ++i) a[i] = operand(in.args[i], in.rank, strip);
    switch (in.op) {
      case Op::const_f:
      case Op::const_i: return fill(dst, in.attr);
      case Op::const_b: return fill(dst, in.attr != 0 ? ~0 : 0);
      case Op::param: return fill(dst, __builtin_bit_cast(int32_t, p_.params[in.attr]));
      case Op::var_b: return fill(dst, p_.entry_of(sequence_));
      case Op::var_q_len: return fill(dst, static_cast<int32_t>(p_.q_len_of(sequence_)));
      case Op::var_kv_len: return fill(dst, static_cast<int32_t>(p_.kv_len_of(sequence_)));
      case Op::var_s:
      case Op::var_f: return;
      // Lanes past the end repeat the last one, so that every lane stays inside what the analysis has proven.
      case Op::var_h: return fill_lanes(dst, shape.lanes, t_->lanes(), [&](int32_t m) { return head_of(m); });
      case Op::var_q_idx:
        return fill_lanes(dst, shape.lanes, t_->lanes(),
                          [&](int32_t m) { return p_.query_of(sequence_, t_->query(m % t_->q_count)); });
      case Op::var_kv_idx:
        if (p_.groups == nullptr) return count_up(dst, shape.lanes, count_, static_cast<int32_t>(first_));
        return fill_lanes(dst, shape.lanes, count_, [&](int32_t n) { return p_.key_of(sequence_, first_ + n); });
      case Op::load_f:
      case Op::load_i:
      case Op::load_b: {
        float* bad = nullptr;
        if (!code_.load_in_bounds[number]) {
          bad_candidate_ = number;
          const size_t mark[4] = {at_.bad_scalar, at_.bad_query, at_.bad_key, at_.bad_strip};
          bad = ws_ + mark[in.rank];
        }
        return load_buffer(dst, shape, p_.buffers[in.attr], a, bad);
      }
      default: return compute(in.op, dst, shape, a);
    }
  }

  const CodeView& code_;
  const Problem& p_;
  const int32_t sequence_;
  const TileLayout at_;
  float *ws_, *s_;
  const Rank lane_rank_;
  int32_t lane_ = 0, lanes_;
  const Task* t_ = nullptr;
  int64_t first_ = 0;
  int32_t count_ = 1;
  int32_t bad_candidate_ = -1, bad_load_ = -1;
};
