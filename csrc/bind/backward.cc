#include "../cpu/backward.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "bind.h"
#include "gradients.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

// (fault, what it is about) as `attend` gives it, and Cotangents.
std::pair<int, int> call_backward(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& o, const Maybe& lse, float scale, const Maybe& sink,
                                  const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                  const std::vector<Tensor>& tensors, const std::vector<float>& params,
                                  const std::optional<DropoutTuple>& dropout, const Tensor& d_o, const Maybe& d_lse,
                                  const Tensor& dq, const Tensor& dk, const Tensor& dv, const Maybe& d_sink,
                                  const std::vector<Maybe>& d_buffers, int threads, int tile_q, int tile_kv,
                                  const std::optional<EncodingTuple>& encoding) try {
  need_tiles(threads, tile_q, tile_kv);
  need(!program.carries, "a program that carries");
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, sink, given_sequences, tensors, params, dropout);
  if (status.fault != Fault::none) return {static_cast<int>(status.fault), status.value};
  r.problem.encoding = make_encoding(encoding);
  Cotangents c;
  status = c.fill(program, r, q, k, v, sink, d_o, d_lse, dq, dk, dv, d_sink, d_buffers);
  if (status.fault == Fault::none && !r.empty) {
    pybind11::gil_scoped_release release;
    status =
        attend_backward(program, r.problem, c.gradients, {tile_q, tile_kv, tile_kv, std::min(threads, kMaxThreads)});
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// `attend_backward` of a program that needs nothing but tensors.
class LaunchBackward {
 public:
  LaunchBackward(const Program& program, float scale, int tile_q, int tile_kv)
      : program_(program), scale_(scale), tile_q_(tile_q), tile_kv_(tile_kv) {
    need_tiles(1, tile_q, tile_kv);
    need(!program.carries, "a program that carries");
  }

  std::pair<int, int> run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                          const Tensor& d_o, const Maybe& d_lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                          int threads) const {
    return call_backward(program_, q, k, v, o, lse, scale_, {}, {}, {}, {}, {}, d_o, d_lse, dq, dk, dv, {}, {}, threads,
                         tile_q_, tile_kv_, {});
  }

 private:
  const Program& program_;
  const float scale_;
  const int tile_q_, tile_kv_;
};

}  // namespace

void bind_backward(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("attend_backward", &call_backward, py::arg("program"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"),
        py::arg("lse"), py::arg("scale"), py::arg("sink"), py::arg("sequences"), py::arg("buffers"), py::arg("params"),
        py::arg("dropout"), py::arg("d_o"), py::arg("d_lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("d_sink"), py::arg("d_buffers"), py::arg("threads"), py::arg("tile_q"), py::arg("tile_kv"),
        py::arg("encoding") = py::none());
  py::class_<LaunchBackward>(m, "LaunchBackward")
      .def(py::init<const Program&, float, int, int>(), py::keep_alive<1, 2>())
      .def("run", &LaunchBackward::run);
}

}  // namespace attnkit::cpu
