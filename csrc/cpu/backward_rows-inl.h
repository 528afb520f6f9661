// Rows of the backward's tensors, and what its tasks need to know of them.

// Elements d .. d + kLanes - 1 of a row of `width`; zero past its end.
template <class T>
vf vector_at(const T* row, int64_t stride, int32_t width, int32_t d) {
  if (stride == 1 && d + kLanes <= width) return widen(row + d);
  vf x{};
  for (int32_t l = 0; l < kLanes && d + l < width; ++l) x[l] = widen_one(row[(d + l) * stride]);
  return x;
}

template <class T, class F>
void each_vector(const T* row, int64_t stride, int32_t width, F f) {
  for (int32_t d = 0; d < width; d += kLanes) f(vector_at(row, stride, width, d), d);
}

// Before the tasks: what they need to know of one block of queries.
template <class T, class O>
void look_at_rows(const BackwardCall& c, const Task& t, RowBlock& rows) {
  const Problem& p = *c.problem;
  const Gradients& g = *c.gradients;
  const Sequence& seq = p.sequences[t.sequence];
  rows.dead = false;
  const bool clears = p.groups == nullptr || p.q_rows;  // else groups share rows of dq
  vf zero{};
  for (int32_t m = 0; m < t.q_count; ++m) {
    const int64_t token = p.query_at(t.sequence, t.q_first + m), result = p.result_at(t.sequence, t.q_first + m);
    const T *q = row_of<T*>(p.q, seq.batch, t.head, token), *d_o = row_of<T*>(g.d_o, seq.batch, t.head, token);
    const auto* o = row_of<O*>(p.o, seq.batch, t.head, result);
    each_vector(q, p.q.stride[3], p.head_dim, [&](vf x, int32_t) { zero = fma(x, vf{}, zero); });
    vf sum{};
    each_vector(d_o, g.d_o.stride[3], p.v_head_dim, [&](vf x, int32_t d) {
      zero = fma(x, vf{}, zero);
      sum = fma(x, vector_at(o, p.o.stride[3], p.v_head_dim, d), sum);
    });
    const float lse = p.lse[seq.batch * p.lse_stride[0] + t.head * p.lse_stride[1] + result * p.lse_stride[2]];
    const bool dead = lse == -kInfinity;
    float delta = sum_of_lanes(sum);
    if (g.d_lse != nullptr)
      delta -= g.d_lse[seq.batch * g.d_lse_stride[0] + t.head * g.d_lse_stride[1] + result * g.d_lse_stride[2]];
    rows.dead |= dead;
    rows.lse[m] = dead ? kInfinity : lse;
    rows.delta[m] = dead ? 0 : delta;
    if (!clears) continue;
    float* dq = row_of<float*>(g.dq, seq.batch, t.head, result);
    for (int32_t d = 0; d < p.head_dim; ++d) dq[d * g.dq.stride[3]] = 0;
  }
  rows.finite = !any(zero != vf{});
}

void backward_rows(const BackwardCall& c, const Task& t, RowBlock& rows) {
  with_elements(c.problem->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    c.problem->q_rows ? look_at_rows<T, float>(c, t, rows) : look_at_rows<T, T>(c, t, rows);
  });
}
