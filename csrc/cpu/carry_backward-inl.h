// The backward of attention that carries, one task: a block of keys, against the blocks of queries of all heads.
//
// With F the sums before each query, which the scores lose, and S what a query adds,
//   dF = -sum over heads of dscore,  dS of a query = dcarry + sum over later queries of dF,
//   and to ds of the head that selects is added d S / d s times dS.
// Of a block of keys nothing else is needed, so a task goes forward through the queries once, with that head alone, and
// keeps the sums before each block of them; and then back, all heads at each block, the one that selects at last. So
// that all heads are at hand, a task has their keys and gradients in its memory.

struct CarriedLayout {
  Places places;
  TileLayout selecting;
  size_t f, d_f, slope, sums, later, before;
  size_t keys, head, size;  // what the layout below has of the keys of each kv head, and then what is known of them

  CarriedLayout(const CarriedBackwardCall& c, const BackwardLayout& base)
      : places(base.places), selecting(c.selecting, base.bn, places) {
    const Problem& p = *c.pairs.problem;
    const auto take = [&](int64_t rows, int64_t columns) { return places.take(rows, columns); };
    for (size_t* tile : {&f, &d_f, &slope}) *tile = take(c.pairs.tile_q, base.bn);
    sums = take(1, base.bn);
    later = take(1, base.bn);
    before = take(c.most_blocks, base.bn);
    Places of_keys = base.of_keys;
    head = of_keys.take(1, 16);
    size = of_keys.next;
    keys = take(p.num_kv_heads, static_cast<int64_t>(size));
  }
};

struct WeighCarried {  // scores to weights
  float* c;
  int64_t stride;
  const float *lse, *f;  // f lies as c does
  ATTNKIT_INLINE vf operator()(vf x, const float* at, int32_t row) const {
    return exp_weight(x - load(f + (at - c)) - set1(lse[row]));
  }
};

struct SlopeCarried {  // do . v to ds, over the weights; and what is carried loses it
  float* c;
  int64_t stride;
  const float* delta;
  float* d_f;
  ATTNKIT_INLINE vf operator()(vf x, const float* at, int32_t row) const {
    const vf ds = load(at) * (x - set1(delta[row]));
    float* to = d_f + (at - c);
    store(to, load(to) - ds);
    return ds;
  }
};

// `Pairs`: how products are made, Backward or what is derived from it.
template <class Pairs>
class CarriedBackward : public Pairs {
  using Extent = typename Pairs::Extent;
  using Operands = typename Pairs::Operands;

 public:
  // `t` is changed: its kv head is the one at hand.
  CarriedBackward(const CarriedBackwardCall& c, BackwardTask& t, float* workspace)
      : Pairs(c.pairs, t, workspace),
        what_(c),
        mine_(t),
        has_(c, typename Pairs::Layout(c.pairs)),
        selecting_(c.selecting, p_, t.sequence, has_.selecting, workspace, workspace + at_.s, kPerKey) {}

  void run(const CarriedTiles& tiles) {
    for (int32_t h = 0; h < p_.num_kv_heads; ++h) {
      place(h);
      this->start();
      keep({});
    }
    const int64_t first = seq_.batch * what_.keys + seq_.kv_start + t_.first;
    const auto keys = static_cast<size_t>(t_.count) * 4;
    gone_ = what_.gone == nullptr ? nullptr : what_.gone + first;
    this->clear(ws_ + has_.sums, at_.bn);
    this->clear(ws_ + has_.later, at_.bn);
    if (what_.initial != nullptr) __builtin_memcpy(ws_ + has_.sums, what_.initial + first, keys);
    BackwardTile tile;
    bool begun = false;
    for (int32_t row = 0; row < tiles.blocks; ++row) {
      __builtin_memcpy(ws_ + has_.before + row * at_.bn, ws_ + has_.sums, static_cast<size_t>(at_.bn) * 4);
      if (!tiles.at(tiles.state, row, what_.head, &tile)) continue;
      if (!begun) begin_all();
      begun = true;
      carry(tile, false);
    }
    if (what_.d_carry != nullptr) __builtin_memcpy(ws_ + has_.later, what_.d_carry + first, keys);
    for (int32_t j = 0; j < at_.bn; ++j)
      if (ws_[has_.sums + j] == kInfinity) ws_[has_.later + j] = 0;
    for (int32_t row = tiles.blocks; row-- > 0;) {
      if (!tiles.at(tiles.state, row, what_.head, &tile)) continue;
      __builtin_memcpy(ws_ + has_.sums, ws_ + has_.before + row * at_.bn, static_cast<size_t>(at_.bn) * 4);
      carry(tile, true);
      back(tile, row, tiles);
    }
    if (what_.d_initial != nullptr) __builtin_memcpy(what_.d_initial + first, ws_ + has_.later, keys);
  }

