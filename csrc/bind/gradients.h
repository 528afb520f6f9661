// What the backward of a problem reads and writes besides, as Python gives it.
#pragma once
#include "tensors.h"

namespace attnkit::cpu {

struct Cotangents {
  int64_t rows = 0, kv_rows = 0;  // of dq, of dk and dv, float32, of groups that have rows of their own
  Gradients gradients{};
  std::vector<float*> buffers;

  // A fault is about a tensor, after those and the buffers of the request: d_o, d_lse, dq, dk, dv, d_sink and the
  // gradients of buffers. dq is float32; dk and dv have the dtype of k and v.
  Status fill(const Program& program, const Request& r, const Tensor& q, const Tensor& k, const Tensor& v,
              const Maybe& sink, const Tensor& d_o, const Maybe& d_lse, const Tensor& dq, const Tensor& dk,
              const Tensor& dv, const Maybe& d_sink, const std::vector<Maybe>& d_buffers) {
    need(r.problem.lse != nullptr || r.empty, "the backward needs lse");
    const auto element = static_cast<DType>(q.dtype), of_keys = kv_rows > 0 ? DType::f32 : element;
    const Ints o_shape{q.size[0], q.size[1], q.size[2], v.size[3]};
    const auto rows_of = [](const Tensor& t, int64_t rows) {
      return Ints{t.size[0], t.size[1], rows > 0 ? rows : t.size[2], t.size[3]};
    };
    gradients.d_o = view_of(d_o, element, o_shape, "d_o is not like o");
    gradients.d_lse = expect(given(d_lse), DType::f32, r.lse_shape, "d_lse is not like lse");
    if (d_lse) std::copy_n(d_lse->stride.begin(), 3, gradients.d_lse_stride);
    gradients.dq = view_of(dq, DType::f32, rows_of(q, rows), "dq is not float32 of the shape of q");
    gradients.dk = view_of(dk, of_keys, rows_of(k, kv_rows), "dk is not like k");
    gradients.dv = view_of(dv, of_keys, rows_of(v, kv_rows), "dv is not like v");
    gradients.d_sink = expect(given(d_sink), DType::f32, {q.size[1]}, "d_sink is not like the sink");
    need(!d_sink || (sink && (d_sink->stride[0] == 1 || q.size[1] == 1)), "d_sink is not like the sink");
    need(d_buffers.size() == r.buffers.size(), "gradients of another number of buffers");
    for (size_t i = 0; i < d_buffers.size(); ++i) {
      const Buffer& b = r.buffers[i];
      buffers.push_back(expect(given(d_buffers[i]), DType::f32, Ints(b.size, b.size + b.rank),
                               "the gradient of a buffer is not like it"));
      if (!d_buffers[i]) continue;
      int64_t contiguous = 1;
      for (auto d = static_cast<size_t>(b.rank); d-- > 0; contiguous *= b.size[d])
        need(d_buffers[i]->stride[d] == contiguous || b.size[d] <= 1, "the gradient of a buffer is not contiguous");
    }
    for (const LoadSlope& load : program.loads)
      need(buffers[static_cast<size_t>(program.code[static_cast<size_t>(load.load)].attr)] != nullptr,
           "the gradient of a buffer is not there");
    gradients.buffers = buffers.data();
    for (size_t i = 0; i < memory_.size(); ++i)
      if (const Fault fault = check_memory(memory_[i]); fault != Fault::none)
        return {fault, static_cast<int>(6 + r.buffers.size() + i)};
    for (const Tensor* t : {&dq, &dk, &dv}) in_large_pages(*t);
    return {};
  }

 private:
  static const Tensor* given(const Maybe& tensor) { return tensor ? &*tensor : nullptr; }

  // A tensor of this dtype and shape; its memory is noted, also where there is none.
  float* expect(const Tensor* tensor, DType dtype, const Ints& shape, const char* what) {
    if (tensor == nullptr) {
      memory_.push_back(kAbsent);
      return nullptr;
    }
    const auto& [data, held, size, stride] = *tensor;
    need(held == static_cast<int>(dtype) && size == shape && stride.size() == shape.size(), what);
    memory_.push_back({data, size, stride, element_size(dtype)});
    return reinterpret_cast<float*>(data);
  }

  View view_of(const Tensor& tensor, DType dtype, const Ints& shape, const char* what) {
    expect(&tensor, dtype, shape, what);
    return make_view(tensor);
  }

  std::vector<Memory> memory_;
};

}  // namespace attnkit::cpu
