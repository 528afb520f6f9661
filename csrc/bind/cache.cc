// Caches of codes: attention to them, and appending.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "../cpu/kv_append.h"
#include "bind.h"
#include "carry.h"

namespace attnkit::cpu {
namespace {
#include "../cpu/half-inl.h"
#include "../cpu/store-inl.h"

// (codec, channels, group, codes or elements, scales, the newest tokens): see Store.
using StoreTuple = std::tuple<int, int, int, Tensor, Maybe, Maybe>;

// What one dimension after the other takes if they are in one piece from `first` on; else -1.
int64_t elements_from(const Tensor& t, size_t first) {
  int64_t n = 1;
  for (size_t d = t.size.size(); d-- > first;) {
    if (t.size[d] != 1 && t.stride[d] != n) return -1;
    if (__builtin_mul_overflow(n, t.size[d], &n)) return -1;
  }
  return n;
}

void need_memory(const Tensor& t, int element) {
  need(check_memory({t.data, t.size, t.stride, element}) == Fault::none, "a store has no memory, or is misaligned");
}

struct Held {
  Store store{};
  int64_t outer, heads, tokens;  // batch entries or pages; tokens of each
};

Held make_held(const StoreTuple& given, bool is_keys) {
  const auto& [codec, channels, group, codes, scales, newest] = given;
  need(codec >= 0 && codec <= static_cast<int>(Codec::int2), "unknown codec");
  need(channels > 0 && channels <= 4096, "1 to 4096 channels");
  Held held;
  Store& s = held.store;
  s.codec = static_cast<Codec>(codec);
  s.is_keys = is_keys;
  s.dtype = static_cast<DType>(codes.dtype);
  s.channels = channels;
  s.group = group;
  const bool plain = s.codec == Codec::plain;
  need(plain ? s.dtype == DType::f32 || s.dtype == DType::bf16 || s.dtype == DType::f16
             : s.dtype == (is_words(s.codec) ? DType::i32 : DType::byte),
       "codes are int32 words, of fp8 bytes");
  need(!has_zeros(s.codec) || (group > 0 && group % kScaleRun == 0), "a group is a multiple of 32");
  need(codes.size.size() > 2 && codes.stride.size() == codes.size.size(), "codes are [batch, heads, ...]");
  need_memory(codes, element_size(s.dtype));
  held.outer = codes.size[0];
  held.heads = codes.size[1];
  const int64_t bytes = elements_from(codes, 2) * element_size(s.dtype), run = run_bytes(s);
  need(bytes >= 0 && bytes % run == 0, "the codes of a head are not whole runs in one piece");
  held.tokens = bytes / run * kRun;
  s.codes = reinterpret_cast<char*>(codes.data);
  for (size_t d = 0; d < 2; ++d) s.codes_stride[d] = codes.stride[d] * element_size(s.dtype);
  if (is_words(s.codec)) {
    need(scales && scales->dtype == static_cast<int>(DType::bf16) && scales->size.size() > 2 &&
             scales->size[0] == held.outer && scales->size[1] == held.heads,
         "scales are bfloat16 [batch, heads, ...]");
    need_memory(*scales, 2);
    int32_t tokens = 1;
    const int64_t size = scales_of_run(s, &tokens);
    need(held.tokens % tokens == 0 && elements_from(*scales, 2) == held.tokens / tokens * size,
         "the scales of a head do not go with its codes");
    s.scales = reinterpret_cast<uint16_t*>(scales->data);
    for (size_t d = 0; d < 2; ++d) s.scales_stride[d] = scales->stride[d];
  } else if (s.codec == Codec::fp8 && scales) {
    need(scales->dtype == static_cast<int>(DType::f32) && scales->size == Ints{held.heads} &&
             elements_from(*scales, 0) == held.heads,
         "the scales of fp8 are float32, one a head");
    need_memory(*scales, 4);
    s.head_scale = reinterpret_cast<const float*>(scales->data);
  }
  need(newest.has_value() == has_zeros(s.codec), "int4 and int2 keep the newest tokens apart");
  if (newest) {
    need(newest->dtype == static_cast<int>(DType::bf16) && newest->size.size() == 4 && newest->size[1] == held.heads &&
             newest->size[3] == channels && newest->size[2] > 0 && newest->size[2] % kRun == 0 &&
             elements_from(*newest, 2) == newest->size[2] * channels,
         "the newest tokens are bfloat16 [batch, heads, slots, channels]");
    need_memory(*newest, 2);
    s.newest = reinterpret_cast<uint16_t*>(newest->data);
    s.newest_stride[0] = newest->stride[0];
    s.newest_stride[1] = newest->stride[1];
    s.slots = static_cast<int32_t>(newest->size[2]);
  }
  return held;
}

std::vector<int64_t> integers(const Tensor& t, int64_t count) {
  need(t.dtype == static_cast<int>(DType::i32) && t.size == Ints{count} && t.stride.size() == 1,
       "lengths are int32, one a row");
  need_memory(t, 4);
  std::vector<int64_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(reinterpret_cast<const int32_t*>(t.data)[i * t.stride[0]]);
  return values;
}

// k and v of a cache, and the tokens that a row has room for.
struct Cache {
  Held held[2];
  Store stores[2];
  PageTable table;
  Pages pages;
  int64_t tokens, slots = INT64_MAX, group = 0;  // of the newest tokens: their slots, and how many leave at once

