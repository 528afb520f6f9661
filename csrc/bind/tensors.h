// What reaches the engine from Python: tensors as addresses, shapes and strides that the caller has checked.
#pragma once
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/attend.h"
#include "dlpack.h"

namespace attnkit::cpu {

// Sizes or strides, held in place: a call makes a dozen of them.
class Ints {
 public:
  static constexpr size_t kMost = 8;

  Ints() = default;
  Ints(std::initializer_list<int64_t> values) : Ints(values.begin(), values.end()) {}
  Ints(const int64_t* first, const int64_t* last) {
    for (; first != last; ++first) push_back(*first);
  }

  void push_back(int64_t value) {
    if (size_ == kMost) throw pybind11::value_error("a tensor has at most eight dimensions");
    at_[size_++] = value;
  }
  size_t size() const { return size_; }
  const int64_t* begin() const { return at_; }
  const int64_t* end() const { return at_ + size_; }
  int64_t operator[](size_t i) const { return at_[i]; }
  bool operator==(const Ints& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  int64_t at_[kMost]{};
  size_t size_ = 0;
};

// A tensor as it lies in memory: from Python one of a library that speaks DLPack, or a tuple of these.
struct Tensor {
  uintptr_t data = 0;
  int dtype = -1;  // a DType, or a number that is none
  Ints size, stride;
};

using Maybe = std::optional<Tensor>;
using SequenceTuple = std::tuple<int32_t, int64_t, int64_t, int64_t, int64_t>;  // see Sequence
using DropoutTuple = std::tuple<uint64_t, uint32_t, float>;  // see Dropout
using EncodingTuple = std::tuple<int32_t, int32_t, bool>;  // see Encoding
inline constexpr int kMaxThreads = 1024;  // OpenMP ends the process where the system has no more to give

inline void need(bool ok, const char* what) {
  if (!ok) throw pybind11::value_error(what);
}

inline void need_tiles(int threads, int tile_q, int tile_kv) {
  need(threads > 0, "threads are at least 1");
  need(tile_q > 0 && tile_q <= kMaxTileQ, "tile_q is 1 to 128");
  need(tile_kv > 0 && tile_kv <= kMaxTileKv, "tile_kv is 1 to 192");
}

inline Config config_of(int threads, int tile_q, int tile_kv, int split_kv) {
  need_tiles(threads, tile_q, tile_kv);
  need(split_kv > 0 && split_kv <= 1 << 30, "split_kv is 1 to 2^30");
  return {tile_q, tile_kv, split_kv, std::min(threads, kMaxThreads)};
}

inline constexpr int64_t kFarthest = int64_t{1} << 54;  // elements of 8 bytes: no address space is larger

// The memory of a tensor, as far as it can be told: only its owner knows whether it is as large as the sizes say.
// Of a tensor that outlives it: one that a function made of its argument (a Maybe of a Tensor) does not.
struct Memory {
  uintptr_t data;
  const Ints& size;
  const Ints& stride;  // in elements
  int element;         // bytes
};
inline const Ints kNone{0};
inline const Memory kAbsent{0, kNone, kNone, 1};  // an optional tensor that is not there

// What keeps a tensor from being used, if its sizes and strides are possible at all.
inline Fault check_memory(const Memory& m) {
  need(std::all_of(m.size.begin(), m.size.end(), [](int64_t n) { return n >= 0; }), "a size is negative");
  if (std::find(m.size.begin(), m.size.end(), 0) != m.size.end()) return Fault::none;
  if (m.data == 0) return Fault::no_data;
  for (size_t d = 0; d < m.size.size(); ++d) {
    int64_t reach = 0;
    const bool fits = !__builtin_mul_overflow(m.size[d] - 1, m.stride[d], &reach);
    need(fits && reach <= kFarthest && reach >= -kFarthest, "strides lead out of the address space");
  }
  return m.data % static_cast<uintptr_t>(m.element) == 0 ? Fault::none : Fault::misaligned;
}

// Checks type, sizes and that the elements lie one after the other; returns how many there are, dimensions of 0 apart.
inline int64_t need_contiguous(const Tensor& t, DType dtype, const Ints& size, const char* what) {
  need(t.dtype == static_cast<int>(dtype) && t.size == size && t.stride.size() == size.size(), what);
  int64_t contiguous = 1;
  for (size_t d = size.size(); d-- > 0; contiguous *= std::max<int64_t>(size[d], 1)) {
    need(size[d] <= 1 || t.stride[d] == contiguous, what);
    need(size[d] <= kFarthest / contiguous, "a tensor has more than 2^54 elements");
  }
  return contiguous;
}

// Memory that was never written is found page by page, at a fault each, and threads that write to rows of one page meet
// there. So where a result is so large that the allocator may have mapped it for itself alone, its pages are to be
// large ones. The system may refuse; of memory that has been written nothing changes.
inline void in_large_pages([[maybe_unused]] const Tensor& result) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kPage = size_t{2} << 20, kLeast = 2 * kPage;
  auto bytes = static_cast<size_t>(element_size(static_cast<DType>(result.dtype)));
  for (const int64_t n : result.size) bytes *= static_cast<size_t>(n);
  if (bytes < kLeast) return;
  const uintptr_t first = (result.data + kPage - 1) / kPage * kPage, end = (result.data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

inline View make_view(const Tensor& t) {
  need(t.stride.size() == 4, "a tensor has four strides");
  View v{reinterpret_cast<char*>(t.data), {}};
  // The stride of a single element leads nowhere and may be any number.
  for (int d = 0; d < 4; ++d) v.stride[d] = t.size[d] > 1 ? t.stride[d] : 1;
  return v;
}

// The page table without what no token needs.
class PageTable {
 public:
  void describe(const Tensor& table, int64_t batch, int64_t page_size) {
    need(table.dtype == static_cast<int>(DType::i32) && table.size.size() == 2 && table.stride.size() == 2 &&
             table.size[0] == batch,
         "the page table is not int32, a row for each batch entry");
    need(page_size >= Pages::kLeast && page_size <= int64_t{1} << 30 && (page_size & (page_size - 1)) == 0,
         "a page is a power of two of tokens, at least 16");
    need(table.size[1] <= INT32_MAX / page_size, "more tokens than 2^31 - 1 in a row of the page table");
    shift_ = __builtin_ctzll(static_cast<uint64_t>(page_size));
    tokens_ = table.size[1] << shift_;
  }
  int64_t tokens() const { return tokens_; }  // that a row has room for

  // Copies the entries that the sequences need: another thread may write to the table, and what is used must be what
  // was checked. False where one of them is no page of those that there are; `bad` is its sequence.
  bool copy(const Tensor& table, const std::vector<Sequence>& sequences, int64_t num_pages, int32_t& bad) {
    int64_t most = 0;
    for (const Sequence& s : sequences) {
      need(s.kv_start == 0, "a sequence of paged keys begins at the first");
      most = std::max(most, pages_of(s));
    }
    columns_ = most;
    entries_.resize(static_cast<size_t>(table.size[0] * most));
    const int32_t* from = reinterpret_cast<const int32_t*>(table.data);
    for (size_t i = 0; i < sequences.size(); ++i) {
      const int64_t b = sequences[i].batch;
      for (int64_t j = 0; j < pages_of(sequences[i]); ++j) {
        const int32_t page = from[b * table.stride[0] + j * table.stride[1]];
        bad = static_cast<int32_t>(i);
        if (page < 0 || page >= num_pages) return false;
        entries_[static_cast<size_t>(b * most + j)] = page;
      }
    }
    return true;
  }
  Pages view() const { return {entries_.data(), columns_, shift_}; }

 private:
  int64_t pages_of(const Sequence& s) const { return (s.kv_len + (int64_t{1} << shift_) - 1) >> shift_; }

  std::vector<int32_t> entries_;
  int64_t columns_ = 0, tokens_ = 0;
  int32_t shift_ = 0;
};

// Adds the memory of each to `memory`.
inline std::vector<Buffer> make_buffers(const Program& program, const std::vector<Tensor>& tensors,
                                        std::vector<Memory>& memory) {
  need(static_cast<int>(tensors.size()) == program.num_buffers, "wrong number of buffers");
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [data, dtype, size, stride] = tensors[i];
    need(size.size() == stride.size() && size.size() <= kMaxArgs, "a buffer has at most five dimensions");
    need(dtype >= 0 && dtype <= static_cast<int>(DType::f16), "unknown buffer dtype");
    Buffer b{reinterpret_cast<const void*>(data), static_cast<DType>(dtype), static_cast<int32_t>(size.size()), {}, {}};
    std::copy(size.begin(), size.end(), b.size);
    std::copy(stride.begin(), stride.end(), b.stride);
    if (program.buffer_rank[i] != 0xff) {
      const char held = b.dtype == DType::u8 ? 'b' : b.dtype == DType::i32 || b.dtype == DType::i64 ? 'i' : 'f';
      need(program.buffer_rank[i] == b.rank && program.buffer_type[i] == held, "a buffer does not match the program");
    }
    memory.push_back({data, size, stride, element_size(b.dtype)});
    buffers.push_back(b);
  }
  return buffers;
}

inline std::vector<Sequence> make_sequences(const std::optional<std::vector<SequenceTuple>>& given, int64_t batch,
                                            int64_t q_len, int64_t kv_len) {
  std::vector<Sequence> sequences;
  if (!given)
    for (int64_t b = 0; b < batch; ++b) sequences.push_back({static_cast<int32_t>(b), 0, q_len, 0, kv_len});
  else
    for (const auto& [b, q_start, n_q, kv_start, n_kv] : *given) {
      need(b >= 0 && b < batch && q_start >= 0 && n_q >= 0 && q_start <= q_len && n_q <= q_len - q_start &&
               kv_start >= 0 && n_kv >= 0 && kv_start <= kv_len && n_kv <= kv_len - kv_start,
           "a sequence lies outside the tensors");
      sequences.push_back({b, q_start, n_q, kv_start, n_kv});
    }
  need(sequences.size() <= INT32_MAX, "more than 2^31 - 1 sequences");
  for (const Sequence& s : sequences)
    need(s.q_len <= INT32_MAX && s.kv_len <= INT32_MAX, "a sequence is longer than 2^31 - 1");
  return sequences;
}

inline Encoding make_encoding(const std::optional<EncodingTuple>& given) {
  if (!given) return {};
  const auto [q_tile, kv_tile, center] = *given;
  need(q_tile > 0 && kv_tile > 0, "tiles of codes are positive");
  return {q_tile, kv_tile, center};
}

// One problem of `attend`, and what its views point to.
struct Request {
  Problem problem{};
  std::vector<Buffer> buffers;
  std::vector<Sequence> sequences;
  PageTable pages;
  int64_t rows = 0;  // of o and lse, both float32, of groups that have rows of their own
  Ints o_shape, lse_shape;
  bool empty = false;  // there is nothing to compute

