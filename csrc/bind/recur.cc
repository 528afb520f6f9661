#include "../cpu/recur.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <string>

#include "bind.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

using StretchTuple = std::tuple<int32_t, int64_t, int64_t>;  // see Stretch

// What there is beside tokens, each float32: gate, beta, bonus, initial, initial norm.
using Others = std::tuple<Maybe, Maybe, Maybe, Maybe, Maybe>;

// How tokens are mapped, read and written: norm, feature map, scale, causal, normalize, epsilon, chunk; and of
// a polynomial of products its two or three coefficients, else none.
using Form = std::tuple<int, int, float, bool, bool, float, int, std::vector<float>>;

// A recurrence, and what its views point to. Tensors are numbered as they are described: 0 q, 1 k, 2 v, 3 o, 4 gate,
// 5 beta, 6 bonus, 7 initial, 8 initial norm, 9 state, 10 norm, and on with those of the backward.
class Described {
 public:
  Recurrence p{};
  bool empty = false;

  Described(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Others& others,
            const Tensor& state, const Maybe& norm, const std::optional<std::vector<StretchTuple>>& given,
            const Form& form) {
    const auto& [gate, beta, bonus, initial, initial_norm] = others;
    const auto& [row_norm, map, scale, causal, normalize, epsilon, chunk, coefficients] = form;
    need(q.size.size() == 4 && k.size.size() == 4 && v.size.size() == 4, "q, k and v have four dimensions");
    const int64_t batch = v.size[0], heads = v.size[1], length = v.size[2], dim = k.size[3], v_dim = v.size[3];
    need(q.size[0] == batch && k.size[0] == batch && q.size[2] == length && k.size[2] == length,
         "q, k and v differ in batch or length");
    need(q.size[3] == dim && dim >= 1 && dim <= 4096 && v_dim >= 1 && v_dim <= 4096, "head dims are 1 to 4096");
    need(batch <= INT32_MAX && heads >= 1 && heads <= 1 << 20 && q.size[1] >= 1 && q.size[1] <= 1 << 20,
         "too many batch entries or heads, or none");
    need(k.size[1] >= 1 && heads % k.size[1] == 0, "value heads are not a multiple of key heads");
    need(q.size[1] % heads == 0 || heads % q.size[1] == 0, "query and value heads are no multiples");
    need(q.dtype == k.dtype && q.dtype == v.dtype && q.dtype == o.dtype, "q, k, v and o differ in dtype");
    need(q.dtype == static_cast<int>(DType::f32) || q.dtype == static_cast<int>(DType::bf16) ||
             q.dtype == static_cast<int>(DType::f16),
         "q, k, v and o are float32, bfloat16 or float16");
    need(row_norm >= 0 && row_norm <= 2 && map >= 0 && map <= 1, "unknown norm or feature map");
    need(chunk >= 16 && chunk <= kMaxChunk && chunk % 16 == 0, "chunks are 16, 32 ... 128 tokens");
    stretches(given, batch, length);
    const auto n = static_cast<int64_t>(sequences_.size());
    p.dtype = static_cast<DType>(q.dtype);
    p.q = tokens(q, p.dtype, q.size, "q");
    p.k = tokens(k, p.dtype, k.size, "k");
    p.v = tokens(v, p.dtype, v.size, "v");
    p.q_heads = static_cast<int32_t>(q.size[1]);
    p.k_heads = static_cast<int32_t>(k.size[1]);
    p.heads = static_cast<int32_t>(heads);
    p.head_dim = static_cast<int32_t>(dim);
    p.v_head_dim = static_cast<int32_t>(v_dim);
    p.tokens = length;
    p.o = tokens(o, p.dtype, {batch, p.outputs(), length, v_dim}, "o");
    p.channels = gate && gate->size.size() == 4;
    p.gate = numbers(gate, batch, heads, length, dim, "gate");
    need(!beta || beta->size.size() == 3, "beta is [batch, heads, length]");
    p.beta = numbers(beta, batch, heads, length, dim, "beta");
    need(coefficients.empty() || coefficients.size() == 2 || coefficients.size() == 3, "two or three coefficients");
    p.order = coefficients.empty() ? 0 : static_cast<int32_t>(coefficients.size()) - 1;
    std::copy(coefficients.begin(), coefficients.end(), p.coefficients);
    need(p.order < 2 || dim <= 256, "head_dim above 256, whose states have too many rows");
    const int64_t rows = p.features();
    p.bonus = floats(bonus, {heads, dim}, "bonus");
    p.initial = floats(initial, {n, heads, rows, v_dim}, "initial");
    p.initial_norm = floats(initial_norm, {n, heads, rows}, "initial_norm");
    p.state = const_cast<float*>(floats(state, {n, heads, rows, v_dim}, "state"));
    p.norm = const_cast<float*>(floats(norm, {n, heads, rows}, "state_norm"));
    need(!normalize || norm, "a normalised recurrence has a second state");
    need(p.order == 0 || (normalize && !gate && !beta && !bonus), "coefficients with a gate, beta, bonus, or no sum");
    need(!beta || !(bonus || normalize), "beta with a bonus or a normaliser");
    need(causal || !(gate || beta || bonus), "what is not causal does not decay");
    p.row_norm = static_cast<RowNorm>(row_norm);
    p.map = static_cast<FeatureMap>(map);
    p.scale = scale;
    p.causal = causal;
    p.normalize = normalize;
    p.epsilon = epsilon;
    p.chunk = std::min(chunk, most_tokens(p.head_dim, p.channels || p.bonus != nullptr, p.order > 0));
    p.sequences = sequences_.data();
    p.num_sequences = static_cast<int32_t>(n);
  }

