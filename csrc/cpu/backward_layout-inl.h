// Where a task of the backward has what, and what its products' results become.

// Rows of a part of a partial tile; fewer would make short sums of dk and dv.
inline constexpr int32_t kPart = 2 * kStrip;

struct BackwardLayout {
  Places places;
  Places of_keys;  // behind all of those: what a task has of the keys and values of one kv head
  int32_t bn, dk, dv;  // key lanes; channels rounded up to whole vectors
  TileLayout tile;
  size_t kt, vt, k, d_keys, d_values;  // of_keys
  size_t v, q, d_o, dq, s, dp, e, live, alive, random, kept;
  size_t listed_q, listed_do, listed_k, listed_v;  // of what is listed, as memory has it

  explicit BackwardLayout(const BackwardCall& c)
      : bn(round_up(c.tile_kv, kLanes)),
        dk(round_up(c.problem->head_dim, kLanes)),
        dv(round_up(c.problem->v_head_dim, kLanes)),
        tile(c.code, bn, places) {
    const Problem& p = *c.problem;
    kt = of_keys.take(p.head_dim, bn);
    vt = of_keys.take(p.v_head_dim, bn);
    k = of_keys.take(c.tile_kv, dk);
    d_keys = of_keys.take(bn, dk);
    d_values = of_keys.take(bn, dv);
    s = places.take(c.tile_q, bn);
    dp = places.take(c.tile_q, bn);
    e = places.take(kStrip, bn);
    v = places.take(c.tile_kv, dv);
    q = places.take(c.tile_q, dk);
    d_o = places.take(c.tile_q, dv);
    dq = places.take(c.tile_q, dk);
    live = places.take(kPart, bn / kLanes);
    alive = places.take(c.tile_q, bn);
    const bool thinned = p.dropout.threshold != 0;
    random = places.take(thinned ? SplitWords<KeyWords>::kVector : 0, bn / kLanes);
    kept = places.take(thinned ? kStrip : 0, bn);
    const int32_t of_k = listed_stride(p.dtype, p.head_dim) / 4, of_v = listed_stride(p.dtype, p.v_head_dim) / 4;
    const int32_t queries = p.groups != nullptr || c.gathers ? c.tile_q : 0, keys = p.groups != nullptr ? c.tile_kv : 0;
    listed_q = places.take(queries, of_k);
    listed_do = places.take(queries, of_v);
    listed_k = places.take(keys, of_k);
    listed_v = places.take(keys, of_v);
  }

  size_t bytes() const { return (places.next + of_keys.next) * sizeof(float); }
};

// ---- what a product's result becomes ----

struct Put {
  float* c;
  int64_t stride;
  ATTNKIT_INLINE vf operator()(vf x, const float*, int32_t) const { return x; }
};

struct Add {
  float* c;
  int64_t stride;
  ATTNKIT_INLINE vf operator()(vf x, const float* at, int32_t) const { return load(at) + x; }
};

struct Weigh {  // scores to weights
  float* c;
  int64_t stride;
  const float* lse;
  ATTNKIT_INLINE vf operator()(vf x, const float*, int32_t row) const { return exp_weight(x - set1(lse[row])); }
};

struct AddScaled {
  float* c;
  int64_t stride;
  float scale;
  ATTNKIT_INLINE vf operator()(vf x, const float* at, int32_t) const { return fma(x, set1(scale), load(at)); }
};

struct Slope {  // do . v to ds, over the weights
  float* c;
  int64_t stride;
  const float* delta;
  ATTNKIT_INLINE vf operator()(vf x, const float* at, int32_t row) const { return load(at) * (x - set1(delta[row])); }
};