  // A fault is about a tensor: 0 q, 1 k, 2 v, 3 o, 4 lse, 5 sink, 6 and on the buffers; or about a sequence. Shapes are
  // [batch, heads, length, head_dim], of k and v with a page table [pages, heads, page size, head_dim].
  Status fill(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
              const Maybe& lse, float scale, const Maybe& sink,
              const std::optional<std::vector<SequenceTuple>>& given_sequences, const std::vector<Tensor>& tensors,
              const std::vector<float>& params, const std::optional<DropoutTuple>& dropout, const Maybe& table = {}) {
    need(q.size.size() == 4 && k.size.size() == 4 && v.size.size() == 4, "q, k and v have four dimensions");
    need((table || q.size[0] == k.size[0]) && k.size[0] == v.size[0], "q, k and v differ in batch");
    need(k.size[1] == v.size[1] && k.size[2] == v.size[2], "k and v differ in heads or length");
    need(k.size[1] > 0 && q.size[1] % k.size[1] == 0, "query heads are not a multiple of kv heads");
    need(q.size[3] == k.size[3], "q and k differ in head_dim");
    need(q.size[3] <= 4096 && v.size[3] <= 4096, "head_dim above 4096");
    need(static_cast<int>(params.size()) == program.num_params, "wrong number of parameters");
    constexpr int f32 = static_cast<int>(DType::f32);
    need(q.dtype == k.dtype && q.dtype == v.dtype && o.dtype == (rows > 0 ? f32 : q.dtype),
         "q, k, v and o differ in dtype");
    need(q.dtype == static_cast<int>(DType::f32) || q.dtype == static_cast<int>(DType::bf16) ||
             q.dtype == static_cast<int>(DType::f16),
         "q, k, v and o are float32, bfloat16 or float16");
    need(q.size[0] <= INT32_MAX && q.size[1] <= INT32_MAX, "more than 2^31 - 1 batch entries or heads");
    o_shape = {q.size[0], q.size[1], rows > 0 ? rows : q.size[2], v.size[3]};
    lse_shape = {o_shape.begin(), o_shape.end() - 1};
    need(o.size == o_shape, "o is not of the shape of the output");
    problem = Problem{};
    problem.q = make_view(q);
    problem.k = make_view(k);
    problem.v = make_view(v);
    problem.o = make_view(o);
    problem.dtype = static_cast<DType>(q.dtype);
    if (lse) {
      need(lse->dtype == f32 && lse->size == lse_shape && lse->stride.size() == 3,
           "lse is not float32 of three strides");
      problem.lse = reinterpret_cast<float*>(lse->data);
      std::copy(lse->stride.begin(), lse->stride.end(), problem.lse_stride);
    }
    if (sink) {
      need(sink->dtype == f32 && sink->size == Ints{q.size[1]} && sink->stride.size() == 1 &&
               (sink->stride[0] == 1 || q.size[1] == 1),
           "the sink is not float32, one after the other, for each head");
      problem.sink = reinterpret_cast<const float*>(sink->data);
    }
    const int element = element_size(problem.dtype);
    std::vector<Memory> memory{{q.data, q.size, q.stride, element},
                               {k.data, k.size, k.stride, element},
                               {v.data, v.size, v.stride, element},
                               {o.data, o.size, o.stride, rows > 0 ? 4 : element}};
    memory.push_back(lse ? Memory{lse->data, lse->size, lse->stride, element_size(DType::f32)} : kAbsent);
    memory.push_back(sink ? Memory{sink->data, sink->size, sink->stride, element_size(DType::f32)} : kAbsent);
    int64_t kv_len = k.size[2];
    if (table) {
      pages.describe(*table, q.size[0], k.size[2]);
      kv_len = pages.tokens();
      need(given_sequences.has_value(), "paged keys need sequences");
    }
    buffers = make_buffers(program, tensors, memory);
    for (size_t i = 0; i < memory.size(); ++i)
      if (const Fault fault = check_memory(memory[i]); fault != Fault::none) return {fault, static_cast<int>(i)};
    if (table)
      need(check_memory({table->data, table->size, table->stride, 4}) == Fault::none,
           "the page table has no memory, or is misaligned");
    in_large_pages(o);
    if (std::find(o_shape.begin(), o_shape.end(), 0) != o_shape.end()) {
      empty = true;
      return {};
    }
    sequences = make_sequences(given_sequences, q.size[0], q.size[2], kv_len);
    if (table) {
      int32_t bad = 0;
      if (!pages.copy(*table, sequences, k.size[0], bad)) return {Fault::no_page, bad};
      problem.pages = pages.view();
    }
    problem.num_heads = static_cast<int32_t>(q.size[1]);
    problem.num_kv_heads = static_cast<int32_t>(k.size[1]);
    problem.head_dim = static_cast<int32_t>(q.size[3]);
    problem.v_head_dim = static_cast<int32_t>(v.size[3]);
    problem.scale = scale;
    problem.sequences = sequences.data();
    problem.num_sequences = static_cast<int32_t>(sequences.size());
    problem.buffers = buffers.data();
    problem.num_buffers = static_cast<int32_t>(buffers.size());
    problem.params = params.data();
    problem.num_params = static_cast<int32_t>(params.size());
    if (dropout) problem.dropout = {std::get<0>(*dropout), std::get<1>(*dropout), std::get<2>(*dropout)};
    return {};
  }
};

}  // namespace attnkit::cpu

// A tuple, or anything else that holds integers in a row.
template <>
struct pybind11::detail::type_caster<attnkit::cpu::Ints> {
  PYBIND11_TYPE_CASTER(attnkit::cpu::Ints, const_name("Sequence[int]"));

