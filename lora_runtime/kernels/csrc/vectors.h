// Kernel bodies, compiled once for every instruction set by cpu.cpp. No include guard on purpose.
//
// A value never depends on the block it was computed in: every sum runs over one token's own
// elements in one fixed order, so a row's result is bit-equal whatever rows stand beside it.

constexpr int LANES = VECTOR_BYTES / 4;  // floats of a vector
constexpr int WIDE = 2 * LANES;  // floats a step; two vectors keep both multipliers busy
constexpr int DEPTH = 64;  // products summed before they join the total: short sums round less
constexpr int TOKENS = 4;  // tokens (or query heads) that share each load
constexpr long MIN_PARALLEL_WORK = 1 << 16;  // multiplications below which a second thread costs more

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t bits32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t bits16 __attribute__((vector_size(VECTOR_BYTES / 2)));

inline float value(float x) { return x; }
inline float value(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) {  // round to nearest even, keep NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline vec load(const float* from) {
  vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline vec load(const bf16* from) {
  bits16 narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const bits32 wide = __builtin_convertvector(narrow, bits32) << 16;
  vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
template <class T>
inline vec load_part(const T* from, int width) {
  vec v = {};
  for (int i = 0; i < width; i++) v[i] = value(from[i]);
  return v;
}
inline float sum(vec v) {
  float parts[LANES];
  std::memcpy(parts, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// out[j] = row · xs[j] for N vectors of length n.
template <int N, class W, class T>
inline void dots(const W* row, const T* const* xs, int n, float* out) {
  vec even[N] = {}, odd[N] = {};
  int i = 0;
  for (; i + WIDE <= n; i += WIDE) {
    const vec first = load(row + i), second = load(row + i + LANES);
    for (int j = 0; j < N; j++) even[j] += first * load(xs[j] + i);
    for (int j = 0; j < N; j++) odd[j] += second * load(xs[j] + i + LANES);
  }
  for (; i < n; i += LANES) {
    const int width = std::min(LANES, n - i);
    const vec first = load_part(row + i, width);
    for (int j = 0; j < N; j++) even[j] += first * load_part(xs[j] + i, width);
  }
  for (int j = 0; j < N; j++) out[j] = sum(even[j] + odd[j]);
}

// sums[j][0:width] = Σ_k scales[j][k] · row(k)[0:width] for N sets of scales and `width` ≤ WIDE.
template <int N, class Row>
inline void combine(const float* const* scales, int count, int width, Row row, float (*sums)[WIDE]) {
  vec left[N] = {}, right[N] = {};
  if (width == WIDE)
    for (int k = 0; k < count; k++) {
      const vec first = load(row(k)), second = load(row(k) + LANES);
      for (int j = 0; j < N; j++) left[j] += scales[j][k] * first;
      for (int j = 0; j < N; j++) right[j] += scales[j][k] * second;
    }
  else
    for (int k = 0; k < count; k++) {
      const vec first = load_part(row(k), std::min(width, LANES));
      const vec second = load_part(row(k) + LANES, width - LANES);
      for (int j = 0; j < N; j++) left[j] += scales[j][k] * first;
      for (int j = 0; j < N; j++) right[j] += scales[j][k] * second;
    }
  for (int j = 0; j < N; j++) {
    std::memcpy(sums[j], &left[j], sizeof(vec));
    std::memcpy(sums[j] + LANES, &right[j], sizeof(vec));
  }
}
