// The backward of bfloat16 on the tile registers of AMX: PairBackward with other products. Left factors are queries and
// cotangents as they lie in memory, and the rows of slopes; right ones keys and values as pairs of channels, weights
// and slopes as pairs of queries, keys as pairs of keys. So dk and dv grow transposed, [channel][key], from transposed
// queries and cotangents.

struct AmxLayout : PairLayout {
  int32_t ld;  // of weights and slopes: whole tiles, in depth too
  size_t kt, vt, k_pairs;  // of_keys, as PairLayout has them, whole tiles
  size_t dk_columns, dv_columns;  // of_keys: sums, [channel][key]
  size_t q_columns, do_columns;  // [32 queries][channel][query]
  size_t weights, slopes, slope_rows;  // as PairLayout has them, whole tiles
  size_t dq;
  size_t s, dp;  // of a block of pairs, and of the next

  explicit AmxLayout(const BackwardCall& c) : PairLayout(c), ld(round_up(bn, kTileDepth)) {
    const int32_t deep = round_up(c.tile_q, kTileDepth);
    kt = of_keys.take(units_k, ld);
    vt = of_keys.take(units_v, ld);
    k_pairs = of_keys.take(ld / 2 + kTileRows, 2 * units_k);
    dk_columns = of_keys.take(dk, ld);
    dv_columns = of_keys.take(dv, ld);
    q_columns = places.take(deep / 2, dk);
    do_columns = places.take(deep / 2, dv);
    weights = places.take(deep / 2, ld);
    slopes = places.take(deep / 2, ld);
    slope_rows = places.take(deep, ld / 2);
    dq = places.take(deep, dk);
    s = places.take(2 * kBlock, kBlock);
    dp = places.take(2 * kBlock, kBlock);
  }

  static constexpr int32_t kBlock = 2 * kTileRows;
};

class AmxBackward : public PairBackward {
 public:
  using Layout = AmxLayout;

  AmxBackward(const BackwardCall& c, const BackwardTask& t, float* workspace) : PairBackward(c, t, workspace), amx_(c) {
    weights_ = ws_ + amx_.weights;
    slopes_.pairs = ws_ + amx_.slopes;
    slopes_.rows = ws_ + amx_.slope_rows;
    keys_ = workspace + amx_.places.next;
  }

  // Whatever else is in a call, a sequence has the same bits: what decides is the call's configuration, and the
  // sequence. Less than a tile of queries or keys is no faster on tiles.
  static bool takes(const BackwardCall& c, const Sequence& s) {
    return takes(c) && s.q_len >= kTileRows && s.kv_len >= kTileRows;
  }
  static bool takes(const BackwardCall& c) {
    const Problem& p = *c.problem;
    return p.dtype == DType::bf16 && p.head_dim >= kTileRows && p.v_head_dim >= kTileRows &&
           c.tile_q % kTileRows == 0 && c.tile_kv % kTileRows == 0;
  }

  void start() {
    PairBackward::start();
    clear(keys_ + amx_.dk_columns, static_cast<int64_t>(amx_.ld) * amx_.dk);
    clear(keys_ + amx_.dv_columns, static_cast<int64_t>(amx_.ld) * amx_.dv);
  }

  void begin(const float* gone = nullptr) {
    const auto [k, v] = units_of_keys(gone);
    clear(keys_ + amx_.kt, static_cast<int64_t>(amx_.units_k) * amx_.ld);
    clear(keys_ + amx_.vt, static_cast<int64_t>(amx_.units_v) * amx_.ld);
    clear(keys_ + amx_.k_pairs, static_cast<int64_t>(amx_.ld / 2 + kTileRows) * 2 * amx_.units_k);
    const auto same = [](vf x) { return x; };
    transpose(k, amx_.units_k, keys_ + amx_.kt, amx_.ld, same);
    transpose(v, amx_.units_v, keys_ + amx_.vt, amx_.ld, same);
    pair_rows(k, t_.count, amx_.units_k, keys_ + amx_.k_pairs);
  }

  int32_t finish() {
    join(keys_ + amx_.dk_columns, amx_.dk, keys_ + at_.d_keys);
    join(keys_ + amx_.dv_columns, amx_.dv, keys_ + at_.d_values);
    return PairBackward::finish();
  }

 protected:
  Operands operands(const BackwardTile& tile) override {
    const int32_t rows = tile.queries.q_count;
    const auto [q, d_o] = PairBackward::operands(tile);
    slopes_.stride = round_up(slopes_.stride, kTileDepth);
    return {whole_tiles(q, rows, amx_.units_k, pairs_.q_units), whole_tiles(d_o, rows, amx_.units_v, pairs_.do_units)};
  }

