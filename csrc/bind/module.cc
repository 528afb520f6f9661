// The only C++ that sees Python: tensors arrive as they lie in memory, which is nobody else's to check.
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
#include <utility>
#include <vector>

#include "../cpu/blocks.h"
#include "../cpu/gather.h"
#include "bind.h"
#include "gradients.h"
#include "tensors.h"

namespace py = pybind11;
using namespace attnkit::cpu;  // NOLINT: this file is the engine's face

namespace {

using ProgramCode = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;  // rows of 8

// `loads`: (instruction, value of its slope) of every load that has a gradient.
Program make_program(const ProgramCode& code, int score, int mask, int num_buffers, int num_params, int slope,
                     const std::vector<std::pair<int, int>>& loads, int slope_f, bool carries, bool unnormalized) {
  Program p;
  Roots roots{score, mask, slope, {}};
  roots.slope_f = slope_f;
  roots.carries = carries;
  roots.unnormalized = unnormalized;
  for (const auto& [load, of_load] : loads) roots.loads.push_back({load, of_load});
  const std::string bad = compile({code.data(), static_cast<size_t>(code.size())}, roots, num_buffers, num_params, p);
  if (!bad.empty()) throw py::value_error(bad);
  return p;
}

// (fault, what it is about): an instruction, a sequence, or a tensor: 0 q, 1 k, 2 v, 3 o, 4 lse, 5 sink, 6 and on the
// buffers. Shapes are [batch, heads, length, head_dim].
std::pair<int, int> call_attend(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& o, const Maybe& lse, float scale, const Maybe& sink,
                                const std::optional<std::vector<SequenceTuple>>& given_sequences,
                                const std::vector<Tensor>& tensors, const std::vector<float>& params,
                                const std::optional<DropoutTuple>& dropout, int threads, int tile_q, int tile_kv,
                                int split_kv, const Maybe& page_table, const std::optional<EncodingTuple>& encoding,
                                float skip) try {
  const Config config = config_of(threads, tile_q, tile_kv, split_kv);
  need(!page_table || tile_kv % Pages::kLeast == 0, "tile_kv of paged keys is a multiple of 16");
  need(!program.carries, "a program that carries");
  need(!encoding || !page_table, "codes of pages are a cache's");
  need(!program.unnormalized || (!encoding && skip == 0 && !sink), "what needs a softmax");
  need(skip >= 0, "skip is not below 0");
  Request r;
  Status status = r.fill(program, q, k, v, o, lse, scale, sink, given_sequences, tensors, params, dropout, page_table);
  r.problem.encoding = make_encoding(encoding);
  r.problem.skip = skip;
  if (status.fault == Fault::none && !r.empty) {
    py::gil_scoped_release release;
    status = attend(program, r.problem, config);
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// What a mask is looked at with: a problem without queries, keys and values, of so many sequences of equal lengths.
class MaskProblem {
 public:
  MaskProblem(const Program& program, int batch, int heads, int64_t q_len, int64_t kv_len, int q_block, int kv_block,
              const std::vector<Tensor>& tensors, const std::vector<float>& params) {
    need(q_len > 0 && kv_len > 0 && q_block > 0 && kv_block > 0 && batch > 0 && heads > 0, "sizes are positive");
    need(static_cast<int>(params.size()) == program.num_params, "wrong number of parameters");
    need(q_len <= INT32_MAX && kv_len <= INT32_MAX, "a sequence is longer than 2^31 - 1");
    const int64_t rows = (q_len - 1) / q_block + 1, columns = (kv_len - 1) / kv_block + 1;
    need(batch <= 1 << 20 && heads <= 1 << 20 && rows <= (1 << 26) / (int64_t{batch} * heads) && columns <= 1 << 26,
         "more than 2^26 rows or columns of blocks");
    std::vector<Memory> memory;
    buffers_ = make_buffers(program, tensors, memory);
    for (const Memory& m : memory) need(check_memory(m) == Fault::none, "a buffer has no memory, or is misaligned");
    sequences_ = make_sequences({}, batch, q_len, kv_len);
    p.sequences = sequences_.data();
    p.num_sequences = batch;
    p.num_heads = heads;
    p.buffers = buffers_.data();
    p.num_buffers = static_cast<int32_t>(buffers_.size());
    p.params = params.data();
    p.num_params = static_cast<int32_t>(params.size());
  }
  Problem p{};

 private:
  std::vector<Buffer> buffers_;
  std::vector<Sequence> sequences_;
};

// (fault, instruction, batch, heads, offsets int64 [rows + 1], runs int32 [n, 3]): see BlockRuns. Batch and heads are 1
// where all are alike.
py::tuple call_block_runs(const Program& program, int batch, int heads, int64_t q_len, int64_t kv_len, int q_block,
                          int kv_block, const std::vector<Tensor>& tensors, const std::vector<float>& params) {
  const MaskProblem problem(program, batch, heads, q_len, kv_len, q_block, kv_block, tensors, params);
  BlockRuns found;
  {
    py::gil_scoped_release release;
    found = block_runs(program, problem.p, q_block, kv_block);
  }
  py::array_t<int64_t> offsets(static_cast<py::ssize_t>(found.offsets.size()), found.offsets.data());
  static_assert(sizeof(Run) == 3 * sizeof(int32_t));
  py::array_t<int32_t> runs({static_cast<py::ssize_t>(found.runs.size()), py::ssize_t{3}},
                            reinterpret_cast<const int32_t*>(found.runs.data()));
  return py::make_tuple(static_cast<int>(found.status.fault), found.status.value, found.per_batch ? batch : 1,
                        found.per_head ? heads : 1, offsets, runs);
}

// (full, partial) tiles of queries that are gathered, see GatheredTiles; None where they are not.
std::optional<std::pair<int64_t, int64_t>> call_gathered_tiles(const Program& program, int batch, int heads,
                                                               int64_t q_len, int64_t kv_len, int tile_q, int tile_kv,
                                                               const std::vector<Tensor>& tensors,
                                                               const std::vector<float>& params) {
  need(tile_q <= kMaxTileQ && tile_kv <= kMaxTileKv, "tiles are too large");
  const MaskProblem problem(program, batch, heads, q_len, kv_len, tile_q, tile_kv, tensors, params);
  const py::gil_scoped_release release;
  const std::optional<GatheredTiles> found = gathered_tiles(program, problem.p, {tile_q, tile_kv, tile_kv, 1});
  if (!found) return {};
  return std::pair{found->full, found->partial};
}

// The routine behind one opcode, or one of the engine's own, on whole arrays. All its arguments must be there; one of a
// single element among longer ones is the same for all.
py::array_t<float> call_evaluate(const std::string& opcode,
                                 const std::vector<py::array_t<float, py::array::c_style>>& args) {
  for (int i = 0; i < static_cast<int>(Op::all); ++i) {
    const Op op = static_cast<Op>(i);
    const OpSignature& sig = signature(op);
    if (opcode != sig.name) continue;
    const size_t n_args = std::strlen(sig.args);
    need(n_args > 0 && sig.args[0] != '*' && args.size() == n_args, "not an opcode of that many arguments");
    const auto size = [&](size_t a) { return static_cast<size_t>(args[a].size()); };
    size_t n = size(0);
    for (size_t a = 1; a < n_args; ++a)
      if (n == 1) n = size(a);
    need(n <= 1 << 30, "more than 2^30 elements");
    const size_t padded = std::max<size_t>((n + 15) / 16, 1) * 16;  // room for a single element beside none
    std::vector<std::vector<float>> in(kMaxArgs, std::vector<float>(padded));
    const float* pointers[kMaxArgs];
    bool same[kMaxArgs] = {};
    for (size_t a = 0; a < kMaxArgs; ++a) {
      if (a < n_args) {
        same[a] = size(a) == 1 && n != 1;
        need(size(a) == n || same[a], "arguments differ in length");
        std::copy_n(args[a].data(), size(a), in[a].begin());
      }
      pointers[a] = in[a].data();
    }
    std::vector<float> out(padded);
    evaluate(op, out.data(), pointers, same, static_cast<int32_t>(padded));
    py::array_t<float> result(static_cast<py::ssize_t>(n));
    std::copy_n(out.begin(), n, result.mutable_data());
    return result;
  }
  throw py::value_error("unknown opcode " + opcode);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double gflops(double (*burst)(int64_t), int threads, int64_t rounds) {
  need(threads > 0, "threads are at least 1");
  need(rounds >= 0 && rounds <= 1'000'000'000, "rounds are 0 to 10^9");
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  double flops = 0;
#pragma omp parallel num_threads(std::min(threads, kMaxThreads)) reduction(+ : flops)
  flops += burst(rounds);
  return flops / seconds_since(start) * 1e-9;
}

double fma_gflops(int threads, int64_t rounds) { return gflops(current_isa().fma_burst, threads, rounds); }

std::optional<double> bf16_gflops(int threads, int64_t rounds) {
  if (!current_isa().dot_burst) return std::nullopt;
  return gflops(current_isa().dot_burst, threads, rounds);
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
           py::arg("num_params"), py::arg("slope") = -1, py::arg("loads") = std::vector<std::pair<int, int>>{},
           py::arg("slope_f") = -1, py::arg("carries") = false, py::arg("unnormalized") = false)
      .def_property_readonly("num_instructions", [](const Program& p) { return p.code.size(); })
      // Keys in a block of its choice, 0 where it has none.
      .def_property_readonly("chooses", [](const Program& p) { return p.choice.load < 0 ? 0 : p.choice.block; })
      .def_property_readonly("ranks",
                             [](const Program& p) {
                               std::vector<int> ranks;
                               for (const Instruction& in : p.code) ranks.push_back(in.rank);
                               return ranks;
                             })
      // What runs on a strip of a tile, in order: (the value, its operator, its arguments).
      .def_property_readonly("passes", [](const Program& p) {
        std::vector<std::tuple<int, std::string, std::vector<int>>> passes;
        for (int32_t i : p.order[kTile]) {
          const Instruction& in = p.run[static_cast<size_t>(i)];
          if (in.op == Op::var_s) continue;
          passes.emplace_back(i, signature(in.op).name, std::vector<int>(in.args, in.args + in.nargs));
        }
        return passes;
      });
  m.def("opcodes", [] {
    py::dict d;
    for (int i = 0; i < static_cast<int>(Op::count); ++i) d[signature(static_cast<Op>(i)).name] = i;
    return d;
  });
  m.def("attend", &call_attend, py::arg("program"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"),
        py::arg("lse"), py::arg("scale"), py::arg("sink"), py::arg("sequences"), py::arg("buffers"), py::arg("params"),
        py::arg("dropout"), py::arg("threads"), py::arg("tile_q"), py::arg("tile_kv"), py::arg("split_kv"),
        py::arg("page_table") = py::none(), py::arg("encoding") = py::none(), py::arg("skip") = 0.0f);
  bind_backward(m);
  bind_recur(m);
  bind_cache(m);
  bind_carry(m);
  bind_groups(m);
  bind_readout(m);
  bind_select(m);
  bind_warm(m);
  m.def("block_runs", &call_block_runs);
  m.def("gathered_tiles", &call_gathered_tiles);
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
  m.def("cores", &omp_get_num_procs);
  m.def("fma_gflops", &fma_gflops, py::arg("threads"), py::arg("rounds") = 2'000'000);
  m.def("bf16_gflops", &bf16_gflops, py::arg("threads"), py::arg("rounds") = 2'000'000);
  m.def("read_gbytes_per_s", &read_gbytes_per_s, py::arg("threads"), py::arg("memory"));
  m.attr("compiler") = __VERSION__;
  m.attr("kernels") = ATTNKIT_KERNELS;
}