  Status check() const {
    for (size_t i = 0; i < memory_.size(); ++i)
      if (const Fault fault = check_memory(memory_[i]); fault != Fault::none) return {fault, static_cast<int>(i)};
    return {};
  }

  View tokens(const Tensor& t, DType dtype, const Ints& size, const char* what) {
    need(t.dtype == static_cast<int>(dtype) && t.size == size && t.stride.size() == 4, what);
    memory_.push_back({t.data, t.size, t.stride, element_size(dtype)});
    return make_view(t);
  }

  // A contiguous float32 tensor of this size.
  const float* floats(const Tensor& t, const Ints& size, const char* what) {
    need(t.dtype == static_cast<int>(DType::f32) && t.size == size && t.stride.size() == size.size(), what);
    int64_t contiguous = 1;  // as torch has it: of no elements, as if there were one
    for (size_t d = size.size(); d-- > 0; contiguous *= std::max<int64_t>(size[d], 1))
      need(size[d] <= 1 || t.stride[d] == contiguous, what);
    memory_.push_back({t.data, t.size, t.stride, element_size(DType::f32)});
    return reinterpret_cast<const float*>(t.data);
  }
  const float* floats(const Maybe& t, const Ints& size, const char* what) {
    if (t) return floats(*t, size, what);
    memory_.push_back(kAbsent);
    return nullptr;
  }

 private:
  std::vector<Stretch> sequences_;
  std::vector<Memory> memory_;

  void stretches(const std::optional<std::vector<StretchTuple>>& given, int64_t batch, int64_t length) {
    if (!given)
      for (int64_t b = 0; b < batch; ++b) sequences_.push_back({static_cast<int32_t>(b), 0, length});
    else
      for (const auto& [b, first, tokens] : *given) {
        need(b >= 0 && b < batch && first >= 0 && tokens >= 0 && first <= length && tokens <= length - first,
             "a sequence lies outside the tensors");
        sequences_.push_back({b, first, tokens});
      }
    need(sequences_.size() <= INT32_MAX, "more than 2^31 - 1 sequences");
  }

  // [heads], [batch, heads, length] or [batch, heads, length, dim].
  Numbers numbers(const Maybe& t, int64_t batch, int64_t heads, int64_t length, int64_t dim, const char* what) {
    if (!t) {
      memory_.push_back(kAbsent);
      return {};
    }
    const size_t rank = t->size.size();
    const Ints all{batch, heads, length, dim};
    need(t->dtype == static_cast<int>(DType::f32) && t->stride.size() == rank, what);
    need(
        rank == 1 ? t->size == Ints{heads} : rank >= 3 && rank <= 4 && t->size == Ints(all.begin(), all.begin() + rank),
        what);
    Numbers n{reinterpret_cast<const float*>(t->data), {}};
    for (size_t d = 0; d < rank; ++d) n.stride[rank == 1 ? 1 : d] = t->size[d] > 1 ? t->stride[d] : 0;
    memory_.push_back({t->data, t->size, t->stride, element_size(DType::f32)});
    return n;
  }
};

