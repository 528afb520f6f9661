#include "../cpu/backward.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "bind.h"
#include "gradients.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

// (head, budget or 0, sums, gone or None); see Carry.
using CarryTuple = std::tuple<int32_t, int32_t, Tensor, Maybe>;

// A row for each batch entry, one after the other, for every key there is.
template <class T>
T* rows_of_keys(const Tensor& t, DType dtype, int64_t batch, int64_t keys, const char* what) {
  need(t.dtype == static_cast<int>(dtype) && t.size == Ints{batch, keys} && t.stride.size() == 2, what);
  need((keys <= 1 || t.stride[1] == 1) && (batch <= 1 || t.stride[0] == keys), what);
  need(check_memory({t.data, t.size, t.stride, element_size(dtype)}) == Fault::none, what);
  return reinterpret_cast<T*>(t.data);
}

Carry make_carry(const CarryTuple& given, const Problem& p, int64_t batch, int64_t keys) {
  const auto& [head, budget, sums, gone] = given;
  need(head >= 0 && head < p.num_heads, "no such head");
  need(budget >= 0 && (budget > 0) == gone.has_value(), "a budget, and what is gone");
  Carry carry{head, budget, rows_of_keys<float>(sums, DType::f32, batch, keys, "sums are float32 [batch, keys]"), keys,
              nullptr};
  if (gone) carry.gone = rows_of_keys<int32_t>(*gone, DType::i32, batch, keys, "gone is int32 [batch, keys]");
  return carry;
}

// As `attend`; a fault about an instruction of `carry` is marked by kOfCarry.
std::pair<int, int> call_attend_carried(const Program& program, const Program& carry, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& o, const Maybe& lse, float scale,
                                        const Maybe& sink,
                                        const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                        const std::vector<Tensor>& tensors, const std::vector<float>& params,
                                        const CarryTuple& what, int threads, int tile_q, int tile_kv, int split_kv,
                                        const Maybe& page_table) try {
  const Config config = config_of(threads, tile_q, tile_kv, split_kv);
  need(tile_kv % 16 == 0, "tile_kv is a multiple of 16");
  need(program.mask >= 0 && carry.mask >= 0 && !carry.carries, "not a program that carries");
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, sink, given_sequences, tensors, params, {}, page_table);
  std::vector<Memory> memory;
  make_buffers(carry, tensors, memory);  // it reads the same
  need(carry.num_params == program.num_params, "wrong number of parameters");
  if (status.fault == Fault::none && !r.empty) {
    const int64_t keys = std::get<2>(what).size.size() == 2 ? std::get<2>(what).size[1] : -1;
    const Carry held = make_carry(what, r.problem, q.size[0], keys);
    for (const Sequence& s : r.sequences) need(s.kv_start + s.kv_len <= keys, "sums of too few keys");
    is_new(o);
    pybind11::gil_scoped_release release;
    status = attend_carried(program, carry, r.problem, held, config);
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// The gradients of a call. Tensors are numbered as those of `attend_backward`, without gradients of sinks or buffers.
// In `what` the sums are what was carried before; `d_carry` and `d_initial` are like them, or None.
std::pair<int, int> call_backward(const Program& program, const Program& carry, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const Tensor& o, const Tensor& lse, float scale,
                                  const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                  const std::vector<Tensor>& tensors, const std::vector<float>& params,
                                  const CarryTuple& what, const Tensor& d_o, const Maybe& d_lse, const Maybe& d_carry,
                                  const Tensor& dq, const Tensor& dk, const Tensor& dv, const Maybe& d_initial,
                                  int threads, int tile_q, int tile_kv) try {
  need_tiles(threads, tile_q, tile_kv);
  need(tile_kv % 16 == 0, "tile_kv is a multiple of 16");
  need(program.mask >= 0 && carry.mask >= 0 && !carry.carries, "not a program that carries");
  need(program.loads.empty() && carry.loads.empty(), "gradients of loads");
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, {}, given_sequences, tensors, params, {});
  std::vector<Memory> memory;
  make_buffers(carry, tensors, memory);
  if (status.fault != Fault::none || r.empty) return {static_cast<int>(status.fault), status.value};
  const int64_t keys = k.size[2];
  const Carry held = make_carry(what, r.problem, q.size[0], keys);
  Cotangents c;
  const std::vector<Maybe> d_buffers(tensors.size());
  status = c.fill(program, r, q, k, v, {}, d_o, d_lse, dq, dk, dv, {}, d_buffers);
  if (status.fault != Fault::none) return {static_cast<int>(status.fault), status.value};
  const auto like_sums = [&](const Maybe& t) {
    return t ? rows_of_keys<float>(*t, DType::f32, q.size[0], keys, "float32 [batch, keys]") : nullptr;
  };
  const CarryGradients of_carry{like_sums(d_carry), like_sums(d_initial)};
  {
    pybind11::gil_scoped_release release;
    status = attend_carried_backward(program, carry, r.problem, held, c.gradients, of_carry,
                                     {tile_q, tile_kv, tile_kv, std::min(threads, kMaxThreads)});
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

}  // namespace

void bind_carry(pybind11::module_& m) {
  m.def("attend_carried", &call_attend_carried);
  m.def("attend_carried_backward", &call_backward);
  m.attr("of_carry") = kOfCarry;
}

}  // namespace attnkit::cpu