  void scores(const BackwardTile& tile, const Operands& of_tile) override {
    const Extent of = extent(tile);
    float* s = ws_ + at_.s;
    tile_products(left(of_tile.q), of.rows, right(keys_ + amx_.kt + of.lane, amx_.ld), of.lanes,
                  amx_.units_k / kTileRows, false, s, of.lanes);
    for (int32_t i = 0; i < of.rows * of.lanes; i += kLanes) store(s + i, load(s + i) * set1(p_.scale));
  }
  void slopes(const BackwardTile& tile, const Operands& of_tile) override {
    const Extent of = extent(tile);
    tile_products(left(of_tile.d_o), of.rows, right(keys_ + amx_.vt + of.lane, amx_.ld), of.lanes,
                  amx_.units_v / kTileRows, false, ws_ + at_.dp, of.lanes);
  }

  bool at_once(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) override {
    if (!plain(tile)) return false;
    with_slopes(tile, [&](const auto& make) { products(tile, tiles, of_tile, make); });
    return true;
  }

  static constexpr bool in_one_stretch() { return true; }
  void products(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile, const auto& make) {
    plain_blocks(of_tile, extent(tile), make);
    multiply_rounded(tile, tiles, of_tile);
  }

  void multiply_rounded(const BackwardTile& tile, const Tiles& tiles, const Operands& of_tile) override {
    const Extent of = extent(tile);
    const int32_t rows = of.rows, steps = (rows + kTileDepth - 1) / kTileDepth;
    clear_rest(of, tile.count, steps);
    columns(of_tile.d_o, rows, p_.v_head_dim, amx_.dv, amx_.do_columns);
    tile_products(left(amx_.do_columns, amx_.dv), amx_.dv, right(weights_, slopes_.stride), of.lanes, steps, true,
                  keys_ + amx_.dv_columns + of.lane, amx_.ld);
    columns(of_tile.q, rows, p_.head_dim, amx_.dk, amx_.q_columns);
    tile_products(left(amx_.q_columns, amx_.dk), amx_.dk, right(slopes_.pairs, slopes_.stride), of.lanes, steps, true,
                  keys_ + amx_.dk_columns + of.lane, amx_.ld);
    float* dq = ws_ + amx_.dq;
    const float* k_pairs = keys_ + amx_.k_pairs + static_cast<int64_t>(of.lane) * amx_.units_k;
    tile_products(left({slopes_.rows, slopes_.stride / 2}), rows, right(k_pairs, 2 * amx_.units_k), amx_.dk,
                  slopes_.stride / kTileDepth, false, dq, amx_.dk);
    add_to_queries(tile, tiles, [&](float* sum, int64_t stride) {
      const AddScaled add{sum, stride, p_.scale};
      for (int32_t m = 0; m < rows; ++m)
        for (int32_t d = 0; d < amx_.dk; d += kLanes) {
          float* x = sum + m * stride + d;
          store(x, add(load(dq + m * amx_.dk + d), x, m));
        }
    });
  }

 private:
  static TileMatrix left(Rows rows) { return {rows.data, 4 * rows.stride, kTileBytes, 4 * kTileRows * rows.stride}; }
  TileMatrix left(size_t columns, int32_t channels) const {
    return {ws_ + columns, kTileBytes, kTileBytes * channels, kTileBytes * kTileRows};
  }
  static TileMatrix right(const float* pairs, int64_t ld) { return {pairs, 4 * ld, 4 * kTileRows * ld, kTileBytes}; }

  // Rows where they lie, if there are whole tiles of them: else a copy, behind which there may be anything.
  Rows whole_tiles(Rows from, int32_t rows, int32_t units, size_t at) const {
    float* to = ws_ + at;
    if (rows % kTileRows == 0 || from.data == to) return from;
    for (int32_t r = 0; r < rows; ++r)
      __builtin_memcpy(to + r * units, from.data + r * from.stride, static_cast<size_t>(units) * sizeof(float));
    return {to, units};
  }

