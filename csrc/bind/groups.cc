#include "../cpu/groups.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "../cpu/backward.h"
#include "bind.h"
#include "gradients.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

constexpr int kF32 = static_cast<int>(DType::f32);

void need_memory(const Tensor& t, int element) {
  need(check_memory({t.data, t.size, t.stride, element}) == Fault::none, "a tensor has no memory, or is misaligned");
}

bool is_contiguous(const Tensor& t) {
  int64_t step = 1;
  for (size_t d = t.size.size(); d-- > 0; step *= t.size[d])
    if (t.stride[d] != step && t.size[d] > 1) return false;
  return true;
}

// int32 [batches, heads, groups, most], contiguous.
Lists lists_of(const Tensor& t) {
  need(t.dtype == static_cast<int>(DType::i32) && t.size.size() == 4 && t.stride.size() == 4 && is_contiguous(t),
       "lists are not int32, contiguous, of four dimensions");
  need_memory(t, 4);
  need(t.size[0] > 0 && t.size[1] > 0 && t.size[2] <= INT32_MAX &&
           t.size[3] <= INT32_MAX / std::max<int64_t>(t.size[2], 1),
       "lists have no batch entry or head, or more than 2^31 - 1 rows");
  return {reinterpret_cast<const int32_t*>(t.data), t.size[0], t.size[1], t.size[2], t.size[3]};
}

// (valid, shared, complete): see ListFacts.
std::tuple<bool, bool, bool> call_look_at(const Tensor& lists, int64_t tokens) {
  need(tokens >= 0 && tokens <= INT32_MAX, "more than 2^31 - 1 tokens");
  const Lists l = lists_of(lists);
  pybind11::gil_scoped_release release;
  const ListFacts found = look_at(l, tokens);
  return {found.valid, found.shared, found.complete};
}

void check_lists(const Lists& queries, const Lists& keys, const Tensor& q, const Tensor& k) {
  const int64_t batch = q.size[0], kv_heads = k.size[1];
  need(queries.groups == keys.groups, "lists of queries and keys are of as many groups");
  for (const Lists* l : {&queries, &keys}) {
    need(l->batches == 1 || l->batches == batch, "lists are for one batch entry or for each");
    need(l->heads == 1 || l->heads == kv_heads, "lists are for one head or for each kv head");
  }
  need(queries.groups <= INT32_MAX / std::max<int64_t>(batch * kv_heads, 1), "more than 2^31 - 1 groups");
  for (const Tensor* t : {&q, &k}) need(t->stride[3] == 1 || t->size[3] == 1, "channels are not adjacent");
}

