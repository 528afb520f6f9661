#include "../cpu/backward.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "bind.h"
#include "carry.h"
#include "gradients.h"

namespace attnkit::cpu {
namespace {

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
  check_carrying(program, carry, tensors);
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, sink, given_sequences, tensors, params, {}, page_table);
  if (status.fault == Fault::none && !r.empty) {
    const int64_t keys = std::get<2>(what).size.size() == 2 ? std::get<2>(what).size[1] : -1;
    const Carry held = make_carry(what, r.problem, q.size[0], keys);
    for (const Sequence& s : r.sequences) need(s.kv_start + s.kv_len <= keys, "sums of too few keys");
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
  check_carrying(program, carry, tensors);
  need(program.loads.empty() && carry.loads.empty(), "gradients of loads");
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, {}, given_sequences, tensors, params, {});
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
