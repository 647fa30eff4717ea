// y = x Wᵀ for few rows of bfloat16 x, with W in bitsandbytes' 4-bit format.
//
// What W is. packed (out · in / 2 bytes) holds two codes of 4 bits a byte, the earlier one in the
// high nibble; every 64 consecutive weights of a row, a block, share one absmax; and a weight is
// fp32(code[c] × absmax) rounded once to bfloat16. The packed bytes are read as bitsandbytes wrote
// them: nothing is repacked, and each is read once, by 16-byte loads.
//
// Why it is done in this way. On an H100 the bytes of W come in at about 21 weights a clock and
// multiprocessor, so a weight may cost three integer operations and no more. Looking each code up
// in shared memory, or writing values to shared memory so that a tensor core can read them, costs
// more than that. Here weights pass through registers only.
//
// 1. A thread owns whole blocks. A block has one absmax, so it has only sixteen different values.
//    The thread makes these sixteen once (16 multiplications, 8 conversions of a pair, exactly the
//    definition's one rounding) and keeps them as bytes: the low bytes of values 0 to 15 in four
//    registers, the high bytes in four others.
// 2. A look-up is a byte permute. PRMT picks four bytes out of eight by four selectors of 4 bits,
//    of which 3 are an index: and the codes, as they lie in the packed word, are such selectors.
//    With their top bits cleared, four codes select four low bytes among values 0 to 7, four among
//    8 to 15, and the same for high bytes. The codes' top bits, spread to whole bytes by PRMT's
//    sign mode, choose between the two; two more PRMTs put low and high bytes side by side, in
//    the codes' order. Ten operations give four weights as two registers of two bfloat16.
// 3. The result is the tensor core's operand as it stands. mma.m16n8k16 wants, from lane 4g + t, of
//    rows g and g + 8 of W, the inputs {2t, 2t + 1} and {2t + 8, 2t + 9}. A sum over k may be taken
//    in any order as long as W and x agree, so "inputs 2t, 2t + 1, 2t + 8, 2t + 9" are taken to be
//    four *consecutive* inputs of the block that the lane owns. A chunk is 256 inputs, four blocks;
//    lane 4g + t owns block t of rows g and g + 8; the eight codes of a packed word feed two mma,
//    and the 8 words of a block feed 16. The four lanes of a row read 128 consecutive bytes.
// 4. x is the other operand. For word q, lane 4g + t needs the 8 consecutive inputs
//    256 chunk + 64 t + 8 q … + 7 of row g of x. All warps of a program need the same, so they
//    bring a chunk of x into shared memory together, in the order in which it is read, some chunks
//    ahead; one barrier a chunk.
// 5. Inputs are split over gridDim.y where the outputs alone give too few warps. Each warp writes
//    its sums in the order of its own registers; the warp that comes last at a tile adds up all
//    splits' sums in the order of the splits, so the result does not depend on who was last.
//
// A warp makes 16 · OUT_TILES outputs for 8 · ROW_TILES rows. More rows are further programs, which
// find the codes in the cache. What a row's sums are, and their order, does not depend on how many
// rows there are. in_features is a multiple of BLOCK, out_features any number;
// out_features · in_features / 2 < 2³², as offsets have 32 bits.
// It may be launched while the launch before it is at work (from compute capability 9.0 on): codes
// and scales, which nobody writes, are asked for at once, and the wait comes before x or, where the
// launch before it does not make x either, at the end.
// With GATE the outputs are those of two joined layers, and y is act(gate) · up of both, each
// rounded to bfloat16 first. With NESTED a block's absmax is an 8-bit code itself.
// There are no includes, so that NVRTC can compile it as it is; bfloat16 is handled as bits.

