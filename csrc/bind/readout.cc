#include "../cpu/readout.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "bind.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

// column_sum, column_max, row_max, entropy, best, best_keys, weights, rows; see Readout.
using Results = std::array<Maybe, 8>;

template <class T>
T* result(const Maybe& given, DType dtype, const Ints& size, const char* what) {
  if (!given) return nullptr;
  need_contiguous(*given, dtype, size, what);
  need(check_memory({given->data, given->size, given->stride, element_size(dtype)}) == Fault::none, what);
  return reinterpret_cast<T*>(given->data);
}

Readout make_readout(const Results& given, const Problem& p, int64_t batch, int64_t queries, int64_t keys) {
  const auto& [column_sum, column_max, row_max, entropy, best, best_keys, weights, rows] = given;
  const int64_t heads = p.num_heads;
  Readout out{};
  out.queries = queries;
  out.keys = keys;
  const Ints of_keys{batch, heads, keys}, of_queries{batch, heads, queries};
  out.column_sum = result<float>(column_sum, DType::f32, of_keys, "column_sum is float32 [batch, heads, keys]");
  out.column_max = result<float>(column_max, DType::f32, of_keys, "column_max is float32 [batch, heads, keys]");
  out.row_max = result<float>(row_max, DType::f32, of_queries, "row_max is float32 [batch, heads, queries]");
  out.entropy = result<float>(entropy, DType::f32, of_queries, "entropy is float32 [batch, heads, queries]");
  need(best.has_value() == best_keys.has_value() && weights.has_value() == rows.has_value(), "results come in pairs");
  if (best) {
    need(best->size.size() == 4 && best->size[3] >= 1 && best->size[3] <= INT32_MAX, "top_k is 1 to 2^31 - 1");
    out.top_k = static_cast<int32_t>(best->size[3]);
    const Ints size{batch, heads, queries, best->size[3]};
    out.best = result<float>(best, DType::f32, size, "the largest weights are float32 [batch, heads, queries, top_k]");
    out.best_keys = result<int64_t>(best_keys, DType::i64, size, "their keys are int64 [batch, heads, queries, top_k]");
  }
  if (rows) {
    need(rows->size.size() == 1, "rows have one dimension");
    out.num_rows = rows->size[0];
    out.rows = result<int32_t>(rows, DType::i32, {out.num_rows}, "rows are int32, one after the other");
    for (int64_t i = 0; i < out.num_rows; ++i)
      need(out.rows[i] >= (i == 0 ? 0 : out.rows[i - 1]) && out.rows[i] < queries, "rows ascend, and are there");
    out.weights = result<float>(weights, DType::f32, {batch, heads, out.num_rows, keys},
                                "weights are float32 [batch, heads, rows, keys]");
  }
  return out;
}

// As `attend`, which has no v and o here.
std::pair<int, int> call_readout(const Program& program, const Tensor& q, const Tensor& k, const Tensor& lse,
                                 float scale, const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                 const std::vector<Tensor>& tensors, const std::vector<float>& params,
                                 const Results& results, int threads, int tile_kv, const Maybe& page_table) try {
  const Config config = config_of(threads, 1, tile_kv, tile_kv);
  need(!page_table || tile_kv % Pages::kLeast == 0, "tile_kv of paged keys is a multiple of 16");
  need(!program.carries && !program.unnormalized, "weights that are no softmax");
  Request r;
  const Maybe given_lse = lse;
  Status status = r.fill(program, q, k, k, q, given_lse, scale, {}, given_sequences, tensors, params, {}, page_table);
  if (status.fault == Fault::none && !r.empty) {
    const int64_t keys = page_table ? r.pages.tokens() : k.size[2];
    const Readout out = make_readout(results, r.problem, q.size[0], q.size[2], keys);
    pybind11::gil_scoped_release release;
    status = readout(program, r.problem, out, config);
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

}  // namespace

void bind_readout(pybind11::module_& m) { m.def("readout", &call_readout); }

}  // namespace attnkit::cpu