// (fault, which tensor).
template <class Run>
std::pair<int, int> run(const Described& d, const Run& what) {
  Status status = d.check();
  if (status.fault == Fault::none) {
    pybind11::gil_scoped_release release;
    status = what();
  }
  return {static_cast<int>(status.fault), status.value};
}

using Sequences = std::optional<std::vector<StretchTuple>>;

std::pair<int, int> call_recur(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Others& others,
                               const Tensor& state, const Maybe& norm, const Sequences& sequences, const Form& form,
                               int threads) try {
  need(threads > 0, "threads are at least 1");
  const Described d(q, k, v, o, others, state, norm, sequences, form);
  for (const Tensor* t : {&o, &state}) in_large_pages(*t);
  return run(d, [&] { return recur(d.p, std::min(threads, kMaxThreads)); });
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// `gradients`: those of what `others` are, float32 and contiguous, those of gate and beta for every token, of bonus for
// every sequence. dq has a head for each of o, dk one for each state; both may be float32.
std::pair<int, int> call_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                                  const Others& others, const Tensor& state, const Maybe& norm,
                                  const Sequences& sequences, const Form& form, const Tensor& d_o, const Maybe& d_state,
                                  const Maybe& d_norm, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                  const Others& gradients, int threads) try {
  need(threads > 0, "threads are at least 1");
  Described d(q, k, v, o, others, state, norm, sequences, form);
  const auto& [gate, beta, bonus, initial, initial_norm] = others;
  const auto& [d_gate, d_beta, d_bonus, d_initial, d_initial_norm] = gradients;
  const int64_t batch = v.size[0], heads = v.size[1], length = v.size[2], dim = q.size[3];
  const int64_t rows = d.p.features();
  const Ints of_state{d.p.num_sequences, heads, rows, v.size[3]}, of_norm{d.p.num_sequences, heads, rows};
  const auto dtype = [](const Tensor& t) { return static_cast<DType>(t.dtype); };
  const auto written = [&](const Maybe& given, const Maybe& of, const Ints& size, const char* what) {
    need(!given || of, what);
    return const_cast<float*>(d.floats(given, size, what));
  };
  RecurGradients g{};
  g.d_o = d.tokens(d_o, d.p.dtype, o.size, "d_o is not like o");
  g.d_state = d.floats(d_state, of_state, "d_state is not like state");
  g.d_norm = d.floats(d_norm, of_norm, "d_norm is not like norm");
  for (const Tensor* t : {&dq, &dk})
    need(dtype(*t) == DType::f32 || dtype(*t) == d.p.dtype, "dq and dk are float32, or of the dtype of q");
  g.dq_dtype = dtype(dq);
  g.dk_dtype = dtype(dk);
  g.dq = d.tokens(dq, g.dq_dtype, {batch, d.p.outputs(), length, dim}, "dq has other sizes");
  g.dk = d.tokens(dk, g.dk_dtype, {batch, heads, length, dim}, "dk has other sizes");
  g.dv = d.tokens(dv, d.p.dtype, v.size, "dv is not like v");
  const Ints per_token{batch, heads, length};
  g.d_gate = written(d_gate, gate, d.p.channels ? Ints{batch, heads, length, dim} : per_token, "d_gate");
  g.d_beta = written(d_beta, beta, per_token, "d_beta");
  g.d_bonus = written(d_bonus, bonus, {d.p.num_sequences, heads, dim}, "d_bonus");
  g.d_initial = written(d_initial, initial, of_state, "d_initial");
  g.d_initial_norm = written(d_initial_norm, initial_norm, of_norm, "d_initial_norm");
  for (const Tensor* t : {&dq, &dk, &dv}) in_large_pages(*t);
  return run(d, [&] { return recur_backward(d.p, g, std::min(threads, kMaxThreads)); });
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

}  // namespace

void bind_recur(pybind11::module_& m) {
  m.def("most_tokens", &most_tokens);
  m.def("recur", &call_recur);
  m.def("recur_backward", &call_backward);
}

}  // namespace attnkit::cpu
