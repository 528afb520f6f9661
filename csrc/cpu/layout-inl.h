// Where the forward kernel keeps things in a thread's workspace.

inline constexpr int32_t kMostCodeChannels = 512;  // of queries that are multiplied as bytes,
inline constexpr int32_t kMostCodeGroups = kMaxTileKv / 32 + 1;  // each time with the scales of a group of keys

struct Layout {
  Places places;
  int32_t bm, dv;  // query lanes, value channels rounded up to whole vectors
  int32_t keys;  // that are taken at once, at most,
  int32_t ld;  // and in a row of S^T
  TileLayout tile;
  size_t qt, s, o, guarded, max, sum, alpha, largest, k, v, live;
  size_t weights, values;  // as pairs of keys
  size_t before_o, before_max, before_sum;  // of the stretches of keys before this one
  size_t random;  // words of the queries
  size_t listed_k, listed_v;  // of groups, as memory has them
  size_t code_q, code_bytes, code_weights;  // of few queries over codes
  size_t q, st, apart;  // of few queries: rows of them, of S^T, and of what a tile adds to o
  size_t steps, shift, factor;  // of encoded queries
  int32_t dq;  // channels in a row of them

  // `few`: expressions are computed on S^T.
  Layout(const Call& c, int32_t lanes, bool few)
      : bm(round_up(lanes, kLanes)),
        dv(round_up(c.problem->v_head_dim, kLanes)),
        keys(few ? kMaxTileKv : c.tile_kv),
        ld(round_up(keys, kBlockVecs * kLanes)),
        tile(c.code, few ? ld : bm, places) {
    const Problem& p = *c.problem;
    const auto take = [&](int64_t rows, int64_t columns) { return places.take(rows, columns); };
    qt = take(p.head_dim, bm);
    s = take(c.tile_kv + kMaxKeyRows, bm);
    o = take(bm, dv);
    guarded = take(bm, dv);
    max = take(1, bm);
    sum = take(1, bm);
    alpha = take(1, bm);
    largest = take(1, bm);
    k = take(keys, round_up(p.head_dim, 2 * kLanes));
    v = take(keys, dv);
    live = take(keys, bm / kLanes);
    weights = take((c.tile_kv + 1) / 2, bm);
    values = take((c.tile_kv + 1) / 2, dv);
    before_o = take(bm, dv);
    before_max = take(1, bm);
    before_sum = take(1, bm);
    random = take(p.dropout.threshold != 0 ? SplitWords<QueryWords>::kVector : 0, bm / kLanes);
    const int32_t listed = p.groups == nullptr ? 0 : keys;
    listed_k = take(listed, listed_stride(p.dtype, p.head_dim) / 4);
    listed_v = take(listed, listed_stride(p.dtype, p.v_head_dim) / 4);
    dq = round_up(p.head_dim, kLanes * 4 / element_size(p.dtype));
    q = take(kFewLanes, dq);
    const bool coded = p.stores != nullptr;
    code_q = take(coded ? kFewLanes : 0, dq);
    code_bytes = take(coded ? kMostCodeGroups * kFewLanes : 0, kMostCodeChannels / 2);
    code_weights = take(coded ? kFewLanes : 0, c.tile_kv * (dv / 64 + 1) + 2 * dv);
    st = take(kFewLanes, ld);
    apart = take(kFewLanes, dv);
    for (size_t* at : {&steps, &shift, &factor}) *at = take(p.codes != nullptr, bm);
  }
};
