// The machine's ceilings and the expression routines by themselves, measured and tested with the same vectors as the
// kernels use.

void evaluate(Op op, float* dst, const float* const* args, const bool* same, int32_t n) {
  Operand a[kMaxArgs];
  for (int i = 0; i < kMaxArgs; ++i) a[i] = {args[i], 0, !same[i]};
  compute(op, dst, {1, n}, a);
}

double fma_burst(int64_t rounds) {
  constexpr int kChains = kAccumulators;
  vf acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i));
  const vf a = set1(0.999f), b = set1(0.001f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
  }
  vf sum = acc[0];
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) sum += acc[i];
  asm volatile("" : : "m"(sum));  // or the loop could be dropped
  return 2.0 * kLanes * kChains * static_cast<double>(rounds);
}

float read_burst(const float* p, int64_t n) {
  vf sum[8] = {};
  for (int64_t i = 0; i + 8 * kLanes <= n; i += 8 * kLanes)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = sum[j] + load(p + i + j * kLanes);
  float total = 0;
  for (int j = 0; j < 8; ++j)
    for (int l = 0; l < kLanes; ++l) total += sum[j][l];
  return total;
}
