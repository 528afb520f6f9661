// What a thread keeps of one sequence and kv head between its tasks, in front of their workspace: keys and values as
// products take them, where memory does not have them so. A chunk of keys is made when one of its tiles first asks.
class Kept {
 public:
  Kept() = default;
  // `of_keys`, `of_values`: floats of each in a chunk; 0 of what is not to be kept, as encoded keys never are.
  Kept(const Call& c, const Task& t, int64_t of_keys, int64_t of_values, float* workspace)
      : keys_len_(c.problem->sequences[t.sequence].kv_len),
        of_keys_(c.problem->codes == nullptr ? of_keys : 0),
        of_values_(of_values) {
    const int32_t group = c.problem->num_heads / c.problem->num_kv_heads;
    const int64_t chunks = (keys_len_ + kKeptKeys - 1) / kKeptKeys, head = kept_head(chunks);
    const bool again = t.lanes() < group * c.problem->sequences[t.sequence].q_len;  // other tasks have the same keys
    if (!again || of_keys_ + of_values == 0 || head + chunks * (of_keys_ + of_values) > c.kept) return;
    float* memory = workspace - c.kept;
    known_ = reinterpret_cast<uint8_t*>(memory + kKeptOwner);
    keys_ = memory + head;
    values_ = keys_ + chunks * of_keys_;
    const int64_t owner[] = {c.number, t.sequence, t.head / group};
    if (__builtin_memcmp(memory, owner, sizeof owner) == 0) return;
    __builtin_memcpy(memory, owner, sizeof owner);
    __builtin_memset(known_, 0, static_cast<size_t>(chunks));
  }

  bool keys() const { return known_ != nullptr && of_keys_ > 0; }
  bool values() const { return known_ != nullptr && of_values_ > 0; }

  // The chunk of key `first` and, one after the other, those up to key `first + count`: put(first key, keys, to) makes
  // one.
  template <class F>
  float* keys(int64_t first, int32_t count, F put) const {
    return need(first, count, {kKeys, keys_, of_keys_}, put);
  }
  // The same of values; put says whether they are finite, and so does this, of all of them.
  template <class F>
  float* values(int64_t first, int32_t count, bool& finite, F put) const {
    float* at = need(first, count, {kValues, values_, of_values_}, [&](int64_t key, int32_t keys, float* to) {
      if (!put(key, keys, to)) known_[key / kKeptKeys] |= kNotFinite;
    });
    finite = true;
    for (int64_t n = first / kKeptKeys; n * kKeptKeys < first + count; ++n) finite &= (known_[n] & kNotFinite) == 0;
    return at;
  }

 private:
  enum : uint8_t { kKeys = 1, kValues = 2, kNotFinite = 4 };
  struct Chunks {
    uint8_t kind;
    float* at;
    int64_t floats;
  };

  template <class F>
  float* need(int64_t first, int32_t count, Chunks of, F put) const {
    for (int64_t n = first / kKeptKeys; n * kKeptKeys < first + count; ++n) {
      if ((known_[n] & of.kind) != 0) continue;
      const int64_t key = n * kKeptKeys, left = keys_len_ - key;
      put(key, left < kKeptKeys ? static_cast<int32_t>(left) : kKeptKeys, of.at + n * of.floats);
      known_[n] |= of.kind;
    }
    return of.at + first / kKeptKeys * of.floats;
  }

  int64_t keys_len_ = 0, of_keys_ = 0, of_values_ = 0;
  uint8_t* known_ = nullptr;  // what there is of each chunk
  float *keys_ = nullptr, *values_ = nullptr;
};
