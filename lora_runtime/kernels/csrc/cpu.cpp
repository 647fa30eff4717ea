// CPU kernels of the runtime behind a plain C interface; cpu.py loads this library.
// Every body is compiled for the baseline and, on x86-64 with GCC, for AVX2 and AVX-512; the best
// one the processor has is chosen at every call.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Product {
  float* y;
  const float *x, *panels;
  int num_tokens, in, out;
};

struct bf16 { uint16_t bits; };

// Where the parts of one adapter in one module lie, as in types.py: rank, then element offsets, -1
// for none.
struct Extent { int64_t rank, a, b, gain, bias, num_rows, rows, row_ids; };
struct Segment { int first, last, rank; const Extent* extent; long hidden; };
struct Block { const Segment* segment; int first; };

template <class T>
struct Adapters {
  T* y;
  const T *base, *x, *bias;
  const float *memory, *vectors, *weights;
  const int32_t* tokens;
  const std::vector<Segment>* segments;
  float *hidden, *sums;
  long num_tokens;
  int in, out;
};

template <class T>
struct Attention {
  T* out;
  const T *q, *keys, *values;
  const int32_t *rows, *positions, *tables;
  int num_tokens, num_heads, num_kv_heads, head_dim, block_size, table_width, window;
  float scale, softcap;
};

#define VECTOR_BYTES 32
namespace baseline {
#include "vectors.h"
#include "product.h"
#include "adapters.h"
#include "attention.h"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_VARIANTS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "vectors.h"
#include "product.h"
#include "adapters.h"
#include "attention.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#undef VECTOR_BYTES
#define VECTOR_BYTES 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#include "vectors.h"
#include "product.h"
#include "adapters.h"
#include "attention.h"
}
#pragma GCC pop_options
#endif

int level() {
#ifdef HAS_VARIANTS
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

template <class T>
void run(const Adapters<T>& p, int num_threads) {
#ifdef HAS_VARIANTS
  if (level() == 2) return avx512::apply_adapters(p, num_threads);
  if (level() == 1) return avx2::apply_adapters(p, num_threads);
#endif
  baseline::apply_adapters(p, num_threads);
}

template <class T>
void run(const Attention<T>& p, int num_threads) {
#ifdef HAS_VARIANTS
  if (level() == 2) return avx512::paged_attention(p, num_threads);
  if (level() == 1) return avx2::paged_attention(p, num_threads);
#endif
  baseline::paged_attention(p, num_threads);
}

void run(const Product& p, int num_threads) {
#ifdef HAS_VARIANTS
  if (level() == 2) return avx512::product(p, num_threads);
  if (level() == 1) return avx2::product(p, num_threads);
#endif
  baseline::product(p, num_threads);
}

std::vector<Segment> read_segments(const int64_t* extents, int num_replicas, const int32_t* slots,
                                   const int32_t* replicas, const int32_t* starts, int count,
                                   long* num_hidden) {
  std::vector<Segment> segments;
  *num_hidden = 0;
  for (int i = 0; i < count; i++) {
    const int first = starts[i], last = starts[i + 1];
    const Extent* extent = reinterpret_cast<const Extent*>(extents) +
                     (long(slots[first]) * num_replicas + replicas[first]);
    if (extent->rank == 0 && extent->gain < 0 && extent->bias < 0) continue;
    segments.push_back({first, last, int(extent->rank), extent, *num_hidden});
    *num_hidden += long(last - first) * extent->rank;
  }
  return segments;
}

float* buffer(std::vector<float>& storage, long size) {
  if (long(storage.size()) < size) storage.resize(size);
  return storage.data();
}

template <class T>
void apply_adapters(T* y, const T* base, const T* x, const T* bias, const float* memory,
                    const float* vectors, const int64_t* extents, int num_replicas,
                    const int32_t* tokens, const int32_t* slots, const int32_t* replicas,
                    const float* weights, const int32_t* starts, int num_segments, int num_tokens,
                    int in, int out, int num_threads) {
  static thread_local std::vector<float> hidden, sums;
  long num_hidden;
  const auto segments =
      read_segments(extents, num_replicas, slots, replicas, starts, num_segments, &num_hidden);
  float* accumulators = sizeof(T) == 4 ? reinterpret_cast<float*>(y)
                                       : buffer(sums, long(num_tokens) * out);
  run(Adapters<T>{y, base, x, bias, memory, vectors, weights, tokens, &segments,
                  buffer(hidden, num_hidden), accumulators, num_tokens, in, out},
      num_threads);
}

}  // namespace

#define ADAPTER_ARGS(T)                                                                          \
  T *y, const T *base, const T *x, const T *bias, const float *memory, const float *vectors,     \
      const int64_t *extents, int num_replicas, const int32_t *tokens,                           \
      const int32_t *slots, const int32_t *replicas, const float *weights, const int32_t *starts, \
      int num_segments, int num_tokens, int in, int out, int num_threads
#define ADAPTER_NAMES                                                                            \
  y, base, x, bias, memory, vectors, extents, num_replicas, tokens, slots, replicas, weights,    \
      starts, num_segments, num_tokens, in, out, num_threads
#define ATTENTION_ARGS(T)                                                                        \
  T *out, const T *q, const T *keys, const T *values, const int32_t *rows,                       \
      const int32_t *positions, const int32_t *tables, int num_tokens, int num_heads,            \
      int num_kv_heads, int head_dim, int block_size, int table_width, int window, float scale,  \
      float softcap, int num_threads
#define ATTENTION_FIELDS                                                                         \
  out, q, keys, values, rows, positions, tables, num_tokens, num_heads, num_kv_heads, head_dim,  \
      block_size, table_width, window, scale, softcap

extern "C" {
int loramux_abi() { return 3; }  // raise it with every change of a signature below
int loramux_level() { return level(); }
int loramux_panel_width() { return level() == 2 ? 32 : 16; }
void loramux_product_f32(float* y, const float* x, const float* panels, int num_tokens, int in, int out,
                         int num_threads) {
  run(Product{y, x, panels, num_tokens, in, out}, num_threads);
}
void loramux_apply_adapters_f32(ADAPTER_ARGS(float)) { apply_adapters<float>(ADAPTER_NAMES); }
void loramux_apply_adapters_bf16(ADAPTER_ARGS(bf16)) { apply_adapters<bf16>(ADAPTER_NAMES); }
void loramux_attention_f32(ATTENTION_ARGS(float)) { run(Attention<float>{ATTENTION_FIELDS}, num_threads); }
void loramux_attention_bf16(ATTENTION_ARGS(bf16)) { run(Attention<bf16>{ATTENTION_FIELDS}, num_threads); }
}
