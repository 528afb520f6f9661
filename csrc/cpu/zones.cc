#include "zones.h"

#include <limits>
#include <optional>

namespace attnkit::cpu {
namespace {

#include "half-inl.h"

constexpr int64_t kLeaf = 32, kFan = 8;  // elements of a lowest zone, zones of the next one
constexpr int64_t kScan = 2 * kLeaf;     // so few elements are looked at one by one

// f(T{}) with the type that the elements are held in.
template <class F>
decltype(auto) typed(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::i32: return f(int32_t{});
    case DType::i64: return f(int64_t{});
    case DType::bf16: return f(Bf16{});
    case DType::f16: return f(F16{});
    default: return f(uint8_t{});
  }
}

template <class T>
T read(const T& x) {
  if constexpr (sizeof(T) == 1) return x != 0;
  return x;
}
float read(Bf16 x) { return widen_one(x); }
float read(F16 x) { return widen_one(x); }
template <class T>
using Read = decltype(read(T{}));

// Where a search for the least (the greatest) element starts. A float's NaN is less or greater than nothing.
template <class T>
constexpr T kTop =
    std::numeric_limits<T>::has_infinity ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::max();
template <class T>
constexpr T kBottom = std::numeric_limits<T>::has_infinity ? -kTop<T> : std::numeric_limits<T>::lowest();

template <class T>
bool is_nan(T x) {
  if constexpr (std::is_floating_point_v<T>) return x != x;
  return false;
}

// f(stride), which the compiler knows where it is 1.
template <class F>
void strided(int64_t stride, F f) {
  if (stride == 1)
    f(std::integral_constant<int64_t, 1>{});
  else
    f(stride);
}

template <class T>
Interval scan(const T* lo, const T* hi, int64_t stride, int64_t count) {
  using V = Read<T>;
  V least = kTop<V>, most = kBottom<V>;
  bool nan = false;
  strided(stride, [&](auto step) {
    for (int64_t i = 0; i < count; ++i) {
      const V a = read(lo[i * step]), b = read(hi[i * step]);
      nan |= is_nan(a);
      least = a < least ? a : least;
      most = b > most ? b : most;
    }
  });
  return {static_cast<double>(least), static_cast<double>(most), nan};
}

Interval scan(const Line& line, int64_t first, int64_t count) {
  return typed(line.dtype, [&]<class T>(T) {
    return scan(static_cast<const T*>(line.lo) + first * line.stride,
                static_cast<const T*>(line.hi) + first * line.stride, line.stride, count);
  });
}

Interval scan(const Buffer& buf, int64_t offset, int64_t stride, int64_t count) {
  return typed(buf.dtype, [&]<class T>(T) {
    const T* data = static_cast<const T*>(buf.data) + offset;
    return scan(data, data, stride, count);
  });
}

Line line_of(const Buffer& buf, int dim, int64_t base) {
  return typed(buf.dtype, [&]<class T>(T) {
    const T* data = static_cast<const T*>(buf.data) + base;
    const int64_t stride = dim < 0 ? 0 : buf.stride[dim];
    return Line{buf.dtype, data, data, stride, stride == 0 ? 1 : buf.size[dim]};
  });
}

int64_t extent(const IndexBox& box, int dim) { return dim < 0 ? 1 : box.hi[dim] - box.lo[dim] + 1; }

// Calls f(offset) for every choice of indices in the dimensions other than `skipped`, where the offset is that of 0.
template <class F>
void for_others(const Buffer& buf, const IndexBox& box, int skipped, F f) {
  int64_t index[kMaxArgs];
  std::copy(box.lo, box.lo + buf.rank, index);
  while (true) {
    int64_t offset = 0;
    for (int d = 0; d < buf.rank; ++d)
      if (d != skipped) offset += index[d] * buf.stride[d];
    f(offset);
    int d = buf.rank - 1;
    for (; d >= 0; --d) {
      if (d == skipped) continue;
      if (++index[d] <= box.hi[d]) break;
      index[d] = box.lo[d];
    }
    if (d < 0) return;
  }
}

Interval unknown(Op op) {
  if (op == Op::load_b) return kAnyBool;
  return op == Op::load_f ? kAnyFloat : range_of(INT32_MIN, INT32_MAX);  // proven to fit
}

// An interval has no way to say "nothing but NaN".
void or_anything(Interval& r) {
  if (r.lo > r.hi) r = kAnyFloat;
}

}  // namespace

ZoneMap::ZoneMap(const Line& line) : line_(line) {
  std::vector<Interval> level;
  for (int64_t i = 0; i < line.count; i += kLeaf) level.push_back(scan(line, i, std::min(kLeaf, line.count - i)));
  while (true) {
    levels_.push_back(std::move(level));
    const std::vector<Interval>& below = levels_.back();
    if (below.size() <= kFan) return;
    level.clear();
    for (size_t i = 0; i < below.size(); i += kFan) {
      Interval r = kNothing;
      for (size_t j = i; j < std::min(i + kFan, below.size()); ++j) extend(r, below[j]);
      level.push_back(r);
    }
  }
}

Interval ZoneMap::range(int64_t first, int64_t last) const {
  int64_t end = last + 1;
  int64_t a = (first + kLeaf - 1) / kLeaf, b = end / kLeaf;  // whole zones
  if (a >= b) return scan(line_, first, end - first);
  Interval r = kNothing;
  if (first < a * kLeaf) extend(r, scan(line_, first, a * kLeaf - first));
  if (b * kLeaf < end) extend(r, scan(line_, b * kLeaf, end - b * kLeaf));
  for (size_t k = 0;; ++k) {  // at each level, what is not whole on the next
    const Interval* zone = levels_[k].data();
    const bool top = k + 1 == levels_.size();
    while (a < b && (top || a % kFan != 0)) extend(r, zone[a++]);
    while (a < b && b % kFan != 0) extend(r, zone[--b]);
    if (a >= b) return r;
    a /= kFan;
    b /= kFan;
  }
}

