#include "../cpu/select.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <string>
#include <tuple>

#include "bind.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

// How rows and columns are made and chosen: tokens of a row and of a column, scale, centered, least similarity or none;
// rule (see Rule), its number, at least one, heads of a group together.
using Form = std::tuple<int, int, float, bool, std::optional<float>, int, float, bool, bool>;

// (fault, what it is about): a tensor: 0 q, 1 k, 2 chosen, 3 and on the buffers; or an instruction. q and k are [batch,
// heads, length, head_dim], chosen is bool [batch, heads, columns, rows] and contiguous.
std::pair<int, int> call_select(const Tensor& q, const Tensor& k, const Tensor& chosen, const Form& form,
                                const Program* mask, const Program* force, const std::vector<Tensor>& tensors,
                                const std::vector<float>& params, int threads) try {
  need(threads > 0, "threads are at least 1");
  need(q.size.size() == 4 && k.size.size() == 4 && q.stride.size() == 4 && k.stride.size() == 4,
       "q and k have four dimensions");
  need(q.size[0] == k.size[0] && q.size[3] == k.size[3], "q and k differ in batch or head_dim");
  need(k.size[1] > 0 && q.size[1] % k.size[1] == 0, "query heads are not a multiple of kv heads");
  need(q.size[3] >= 1 && q.size[3] <= 4096, "head_dim is 1 to 4096");
  need(q.size[0] <= INT32_MAX && q.size[1] <= 1 << 20, "too many batch entries or heads");
  need(q.size[2] <= INT32_MAX && k.size[2] <= INT32_MAX, "a sequence is longer than 2^31 - 1");
  need(q.dtype == k.dtype, "q and k differ in dtype");
  need(q.dtype == static_cast<int>(DType::f32) || q.dtype == static_cast<int>(DType::bf16) ||
           q.dtype == static_cast<int>(DType::f16),
       "q and k are float32, bfloat16 or float16");
  Selection s{};
  int rule = 0;
  std::optional<float> least;
  std::tie(s.row_block, s.column_block, s.scale, s.centered, least, rule, s.value, s.at_least_one, s.of_group) = form;
  need(s.row_block > 0 && s.column_block > 0, "blocks have a token");
  need(rule >= 0 && rule <= static_cast<int>(Rule::threshold), "unknown rule");
  s.rule = static_cast<Rule>(rule);
  s.coherent = least.has_value();
  s.least = least.value_or(0);
  s.dtype = static_cast<DType>(q.dtype);
  s.q = make_view(q);
  s.k = make_view(k);
  s.batch = static_cast<int32_t>(q.size[0]);
  s.q_heads = static_cast<int32_t>(q.size[1]);
  s.k_heads = static_cast<int32_t>(k.size[1]);
  s.head_dim = static_cast<int32_t>(q.size[3]);
  s.q_len = q.size[2];
  s.kv_len = k.size[2];
  const int64_t rows = s.rows(), columns = s.columns();
  const int64_t pairs_of_blocks = need_contiguous(chosen, DType::u8, {q.size[0], int64_t{s.choosers()}, columns, rows},
                                                  "chosen is not bool and contiguous, [batch, heads, columns, rows]");
  need(pairs_of_blocks <= (int64_t{1} << 40), "more than 2^40 pairs of rows and columns");
  s.chosen = reinterpret_cast<uint8_t*>(chosen.data);
  const int element = element_size(s.dtype);
  std::vector<Memory> memory{{q.data, q.size, q.stride, element},
                             {k.data, k.size, k.stride, element},
                             {chosen.data, chosen.size, chosen.stride, 1}};
  std::vector<Memory> of_buffers;
  std::vector<Buffer> buffers;
  for (const Program* program : {mask, force})
    if (program != nullptr) {
      need(program->mask >= 0, "an expression is a mask");
      need(static_cast<int>(params.size()) == program->num_params, "wrong number of parameters");
      of_buffers.clear();
      buffers = make_buffers(*program, tensors, of_buffers);
    }
  for (const Memory& m : of_buffers) memory.push_back(m);
  for (size_t i = 0; i < memory.size(); ++i)
    if (const Fault fault = check_memory(memory[i]); fault != Fault::none)
      return {static_cast<int>(fault), static_cast<int>(i)};
  const std::vector<Sequence> sequences = make_sequences({}, s.batch, rows, columns);
  Problem pairs{};
  pairs.sequences = sequences.data();
  pairs.num_sequences = s.batch;
  pairs.num_heads = s.q_heads;
  pairs.num_kv_heads = s.k_heads;
  pairs.buffers = buffers.data();
  pairs.num_buffers = static_cast<int32_t>(buffers.size());
  pairs.params = params.data();
  pairs.num_params = static_cast<int32_t>(params.size());
  s.pairs = &pairs;
  pybind11::gil_scoped_release release;
  const Status status = select(s, mask, force, std::min(threads, kMaxThreads));
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

}  // namespace

void bind_select(pybind11::module_& m) { m.def("select", &call_select); }

}  // namespace attnkit::cpu