// As `attend`; lists have been looked at. `q_rows`: o and lse are float32, with a row for each entry of a list. `mean`:
// o is the mean over the groups of a token, without lse.
std::pair<int, int> call_attend(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& o, const Maybe& lse, float scale, const Tensor& queries,
                                const Tensor& keys, bool q_rows, bool mean, const std::vector<Tensor>& buffers,
                                const std::vector<float>& params, int threads, int tile_q, int tile_kv,
                                int split_kv) try {
  const Config config = config_of(threads, tile_q, tile_kv, split_kv);
  need(!mean || (!q_rows && !lse), "a mean has no rows and no lse");
  const Lists q_lists = lists_of(queries), kv_lists = lists_of(keys);
  Request r;
  r.rows = q_rows ? std::max<int64_t>(q_lists.rows(), 1) : 0;
  Status status = r.fill(program, q, k, v, o, lse, scale, {}, {}, buffers, params, {});
  if (status.fault == Fault::none && !r.empty) {
    check_lists(q_lists, kv_lists, q, k);
    need(v.stride[3] == 1 || v.size[3] == 1, "channels are not adjacent");
    r.problem.q_rows = q_rows;
    is_new(o);
    pybind11::gil_scoped_release release;
    status = (mean ? attend_groups_mean : attend_groups)(program, r.problem, q_lists, kv_lists, config);
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// As `attend_backward`. `q_rows`, `kv_rows`: o, lse and dq (dk and dv) are float32, with a row for each entry of a
// list.
std::pair<int, int> call_backward(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& o, const Maybe& lse, float scale, const Tensor& queries,
                                  const Tensor& keys, bool q_rows, bool kv_rows, const std::vector<Tensor>& tensors,
                                  const std::vector<float>& params, const Tensor& d_o, const Maybe& d_lse,
                                  const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                  const std::vector<Maybe>& d_buffers, int threads, int tile_q, int tile_kv) try {
  need_tiles(threads, tile_q, tile_kv);
  const Lists q_lists = lists_of(queries), kv_lists = lists_of(keys);
  Request r;
  r.rows = q_rows ? std::max<int64_t>(q_lists.rows(), 1) : 0;
  Status status = r.fill(program, q, k, v, o, lse, scale, {}, {}, tensors, params, {});
  if (status.fault != Fault::none) return {static_cast<int>(status.fault), status.value};
  Cotangents c;
  c.rows = r.rows;
  c.kv_rows = kv_rows ? std::max<int64_t>(kv_lists.rows(), 1) : 0;
  status = c.fill(program, r, q, k, v, {}, d_o, d_lse, dq, dk, dv, {}, d_buffers);
  if (status.fault == Fault::none && !r.empty) {
    check_lists(q_lists, kv_lists, q, k);
    need((v.stride[3] == 1 || v.size[3] == 1) && (d_o.stride[3] == 1 || d_o.size[3] == 1), "channels are not adjacent");
    r.problem.q_rows = q_rows;
    r.problem.kv_rows = kv_rows;
    pybind11::gil_scoped_release release;
    status = attend_groups_backward(program, r.problem, c.gradients, q_lists, kv_lists,
                                    {tile_q, tile_kv, tile_kv, std::min(threads, kMaxThreads)});
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// Sums (averages) the rows of lists, float32 [batch, heads, groups * most, channels], into `to` [batch, heads, tokens,
// channels].
void call_sum_rows(const Tensor& rows, const Tensor& lists, const Tensor& to, bool mean, const Maybe& lse,
                   int threads) {
  const Lists l = lists_of(lists);
  need(rows.dtype == kF32 && rows.size.size() == 4 && to.size.size() == 4 && is_contiguous(rows),
       "rows are contiguous float32");
  need(rows.size[0] == to.size[0] && rows.size[1] == to.size[1] && rows.size[3] == to.size[3] &&
           rows.size[2] == l.rows(),
       "rows and what they are summed to differ in shape");
  need(to.size[1] % l.heads == 0 && (l.batches == 1 || l.batches == to.size[0]) && to.size[3] <= 4096,
       "lists are of other batch entries or heads");
  need(to.dtype == kF32 || to.dtype == static_cast<int>(DType::bf16) || to.dtype == static_cast<int>(DType::f16),
       "unknown dtype");
  need_memory(rows, 4);
  need_memory(to, element_size(static_cast<DType>(to.dtype)));
  if (lse) {
    need(lse->dtype == kF32 && is_contiguous(*lse) && lse->size == Ints(rows.size.begin(), rows.size.end() - 1),
         "lse is not float32, contiguous, one a row");
    need_memory(*lse, 4);
  }
  const RowSums sums{make_view(rows),
                     make_view(to),
                     static_cast<DType>(to.dtype),
                     static_cast<int32_t>(to.size[3]),
                     mean,
                     lse ? reinterpret_cast<float*>(lse->data) : nullptr};
  pybind11::gil_scoped_release release;
  sum_rows(sums, l, to.size[0], to.size[1], to.size[2], std::min(threads, kMaxThreads));
}

// What affinities are computed from, with the centroids [heads, count, head_dim] as the engine reads them.
struct Routed {
  Affinities of{};
  std::vector<float> centroids;

  Routed(const Tensor& x, const Tensor& given, int norm) {
    need(x.size.size() == 4 && given.size.size() == 3 && given.size[0] == x.size[1] && given.size[2] == x.size[3],
         "centroids are not [heads, count, head_dim]");
    need(given.dtype == kF32 && is_contiguous(given), "centroids are not contiguous float32");
    need(x.dtype == kF32 || x.dtype == static_cast<int>(DType::bf16) || x.dtype == static_cast<int>(DType::f16),
         "unknown dtype");
    need(x.size[3] > 0 && x.size[3] <= 4096 && given.size[1] > 0 && given.size[1] <= 1 << 20,
         "sizes beyond the engine's");
    need(norm >= 0 && norm <= 2, "unknown norm");
    need_memory(x, element_size(static_cast<DType>(x.dtype)));
    need_memory(given, 4);
    const int64_t heads = given.size[0], count = given.size[1], width = given.size[2], lanes = (count + 15) / 16 * 16;
    centroids.resize(static_cast<size_t>(heads * width * lanes));
    const float* from = reinterpret_cast<const float*>(given.data);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < count; ++c)
        for (int64_t d = 0; d < width; ++d)
          centroids[static_cast<size_t>((h * width + d) * lanes + c)] = from[(h * count + c) * width + d];
    of = {make_view(x),     static_cast<DType>(x.dtype), static_cast<int32_t>(width), static_cast<RowNorm>(norm),
          centroids.data(), static_cast<int32_t>(count), static_cast<int32_t>(lanes), (x.size[2] + 15) / 16 * 16};
  }
};

int32_t* lists_to(const Tensor& t, const Ints& shape) {
  lists_of(t);
  need(t.size == shape, "lists are of another shape");
  return reinterpret_cast<int32_t*>(t.data);
}

int call_route(const Tensor& x, const Tensor& centroids, int norm, const Tensor& lists, int threads) try {
  const Routed routed(x, centroids, norm);
  const int64_t w = lists.size.size() == 4 ? lists.size[3] : 0;
  need(w <= x.size[2], "more places than tokens");
  int32_t* out = lists_to(lists, {x.size[0], x.size[1], centroids.size[1], w});
  pybind11::gil_scoped_release release;
  return static_cast<int>(
      route(routed.of, x.size[0], x.size[1], x.size[2], w, out, std::min(threads, kMaxThreads)).fault);
} catch (const std::bad_alloc&) {
  return static_cast<int>(Fault::no_memory);
}

int call_route_prefix(const Tensor& q, const Tensor& k, const Tensor& centroids, int norm, int64_t w, int64_t block,
                      const Tensor& queries, const Tensor& keys, int threads) try {
  const Routed of_q(q, centroids, norm), of_k(k, centroids, norm);
  need(q.size[0] == k.size[0] && q.size[1] == k.size[1], "q and k differ in batch or heads");
  need(w >= 0 && w <= k.size[2] && block > 0 && block <= 1 << 20, "sizes beyond the engine's");
  const int64_t groups = PrefixBlocks(block, q.size[2], k.size[2]).count * centroids.size[1];
  int32_t* q_lists = lists_to(queries, {q.size[0], q.size[1], groups, block});
  int32_t* kv_lists = lists_to(keys, {q.size[0], q.size[1], groups, w + block});
  pybind11::gil_scoped_release release;
  return static_cast<int>(route_prefix(of_q.of, of_k.of, q.size[0], q.size[1], q.size[2], k.size[2], w, block, q_lists,
                                       kv_lists, std::min(threads, kMaxThreads))
                              .fault);
} catch (const std::bad_alloc&) {
  return static_cast<int>(Fault::no_memory);
}

}  // namespace

void bind_groups(pybind11::module_& m) {
  m.def("look_at_lists", &call_look_at);
  m.def("attend_groups", &call_attend);
  m.def("attend_groups_backward", &call_backward);
  m.def("sum_rows", &call_sum_rows);
  m.def("route", &call_route);
  m.def("route_prefix", &call_route_prefix);
}

}  // namespace attnkit::cpu