#ifndef ROW_TILES
#define ROW_TILES 1  // tiles of 8 rows of x: 1, 2, 4 or 8
#endif
#ifndef OUT_TILES
#define OUT_TILES 1  // tiles of 16 outputs a warp makes
#endif
#ifndef MAX_WARPS
#define MAX_WARPS 16  // of a program, of which a multiprocessor holds one
#endif
#ifndef STAGES
#define STAGES 3  // chunks of x that shared memory holds
#endif
#ifndef GATE
#define GATE 0  // 1: silu, 2: gelu in tanh's form
#endif
#ifndef NESTED
#define NESTED 0
#endif
#define BLOCK 64         // weights that share one absmax
#define CHUNK 256        // inputs a warp takes at once, a block for each of the four lanes of a row
#define WORDS 8          // words of eight codes a block
#define NESTED_BLOCK 256 // blocks that share a second absmax
#define STAGE_BYTES (ROW_TILES * 8 * CHUNK * 2)

// Selectors of PRMT; the least significant digit is of the lowest byte.
#define LOW_BYTES 0x6420         // of four bfloat16
#define HIGH_BYTES 0x7531        // of four bfloat16
#define FIRST_PAIR 0x4051        // low and high bytes of the first two of four weights
#define SECOND_PAIR 0x6273       // of the other two
#define TOP_BITS_FIRST 0xD9C8    // the top bits of a word's lower four codes, each spread to a byte
#define TOP_BITS_SECOND 0xFBEA   // of its upper four
#define INDEX_BITS 0x77777777
#define SELECT 0xCA  // LOP3's truth table of mask ? a : b

typedef unsigned int word;

struct Table {  // bytes of a block's sixteen values, four values a register
  word low[4], high[4];
};

struct Scales {         // of blocks
  const float* absmax;  // of blocks or, with NESTED, of NESTED_BLOCK codes
  const unsigned char* codes;
  const float* code;    // 256 numbers
  const float* offset;  // of NESTED_BLOCK codes
};

__device__ __forceinline__ word permute(word a, word b, word selector) {
  word result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

__device__ __forceinline__ word select_bits(word mask, word a, word b) {
  word result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(mask), "r"(a), "r"(b), "n"(SELECT));
  return result;
}

__device__ __forceinline__ word bfloat16_pair(float low, float high) {
  word result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Half a block's codes. They are read once, so they go first when the cache is short of room. The
// offset has 32 bits, so that the load itself adds it to the pointer.
template <int half>
__device__ __forceinline__ uint4 load_codes(const uint4* packed, word block) {
  uint4 v;
  asm volatile("ld.global.nc.L1::evict_first.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"((const char*)packed + block * (BLOCK / 2)), "n"(16 * half));
  return v;
}

__device__ __forceinline__ float load_scale(const Scales& scales, word block) {
#if NESTED
  const float code = __ldg(scales.code + __ldg(scales.codes + block));
  const word group = block / NESTED_BLOCK;
  // Rounded between × and +, as bitsandbytes does.
  return __fadd_rn(__fmul_rn(code, __ldg(scales.absmax + group)), __ldg(scales.offset + group));
#else
  return __ldg(scales.absmax + block);
#endif
}

// Numbers 4i … 4i + 3 of the code: read anew for each chunk, which keeps sixteen registers free
// between; without the volatile they would be held all the time.
__device__ __forceinline__ float4 load_code(const float4* code, int i) {
  float4 v;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"((word)__cvta_generic_to_shared(code + i)));
  return v;
}

__device__ __forceinline__ uint4 load_x(word place) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(place));
  return v;
}

// What another program wrote: from the second-level cache.
__device__ __forceinline__ float4 load_part(const float4* place) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(place)
               : "memory");
  return v;
}

