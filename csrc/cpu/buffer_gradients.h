#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "backward.h"
#include "run.h"

namespace attnkit::cpu {

// Gradients of captured tensors: who adds to one, and when. Tasks of a backward pass share it.
class BufferGradients {
 public:
  BufferGradients(const Program& program, const Problem& p, const Gradients& g)
      : program_(program), g_(g), plans_(static_cast<size_t>(p.num_buffers)) {
    std::vector<int> count(plans_.size(), 0);
    for (const LoadSlope& load : program.loads) {
      const size_t b = buffer_of(load);
      const Buffer& buffer = p.buffers[b];
      if (count[b]++ == 0)
        for (int32_t d = buffer.rank; d-- > 0; plans_[b].elements *= buffer.size[d])
          plans_[b].stride[d] = plans_[b].elements;
      plans_[b].way = count[b] > 1 ? Way::apart : way_of(program.code[static_cast<size_t>(load.load)], p);
    }
  }

  // Whether some tensor is added to by turn, by pair; task after task, whatever head they are of.
  bool by_turn() const { return some(Way::by_turn); }
  bool by_pair() const { return some(Way::by_pair); }
  bool in_order() const { return by_pair() || some(Way::apart); }

  // A thread's own part of gradients, and where they are added to.
  struct Parts {
    std::vector<std::vector<float>> apart;  // of each buffer
    std::vector<LoadTarget> targets;        // of each load
  };

  Parts parts() const {
    Parts parts;
    parts.apart.resize(plans_.size());
    for (const LoadSlope& load : program_.loads) {
      const size_t b = buffer_of(load);
      LoadTarget target{g_.buffers[b], {}, INT64_MAX, 0};
      std::copy(plans_[b].stride, plans_[b].stride + kMaxArgs, target.stride);
      if (plans_[b].way == Way::apart) {
        parts.apart[b].resize(static_cast<size_t>(plans_[b].elements));
        target.data = parts.apart[b].data();
      }
      parts.targets.push_back(target);
    }
    return parts;
  }

  // Adds what a task has collected apart, after all tasks before it.
  void merge(Parts& parts, int64_t task) {
    if (!some(Way::apart)) return;
    until([&] { return merged_.load(std::memory_order_acquire) == task; });
    for (size_t i = 0; i < parts.targets.size(); ++i) {
      LoadTarget& target = parts.targets[i];
      const size_t b = buffer_of(program_.loads[i]);
      if (plans_[b].way == Way::apart)
        for (int64_t e = target.first; e < target.end; ++e) {
          g_.buffers[b][e] += target.data[e];
          target.data[e] = 0;
        }
      target.first = INT64_MAX;
      target.end = 0;
    }
    merged_.store(task + 1, std::memory_order_release);
  }

 private:
  enum class Way : uint8_t {
    none,
    alone,    // each element belongs to one tile: whenever it likes
    by_turn,  // to one row of tiles: in their order, as for dq
    by_pair,  // to the tiles at one place, of several heads or sequences: task after task
    apart,    // to any: each task by itself, and then all in order
  };
  struct Plan {
    Way way = Way::none;
    int64_t stride[kMaxArgs];
    int64_t elements = 1;
  };

  Way way_of(const Instruction& load, const Problem& p) const {
    const auto has = [&](Op op) {
      return std::any_of(load.args, load.args + load.nargs,
                         [&](int32_t a) { return program_.code[static_cast<size_t>(a)].op == op; });
    };
    // Tokens may meet in several groups.
    const bool one_head =
        p.groups == nullptr && (has(Op::var_b) || p.num_sequences == 1) && (has(Op::var_h) || p.num_heads == 1);
    const bool query = has(Op::var_q_idx), pair = query && has(Op::var_kv_idx);
    return pair && one_head              ? Way::alone
           : query && one_head           ? Way::by_turn
           : pair && p.groups == nullptr ? Way::by_pair
                                         : Way::apart;
  }

  size_t buffer_of(const LoadSlope& load) const {
    return static_cast<size_t>(program_.code[static_cast<size_t>(load.load)].attr);
  }
  bool some(Way way) const {
    return std::any_of(plans_.begin(), plans_.end(), [way](const Plan& plan) { return plan.way == way; });
  }

  const Program& program_;
  const Gradients& g_;
  std::vector<Plan> plans_;
  std::atomic<int64_t> merged_{0};  // tasks
};

}  // namespace attnkit::cpu