  bool load(handle source, bool) {
    const auto items = reinterpret_steal<object>(PySequence_Fast(source.ptr(), ""));
    value = {};
    if (!items) PyErr_Clear();
    for (Py_ssize_t i = 0; items && i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
      const int64_t n = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), i));
      if (n == -1 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
      value.push_back(n);
    }
    return static_cast<bool>(items);
  }
};

template <>
struct pybind11::detail::type_caster<attnkit::cpu::Tensor> {
  PYBIND11_TYPE_CASTER(attnkit::cpu::Tensor, const_name("Tensor"));

  bool load(handle source, bool convert) {
    namespace dlpack = attnkit::dlpack;
    const dlpack::ExchangeApi* api = dlpack::exchange_api(source.ptr());
    if (api == nullptr) return load_tuple(source, convert);
    dlpack::Tensor t;
    if (api->read(source.ptr(), &t) != 0) {
      PyErr_Clear();
      return false;
    }
    if (t.device_type != dlpack::kCpu || t.strides == nullptr) return false;
    value = {reinterpret_cast<uintptr_t>(t.data) + t.byte_offset,
             dtype_of(t),
             {t.shape, t.shape + t.ndim},
             {t.strides, t.strides + t.ndim}};
    return true;
  }

 private:
  bool load_tuple(handle source, bool convert) {
    make_caster<std::tuple<uintptr_t, int, attnkit::cpu::Ints, attnkit::cpu::Ints>> parts;
    if (!isinstance<tuple>(source) || !parts.load(source, convert)) return false;
    const auto& [data, dtype, size, stride] =
        cast_op<const std::tuple<uintptr_t, int, attnkit::cpu::Ints, attnkit::cpu::Ints>&>(parts);
    value = {data, dtype, size, stride};
    return true;
  }

  static int dtype_of(const attnkit::dlpack::Tensor& t) {
    using attnkit::cpu::DType;
    struct Row {
      uint8_t code, bits;
      DType dtype;
    };
    namespace dlpack = attnkit::dlpack;
    constexpr Row rows[] = {{dlpack::kFloat, 32, DType::f32},   {dlpack::kInt, 32, DType::i32},
                            {dlpack::kInt, 64, DType::i64},     {dlpack::kBool, 8, DType::u8},
                            {dlpack::kBfloat, 16, DType::bf16}, {dlpack::kFloat, 16, DType::f16},
                            {dlpack::kInt, 8, DType::byte},     {dlpack::kUnsigned, 8, DType::byte}};
    for (const Row& row : rows)
      if (t.code == row.code && t.bits == row.bits && t.lanes == 1) return static_cast<int>(row.dtype);
    return -1;
  }
};