  // Both products of a block of pairs while the first cache holds them, and those of the next before its weights and
  // slopes are made.
  template <class S>
  __attribute__((noinline)) void plain_blocks(const Operands& of_tile, const Extent& of, const S& slopes) {
    constexpr int32_t kBlock = AmxLayout::kBlock;
    const TileMatrix q = left(of_tile.q), d_o = left(of_tile.d_o), k = right(keys_ + amx_.kt + of.lane, amx_.ld),
                     v = right(keys_ + amx_.vt + of.lane, amx_.ld);
    struct Block {
      int32_t row, lane, rows, lanes;
    } before{};
    int32_t turn = 0;
    const auto place = [&](size_t at) { return ws_ + at + turn % 2 * kBlock * kBlock; };
    const auto make = [&] {
      const auto each = [&]<int kVecs>() __attribute__((always_inline)) {
        const float *s = place(amx_.s), *dp = place(amx_.dp);
        for (int32_t r = 0; r < before.rows; r += 2)
          slopes.template put<kVecs>(s + r * kVecs * kLanes, dp + r * kVecs * kLanes, before.row + r,
                                     r + 1 < before.rows, before.lane);
      };
      before.lanes == kBlock ? each.template operator()<2>() : each.template operator()<1>();
    };
    TileProducts products;
    for (int32_t lane = 0; lane < of.lanes; lane += kBlock)
      for (int32_t row = 0; row < of.rows; row += kBlock) {
        const Block block{row, lane, of.rows - row < kBlock ? of.rows - row : kBlock,
                          of.lanes - lane < kBlock ? of.lanes - lane : kBlock};
        products.multiply(q.tile(row), block.rows, k.tile(lane), block.lanes, amx_.units_k / kTileRows, false,
                          place(amx_.s), block.lanes);
        products.multiply(d_o.tile(row), block.rows, v.tile(lane), block.lanes, amx_.units_v / kTileRows, false,
                          place(amx_.dp), block.lanes);
        ++turn;
        if (before.rows > 0) make();
        before = block;
      }
    products.put_all();
    ++turn;
    make();
  }

  // Beyond the last row and the last of `count` keys there may be anything: of a key that does not exist, whose score
  // is 0, the weight where all others lie far below may be infinite.
  void clear_rest(const Extent& of, int32_t count, int32_t steps) {
    const auto ld = static_cast<size_t>(slopes_.stride);
    for (int32_t r = (of.rows + 1) / 2; r < steps * kTileRows; ++r) {
      __builtin_memset(weights_ + r * ld, 0, ld * sizeof(float));
      __builtin_memset(slopes_.pairs + r * ld, 0, ld * sizeof(float));
    }
    if (count == slopes_.stride) return;
    Bf16* row = reinterpret_cast<Bf16*>(slopes_.rows);
    for (int32_t r = 0; r < of.rows; ++r, row += slopes_.stride)
      __builtin_memset(row + count, 0, static_cast<size_t>(slopes_.stride - count) * sizeof(Bf16));
  }

  void columns(Rows from, int32_t rows, int32_t width, int32_t padded, size_t at) {
    Bf16* to = reinterpret_cast<Bf16*>(ws_ + at);
    for (int32_t r = 0; r < rows; r += kTileDepth, to += padded * kTileDepth) {
      const int32_t some = rows - r < kTileDepth ? rows - r : kTileDepth;
      const Bf16* row[kTileDepth];
      for (int32_t i = 0; i < some; ++i) row[i] = reinterpret_cast<const Bf16*>(from.data + (r + i) * from.stride);
      transpose_chunk<false>(row, some, 1, width, padded, to);
    }
  }

  // Adds columns to rows.
  void join(const float* columns, int32_t channels, float* rows) const {
    for (int32_t n = 0; n < at_.bn; n += kLanes)
      for (int32_t d = 0; d < channels; d += kLanes) {
        vf square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(columns + static_cast<int64_t>(d + i) * amx_.ld + n);
        transpose_square(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          float* x = rows + static_cast<int64_t>(n + i) * channels + d;
          store(x, load(x) + square[i]);
        }
      }
  }

  const AmxLayout amx_;
  const TileRegisters registers_;
};

int32_t backward_on_tiles(const BackwardCall& c, const BackwardTask& t, const Tiles& tiles, float* workspace) {
  const bool takes = AmxBackward::takes(c, c.problem->sequences[t.sequence]);
  return (takes ? backward_as<AmxBackward> : dot_products().backward)(c, t, tiles, workspace);
}

// Enough for dot products as well, whose layout is the first part of this one.
size_t backward_bytes_on_tiles(const BackwardCall& c) {
  return AmxBackward::takes(c) ? AmxLayout(c).bytes() : dot_products().backward_bytes(c);
}

int32_t carried_backward_on_tiles(const CarriedBackwardCall& c, const BackwardTask& t, const CarriedTiles& tiles,
                                  float* workspace) {
  const bool takes = AmxBackward::takes(c.pairs, c.pairs.problem->sequences[t.sequence]);
  return (takes ? carried_backward<AmxBackward> : dot_products().carry.backward)(c, t, tiles, workspace);
}

size_t carried_backward_bytes_on_tiles(const CarriedBackwardCall& c) {
  return AmxBackward::takes(c.pairs) ? carried_backward_bytes<AmxBackward>(c) : dot_products().carry.backward_bytes(c);
}