  int32_t end() {
    int32_t bad = selecting_.bad_load();
    for (int32_t h = 0; h < p_.num_kv_heads; ++h) {
      use(h);
      if (const int32_t found = this->finish(); found >= 0) bad = found;
    }
    return bad;
  }

 private:
  struct Head {
    Rows k;
    bool finite, values_finite;
  };
  static_assert(sizeof(Head) <= 64);

  void keep(const Head& head) { __builtin_memcpy(keys_ + has_.head, &head, sizeof(Head)); }

  void place(int32_t kv_head) {
    mine_.kv_head = kv_head;
    keys_ = ws_ + has_.keys + static_cast<size_t>(kv_head) * has_.size;
  }

  void use(int32_t kv_head) {
    place(kv_head);
    Head head;
    __builtin_memcpy(&head, keys_ + has_.head, sizeof(Head));
    k_ = head.k;
    finite_ = head.finite;
    values_finite_ = head.values_finite;
  }

  // Keys that are gone before the first query may hold anything.
  void begin_all() {
    for (int32_t h = 0; h < p_.num_kv_heads; ++h) {
      place(h);
      this->begin(ws_ + has_.before);
      const Rows v = this->rows(p_.v, this->value_lines(), p_.v_head_dim, at_.dv, ws_ + at_.v);
      keep({k_, finite_, is_finite(v, t_.count, at_.dv)});
    }
    selecting_.begin();
    selecting_.keys(t_.first, t_.count);
  }

  int32_t kv_head_of(int32_t head) const { return head / (p_.num_heads / p_.num_kv_heads); }

  // ---- what is carried: F, and (`keep`) d S / d s, of one tile, whose lanes they have ----

  void carry(const BackwardTile& tile, bool keep) {
    const auto [rows, lane, lanes] = this->extent(tile);
    use(kv_head_of(what_.head));
    this->scores(tile, this->operands(tile));
    selecting_.queries(tile.queries);
    selecting_.narrow(lane, lanes);
    for (int32_t strip = 0; strip < rows; strip += kStrip) {
      const int32_t count = rows - strip < kStrip ? rows - strip : kStrip;
      selecting_.run_strip(strip, count, true,
                           true);  // its mask is another: what sees a key need not select against it
      selecting_.check_loads(strip, count, tile.count, false);
      carry_strip(tile, strip, count, keep);
    }
  }

  static vf at(const Operand& o, int32_t r, int32_t j) {
    const float* x = o.p + static_cast<int64_t>(r) * o.step;
    return o.vec ? load(x + j) : set1_bits(x);
  }

  void carry_strip(const BackwardTile& tile, int32_t strip, int32_t count, bool keep) {
    const auto [rows, lane, lanes] = this->extent(tile);
    const CodeView& code = what_.selecting;
    const float* s = ws_ + at_.s + static_cast<int64_t>(strip) * lanes;
    const Operand plain{s, lanes, true};
    const Operand added = code.score < 0 ? plain : selecting_.operand(code.score, kTile, strip);
    const Operand slope = code.slope < 0 ? plain : selecting_.operand(code.slope, kTile, strip);
    const Operand exists = selecting_.operand(code.mask, kTile, strip);
    const auto query = static_cast<int32_t>(tile.queries.q_first) + strip;
    for (int32_t j = 0; j < lanes; j += kLanes) {
      const int32_t left = tile.count - j, held = left < kLanes ? left : kLanes;
      float* sums = ws_ + has_.sums + lane + j;
      Accumulator keys = accumulator(sums, gone_ == nullptr ? nullptr : gone_ + lane + j, static_cast<size_t>(held));
      for (int32_t r = 0; r < count; ++r) {
        const vi live = as_int(at(exists, r, j));
        const vi stays = keys.gone > query + r;
        const vf before = keys.step(select(live, at(added, r, j), vf{}), query + r);
        if (!keep) continue;
        const int64_t i = static_cast<int64_t>(strip + r) * lanes + j;
        store(ws_ + has_.f + i, before);
        store(ws_ + has_.slope + i, select(live & stays, code.slope < 0 ? set1(1) : at(slope, r, j), vf{}));
      }
      keys.sum = select(keys.gone < query + count, set1(kInfinity), keys.sum);
      store(sums, keys.sum);
    }
  }

