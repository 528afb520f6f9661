// The only C++ that sees Python: tensors arrive as addresses, shapes and strides that the caller has checked.
#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/attend.h"
#include "../cpu/blocks.h"

namespace py = pybind11;
using namespace attnkit::cpu;  // NOLINT: this file is the engine's face

namespace {

using Ints = std::vector<int64_t>;
using BufferTuple = std::tuple<uintptr_t, int, Ints, Ints>;  // address, dtype, sizes, strides
using SequenceTuple = std::tuple<int32_t, int64_t, int64_t, int64_t, int64_t>;  // see Sequence
constexpr int kMaxThreads = 1024;  // OpenMP ends the process where the system has no more to give
using ProgramCode = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;  // rows of 8

Program make_program(const ProgramCode& code, int score, int mask, int num_buffers, int num_params) {
  Program p;
  const std::string bad =
      compile({code.data(), static_cast<size_t>(code.size())}, score, mask, num_buffers, num_params, p);
  if (!bad.empty()) throw py::value_error(bad);
  return p;
}

void need(bool ok, const char* what) {
  if (!ok) throw py::value_error(what);
}

constexpr int64_t kFarthest = int64_t{1} << 54;  // elements of 8 bytes: no address space is larger

// The memory of a tensor, as far as it can be told: only its owner knows whether it is as large as the sizes say.
struct Memory {
  uintptr_t data;
  const Ints& size;
  const Ints& stride;  // in elements
  int element;         // bytes
};
const Ints kNone{0};
const Memory kAbsent{0, kNone, kNone, 1};  // an optional tensor that is not there

// What keeps a tensor from being used, if its sizes and strides are possible at all.
Fault check_memory(const Memory& m) {
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

View make_view(uintptr_t data, const Ints& stride) {
  need(stride.size() == 4, "a tensor has four strides");
  View v{reinterpret_cast<char*>(data), {}};
  std::copy(stride.begin(), stride.end(), v.stride);
  return v;
}

// Adds the memory of each to `memory`.
std::vector<Buffer> make_buffers(const Program& program, const std::vector<BufferTuple>& tuples,
                                 std::vector<Memory>& memory) {
  need(static_cast<int>(tuples.size()) == program.num_buffers, "wrong number of buffers");
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < tuples.size(); ++i) {
    const auto& [data, dtype, size, stride] = tuples[i];
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

std::vector<Sequence> make_sequences(const std::optional<std::vector<SequenceTuple>>& given, int64_t batch,
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

// (fault, what it is about): an instruction, or a tensor: 0 q, 1 k, 2 v, 3 o, 4 lse, 5 sink, 6 and on the buffers.
// Shapes are [batch, heads, length, head_dim].
std::pair<int, int> call_attend(const Program& program, int dtype, uintptr_t q, const Ints& q_shape,
                                const Ints& q_stride, uintptr_t k, const Ints& k_shape, const Ints& k_stride,
                                uintptr_t v, const Ints& v_shape, const Ints& v_stride, uintptr_t o,
                                const Ints& o_stride, uintptr_t lse, const Ints& lse_stride, float scale,
                                uintptr_t sink, const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                const std::vector<BufferTuple>& buffer_tuples, const std::vector<float>& params,
                                int threads, int tile_q, int tile_kv, int split_kv) try {
  need(q_shape.size() == 4 && k_shape.size() == 4 && v_shape.size() == 4, "q, k and v have four dimensions");
  need(q_shape[0] == k_shape[0] && q_shape[0] == v_shape[0], "q, k and v differ in batch");
  need(k_shape[1] == v_shape[1] && k_shape[2] == v_shape[2], "k and v differ in heads or length");
  need(k_shape[1] > 0 && q_shape[1] % k_shape[1] == 0, "query heads are not a multiple of kv heads");
  need(q_shape[3] == k_shape[3], "q and k differ in head_dim");
  need(q_shape[3] <= 4096 && v_shape[3] <= 4096, "head_dim above 4096");
  need(static_cast<int>(params.size()) == program.num_params, "wrong number of parameters");
  need(tile_q > 0 && tile_q <= kMaxTileQ, "tile_q is 1 to 96");
  need(tile_kv > 0 && tile_kv <= kMaxTileKv, "tile_kv is 1 to 128");
  need(split_kv > 0 && split_kv <= 1 << 30, "split_kv is 1 to 2^30");
  need(dtype == static_cast<int>(DType::f32) || dtype == static_cast<int>(DType::bf16) ||
           dtype == static_cast<int>(DType::f16),
       "q, k, v and o are float32, bfloat16 or float16");
  need(lse == 0 || lse_stride.size() == 3, "lse has three strides");
  need(threads > 0, "threads are at least 1");
  need(q_shape[0] <= INT32_MAX && q_shape[1] <= INT32_MAX, "more than 2^31 - 1 batch entries or heads");
  Problem p{};
  p.q = make_view(q, q_stride);
  p.k = make_view(k, k_stride);
  p.v = make_view(v, v_stride);
  p.o = make_view(o, o_stride);
  p.dtype = static_cast<DType>(dtype);
  p.lse = reinterpret_cast<float*>(lse);
  if (lse != 0) std::copy(lse_stride.begin(), lse_stride.end(), p.lse_stride);
  const Ints o_shape{q_shape[0], q_shape[1], q_shape[2], v_shape[3]}, lse_shape(o_shape.begin(), o_shape.end() - 1);
  const Ints sink_shape{q_shape[1]}, sink_stride{1};
  constexpr int f32 = element_size(DType::f32);
  const int element = element_size(p.dtype);
  std::vector<Memory> memory{{q, q_shape, q_stride, element},
                             {k, k_shape, k_stride, element},
                             {v, v_shape, v_stride, element},
                             {o, o_shape, o_stride, element}};
  memory.push_back(lse != 0 ? Memory{lse, lse_shape, lse_stride, f32} : kAbsent);
  memory.push_back(sink != 0 ? Memory{sink, sink_shape, sink_stride, f32} : kAbsent);
  const std::vector<Buffer> buffers = make_buffers(program, buffer_tuples, memory);
  for (size_t i = 0; i < memory.size(); ++i)
    if (const Fault fault = check_memory(memory[i]); fault != Fault::none)
      return {static_cast<int>(fault), static_cast<int>(i)};
  if (std::find(o_shape.begin(), o_shape.end(), 0) != o_shape.end()) return {0, -1};  // nothing to compute
  const std::vector<Sequence> sequences = make_sequences(given_sequences, q_shape[0], q_shape[2], k_shape[2]);
  p.num_heads = static_cast<int32_t>(q_shape[1]);
  p.num_kv_heads = static_cast<int32_t>(k_shape[1]);
  p.head_dim = static_cast<int32_t>(q_shape[3]);
  p.v_head_dim = static_cast<int32_t>(v_shape[3]);
  p.scale = scale;
  p.sink = reinterpret_cast<const float*>(sink);
  p.sequences = sequences.data();
  p.num_sequences = static_cast<int32_t>(sequences.size());
  p.buffers = buffers.data();
  p.num_buffers = static_cast<int32_t>(buffers.size());
  p.params = params.data();
  p.num_params = static_cast<int32_t>(params.size());
  py::gil_scoped_release release;
  const Status status = attend(program, p, {tile_q, tile_kv, split_kv, std::min(threads, kMaxThreads)});
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// (fault, instruction, batch, heads, offsets int64 [rows + 1], runs int32 [n, 3]): see BlockRuns. Batch and heads are 1
// where all are alike.
py::tuple call_block_runs(const Program& program, int batch, int heads, int64_t q_len, int64_t kv_len, int q_block,
                          int kv_block, const std::vector<BufferTuple>& buffer_tuples,
                          const std::vector<float>& params) {
  need(q_len > 0 && kv_len > 0 && q_block > 0 && kv_block > 0 && batch > 0 && heads > 0, "sizes are positive");
  need(static_cast<int>(params.size()) == program.num_params, "wrong number of parameters");
  need(q_len <= INT32_MAX && kv_len <= INT32_MAX, "a sequence is longer than 2^31 - 1");
  const int64_t rows = (q_len - 1) / q_block + 1, columns = (kv_len - 1) / kv_block + 1;
  need(batch <= 1 << 20 && heads <= 1 << 20 && rows <= (1 << 26) / (int64_t{batch} * heads) && columns <= 1 << 26,
       "more than 2^26 rows or columns of blocks");
  std::vector<Memory> memory;
  const std::vector<Buffer> buffers = make_buffers(program, buffer_tuples, memory);
  for (const Memory& m : memory) need(check_memory(m) == Fault::none, "a buffer has no memory, or is misaligned");
  const std::vector<Sequence> sequences = make_sequences({}, batch, q_len, kv_len);
  Problem p{};
  p.sequences = sequences.data();
  p.num_sequences = batch;
  p.num_heads = heads;
  p.buffers = buffers.data();
  p.num_buffers = static_cast<int32_t>(buffers.size());
  p.params = params.data();
  p.num_params = static_cast<int32_t>(params.size());
  BlockRuns found;
  {
    py::gil_scoped_release release;
    found = block_runs(program, p, q_block, kv_block);
  }
  py::array_t<int64_t> offsets(static_cast<py::ssize_t>(found.offsets.size()), found.offsets.data());
  static_assert(sizeof(Run) == 3 * sizeof(int32_t));
  py::array_t<int32_t> runs({static_cast<py::ssize_t>(found.runs.size()), py::ssize_t{3}},
                            reinterpret_cast<const int32_t*>(found.runs.data()));
  return py::make_tuple(static_cast<int>(found.status.fault), found.status.value, found.per_batch ? batch : 1,
                        found.per_head ? heads : 1, offsets, runs);
}

// The routine behind one opcode, on whole arrays; any of the arguments an opcode has must be there.
py::array_t<float> call_evaluate(const std::string& opcode,
                                 const std::vector<py::array_t<float, py::array::c_style>>& args) {
  for (int i = 0; i < static_cast<int>(Op::count); ++i) {
    const OpSignature& sig = signature(static_cast<Op>(i));
    if (opcode != sig.name) continue;
    const size_t n_args = std::strlen(sig.args);
    need(n_args > 0 && sig.args[0] != '*' && args.size() == n_args, "not an opcode of that many arguments");
    need(args[0].size() <= 1 << 30, "more than 2^30 elements");
    const auto n = static_cast<size_t>(args[0].size()), padded = (n + 15) / 16 * 16;
    std::vector<std::vector<float>> in(3, std::vector<float>(padded));
    const float* pointers[3];
    for (size_t a = 0; a < 3; ++a) {
      if (a < n_args) {
        need(static_cast<size_t>(args[a].size()) == n, "arguments differ in length");
        std::copy_n(args[a].data(), n, in[a].begin());
      }
      pointers[a] = in[a].data();
    }
    std::vector<float> out(padded);
    evaluate(static_cast<Op>(i), out.data(), pointers, static_cast<int32_t>(padded));
    py::array_t<float> result(static_cast<py::ssize_t>(n));
    std::copy_n(out.begin(), n, result.mutable_data());
    return result;
  }
  throw py::value_error("unknown opcode " + opcode);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double fma_gflops(int threads, int64_t rounds) {
  need(threads > 0, "threads are at least 1");
  need(rounds >= 0 && rounds <= 1'000'000'000, "rounds are 0 to 10^9");
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  double flops = 0;
#pragma omp parallel num_threads(std::min(threads, kMaxThreads)) reduction(+ : flops)
  flops += current_isa().fma_burst(rounds);
  return flops / seconds_since(start) * 1e-9;
}

double read_gbytes_per_s(int threads, const py::array_t<float, py::array::c_style>& memory) {
  need(threads > 0, "threads are at least 1");
  const float* data = memory.data();
  const int64_t n = memory.size();
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  float sum = 0;
#pragma omp parallel num_threads(std::min(threads, kMaxThreads)) reduction(+ : sum)
  {
    const int64_t part = n / omp_get_num_threads();
    sum += current_isa().read_burst(data + part * omp_get_thread_num(), part);
  }
  asm volatile("" : : "m"(sum));  // or the reads could be dropped
  return static_cast<double>(n) * 4 / seconds_since(start) * 1e-9;
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "attnkit's CPU engine.";
  py::class_<Program>(m, "Program", "A verified tile-bytecode program; the only thing the engine runs.")
      .def(py::init(&make_program), py::arg("code"), py::arg("score"), py::arg("mask"), py::arg("num_buffers"),
           py::arg("num_params"))
      .def_property_readonly("num_instructions", [](const Program& p) { return p.code.size(); })
      .def_property_readonly("ranks", [](const Program& p) {
        std::vector<int> ranks;
        for (const Instruction& in : p.code) ranks.push_back(in.rank);
        return ranks;
      });
  m.def("opcodes", [] {
    py::dict d;
    for (int i = 0; i < static_cast<int>(Op::count); ++i) d[signature(static_cast<Op>(i)).name] = i;
    return d;
  });
  m.def("attend", &call_attend);
  m.def("block_runs", &call_block_runs);
  m.def("evaluate", &call_evaluate);
  m.def("isa_levels", [] {
    std::vector<std::string> names;
    for (const Kernel* k : isa_levels()) names.emplace_back(k->name);
    return names;
  });
  m.def("current_isa", [] { return std::string(current_isa().name); });
  m.def("set_isa", [](const std::string& name) {
    need(set_isa(name.c_str()), "this machine or build has no such instruction set");
  });
  m.def("last_isa", [] { return std::string(last_isa()); });
  m.def("set_poison", &set_poison);
  m.def("fma_gflops", &fma_gflops, py::arg("threads"), py::arg("rounds") = 2'000'000);
  m.def("read_gbytes_per_s", &read_gbytes_per_s, py::arg("threads"), py::arg("memory"));
  m.attr("compiler") = __VERSION__;
}