  Cache(const StoreTuple& k, const StoreTuple& v, const Maybe& page_table, int64_t batch)
      : held{make_held(k, true), make_held(v, false)} {
    need(held[0].outer == held[1].outer && held[0].heads == held[1].heads && held[0].tokens == held[1].tokens,
         "k and v differ in batch, heads or length");
    for (int i = 0; i < 2; ++i) {
      stores[i] = held[i].store;
      if (stores[i].newest == nullptr) continue;
      slots = std::min<int64_t>(slots, stores[i].slots);
      need(group == 0 || group == stores[i].group, "k and v have groups of different sizes");
      group = stores[i].group;
      need(std::get<5>(i == 0 ? k : v)->size[0] == batch, "the newest tokens differ from the lengths in batch");
    }
    tokens = held[0].tokens;
    if (page_table) {
      table.describe(*page_table, batch, tokens);
      need(check_memory({page_table->data, page_table->size, page_table->stride, 4}) == Fault::none,
           "the page table has no memory, or is misaligned");
      for (const Store& s : stores) need(!has_zeros(s.codec) || tokens % s.group == 0, "a page is not whole groups");
      tokens = table.tokens();
    } else {
      need(held[0].outer == batch, "the store differs from the lengths in batch");
    }
  }

  // Looks up the pages of the sequences; false, and which has none.
  bool find_pages(const Maybe& page_table, const std::vector<Sequence>& sequences, int32_t& bad) {
    if (!page_table) return true;
    if (!table.copy(*page_table, sequences, held[0].outer, bad)) return false;
    pages = table.view();
    return true;
  }

