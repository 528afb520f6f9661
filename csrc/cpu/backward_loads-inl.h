// What the pairs of a strip add to the gradient of a captured tensor, in a fixed order.

// Where each row and each lane of a strip lie in the gradient; `index` are the load's operands.
struct Places2d {
  bool by_row = false, by_lane = false, by_pair = false;

  Places2d(const Operand* index, int32_t rank) {
    for (int32_t d = 0; d < rank; ++d) {
      by_row |= !index[d].vec && index[d].step != 0;
      by_lane |= index[d].vec && index[d].step == 0;
      by_pair |= index[d].vec && index[d].step != 0;
    }
  }
};

class LoadSums {
 public:
  LoadSums(LoadTarget& to, const Buffer& buffer, bool in_bounds) : to_(to), buffer_(buffer), in_bounds_(in_bounds) {}
  LoadSums(const LoadSums&) = delete;

  // `e`: what each pair adds; only the first `count` lanes are pairs.
  void add(const Operand* index, const float* e, Shape shape, int32_t count) {
    const Places2d places(index, buffer_.rank);
    if (places.by_pair || (places.by_row && places.by_lane)) return add_pairs(index, e, shape, count);
    if (!places.by_lane) {
      for (int32_t r = 0; r < shape.rows; ++r) {
        float sum = 0;
        const float* row = e + static_cast<int64_t>(r) * shape.lanes;
        vf sums{};
        int32_t j = 0;
        for (; j + kLanes <= count; j += kLanes) sums += load(row + j);
        for (int l = 0; l < kLanes; ++l) sum += sums[l];
        for (; j < count; ++j) sum += row[j];
        gather_up(offset_of(index, r, 0), sum);
      }
    } else {
      for (int32_t j = 0; j < count; ++j) {
        float sum = 0;
        for (int32_t r = 0; r < shape.rows; ++r) sum += e[static_cast<int64_t>(r) * shape.lanes + j];
        put(offset_of(index, 0, j), sum);
      }
    }
  }

  void flush() {
    put(pending_, sum_);
    pending_ = -1;
    sum_ = 0;
  }

 private:
  void add_pairs(const Operand* index, const float* e, Shape shape, int32_t count) {
    const bool adjacent = in_bounds_ && are_adjacent(index, count);
    for (int32_t r = 0; r < shape.rows; ++r) {
      const float* row = e + static_cast<int64_t>(r) * shape.lanes;
      if (!adjacent) {
        for (int32_t j = 0; j < count; ++j) put(offset_of(index, r, j), row[j]);
        continue;
      }
      const int64_t first = offset_of(index, r, 0);
      float* to = to_.data + first;
      int32_t j = 0;
      for (; j + kLanes <= count; j += kLanes) store(to + j, load(to + j) + load(row + j));
      for (; j < count; ++j) to[j] += row[j];
      touch(first, first + count);
    }
  }

  // Whether neighbouring lanes are neighbours in memory, as in bias[h, q_idx, kv_idx].
  bool are_adjacent(const Operand* index, int32_t count) const {
    for (int32_t d = 0; d < buffer_.rank; ++d) {
      if (!index[d].vec) continue;
      if (index[d].step != 0 || to_.stride[d] != 1) return false;
      for (int32_t j = 1; j < count; ++j)
        if (int_at(index[d].p + j) != int_at(index[d].p) + j) return false;
    }
    return true;
  }

  // -1: outside the buffer, which only a pair that does not exist can be without an error.
  int64_t offset_of(const Operand* index, int32_t r, int32_t j) const {
    int64_t offset = 0;
    for (int32_t d = 0; d < buffer_.rank; ++d) {
      const int32_t i = int_at(index[d].p + static_cast<int64_t>(r) * index[d].step + (index[d].vec ? j : 0));
      if (!in_bounds_ && (i < 0 || i >= buffer_.size[d])) return -1;
      offset += i * to_.stride[d];
    }
    return offset;
  }

  // Rows that add to the same element are summed by themselves first: short sums lose fewer bits than a long one.
  void gather_up(int64_t offset, float x) {
    if (offset != pending_) flush();
    pending_ = offset;
    sum_ += x;
  }

  void put(int64_t offset, float x) {
    if (offset < 0) return;
    to_.data[offset] += x;
    touch(offset, offset + 1);
  }

  void touch(int64_t first, int64_t end) {
    if (first < to_.first) to_.first = first;
    if (end > to_.end) to_.end = end;
  }

  LoadTarget& to_;
  const Buffer& buffer_;
  const bool in_bounds_;
  int64_t pending_ = -1;
  float sum_ = 0;
};
