// Weights to 4 bits as bitsandbytes makes them, compiled once for every instruction set by cpu.cpp.

// Of a block the size of the largest weight; NaN where one is.
inline float largest(const bf16* weights, int count) {
  vec most = {}, broken = {};
  for (int i = 0; i < count; i += LANES) {
    const vec w = i + LANES <= count ? load(weights + i) : load_part(weights + i, count - i);
    const vec size = w < 0 ? -w : w;
    most = size > most ? size : most;
    broken += w - w;  // 0, but for NaN and infinity
  }
  float found = 0;
  bool is_nan = false;
  for (int lane = 0; lane < LANES; lane++) {
    found = std::max(found, most[lane]);
    is_nan |= broken[lane] != broken[lane];
  }
  if (is_nan)
    for (int i = 0; i < count; i++)
      if (const float w = value(weights[i]); w != w) return w;
  return found;
}

// The codes of a block of `count` weights: of w / scale, cut to [-1, 1], the number of bounds below.
// A whole block is multiplied by the reciprocal, the rest at the end of the weights divided.
inline void quantize_block(const FourBitCodes& p, long first, int count) {
  const bf16* weights = p.weights + first;
  const bool is_whole = count == FOUR_BIT_BLOCK;
  const float most = largest(weights, count), scale = std::max(most, 1e-38f);
  const float factor = 1.0f / scale;
  p.absmax[first / FOUR_BIT_BLOCK] = is_whole ? most : scale;
  int32_t codes[FOUR_BIT_BLOCK + LANES];
  for (int i = 0; i < count; i += LANES) {
    const vec w = i + LANES <= count ? load(weights + i) : load_part(weights + i, count - i);
    vec v = is_whole ? w * factor : w / scale;
    v = v < -1 ? vec{} - 1 : v;
    v = v > 1 ? vec{} + 1 : v;
    ints code = {};
    for (int b = 0; b < 15; b++) code += 1 + (v <= p.bounds[b]);  // so NaN is above them all
    std::memcpy(codes + i, &code, sizeof code);
  }
  if (count % 2) {  // half a byte is left: the code of 0
    int code = 0;
    for (int b = 0; b < 15; b++) code += !(0 <= p.bounds[b]);
    codes[count] = code;
  }
  uint8_t* packed = p.packed + first / 2;
  for (int i = 0; i < count; i += 2) packed[i / 2] = uint8_t(p.order[codes[i]] << 4 | p.order[codes[i + 1]]);
}

inline void quantize_four_bit(const FourBitCodes& p, int num_threads) {
  const long num_blocks = (p.num_weights + FOUR_BIT_BLOCK - 1) / FOUR_BIT_BLOCK;
  if (p.num_weights < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(num_blocks, BLOCKS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (long block = begin; block < end; block++) {
      const long first = block * FOUR_BIT_BLOCK;
      quantize_block(p, first, int(std::min<long>(FOUR_BIT_BLOCK, p.num_weights - first)));
    }
  });
}