  void check(const Sequence& s) const {
    need(s.kv_len >= 0 && s.kv_len <= tokens && s.kv_len <= INT32_MAX, "a row is longer than the cache");
    if (slots == INT64_MAX) return;
    need(s.num_coded >= 0 && s.num_coded <= s.kv_len && s.num_coded % kScaleRun == 0 && s.kv_len - s.num_coded <= slots,
         "the newest tokens are more than there is room for");
  }
};

// As `attend`, or (with `carry`, and `what` is carried) as `attend_carried`, with stores for k and v, int32 lengths
// [B], and how many of the tokens of each row are codes.
std::pair<int, int> call_attend_cache(const Program& program, const Tensor& q, const StoreTuple& k, const StoreTuple& v,
                                      const Tensor& o, const Maybe& lse, float scale, const Maybe& sink,
                                      const Tensor& lengths, const Maybe& num_coded, const std::vector<Tensor>& tensors,
                                      const std::vector<float>& params, const std::optional<DropoutTuple>& dropout,
                                      int threads, int tile_q, int tile_kv, int split_kv, const Maybe& page_table,
                                      const Program* carry, const std::optional<CarryTuple>& what) try {
  need(tile_kv > 0 && tile_kv <= kMaxTileKv && tile_kv % kScaleRun == 0, "tile_kv is 32 to 192, a multiple of 32");
  const Config config = config_of(threads, tile_q, tile_kv, split_kv);
  need(q.size.size() == 4, "q has four dimensions");
  Cache cache(k, v, page_table, q.size[0]);
  // What `fill` asks of k and v: their shapes. Nothing of them is read through these.
  const auto stand_in = [&](int64_t channels) {
    return Tensor{q.data, q.dtype, {q.size[0], cache.held[0].heads, cache.tokens, channels}, {0, 0, 0, 0}};
  };
  need(program.carries == (carry != nullptr) && (carry != nullptr) == what.has_value(), "a program that carries");
  need(carry == nullptr || !dropout, "nothing is dropped beside what is carried");
  need(!program.unnormalized, "what needs a softmax");
  if (carry != nullptr) check_carrying(program, *carry, tensors);
  Request r;
  Status status = r.fill(program, q, stand_in(cache.stores[0].channels), stand_in(cache.stores[1].channels), o, lse,
                         scale, sink, std::vector<SequenceTuple>{}, tensors, params, dropout);
  if (status.fault != Fault::none || r.empty) return {static_cast<int>(status.fault), status.value};

  const std::vector<int64_t> held = integers(lengths, q.size[0]);
  const std::vector<int64_t> coded =
      num_coded ? integers(*num_coded, q.size[0]) : std::vector<int64_t>(static_cast<size_t>(q.size[0]));
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < q.size[0]; ++b) {
    const auto at = static_cast<size_t>(b);
    sequences.push_back({static_cast<int32_t>(b), 0, q.size[2], 0, held[at], coded[at]});
    cache.check(sequences.back());
  }
  need(q.size[2] <= INT32_MAX, "a sequence is longer than 2^31 - 1");
  int32_t bad = 0;
  if (!cache.find_pages(page_table, sequences, bad)) return {static_cast<int>(Fault::no_page), bad};
  r.problem.pages = cache.pages;
  r.problem.stores = cache.stores;
  r.problem.sequences = sequences.data();
  r.problem.num_sequences = static_cast<int32_t>(sequences.size());
  std::optional<Carry> carried;
  if (what) carried = make_carry(*what, r.problem, q.size[0], cache.tokens);
  {
    pybind11::gil_scoped_release release;
    status =
        carried ? attend_carried(program, *carry, r.problem, *carried, config) : attend(program, r.problem, config);
  }
  return {static_cast<int>(status.fault), status.value};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

// Puts counts[b] tokens of k and v [B, heads, T, channels] behind the lengths[b] that row b has, and counts them.
// `state`, where the newest tokens are kept apart, is int32 [3, B]: how many tokens are codes; the oldest that is also
// there in full precision; and how many stay codes whatever is taken back. Returns a fault and its row.
std::pair<int, int> call_append(const StoreTuple& k_store, const StoreTuple& v_store, const Tensor& k, const Tensor& v,
                                const Tensor& lengths, const Maybe& counts, const Maybe& state, int64_t residual,
                                const Maybe& page_table, int threads) try {
  need(threads > 0, "threads are at least 1");
  need(k.size.size() == 4 && v.size.size() == 4, "k and v have four dimensions");
  const int64_t batch = k.size[0];
  Cache cache(k_store, v_store, page_table, batch);
  const Tensor* tokens[] = {&k, &v};
  for (int i = 0; i < 2; ++i) {
    const Tensor& t = *tokens[i];
    need(t.size == Ints{batch, cache.held[i].heads, k.size[2], cache.stores[i].channels} && t.stride.size() == 4,
         "tokens are [batch, heads, tokens, channels]");
    const auto dtype = static_cast<DType>(t.dtype);
    need(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16, "tokens are float32, bfloat16 or float16");
    if (const Fault fault = check_memory({t.data, t.size, t.stride, element_size(dtype)}); fault != Fault::none)
      return {static_cast<int>(fault), 1 + i};
  }
  const std::vector<int64_t> held = integers(lengths, batch),
                             more = counts ? integers(*counts, batch)
                                           : std::vector<int64_t>(static_cast<size_t>(batch), k.size[2]);
  need((cache.slots != INT64_MAX) == state.has_value(), "a state goes with the newest tokens");
  int32_t* now = nullptr;
  if (state) {
    need(state->dtype == static_cast<int>(DType::i32) && state->size == Ints{3, batch} &&
             elements_from(*state, 0) == 3 * batch && residual >= 0,
         "the state is int32 [3, batch]");
    need_memory(*state, 4);
    now = reinterpret_cast<int32_t*>(state->data);
  }
  std::vector<Appended> rows;
  std::vector<Sequence> sequences;
  for (size_t b = 0; b < static_cast<size_t>(batch); ++b) {
    need(held[b] >= 0 && more[b] >= 0 && more[b] <= k.size[2], "a row has less than no tokens, or more than are given");
    const auto at = static_cast<int32_t>(b);
    const int64_t length = held[b] + more[b];
    Appended row{held[b], more[b], 0, 0};
    if (now != nullptr) {
      const int64_t group = cache.group;
      row.num_coded = now[b];
      row.num_coded_after = std::max<int64_t>({(length - residual) / group * group, now[2 * batch + at], 0});
      need(row.num_coded_after >= row.num_coded, "codes do not become tokens again");
    }
    cache.check({at, 0, 0, 0, held[b], row.num_coded});
    cache.check({at, 0, 0, 0, length, row.num_coded_after});
    rows.push_back(row);
    sequences.push_back({at, 0, 0, 0, length});
  }
  int32_t bad = 0;
  if (!cache.find_pages(page_table, sequences, bad)) return {static_cast<int>(Fault::no_page), bad};
  {
    pybind11::gil_scoped_release release;
    for (int i = 0; i < 2; ++i)
      append(cache.stores[i], cache.pages, rows.data(), batch, cache.held[i].heads, make_view(*tokens[i]),
             static_cast<DType>(tokens[i]->dtype), std::min(threads, kMaxThreads));
  }
  auto* to = reinterpret_cast<int32_t*>(lengths.data);
  for (int64_t b = 0; b < batch; ++b) {
    const Appended& row = rows[static_cast<size_t>(b)];
    const int64_t length = row.length + row.count;
    to[b * lengths.stride[0]] = static_cast<int32_t>(length);
    if (now == nullptr) continue;
    now[b] = static_cast<int32_t>(row.num_coded_after);
    now[batch + b] = static_cast<int32_t>(std::max<int64_t>(now[batch + b], length - cache.slots));
  }
  return {0, -1};
} catch (const std::bad_alloc&) {
  return {static_cast<int>(Fault::no_memory), -1};
}

}  // namespace

void bind_cache(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("attend_cache", &call_attend_cache, py::arg("program"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"),
        py::arg("lse"), py::arg("scale"), py::arg("sink"), py::arg("lengths"), py::arg("num_coded"), py::arg("buffers"),
        py::arg("params"), py::arg("dropout"), py::arg("threads"), py::arg("tile_q"), py::arg("tile_kv"),
        py::arg("split_kv"), py::arg("page_table") = py::none(), py::arg("carry") = py::none(),
        py::arg("what") = py::none());
  m.def("kv_append", &call_append, py::arg("k_store"), py::arg("v_store"), py::arg("k"), py::arg("v"),
        py::arg("lengths"), py::arg("counts"), py::arg("state"), py::arg("residual"), py::arg("page_table"),
        py::arg("threads"));
}

}  // namespace attnkit::cpu