// threadIdx.x, read anew where it is asked for: no registers are held through the loop for it.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Starts to bring a chunk of x to `stage`, in pieces of 8 inputs: piece [q][m][4g + t] is
// x[8m + g][256 chunk + 64t + 8q …], zeros where there is no row or no input. Eight threads that
// follow each other write to eight different groups of banks.
__device__ __forceinline__ void stage_x(word stage, const unsigned short* x, int chunk,
                                        int num_rows, int in_features) {
  for (int i = threadIdx.x; i < ROW_TILES * 256; i += blockDim.x) {
    const int t = i & 3, q = i >> 3 & 7, g = (i >> 5 & 6) | (i >> 2 & 1), m = i >> 8;
    const int row = 8 * m + g, k = CHUNK * chunk + BLOCK * t + 8 * q;
    const bool is_piece = row < num_rows && k < in_features;
    const word target = stage + ((q * ROW_TILES + m) * 32 + 4 * g + t) * 16;
    const unsigned short* source = x + (is_piece ? (long long)row * in_features + k : 0);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(is_piece ? 16 : 0)
                 : "memory");
  }
}

// sums (16 outputs × 8 rows) += W (16 × 16) xᵀ (16 × 8)
__device__ __forceinline__ void multiply(float4& sums, word w0, word w1, word w2, word w3, word x0,
                                         word x1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums.x), "+f"(sums.y), "+f"(sums.z), "+f"(sums.w)
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}

// Puts values 4i … 4i + 3 of a block into its table.
__device__ __forceinline__ void add_values(Table& table, int i, float4 code, float absmax) {
  word first = bfloat16_pair(__fmul_rn(code.x, absmax), __fmul_rn(code.y, absmax));
  word second = bfloat16_pair(__fmul_rn(code.z, absmax), __fmul_rn(code.w, absmax));
  table.low[i] = permute(first, second, LOW_BYTES);
  table.high[i] = permute(first, second, HIGH_BYTES);
}

// Four weights. index: their codes without top bits, in the low half; is_upper: a byte 0xFF for
// each code of 8 and more. The codes lie in the order 1, 0, 3, 2: a byte's high nibble comes first.
__device__ __forceinline__ void look_up(const Table& table, word index, word is_upper, word& first,
                                        word& second) {
  word low = select_bits(is_upper, permute(table.low[2], table.low[3], index),
                         permute(table.low[0], table.low[1], index));
  word high = select_bits(is_upper, permute(table.high[2], table.high[3], index),
                          permute(table.high[0], table.high[1], index));
  first = permute(low, high, FIRST_PAIR);
  second = permute(low, high, SECOND_PAIR);
}

// Eight weights, in order, as four registers.
__device__ __forceinline__ void dequantise(const Table& table, word codes, word* weights) {
  word index = codes & INDEX_BITS, raised = codes << 4;
  look_up(table, index, permute(raised, codes, TOP_BITS_FIRST), weights[0], weights[1]);
  look_up(table, index >> 16, permute(raised, codes, TOP_BITS_SECOND), weights[2], weights[3]);
}

// Until all that the launch before this one does is done, and can be seen.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ word word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The row of W that is row 8r + g of tile a of a warp's tile. With GATE the first eight are of the
// gate and the others the same eight of up. A row that is not there is read as the last one.
__device__ __forceinline__ int row_of_w(int tile, int a, int r, int g, int out_features) {
  if (GATE) {
    const int inner = out_features / 2;
    return min((tile * OUT_TILES + a) * 8 + g, inner - 1) + r * inner;
  }
  return min((tile * OUT_TILES + a) * 16 + 8 * r + g, out_features - 1);
}

__device__ __forceinline__ float rounded(float value) {
  return __uint_as_float(bfloat16_pair(0.0f, value) & 0xFFFF0000u);
}

__device__ __forceinline__ float gated(float gate, float up) {
  float slope = gate;
  if (GATE == 2) slope = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + __expf(-slope)) * up;
}

// Writes what a tile's sums become: .x and .y are rows 2t and 2t + 1 of output g, .z and .w of
// output g + 8, or of up's output g.
__device__ __forceinline__ void store(unsigned short* y, float4 sums, int row, int output,
                                      int num_rows, int num_outputs) {
  word near = bfloat16_pair(sums.x, sums.y), far = bfloat16_pair(sums.z, sums.w);
  if (GATE)
    near = bfloat16_pair(gated(rounded(sums.x), rounded(sums.z)),
                         gated(rounded(sums.y), rounded(sums.w)));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (row + i >= num_rows) break;
    unsigned short* place = y + (long long)(row + i) * num_outputs + output;
    if (output < num_outputs) place[0] = near >> (16 * i);
    if (!GATE && output + 8 < num_outputs) place[8] = far >> (16 * i);
  }
}