struct Zones::Band {
  IndexBox box;  // along the line, what the columns are
  std::vector<unsigned char> lo, hi;
  bool nan = false;
  std::optional<ZoneMap> map;

  bool holds(const IndexBox& other, int rank) const {
    for (int d = 0; d < rank; ++d)
      if (other.lo[d] < box.lo[d] || other.hi[d] > box.hi[d]) return false;
    return true;
  }

  // Some of its columns, all of its rows.
  bool answers(const IndexBox& other, int rank, int line) const {
    for (int d = 0; d < rank; ++d)
      if (d != line && (other.lo[d] != box.lo[d] || other.hi[d] != box.hi[d])) return false;
    return holds(other, rank);
  }

  // One pass over memory, row by row.
  template <class T>
  void reduce(const Buffer& buf, int line) {
    const int64_t count = extent(box, line);
    using V = Read<T>;
    lo.resize(static_cast<size_t>(count) * sizeof(V));
    hi.resize(lo.size());
    V *least = reinterpret_cast<V*>(lo.data()), *most = reinterpret_cast<V*>(hi.data());
    std::fill_n(least, count, kTop<V>);
    std::fill_n(most, count, kBottom<V>);
    for_others(buf, box, line, [&](int64_t offset) {
      const T* row = static_cast<const T*>(buf.data) + offset + box.lo[line] * buf.stride[line];
      strided(buf.stride[line], [&](auto step) {
        for (int64_t i = 0; i < count; ++i) {
          const V x = read(row[i * step]);
          nan |= is_nan(x);
          least[i] = x < least[i] ? x : least[i];
          most[i] = x > most[i] ? x : most[i];
        }
      });
    });
    map.emplace(Line{element_size(buf.dtype) == 2 ? DType::f32 : buf.dtype, least, most, 1, count});
  }
};

Zones::Zones(const Program& program, const Problem& problem, const Zones* shared)
    : program_(program), problem_(problem), shared_(shared), last_(program.code.size()) {}

const ZoneMap& Zones::line(size_t number, int64_t base) {
  Last& last = last_[number];
  if (last.map != nullptr && last.base == base) return *last.map;
  const int32_t buffer = program_.code[number].attr;
  const int dim = program_.boxes.steps[number].line;
  const auto key = std::tuple(buffer, dim, base);
  const ZoneMap* map = nullptr;
  if (shared_ != nullptr)
    if (const auto found = shared_->lines_.find(key); found != shared_->lines_.end()) map = &found->second;
  if (map == nullptr) {
    auto found = lines_.find(key);
    if (found == lines_.end()) found = lines_.emplace(key, line_of(problem_.buffers[buffer], dim, base)).first;
    map = &found->second;
  }
  last = {base, map};
  return *map;
}

Interval Zones::band(size_t number, const IndexBox& box) {
  const Instruction& in = program_.code[number];
  const Buffer& buf = problem_.buffers[in.attr];
  const int line = program_.boxes.steps[number].line;
  auto& [row, part] = bands_[number];
  // A part of the row of blocks that is being looked at must not drive that out.
  std::shared_ptr<Band>& band =
      row != nullptr && row->holds(box, buf.rank) && !row->answers(box, buf.rank, line) ? part : row;
  if (band == nullptr || !band->answers(box, buf.rank, line)) {
    band = std::make_shared<Band>();
    band->box = box;
    typed(buf.dtype, [&]<class T>(T) { band->template reduce<T>(buf, line); });
  }
  Interval r = band->map->range(box.lo[line] - band->box.lo[line], box.hi[line] - band->box.lo[line]);
  r.nan |= band->nan;
  or_anything(r);
  return r;
}

Interval Zones::load(size_t number, const IndexBox& asked, bool proving) {
  const Instruction& in = program_.code[number];
  const BoxStep& step = program_.boxes.steps[number];
  const Buffer& buf = problem_.buffers[in.attr];
  IndexBox box = asked;
  for (int d = 0; d < buf.rank; ++d)  // an expanded dimension holds one element, however often
    if (buf.stride[d] == 0) box.lo[d] = box.hi[d] = 0;
  const int dim = step.line;
  double others = 1;
  int64_t base = 0;
  for (int d = 0; d < buf.rank; ++d)
    if (d != dim) {
      others *= static_cast<double>(extent(box, d));
      base += box.lo[d] * buf.stride[d];
    }
  const int64_t along = extent(box, dim), first = dim < 0 ? 0 : box.lo[dim], stride = dim < 0 ? 0 : buf.stride[dim];
  const auto look = [&](int64_t at) { return scan(buf, at + first * stride, stride, along); };
  Interval r = kNothing;
  if (others * static_cast<double>(along) <= static_cast<double>(kScan)) {
    if (others == 1)
      extend(r, look(base));
    else
      for_others(buf, box, dim, [&](int64_t at) { extend(r, look(at)); });
  } else if (proving && in.op != Op::load_i) {
    return unknown(in.op);
  } else if (!step.plane && others == 1) {
    extend(r, line(number, base).range(first, box.hi[dim]));
  } else if (!step.plane) {  // the others are batch entries and heads
    for_others(buf, box, dim, [&](int64_t at) { extend(r, line(number, at).range(first, box.hi[dim])); });
  } else if (proving) {
    for_others(buf, box, dim, [&](int64_t at) { extend(r, look(at)); });
  } else if (step.wild) {
    return unknown(in.op);
  } else {
    return band(number, box);
  }
  or_anything(r);
  return r;
}

}  // namespace attnkit::cpu