  // ---- all heads ----

  void back(const BackwardTile& whole, int32_t row, const CarriedTiles& tiles) {
    whole_ = this->extent(whole);
    this->clear(ws_ + has_.d_f, static_cast<int64_t>(whole_.rows) * whole_.lanes);
    if (whole.full) {
      piece(whole, 0, row, tiles);
    } else {
      for (int32_t m = (whole_.rows - 1) / kPart * kPart; m >= 0; m -= kPart) {
        BackwardTile part = whole;
        part.queries.q_first += m;
        part.queries.q_count = whole_.rows - m < kPart ? whole_.rows - m : kPart;
        if (!what_.mask_by_head) {
          const Span keys = this->find_live(part, whole_.lane, whole_.lanes);
          if (keys.first >= keys.end) continue;
          part.first += keys.first;
          part.count = (keys.end < whole.count ? keys.end : whole.count) - keys.first;
        }
        piece(part, m, row, tiles);
      }
    }
    for (int32_t head = 0; head < p_.num_heads; ++head) {
      BackwardTile tile;
      tiles.at(tiles.state, row, head, &tile);
      tiles.tiles.wait(tiles.tiles.state, tile);  // there may have been no piece, and turns are taken in order
      tiles.tiles.done(tiles.tiles.state, tile);
    }
  }

  // Rows m and on of a block of queries; the head that selects comes last, when all others' dF are there.
  void piece(const BackwardTile& part, int32_t m, int32_t row, const CarriedTiles& tiles) {
    for (int32_t h = 1; h <= p_.num_heads; ++h) {
      const int32_t head = (what_.head + h) % p_.num_heads;
      BackwardTile tile;
      tiles.at(tiles.state, row, head, &tile);
      tile.queries.q_first = part.queries.q_first;
      tile.queries.q_count = part.queries.q_count;
      tile.first = part.first;
      tile.count = part.count;
      tile.rows.lse += m;
      tile.rows.delta += m;
      tile.queries.carried = {ws_ + has_.f + m * whole_.lanes, whole_.lanes, false, t_.first + whole_.lane};
      one_head(tile, m, head == what_.head, tiles.tiles);
    }
  }

  void one_head(const BackwardTile& tile, int32_t m, bool selects, const Tiles& tiles) {
    use(kv_head_of(tile.queries.head));
    const Extent of = this->extent(tile);
    const Operands of_tile = this->operands(tile);
    float *s = ws_ + at_.s, *d_f = ws_ + has_.d_f + m * whole_.lanes + (of.lane - whole_.lane);
    const bool plain = this->exists(tile) && what_.subtracts;
    if (plain && is_forgotten(tile, of_tile, d_f, selects)) return;
    if constexpr (std::is_same_v<Pairs, Backward>) {
      if (plain && this->in_one_stretch())
        return this->products(tile, tiles, of_tile, WeighCarried{s, of.lanes, tile.rows.lse, ws_ + has_.f},
                              SlopeCarried{s, of.lanes, tile.rows.delta, d_f}, [&](float* ds) {
                                if (selects) select_keys(of, m, ds, d_f);
                              });
    } else {
      if (plain && !selects && this->in_one_stretch())
        return this->products(tile, tiles, of_tile, this->carried_slopes(tile, ws_ + has_.f, d_f, of.lanes));
    }
    this->scores(tile, of_tile);
    this->slopes(tile, of_tile);
    follow_score(tile, d_f);
    if (selects) select_keys(of, m, ws_ + at_.dp, d_f);
    if (this->guarded(tile)) return this->add_guarded_products(tile, tiles);
    this->add_products(tile, tiles, of_tile);
  }

