// Random and damaged bytecode against the verifier; whatever it accepts is run on small problems whose tensors are
// exactly as large as they must be, on every instruction set, sometimes with memory running out. A case is refused, or
// ends in a fault, or writes every output. The sanitizers this is built with report the rest.
//
//   engine_fuzz [--seed N] [--seconds S] [--cases N] [FILE...]
//
// With files, runs the cases they hold (tests/fuzz/corpus). Cases run in a child, so that the parent can print the one
// that crashed or hung in the form of such a file.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu/attend.h"
#include "../cpu/backward.h"
#include "../cpu/blocks.h"
#include "../cpu/readout.h"

namespace {
std::atomic<bool> g_starving{false};
std::atomic<int> g_allocations_left{0};
}  // namespace

void* operator new(size_t bytes) {
  if (g_starving && g_allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  if (void* p = std::malloc(bytes != 0 ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace {
using namespace attnkit::cpu;  // NOLINT: this file is about the engine

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "engine_fuzz: %s\n", what);
  std::abort();
}

struct Random {  // splitmix64
  uint64_t state;

  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
  int within(int lo, int hi) { return lo + below(hi - lo + 1); }
  bool one_in(int n) { return below(n) == 0; }
  template <class T, size_t N>
  T of(const T (&choices)[N]) {
    return choices[below(N)];
  }
  float real() {
    static constexpr float kOdd[] = {
        0.0f, -0.0f, 1e-40f, 1e38f, -1e38f, __builtin_inff(), -__builtin_inff(), __builtin_nanf("")};
    return one_in(40) ? of(kOdd) : static_cast<float>(within(-1000, 1000)) / 250.0f;
  }
};

// ---- programs ----

struct Case {
  uint64_t seed;  // of the problem
  int score, mask, num_buffers, num_params;
  std::vector<int32_t> words;  // rows of 8, unless damaged
};

class Writer {
 public:
  explicit Writer(Random& random) : random_(random) {
    out_ = {random.next(), -1, -1, random.below(4), random.below(3), {}};
    for (int b = 0; b < out_.num_buffers; ++b) {
      rank_[b] = random.within(0, random.one_in(4) ? kMaxArgs : 2);
      type_[b] = "ffib"[random.below(4)];
    }
  }

  Case write() {
    if (random_.one_in(2)) {
      for (int n = random_.within(1, 14); n > 0; --n) anything();
      out_.mask = value('b');
    }
    if (random_.one_in(4)) return out_;
    with_s_ = true;
    add(Op::var_s, 0, {});
    for (int n = random_.within(1, 14); n > 0; --n) anything();
    out_.score = value('f');
    return out_;
  }

 private:
  static constexpr Op kIndices[] = {Op::var_b, Op::var_h, Op::var_q_idx, Op::var_kv_idx, Op::var_q_len, Op::var_kv_len};

  int add(Op op, int32_t attr, const std::vector<int>& args) {
    out_.words.insert(out_.words.end(), {static_cast<int32_t>(op), attr, static_cast<int32_t>(args.size())});
    out_.words.insert(out_.words.end(), args.begin(), args.end());
    out_.words.resize(out_.words.size() + kMaxArgs - args.size());
    types_.push_back(signature(op).result);
    return static_cast<int>(types_.size()) - 1;
  }

  // An earlier value of the type, often a recent one; a leaf if there is none.
  int value(char type) {
    for (int tries = 0; tries < 12 && !types_.empty(); ++tries) {
      const int n = static_cast<int>(types_.size());
      const int i = random_.one_in(2) ? random_.below(n) : n - 1 - random_.below(std::min(n, 4));
      if (types_[static_cast<size_t>(i)] == type) return i;
    }
    return leaf(type);
  }

  int leaf(char type) {
    if (type == 'b' && random_.one_in(8)) return add(Op::const_b, random_.below(2), {});
    if (type == 'b') return add(Op::lt_i, 0, {leaf('i'), leaf('i')});
    if (type == 'i') return random_.one_in(3) ? constant() : add(random_.of(kIndices), 0, {});
    if (with_s_ && random_.one_in(2)) return add(Op::var_s, 0, {});
    if (out_.num_params > 0 && random_.one_in(2)) return add(Op::param, random_.below(out_.num_params), {});
    const float x = random_.real();
    return add(Op::const_f, __builtin_bit_cast(int32_t, x), {});
  }

  int constant() {
    static constexpr int kOdd[] = {0, -1, INT32_MAX, INT32_MIN, 1 << 16};
    return add(Op::const_i, random_.one_in(12) ? random_.of(kOdd) : random_.within(1, 9), {});
  }

  // What the engine runs as one instruction (fuse.cc), or would if nothing else needed its parts.
  void common() {
    const int x = value('f'), y = value('f');
    if (random_.one_in(3)) {
      add(Op::mul_f, 0, {add(Op::tanh_f, 0, {add(Op::div_f, 0, {x, y})}), y});
      return;
    }
    int factor = value('f');
    if (!random_.one_in(3)) {
      const int gap = add(Op::sub_i, 0, {value('i'), value('i')});
      factor = add(Op::i_to_f, 0, {random_.one_in(2) ? gap : add(Op::abs_i, 0, {gap})});
    }
    const int product = add(Op::mul_f, 0, {y, factor});
    add(random_.one_in(2) ? Op::add_f : Op::sub_f, 0, {x, product});
  }

  void anything() {
    if (random_.one_in(5)) {
      common();
      return;
    }
    if (out_.num_buffers > 0 && random_.one_in(3)) {
      const int b = random_.below(out_.num_buffers);
      std::vector<int> index;
      for (int d = 0; d < rank_[b]; ++d) index.push_back(value('i'));
      add(type_[b] == 'f' ? Op::load_f : type_[b] == 'i' ? Op::load_i : Op::load_b, b, index);
      return;
    }
    const Op op = static_cast<Op>(random_.below(static_cast<int>(Op::count)));
    const OpSignature& sig = signature(op);
    if (sig.args[0] == '\0' || sig.args[0] == '*') {
      leaf(sig.result);
      return;
    }
    std::vector<int> args;
    for (const char* type = sig.args; *type != '\0'; ++type) args.push_back(value(*type));
    if ((op == Op::floordiv_i || op == Op::mod_i) && !random_.one_in(4)) args[1] = constant();
    add(op, 0, args);
  }

  Random& random_;
  Case out_{};
  std::vector<char> types_;
  int rank_[4];
  int type_[4];
  bool with_s_ = false;
};

void damage(Case& c, Random& random) {
  static constexpr int32_t kOdd[] = {INT32_MIN, -2, -1, 0, 1, 4, 5, 6, 255, 256, 4095, 4096, INT32_MAX};
  for (int n = random.within(1, 3); n > 0 && c.words.size() >= 8; --n) {
    const int size = static_cast<int>(c.words.size()), row = random.below(size / 8);
    int32_t& word = c.words[static_cast<size_t>(random.below(size))];
    switch (random.below(9)) {
      case 0: word = random.of(kOdd); break;
      case 1: word = static_cast<int32_t>(random.next()); break;
      case 2: word = static_cast<int32_t>(static_cast<uint32_t>(word) + (random.one_in(2) ? 1u : ~0u)); break;
      case 3: word = c.words[static_cast<size_t>(random.below(size))]; break;
      case 4: c.words.resize(static_cast<size_t>(random.below(size))); break;
      case 5:
        (random.one_in(2) ? c.score : c.mask) = random.one_in(4) ? random.of(kOdd) : random.below(size / 8);
        break;
      case 6: (random.one_in(2) ? c.num_buffers : c.num_params) = random.of(kOdd); break;
      default:  // an argument becomes another value, often of another type
        c.words[static_cast<size_t>(8 * row + 3 + random.below(3))] = random.below(row + 1);
    }
  }
}

Case make_case(uint64_t seed, uint64_t number) {
  Random random{seed + number * 0x2545f4914f6cdd1d};
  Case c = Writer(random).write();
  if (random.one_in(2)) damage(c, random);
  return c;
}

// ---- problems ----

// Elements of one tensor: no byte more than its strides reach.
template <class T>
struct Tensor {
  std::unique_ptr<T[]> memory;
  size_t count = 0;
  T* data = nullptr;
  std::vector<int64_t> stride;

  // Dimensions in any order, with gaps, backwards, and (where `repeat` allows it) all the same element.
  Tensor(Random& random, const std::vector<int64_t>& size, bool repeat) : stride(size.size()) {
    std::vector<size_t> order;
    for (size_t d = 0; d < size.size(); ++d)
      order.insert(order.begin() + random.below(static_cast<int>(order.size()) + 1), d);
    if (random.one_in(2)) {
      for (size_t d = 0; d < order.size(); ++d) order[d] = size.size() - 1 - d;  // as most tensors lie
    }
    int64_t next = 1, first = 0, last = 0;
    for (size_t d : order) {
      stride[d] = repeat && random.one_in(8) ? 0 : next * (random.one_in(8) ? 2 : 1);
      next = std::max<int64_t>(next, stride[d] * std::max<int64_t>(size[d], 1));
      if (random.one_in(8)) stride[d] = -stride[d];
      (stride[d] < 0 ? first : last) += stride[d] * (size[d] - 1);
    }
    for (int64_t n : size)
      if (n == 0) return;  // no memory at all
    count = static_cast<size_t>(last - first) + 1;
    memory = std::make_unique<T[]>(count);
    data = memory.get() - first;
  }

  template <class F>
  void fill(F value) {
    for (size_t i = 0; i < count; ++i) memory[i] = static_cast<T>(value());
  }
};

constexpr uint32_t kUnwritten = 0x7fc0dead;  // a NaN that no arithmetic gives

struct Sizes {
  int heads, kv_heads, head_dim, v_head_dim;
  int64_t batch, q_len, kv_len;
};

Sizes make_sizes(Random& r) {
  Sizes s{};
  s.kv_heads = r.within(1, 2);
  s.heads = s.kv_heads * r.within(1, 3);
  static constexpr int kDims[] = {1, 2, 4, 5, 8, 16, 17, 33, 70};
  s.head_dim = r.of(kDims);
  s.v_head_dim = r.of(kDims);
  s.batch = r.within(1, 3);
  s.q_len = r.one_in(10) ? r.within(90, 110) : r.within(0, 20);
  s.kv_len = r.one_in(10) ? r.within(120, 140) : r.within(0, 40);
  return s;
}

std::vector<Sequence> make_sequences(Random& r, const Sizes& s) {
  std::vector<Sequence> sequences;
  if (s.batch > 1 || r.one_in(2)) {  // one per batch entry, of all its keys or the first few
    const bool padded = r.one_in(2);
    for (int32_t b = 0; b < s.batch; ++b)
      sequences.push_back({b, 0, s.q_len, 0, padded ? r.below(static_cast<int>(s.kv_len) + 1) : s.kv_len});
    return sequences;
  }
  int64_t q = 0, kv = 0;
  for (int n = r.below(4); n > 0; --n) {
    const int64_t q_len = r.below(static_cast<int>(s.q_len - q) + 1);
    const int64_t kv_len = r.below(static_cast<int>(s.kv_len - kv) + 1);
    sequences.push_back({0, q, q_len, kv, kv_len});
    q += q_len;
    kv += kv_len;
  }
  return sequences;
}

// A buffer that suits the program, or any if the program does not read it.
class BufferMemory {
 public:
  BufferMemory(Random& r, uint8_t rank, char type) {
    if (rank == 0xff) rank = static_cast<uint8_t>(r.below(kMaxArgs + 1)), type = 'f';
    std::vector<int64_t> size(rank);
    for (int64_t& n : size) n = r.one_in(16) ? 0 : rank < 3 && r.one_in(2) ? r.within(1, 140) : r.within(1, 6);
    buffer_.rank = rank;
    std::copy(size.begin(), size.end(), buffer_.size);
    if (type == 'f') {
      hold<float>(r, size, DType::f32, [&] { return r.real(); });
    } else if (type == 'b') {
      hold<uint8_t>(r, size, DType::u8, [&] { return r.one_in(3) ? 0 : r.within(1, 255); });
    } else if (r.one_in(2)) {
      hold<int32_t>(r, size, DType::i32, [&] { return r.one_in(50) ? INT32_MIN : r.within(-2, 20); });
    } else {
      hold<int64_t>(r, size, DType::i64, [&] { return r.one_in(50) ? INT64_MIN : int64_t{r.within(-2, 20)}; });
    }
  }
  const Buffer& buffer() const { return buffer_; }

 private:
  template <class T, class F>
  void hold(Random& r, const std::vector<int64_t>& size, DType dtype, F value) {
    Tensor<T> tensor(r, size, true);
    tensor.fill(value);
    buffer_.data = tensor.data;
    buffer_.dtype = dtype;
    std::copy(tensor.stride.begin(), tensor.stride.end(), buffer_.stride);
    memory_ = std::shared_ptr<void>(tensor.memory.release(), [](void* p) { delete[] static_cast<T*>(p); });
  }
  Buffer buffer_{};
  std::shared_ptr<void> memory_;
};

View view(const Tensor<float>& t) {
  View v{reinterpret_cast<char*>(t.data), {}};
  std::copy(t.stride.begin(), t.stride.end(), v.stride);
  return v;
}

bool written(float x) { return __builtin_bit_cast(uint32_t, x) != kUnwritten; }

// After a forward that went well.
void run_backward(const Program& program, const Problem& p, const Sizes& s, const Config& config, uint64_t seed) {
  Random r{seed};
  Tensor<float> d_o(r, {s.batch, s.heads, s.q_len, s.v_head_dim}, true);
  Tensor<float> dq(r, {s.batch, s.heads, s.q_len, s.head_dim}, true);
  Tensor<float> dk(r, {s.batch, s.kv_heads, s.kv_len, s.head_dim}, true);
  Tensor<float> dv(r, {s.batch, s.kv_heads, s.kv_len, s.v_head_dim}, true);
  Tensor<float> d_lse(r, {s.batch, s.heads, s.q_len}, false);
  for (Tensor<float>* t : {&d_o, &d_lse}) t->fill([&] { return r.real(); });
  dq.fill([] { return 0.0f; });
  std::vector<float> d_sink(static_cast<size_t>(s.heads));
  std::vector<std::vector<float>> d_buffers;
  std::vector<float*> data;
  for (int32_t b = 0; b < p.num_buffers; ++b) {
    size_t size = 1;
    for (int32_t d = 0; d < p.buffers[b].rank; ++d) size *= static_cast<size_t>(p.buffers[b].size[d]);
    d_buffers.emplace_back(size + 1);  // so that there is an address
    data.push_back(d_buffers.back().data());
  }
  Gradients g{view(d_o), r.one_in(2) ? d_lse.data : nullptr,          {},         view(dq), view(dk),
              view(dv),  p.sink != nullptr ? d_sink.data() : nullptr, data.data()};
  std::copy(d_lse.stride.begin(), d_lse.stride.end(), g.d_lse_stride);
  const bool starve = r.one_in(16);
  Status status{Fault::no_memory, -1};
  g_allocations_left = r.below(30);
  g_starving = starve;
  try {
    status = attend_backward(program, p, g, config);
  } catch (const std::bad_alloc&) {
  }
  g_starving = false;
  require(status.fault != Fault::no_memory || starve, "out of memory by itself");
  require(status.fault == Fault::none || starve, "the backward refuses what the forward takes");
}

// Likewise.
void run_readout(const Program& program, const Problem& p, const Sizes& s, const Config& config, uint64_t seed) {
  Random r{seed};
  const auto of_heads = [&](int64_t n) { return std::vector<float>(static_cast<size_t>(s.batch * s.heads * n)); };
  std::vector<int32_t> rows;
  for (int64_t row = 0; row < s.q_len; ++row)
    if (r.one_in(3)) rows.push_back(static_cast<int32_t>(row));
  const auto top_k = static_cast<int32_t>(r.within(1, 20));
  const auto num_rows = static_cast<int64_t>(rows.size());
  auto column_sum = of_heads(s.kv_len), column_max = of_heads(s.kv_len), row_max = of_heads(s.q_len),
       entropy = of_heads(s.q_len), best = of_heads(s.q_len * top_k), weights = of_heads(num_rows * s.kv_len);
  std::vector<int64_t> best_keys(best.size(), -1);
  const auto some = [&](auto& results) { return r.one_in(3) ? nullptr : results.data(); };
  Readout out{s.q_len,          s.kv_len, some(column_sum), some(column_max), some(row_max), some(entropy), some(best),
              best_keys.data(), top_k,    some(weights),    rows.data(),      num_rows};
  const bool starve = r.one_in(16);
  Status status{Fault::no_memory, -1};
  g_allocations_left = r.below(30);
  g_starving = starve;
  try {
    status = readout(program, p, out, config);
  } catch (const std::bad_alloc&) {
  }
  g_starving = false;
  require(status.fault != Fault::no_memory || starve, "out of memory by itself");
  require(status.fault == Fault::none || starve, "read-outs refuse what the forward takes");
  for (const int64_t key : best_keys) require(key >= -1 && key < s.kv_len, "there is no such key");
}

void run(const Program& program, uint64_t seed) {
  Random r{seed};
  const Sizes s = make_sizes(r);
  const std::vector<Sequence> sequences = make_sequences(r, s);
  Tensor<float> q(r, {s.batch, s.heads, s.q_len, s.head_dim}, true);
  Tensor<float> k(r, {s.batch, s.kv_heads, s.kv_len, s.head_dim}, true);
  Tensor<float> v(r, {s.batch, s.kv_heads, s.kv_len, s.v_head_dim}, true);
  Tensor<float> o(r, {s.batch, s.heads, s.q_len, s.v_head_dim}, false);
  Tensor<float> lse(r, {s.batch, s.heads, s.q_len}, false);
  Tensor<float> sink(r, {s.heads}, false);
  for (Tensor<float>* t : {&q, &k, &v, &sink}) t->fill([&] { return r.real(); });
  std::vector<BufferMemory> memory;
  std::vector<Buffer> buffers;
  for (size_t b = 0; b < program.buffer_rank.size(); ++b)
    memory.emplace_back(r, program.buffer_rank[b], program.buffer_type[b]);
  for (const BufferMemory& m : memory) buffers.push_back(m.buffer());
  std::vector<float> params(static_cast<size_t>(program.num_params));
  for (float& x : params) x = r.real();

  const bool with_lse = !r.one_in(4), with_sink = r.one_in(3) && sink.stride[0] == 1 && !program.unnormalized;
  Problem p{};
  p.q = view(q), p.k = view(k), p.v = view(v), p.o = view(o);
  p.lse = with_lse ? lse.data : nullptr;
  std::copy(lse.stride.begin(), lse.stride.end(), p.lse_stride);
  p.num_heads = s.heads, p.num_kv_heads = s.kv_heads;
  p.head_dim = s.head_dim, p.v_head_dim = s.v_head_dim;
  p.scale = r.real();
  p.sink = with_sink ? sink.data : nullptr;
  p.sequences = sequences.data(), p.num_sequences = static_cast<int32_t>(sequences.size());
  p.buffers = buffers.data(), p.num_buffers = static_cast<int32_t>(buffers.size());
  p.params = params.data(), p.num_params = program.num_params;
  const Config config{r.one_in(2) ? 96 : r.within(1, kMaxTileQ), r.one_in(2) ? 64 : r.within(1, kMaxTileKv),
                      r.one_in(2) ? 1024 : r.within(1, 80), r.within(1, 3)};
  const bool starve = r.one_in(16);

  for (const Kernel* isa : isa_levels()) {
    set_isa(isa->name);
    for (Tensor<float>* t : {&o, &lse}) t->fill([] { return __builtin_bit_cast(float, kUnwritten); });
    g_allocations_left = r.below(30);
    g_starving = starve;
    Status status{Fault::no_memory, -1};
    try {
      status = attend(program, p, config);
    } catch (const std::bad_alloc&) {
    }
    require(status.fault != Fault::no_memory || starve, "out of memory by itself");
    g_starving = false;
    require(status.value < static_cast<int32_t>(program.code.size()), "a fault names no instruction");
    if (status.fault != Fault::none) continue;
    for (const Sequence& seq : sequences)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t m = seq.q_start; m < seq.q_start + seq.q_len; ++m) {
          const int64_t row = seq.batch * p.o.stride[0] + h * p.o.stride[1] + m * p.o.stride[2];
          for (int64_t d = 0; d < s.v_head_dim; ++d) require(written(o.data[row + d * p.o.stride[3]]), "o has holes");
          const int64_t at = seq.batch * p.lse_stride[0] + h * p.lse_stride[1] + m * p.lse_stride[2];
          require(written(lse.data[at]) == with_lse, "lse has holes, or was written unasked");
        }
    if (with_lse && !program.unnormalized) run_readout(program, p, s, config, seed);
    if (with_lse) run_backward(program, p, s, {config.tile_q, config.tile_kv, config.split_kv, config.threads}, seed);
  }
  if (p.num_sequences == 0 || p.sequences[0].q_len == 0 || p.sequences[0].kv_len == 0) return;
  const std::vector<Sequence> alike(static_cast<size_t>(p.num_sequences), p.sequences[0]);
  p.sequences = alike.data();
  for (const Run& run : block_runs(program, p, r.within(1, 40), r.within(1, 40)).runs)
    require(run.first < run.end && run.kind <= static_cast<int32_t>(Block::full), "no such run of blocks");
}

// Returns whether the verifier accepted the program.
bool run(const Case& c) {
  Program program;
  Roots plain{c.score, c.mask};
  plain.unnormalized = c.seed % 4 == 0;
  const std::string refused = compile(c.words, plain, c.num_buffers, c.num_params, program);
  if (!refused.empty()) return false;
  run(program, c.seed);
  Roots roots{c.score, c.mask, c.score, {}};  // any float value may stand for a slope
  roots.unnormalized = plain.unnormalized;
  for (size_t i = 0; c.score >= 0 && i < program.code.size(); ++i)
    if (program.code[i].op == Op::load_f) roots.loads.push_back({static_cast<int32_t>(i), c.score});
  if (!roots.loads.empty() && compile(c.words, roots, c.num_buffers, c.num_params, program).empty())
    run(program, c.seed);
  return true;
}

// ---- cases as text, in a child process ----

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << c.seed << ' ' << c.score << ' ' << c.mask << ' ' << c.num_buffers << ' ' << c.num_params;
  for (size_t i = 0; i < c.words.size(); ++i) out << (i % 8 == 0 ? '\n' : ' ') << c.words[i];
  return out << '\n';
}

Case read_case(const char* path) {
  std::ifstream in(path);
  Case c{};
  in >> c.seed >> c.score >> c.mask >> c.num_buffers >> c.num_params;
  require(static_cast<bool>(in), "a corpus file begins with five numbers");
  c.words.assign(std::istream_iterator<int32_t>(in), {});
  require(in.eof(), "a corpus file holds numbers alone");
  return c;
}

struct Progress {
  std::atomic<uint64_t> cases, accepted;
};

Progress& shared_progress(int fd) {
  require(ftruncate(fd, sizeof(Progress)) == 0, "ftruncate failed");
  void* shared = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  require(shared != MAP_FAILED, "mmap failed");
  return *static_cast<Progress*>(shared);
}

constexpr double kHang = 60;  // seconds for one case

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The child's wait status, after killing it if it stands still.
int watch(pid_t child, const Progress& progress) {
  uint64_t seen = 0;
  for (double since = now();; usleep(20000)) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return status;
    if (progress.cases != seen) {
      seen = progress.cases;
      since = now();
    } else if (now() - since > kHang) {
      kill(child, SIGKILL);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 1, cases = UINT64_MAX;
  double seconds = 10;
  int memory = -1;
  std::vector<Case> corpus;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (word == "--seconds" && i + 1 < argc) {
      seconds = std::strtod(argv[++i], nullptr);
    } else if (word == "--cases" && i + 1 < argc) {
      cases = std::strtoull(argv[++i], nullptr, 10);
    } else if (word == "--child" && i + 1 < argc) {
      memory = std::atoi(argv[++i]);
    } else {
      corpus.push_back(read_case(argv[i]));
    }
  }
  if (!corpus.empty()) cases = corpus.size(), seconds = 1e9;
  const auto the_case = [&](uint64_t i) { return corpus.empty() ? make_case(seed, i) : corpus[i]; };
  const bool is_child = memory >= 0;
  if (!is_child) memory = memfd_create("engine_fuzz", 0);
  Progress& progress = shared_progress(memory);
  if (is_child) {
    set_poison(true);
    for (const double end = now() + seconds; progress.cases < cases && now() < end; ++progress.cases)
      progress.accepted += run(the_case(progress.cases));
    return 0;  // and leaks are looked for
  }
  std::cout << "engine_fuzz --seed " << seed << " on";
  for (const Kernel* isa : isa_levels()) std::cout << ' ' << isa->name;
  std::cout << std::endl;
  const pid_t child = fork();
  require(child >= 0, "fork failed");
  if (child == 0) {  // a process of its own: one that only forked has no OpenMP threads
    const std::string fd = std::to_string(memory);
    std::vector<char*> args(argv, argv + argc);
    for (const char* more : {"--child", fd.c_str(), static_cast<const char*>(nullptr)})
      args.push_back(const_cast<char*>(more));
    execv("/proc/self/exe", args.data());
    _exit(127);
  }
  const int status = watch(child, progress);
  std::cout << progress.cases << " cases, " << progress.accepted << " accepted" << std::endl;
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
  std::cout << "failed: " << (WIFSIGNALED(status) ? "signal " : "exit code ")
            << (WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status)) << ", case " << progress.cases << ":\n";
  if (progress.cases < cases) std::cout << the_case(progress.cases);
  return 1;
}
