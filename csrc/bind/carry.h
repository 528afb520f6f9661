// What is carried onto keys, as Python gives it.
#pragma once
#include "../cpu/carry.h"
#include "tensors.h"

namespace attnkit::cpu {

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

inline Carry make_carry(const CarryTuple& given, const Problem& p, int64_t batch, int64_t keys) {
  const auto& [head, budget, sums, gone] = given;
  need(head >= 0 && head < p.num_heads, "no such head");
  need(budget >= 0 && (budget > 0) == gone.has_value(), "a budget, and what is gone");
  Carry carry{head, budget, rows_of_keys<float>(sums, DType::f32, batch, keys, "sums are float32 [batch, keys]"), keys,
              nullptr};
  if (gone) carry.gone = rows_of_keys<int32_t>(*gone, DType::i32, batch, keys, "gone is int32 [batch, keys]");
  return carry;
}

// The program of what is carried reads what the other does.
inline void check_carrying(const Program& program, const Program& carry, const std::vector<Tensor>& tensors) {
  need(program.mask >= 0 && carry.mask >= 0 && !carry.carries && !program.unnormalized, "not a program that carries");
  std::vector<Memory> memory;
  make_buffers(carry, tensors, memory);
  need(carry.num_params == program.num_params, "wrong number of parameters");
}

}  // namespace attnkit::cpu
