// The product of the base: activations times panels of weights.

// y[t][0:width] = Σ_k x[t][k] · panel[k][0:WIDE] for N tokens: the product with WIDE outputs.
template <int N>
inline void product_block(const float* x, long x_stride, const float* panel, int in, float* y,
                          long y_stride, int width) {
  vec totals[N][2] = {};
  for (int begin = 0; begin < in; begin += DEPTH) {
    vec left[N] = {}, right[N] = {};
    for (int k = begin; k < std::min(in, begin + DEPTH); k++) {
      const vec first = load(panel + long(k) * WIDE), second = load(panel + long(k) * WIDE + LANES);
      for (int j = 0; j < N; j++) {
        left[j] = fused(left[j], x[j * x_stride + k], first);
        right[j] = fused(right[j], x[j * x_stride + k], second);
      }
    }
    for (int j = 0; j < N; j++) totals[j][0] += left[j];
    for (int j = 0; j < N; j++) totals[j][1] += right[j];
  }
  for (int j = 0; j < N; j++) {
    float row[WIDE];
    std::memcpy(row, totals[j], sizeof row);
    std::memcpy(y + j * y_stride, row, width * sizeof(float));
  }
}

// One panel's columns of y.
inline void multiply_panel(const Product& p, int column) {
  constexpr int ROWS = 6;  // 2 · ROWS sums and two weights fill the registers
  const float* panel = p.panels + column / WIDE * (long(p.in) * WIDE);
  const int width = std::min(WIDE, p.out - column);
  int t = 0;
  for (; t + ROWS <= p.num_tokens; t += ROWS)
    product_block<ROWS>(p.x + long(t) * p.in, p.in, panel, p.in, p.y + long(t) * p.out + column, p.out, width);
  for (; t + 2 <= p.num_tokens; t += 2)
    product_block<2>(p.x + long(t) * p.in, p.in, panel, p.in, p.y + long(t) * p.out + column, p.out, width);
  for (; t < p.num_tokens; t++)
    product_block<1>(p.x + long(t) * p.in, p.in, panel, p.in, p.y + long(t) * p.out + column, p.out, width);
}

// y = x Wᵀ with W in panels: (out / WIDE, in, WIDE), the last one padded with zeros.
inline void product(const Product& p, int num_threads) {
  constexpr int PANELS = 4;  // that a thread takes at a time
  Pool::get().run((p.out + WIDE - 1) / WIDE, PANELS, num_threads, [&](long begin, long end) {
    for (long panel = begin; panel < end; panel++) multiply_panel(p, int(panel) * WIDE);
  });
}
