// Who goes to which centroid.
#include <algorithm>
#include <bit>
#include <memory>
#include <new>
#include <vector>

#include "attend.h"
#include "groups.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

constexpr int64_t kMostFloats = int64_t{1} << 22;  // of affinities at a time, unless one head has more

// Numbers in the order of floats; NaN comes first, and both zeros are one.
uint32_t in_order(float x) {
  if (x != x) return 0;
  const auto bits = std::bit_cast<uint32_t>(x + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The w largest of n numbers; their places, ascending. Takes so much memory of its own:
size_t best_bytes(int64_t n) { return static_cast<size_t>(n + 15) * sizeof(float); }
void find_best(const float* numbers, int64_t n, int64_t w, int32_t* places, float* memory) {
  if (w < n) return current_isa().groups.best(numbers, n, w, memory, places);
  for (int64_t i = 0; i < n; ++i) places[i] = static_cast<int32_t>(i);
}

// Work on the heads of batch entries, as many at a time as their affinities fit: first what gives them, task by task
// (head, task, memory), then what uses them.
class Planes {
 public:
  Planes(int64_t planes, int64_t floats, int threads)
      : planes_(planes),
        floats_(floats),
        threads_(threads),
        at_once_(std::clamp<int64_t>(kMostFloats / std::max<int64_t>(floats, 1), 1, std::max<int64_t>(planes, 1))) {
    memory_.reset(new (std::nothrow) float[static_cast<size_t>(at_once_ * floats)]);
  }

  // `gives` and `uses` tasks of a head, each with so many bytes.
  template <class Give, class Use>
  Status run(int64_t gives, size_t give_bytes, const Give& give, int64_t uses, size_t use_bytes, const Use& use) {
    const Status no_memory{Fault::no_memory, -1};
    if (!memory_) return no_memory;
    for (int64_t first = 0; first < planes_; first += at_once_) {
      const int64_t planes = std::min(at_once_, planes_ - first);
      const auto all = [&](int64_t tasks, size_t bytes, const auto& work) {
        return each_task(planes * tasks, threads_, bytes, [&](int64_t i, float* memory) {
          work(first + i / tasks, i % tasks, memory_.get() + i / tasks * floats_, memory);
        });
      };
      if (!all(gives, give_bytes, give) || !all(uses, use_bytes, use)) return no_memory;
    }
    return {};
  }

 private:
  const int64_t planes_, floats_;
  const int threads_;
  const int64_t at_once_;
  std::unique_ptr<float[]> memory_;
};

int64_t tiles_of(int64_t tokens) { return (tokens + kAffinityTokens - 1) / kAffinityTokens; }

void give(const Affinities& of, int64_t plane, int64_t heads, int64_t tile, int64_t tokens, float* to, float* memory) {
  const int64_t first = tile * kAffinityTokens;
  current_isa().groups.affinities(of, static_cast<int32_t>(plane / heads), static_cast<int32_t>(plane % heads), first,
                                  static_cast<int32_t>(std::min<int64_t>(kAffinityTokens, tokens - first)), to, memory);
}

// How many threads the affinities of so many tokens are worth.
int worth_tokens(int threads, int64_t tokens, const Affinities& of) {
  return worth(threads, 2.0 * static_cast<double>(tokens) * (of.head_dim + 16) * of.count);
}

}  // namespace

Status route(const Affinities& of, int64_t batches, int64_t heads, int64_t tokens, int64_t w, int32_t* out,
             int threads) {
  Planes planes(batches * heads, of.count * of.stride, worth_tokens(threads, batches * heads * tokens, of));
  ran(current_isa());
  return planes.run(
      tiles_of(tokens), current_isa().groups.affinity_bytes(of),
      [&](int64_t plane, int64_t tile, float* to, float* memory) { give(of, plane, heads, tile, tokens, to, memory); },
      of.count, best_bytes(tokens),
      [&](int64_t plane, int64_t c, const float* from, float* memory) {
        find_best(from + c * of.stride, tokens, w, out + (plane * of.count + c) * w, memory);
      });
}

Status route_prefix(const Affinities& queries, const Affinities& keys, int64_t batches, int64_t heads, int64_t q_tokens,
                    int64_t kv_tokens, int64_t w, int64_t block, int32_t* q_lists, int32_t* kv_lists, int threads) {
  const PrefixBlocks blocks(block, q_tokens, kv_tokens);
  const int64_t count = keys.count, q_tiles = tiles_of(q_tokens), most = w + block, offset = kv_tokens - q_tokens;
  const int64_t q_floats = count * queries.stride;
  Planes planes(batches * heads, q_floats + count * keys.stride,
                worth_tokens(threads, batches * heads * (q_tokens + kv_tokens), keys));
  ran(current_isa());
  return planes.run(
      q_tiles + tiles_of(kv_tokens),
      std::max(current_isa().groups.affinity_bytes(queries), current_isa().groups.affinity_bytes(keys)),
      [&](int64_t plane, int64_t tile, float* to, float* memory) {
        if (tile < q_tiles) return give(queries, plane, heads, tile, q_tokens, to, memory);
        give(keys, plane, heads, tile - q_tiles, kv_tokens, to + q_floats, memory);
      },
      count, best_bytes(w + block),
      [&](int64_t plane, int64_t c, const float* from, float* memory) {
        const float* affinity = from + q_floats + c * keys.stride;
        std::vector<int32_t> kept, places(static_cast<size_t>(w));  // the w best so far
        std::vector<float> values;
        for (int64_t g = 0; g < blocks.first + blocks.count; ++g) {
          const int64_t first = g * block, end = std::min(first + block, kv_tokens);
          if (g >= blocks.first) {
            const int64_t list = (plane * blocks.count + g - blocks.first) * count + c;
            int32_t* k = std::copy(kept.begin(), kept.end(), kv_lists + list * most);
            for (int64_t j = first; j < end; ++j) *k++ = static_cast<int32_t>(j);
            std::fill(k, kv_lists + (list + 1) * most, -1);
            int32_t* q = q_lists + list * block;
            for (int64_t i = std::max<int64_t>(first - offset, 0); i < std::min(end - offset, q_tokens); ++i) {
              const auto at = [&](int64_t other) { return in_order(from[other * queries.stride + i]); };
              bool chosen = true;
              for (int64_t other = 0; other < count && chosen; ++other)
                chosen = other < c ? at(other) < at(c) : at(other) <= at(c);
              if (chosen) *q++ = static_cast<int32_t>(i);
            }
            std::fill(q, q_lists + (list + 1) * block, -1);
          }
          for (int64_t j = first; j < end; ++j) kept.push_back(static_cast<int32_t>(j));
          if (static_cast<int64_t>(kept.size()) <= w) continue;
          values.clear();
          for (const int32_t j : kept) values.push_back(affinity[j]);
          find_best(values.data(), static_cast<int64_t>(values.size()), w, places.data(), memory);
          for (size_t i = 0; i < places.size(); ++i) kept[i] = kept[static_cast<size_t>(places[i])];
          kept.resize(places.size());
        }
      });
}

}  // namespace attnkit::cpu