  // Whether all weights of a tile are exactly 0, and with them all that they add and all that is selected against the
  // keys. Only looked at where what is carried says that it may be so.
  bool is_forgotten(const BackwardTile& tile, const Operands& of_tile, const float* d_f, bool selects) {
    constexpr float kNoWeight = -106;  // its exponential is 0
    const auto [rows, lane, lanes] = this->extent(tile);
    float* s = ws_ + at_.s;
    const float* f = ws_ + has_.f;
    const auto there = [&](int32_t j) {
      const int32_t left = tile.count - j;
      return lane_mask(left < kLanes ? (uint32_t{1} << left) - 1 : (uint32_t{1} << kLanes) - 1);
    };
    vi near{}, some{};
    for (int32_t j = 0; j < lanes; j += kLanes) near |= (load(f + j) < set1(-kNoWeight)) & there(j);
    if (any(near) || !finite_ || !values_finite_ || !tile.rows.finite) return false;
    this->scores(tile, of_tile);
    for (int32_t j = 0; j < lanes; j += kLanes) {
      if (selects) some |= (load(ws_ + has_.later + lane + j) != vf{}) & there(j);
      for (int32_t r = 0; r < rows; ++r) {
        const int64_t i = static_cast<int64_t>(r) * lanes + j;
        some |= ~(load(s + i) - load(f + i) - set1(tile.rows.lse[r]) <= set1(kNoWeight)) & there(j);
        if (selects) some |= (load(d_f + i) != vf{}) & there(j);
      }
    }
    for (int32_t r = 0; r < rows; ++r) some |= ~(set1(tile.rows.delta[r]) * vf{} == vf{});
    return !any(some);
  }

  // s becomes p, and do . v becomes ds, of which what is carried loses as much as the score has.
  void follow_score(const BackwardTile& tile, float* d_f) {
    const auto [rows, lane, lanes] = this->extent(tile);
    tile_.queries(tile.queries);
    tile_.narrow(lane, lanes);
    for (int32_t strip = 0; strip < rows; strip += kStrip) {
      const Shape shape{rows - strip < kStrip ? rows - strip : kStrip, lanes};
      tile_.run_strip(strip, shape.rows, c_.has_score, !tile.full);
      tile_.check_loads(strip, shape.rows, tile.count, tile.full);
      this->weigh(tile, strip, shape);
      const float* dp = ws_ + at_.dp + static_cast<int64_t>(strip) * lanes;
      const bool less = c_.code.slope_f < 0;
      const Operand slope = less ? Operand{dp, lanes, true} : tile_.operand(c_.code.slope_f, kTile, strip);
      for (int32_t r = 0; r < shape.rows; ++r)
        for (int32_t j = 0; j < lanes; j += kLanes) {
          const vf d = load(dp + r * lanes + j);
          float* to = d_f + static_cast<int64_t>(strip + r) * whole_.lanes + j;
          store(to, less ? load(to) - d : load(to) + select(d == vf{}, vf{}, d * at(slope, r, j)));
        }
      this->follow(strip, shape);
    }
  }

  // From the last query to the first: what was carried to later ones.
  void select_keys(const Extent& of, int32_t m, float* ds, const float* d_f) {
    const float* slope = ws_ + has_.slope + m * whole_.lanes + (of.lane - whole_.lane);
    for (int32_t j = 0; j < of.lanes; j += kLanes) {
      float* at = ws_ + has_.later + of.lane + j;
      vf later = load(at);
      for (int32_t r = of.rows; r-- > 0;) {
        const int64_t i = static_cast<int64_t>(r) * whole_.lanes + j;
        float* x = ds + static_cast<int64_t>(r) * of.lanes + j;
        store(x, fma(load(slope + i), later, load(x)));
        later += load(d_f + i);
      }
      store(at, later);
    }
  }

  using Pairs::at_;
  using Pairs::c_;
  using Pairs::finite_;
  using Pairs::k_;
  using Pairs::keys_;
  using Pairs::p_;
  using Pairs::seq_;
  using Pairs::t_;
  using Pairs::tile_;
  using Pairs::ws_;

  const CarriedBackwardCall& what_;
  BackwardTask& mine_;
  const CarriedLayout has_;
  Tile selecting_;
  Extent whole_{};
  const int32_t* gone_ = nullptr;
  bool values_finite_ = false;
};

template <class Pairs>
int32_t carried_backward(const CarriedBackwardCall& c, const BackwardTask& t, const CarriedTiles& tiles,
                         float* workspace) {
  BackwardTask task = t;
  CarriedBackward<Pairs> backward(c, task, workspace);
  backward.run(tiles);
  return backward.end();
}

template <class Pairs>
size_t carried_backward_bytes(const CarriedBackwardCall& c) {
  return CarriedLayout(c, typename Pairs::Layout(c.pairs)).places.next * sizeof(float);
}

constexpr CarryKernel kCarryKernel{select_keys<FloatForward>, accumulate, carried_backward_bytes<Backward>,
                                   carried_backward<Backward>};