// grid (row blocks · programs, splits), up to MAX_WARPS warps a program; a warp a tile; dynamic
// shared memory of STAGES · STAGE_BYTES. y (num_rows, outputs) bfloat16; partial (splits, row
// blocks · tiles, OUT_TILES, ROW_TILES, 32) float4 and counters (row blocks · tiles) zeros, both
// unused where there is one split; packed, scales and code (16) as above; x (num_rows, in_features).
// x_is_made: the launch before this one has no part in x.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1)
four_bit_product(unsigned short* y, float4* partial, int* counters,
                 const uint4* __restrict__ packed, const float* __restrict__ absmax,
                 const unsigned char* __restrict__ scale_codes,
                 const float* __restrict__ scale_code, const float* __restrict__ scale_offset,
                 const float4* __restrict__ code, const unsigned short* __restrict__ x,
                 int num_rows, int in_features, int out_features, int chunks_per_split,
                 int x_is_made) {
  extern __shared__ uint4 staged[];
  __shared__ float4 shared_code[4];
  if (threadIdx.x < 4) shared_code[threadIdx.x] = code[threadIdx.x];
  const Scales scales = {absmax, scale_codes, scale_code, scale_offset};
  const int row_blocks = (num_rows + 8 * ROW_TILES - 1) / (8 * ROW_TILES);
  const int row_block = blockIdx.x % row_blocks;
  x += (long long)row_block * 8 * ROW_TILES * in_features;
  num_rows = min(num_rows - row_block * 8 * ROW_TILES, 8 * ROW_TILES);
  float4 sums[OUT_TILES][ROW_TILES] = {};
  {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int tile = blockIdx.x / row_blocks * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const int blocks = in_features / BLOCK, chunks = (in_features + CHUNK - 1) / CHUNK;
    int chunk = blockIdx.y * chunks_per_split;
    const int end = min(chunk + chunks_per_split, chunks);

    // The lane's block of each of its rows of W. Instead of a block beyond the row's end it reads
    // one of its own row again, and x is zero there.
    word block[OUT_TILES][2];
    uint4 codes[OUT_TILES][2][2];
    float scale[OUT_TILES][2];
#pragma unroll
    for (int a = 0; a < OUT_TILES; a++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const word first = row_of_w(tile, a, r, g, out_features) * blocks;
        block[a][r] = first + min(4 * chunk + t, blocks - 1);
        codes[a][r][0] = load_codes<0>(packed, block[a][r]);
        codes[a][r][1] = load_codes<1>(packed, block[a][r]);
        scale[a][r] = load_scale(scales, block[a][r]);
      }

    if (!x_is_made) wait_for_launch_before();
    const word stages = (word)__cvta_generic_to_shared(staged);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
      if (chunk + i < end)
        stage_x(stages + i * STAGE_BYTES, x, chunk + i, num_rows, in_features);
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    word stage = stages, free_stage = stages + (STAGES - 1) * STAGE_BYTES;

    for (; chunk < end; chunk++) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      __syncthreads();  // all threads' pieces are there, and nobody reads the chunk before
      if (chunk + STAGES - 1 < end)
        stage_x(free_stage, x, chunk + STAGES - 1, num_rows, in_features);
      asm volatile("cp.async.commit_group;" ::: "memory");
      Table table[OUT_TILES][2];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float4 four = load_code(shared_code, i);
#pragma unroll
        for (int a = 0; a < OUT_TILES; a++)
#pragma unroll
          for (int r = 0; r < 2; r++) add_values(table[a][r], i, four, scale[a][r]);
      }
      // From here on registers are refilled for the next chunk as soon as they are free.
      const bool is_more = chunk + 1 < end;
      if (is_more)
#pragma unroll
        for (int a = 0; a < OUT_TILES; a++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            block[a][r] += 4 * (chunk + 1) + t < blocks ? 4 : 0;
            scale[a][r] = load_scale(scales, block[a][r]);
          }
      const word pieces = stage + lane * 16;
#pragma unroll
      for (int q = 0; q < WORDS; q++) {
        uint4 rows[ROW_TILES];
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) rows[m] = load_x(pieces + (q * ROW_TILES + m) * 512);
#pragma unroll
        for (int a = 0; a < OUT_TILES; a++) {
          word near[4], far[4];
          dequantise(table[a][0], word_of(codes[a][0][q / 4], q % 4), near);
          dequantise(table[a][1], word_of(codes[a][1][q / 4], q % 4), far);
#pragma unroll
          for (int m = 0; m < ROW_TILES; m++)
            multiply(sums[a][m], near[0], far[0], near[1], far[1], rows[m].x, rows[m].y);
#pragma unroll
          for (int m = 0; m < ROW_TILES; m++)
            multiply(sums[a][m], near[2], far[2], near[3], far[3], rows[m].z, rows[m].w);
        }
        if (q % 4 == 3 && is_more)
#pragma unroll
          for (int a = 0; a < OUT_TILES; a++)
#pragma unroll
            for (int r = 0; r < 2; r++)
              codes[a][r][q / 4] = q < 4 ? load_codes<0>(packed, block[a][r])
                                         : load_codes<1>(packed, block[a][r]);
      }
      free_stage = stage;
      stage = stage == stages + (STAGES - 1) * STAGE_BYTES ? stages : stage + STAGE_BYTES;
    }
  }

  if (x_is_made) wait_for_launch_before();  // who waits for this launch waits for that one too
  const int lane = thread_index() & 31, g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x / row_blocks * (blockDim.x >> 5) + (thread_index() >> 5);
  const int num_outputs = GATE ? out_features / 2 : out_features;
  const int tile_outputs = (GATE ? 8 : 16) * OUT_TILES;
  if (tile * tile_outputs >= num_outputs) return;
  const int splits = gridDim.y;
  if (splits > 1) {
    const int unit = tile * row_blocks + row_block;
    const long long units = (num_outputs + tile_outputs - 1) / tile_outputs * row_blocks;
    const long long split_size = units * (OUT_TILES * ROW_TILES * 32);
    float4* parts = partial + (long long)unit * (OUT_TILES * ROW_TILES * 32) + lane;
#pragma unroll
    for (int i = 0; i < OUT_TILES * ROW_TILES; i++)
      parts[blockIdx.y * split_size + i * 32] = sums[i / ROW_TILES][i % ROW_TILES];
    __threadfence();
    __syncwarp();
    int arrived = 0;
    if (lane == 0) arrived = atomicAdd(counters + unit, 1);
    arrived = __shfl_sync(0xFFFFFFFFu, arrived, 0);
    if (arrived < splits - 1) return;
    __threadfence();
    if (lane == 0) counters[unit] = 0;
#pragma unroll
    for (int i = 0; i < OUT_TILES * ROW_TILES; i++)
      sums[i / ROW_TILES][i % ROW_TILES] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    constexpr int at_once = ROW_TILES == 1 ? 8 : ROW_TILES == 2 ? 4 : 1;  // loads on their way
#pragma unroll at_once
    for (int split = 0; split < splits; split++)
#pragma unroll
      for (int i = 0; i < OUT_TILES * ROW_TILES; i++) {
        const float4 part = load_part(parts + split * split_size + i * 32);
        float4& sum = sums[i / ROW_TILES][i % ROW_TILES];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
  }
  y += (long long)row_block * 8 * ROW_TILES * num_outputs;
#pragma unroll
  for (int a = 0; a < OUT_TILES; a++)
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
      store(y, sums[a][m], 8 * m + 2 * t, (tile * OUT_TILES + a) * (GATE ? 8 : 16) + g, num_rows,
            num_outputs);
}
