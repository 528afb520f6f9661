#include "../cpu/backward.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "bind.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

const Tensor* given(const Maybe& tensor) { return tensor ? &*tensor : nullptr; }

// A tensor of this dtype and shape; its memory is added to `memory`, also where there is none.
uintptr_t expect(const Tensor* tensor, DType dtype, const Ints& shape, std::vector<Memory>& memory, const char* what) {
  if (tensor == nullptr) {
    memory.push_back(kAbsent);
    return 0;
  }
  const auto& [data, held, size, stride] = *tensor;
  need(held == static_cast<int>(dtype) && size == shape && stride.size() == shape.size(), what);
  memory.push_back({data, size, stride, element_size(dtype)});
  return data;
}

View view_of(const Tensor& tensor, DType dtype, const Ints& shape, std::vector<Memory>& memory, const char* what) {
  expect(&tensor, dtype, shape, memory, what);
  return make_view(tensor);
}

// (fault, what it is about) as `attend` gives it; tensors after the buffers are d_o, d_lse, dq, dk, dv, d_sink and the
// gradients of buffers. dq is float32; dk and dv have the dtype of k and v.
std::pair<int, int> call_backward(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& o, const Maybe& lse, float scale, const Maybe& sink,
                                  const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                  const std::vector<Tensor>& tensors, const std::vector<float>& params,
                                  const std::optional<DropoutTuple>& dropout, const Tensor& d_o, const Maybe& d_lse,
                                  const Tensor& dq, const Tensor& dk, const Tensor& dv, const Maybe& d_sink,
                                  const std::vector<Maybe>& d_buffers, int threads, int tile_q, int tile_kv,
                                  const std::optional<EncodingTuple>& encoding) try {
  need(threads > 0, "threads are at least 1");
  need(tile_q > 0 && tile_q <= kMaxTileQ, "tile_q is 1 to 128");
  need(tile_kv > 0 && tile_kv <= kMaxTileKv, "tile_kv is 1 to 192");
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, sink, given_sequences, tensors, params, dropout);
  if (status.fault != Fault::none) return {static_cast<int>(status.fault), status.value};

  need(r.problem.lse != nullptr || r.empty, "the backward needs lse");
  r.problem.encoding = make_encoding(encoding);
  std::vector<Memory> memory;
  const DType element = r.problem.dtype;
  Gradients g{};
  g.d_o = view_of(d_o, element, r.o_shape, memory, "d_o is not like o");
  g.d_lse =
      reinterpret_cast<const float*>(expect(given(d_lse), DType::f32, r.lse_shape, memory, "d_lse is not like lse"));
  if (d_lse) std::copy_n(d_lse->stride.begin(), 3, g.d_lse_stride);
  g.dq = view_of(dq, DType::f32, q.size, memory, "dq is not float32 of the shape of q");
  g.dk = view_of(dk, element, k.size, memory, "dk is not like k");
  g.dv = view_of(dv, element, v.size, memory, "dv is not like v");
  g.d_sink =
      reinterpret_cast<float*>(expect(given(d_sink), DType::f32, {q.size[1]}, memory, "d_sink is not like the sink"));
  need(!d_sink || (sink && (d_sink->stride[0] == 1 || q.size[1] == 1)), "d_sink is not like the sink");
  need(d_buffers.size() == r.buffers.size(), "gradients of another number of buffers");
  std::vector<float*> d_buffer_data;
  for (size_t i = 0; i < d_buffers.size(); ++i) {
    const Buffer& b = r.buffers[i];
    d_buffer_data.push_back(
        reinterpret_cast<float*>(expect(given(d_buffers[i]), DType::f32, Ints(b.size, b.size + b.rank), memory,
                                        "the gradient of a buffer is not like it")));
    if (!d_buffers[i]) continue;
    int64_t contiguous = 1;
    for (auto d = static_cast<size_t>(b.rank); d-- > 0; contiguous *= b.size[d])
      need(d_buffers[i]->stride[d] == contiguous || b.size[d] <= 1, "the gradient of a buffer is not contiguous");
  }
  for (const LoadSlope& load : program.loads)
    need(d_buffer_data[static_cast<size_t>(program.code[static_cast<size_t>(load.load)].attr)] != nullptr,
         "the gradient of a buffer is not there");
  g.buffers = d_buffer_data.data();
  for (size_t i = 0; i < memory.size(); ++i)
    if (const Fault fault = check_memory(memory[i]); fault != Fault::none)
      return {static_cast<int>(fault), static_cast<int>(6 + r.buffers.size() + i)};
  if (!r.empty) {
    pybind11::gil_scoped_release release;
    status = attend_backward(program, r.problem, g, {tile_q, tile_kv, tile_kv, std::min(threads, kMaxThreads)});
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

}  // namespace

void bind_backward(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("attend_backward", &call_backward, py::arg("program"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"),
        py::arg("lse"), py::arg("scale"), py::arg("sink"), py::arg("sequences"), py::arg("buffers"), py::arg("params"),
        py::arg("dropout"), py::arg("d_o"), py::arg("d_lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("d_sink"), py::arg("d_buffers"), py::arg("threads"), py::arg("tile_q"), py::arg("tile_kv"),
        py::arg("encoding") = py::none());
}

}  // namespace attnkit::cpu
