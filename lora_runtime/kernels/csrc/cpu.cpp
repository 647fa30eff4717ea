// CPU kernels of the runtime behind a plain C interface; cpu_library.py loads this library.
// Every body is compiled for the baseline and, on x86-64 with GCC, for AVX2 and AVX-512; the best
// one the processor has is chosen at every call.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_VARIANTS 1
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Of libgomp, if torch has brought it; its threads are torch's.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned flags)
    __attribute__((weak));
extern "C" int omp_get_max_threads() __attribute__((weak));
extern "C" void omp_set_num_threads(int) __attribute__((weak));

namespace {

#include "pool.h"

// Memory that grows and is never given back, aligned for any vector. One for each thread and use.
class Scratch {
 public:
  template <class T>
  T* get(long count) {
    const size_t size = count * sizeof(T) + 64;
    if (storage_.size() < size) storage_.resize(size);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<char> storage_;
};


struct bf16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// Where the parts of one adapter in one module lie, as in types.py: rank, then element offsets, -1
// for none.
struct Extent { int64_t rank, a, b, gain, bias, num_rows, rows, row_ids; };
// An adapter's entries first to last at one module, whose outputs are `width` columns.
struct Segment {
  int first, last, rank, column, width;
  const Extent* extent;
  long hidden;
  const int* places;
};
// One of the modules whose outputs stand side by side. places: of every token among those with
// several adapters here, or one of the two constants.
constexpr int NO_ADAPTER = -1, ONE_ADAPTER = -2;
struct Module { int column, width, num_segments; const Segment* segments; const int* places; };
struct Block { const Segment* segment; int first, last; };
// Columns of a module, and the segments that give them something.
struct Columns {
  const Module* module;
  int begin, end;
  const Segment *first, *last;
};
constexpr int CACHE_LINE = 64;  // bytes
constexpr int MIN_COLUMNS = 128, MAX_COLUMNS = 512;  // outputs that one thread adds up at a time
constexpr int LONG_COLUMNS = 1536;  // those of one segment, whose rows of B are read in pieces of 3 and 6 KB
constexpr int LONG_ENTRIES = 16;  // up to which, as more would read B from a cache: then in pieces that it holds
constexpr int SHARES_A_THREAD = 2;  // pieces of work that a thread should have, so that none waits long
constexpr int FEW_TOKENS = 64;  // up to which as little as possible is given to one thread
constexpr long MIN_PARALLEL_WORK = 1 << 16;  // multiplications below which a second thread costs more

template <class T, class W>
struct Adapters {
  T* y;
  const T *base, *x, *bias;
  const W* memory;
  const float *vectors, *weights;
  const int32_t* tokens;
  const std::vector<Module>* modules;
  const std::vector<Columns>* columns;  // of all modules, each for one thread
  float* hidden;
  long num_tokens, num_sums;
  int in, out;
};

// Of adapters in float16, in tiles. hidden: of every 16 entries of a segment and 16 of its ranks a tile.
constexpr int HIDDEN_TILE = 2 * 16 * 16;
inline int tiles_of(int count) { return (count + 15) / 16; }
struct HalfAdapters {
  bf16* y;
  const bf16 *base, *x, *bias;
  const uint16_t* memory;
  const float *vectors, *weights;
  const int32_t* tokens;
  const std::vector<Module>* modules;
  const std::vector<Columns>* columns;
  bf16* hidden;
  long num_tokens, num_sums;
  int in, out;
};

// An adapter in training: a (rank, in) and b (out, rank). hidden: x Aᵀ as trained_adapters.h lays it.
struct TrainedAdapter {
  bf16 *y, *hidden;
  const bf16 *x, *a, *b;
  int num_tokens, in, out, rank;
  int threads(int most) const { return long(num_tokens) * rank * (in + out) < MIN_PARALLEL_WORK ? 1 : most; }
};
// grad: of y; dx, which may be null, has the base's part already.
struct AdapterGradients {
  bf16* dx;
  float *da, *db;
  const bf16* grad;
};

template <class T>
struct Attention {
  T* out;
  const T *q, *keys, *values;
  const int32_t *rows, *positions, *tables;
  const float* sinks;  // of every head a score more that has no value; null without
  int num_tokens, num_heads, num_kv_heads, head_dim, block_size, table_width, window;
  float scale, softcap;
};

// Tokens of one row that see `prefix` shared ones, those before them and themselves.
struct RowSegment { int32_t prefix_start, prefix, start, length; };
// Over whole rows without a cache: q and out (tokens, heads, head_dim), k and v (tokens, kv heads,
// head_dim).
template <class T>
struct RowAttention {
  T* out;
  const T *q, *k, *v;
  const RowSegment* segments;
  int num_segments, num_heads, num_kv_heads, head_dim;
  float scale;
};
template <class T>
struct RowGradient {
  T *dq, *dk, *dv;
  const T* grad;
};

// Rows of width values; with a residual the sum of both is kept in `total` and normed.
template <class T>
struct Norm {
  T *y, *total;
  const T *x, *residual, *weight, *branch_weight;
  int num_rows, width, plus_one;
  float eps;
};

// Queries and keys to be normed and rotated; with slots keys and values go to these of the cache.
template <class T>
struct Rotation {
  T *q_out, *k_out, *v_out;
  const T *q, *k, *v, *cos, *sin, *q_weight, *k_weight;
  const int64_t* slots;
  long q_stride, k_stride, v_stride;
  int num_tokens, num_heads, num_kv_heads, head_dim, rotated, plus_one;
  float eps;
};

template <class T>
struct Gated {
  T* y;
  const T *gate, *up;
  long gate_stride, up_stride;
  int num_rows, width, is_gelu;
};

// The gradient of a norm's input: `grad` is that of its output, `other`, null for none, what the
// input has from elsewhere.
template <class T>
struct NormGradient {
  T* dx;
  const T *grad, *other, *x, *weight;
  int num_rows, width, plus_one;
  float eps;
};

// The gradients of queries and keys before norm and rotation; q and k are null without a norm.
template <class T>
struct RotationGradient {
  T *dq, *dk;
  const T *grad_q, *grad_k, *q, *k, *cos, *sin, *q_weight, *k_weight;
  long grad_q_stride, grad_k_stride, q_stride, k_stride;
  int num_tokens, num_heads, num_kv_heads, head_dim, rotated, plus_one;
  float eps;
};

template <class T>
struct GatedGradient {
  T *dgate, *dup;
  const T *grad, *gate, *up;
  long gate_stride, up_stride;
  int num_rows, width, is_gelu;
};

// Weights to 4 bits: `bounds` lie between the 16 values in ascending order, `order` has their codes.
constexpr int FOUR_BIT_BLOCK = 64;  // weights of one absmax
constexpr long BLOCKS_AT_A_TIME = 256;
struct FourBitCodes {
  uint8_t* packed;
  float* absmax;
  const bf16* weights;
  const float* bounds;
  const uint8_t* order;
  long num_weights;
};
// The pairs of every token, weighted and summed.
template <class T>
struct PairSum {
  T* y;
  const T* x;
  const int64_t* places;
  const float* weights;
  int num_rows, per_token, width;
};

// One token of each row: states (slots, heads, keys, values) change in place; q and k (rows, heads,
// keys), v and out (rows, heads, values), keep and beta (rows, heads), beta null without one.
struct RecurrentStep {
  float *out, *states;
  const int64_t* slots;
  const float *q, *k, *v, *keep, *beta;
  int num_rows, num_heads, num_keys, num_values;
};

struct FourBitWeight {
  const uint8_t* packed;
  const float *absmax, *code;
  const uint8_t* nested_codes;  // null without double quantisation; absmax is then the second one
  const float *nested_code, *nested_offsets;
};
struct EightBitWeight { const int8_t* codes; const float* absmax; };
struct SixteenBitWeight { const bf16* values; };
template <class T>
struct PackedWeight { const T* panels; };
inline float nested_scale(const FourBitWeight& w, long block) {
  float absmax = w.nested_code[w.nested_codes[block]] * w.absmax[block / 256];
#ifdef HAS_VARIANTS
  asm volatile("" : "+x"(absmax));  // rounded before the offset is added
#endif
  return absmax + w.nested_offsets[block / 256];
}
inline float block_scale(const FourBitWeight& w, long block) {
  return w.nested_codes ? nested_scale(w, block) : w.absmax[block];
}

#include "experts.h"
#include "panels.h"

#define VECTOR_BYTES 32
#define VECTOR_LEVEL 0
namespace baseline {
#include "vectors.h"
#include "float_product.h"
#include "adapters.h"
#include "elementwise.h"
#include "quantize.h"
#include "gradients.h"
#include "recurrence.h"
#include "attention.h"
#include "row_attention.h"
}

#ifdef HAS_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#undef VECTOR_LEVEL
#define VECTOR_LEVEL 1
namespace avx2 {
#include "vectors.h"
#include "float_product.h"
#include "adapters.h"
#include "elementwise.h"
#include "quantize.h"
#include "gradients.h"
#include "recurrence.h"
#include "attention.h"
#include "row_attention.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#undef VECTOR_BYTES
#define VECTOR_BYTES 64
#undef VECTOR_LEVEL
#define VECTOR_LEVEL 2
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#include "vectors.h"
#include "float_product.h"
#include "adapters.h"
#include "elementwise.h"
#include "quantize.h"
#include "gradients.h"
#include "recurrence.h"
#include "attention.h"
#include "row_attention.h"
}
#pragma GCC pop_options
#if __GNUC__ >= 11
#define HAS_BFLOAT16 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#undef VECTOR_LEVEL
#define VECTOR_LEVEL 3
#define WITH_AMX 0
namespace avx512_bf16 {
#include "vectors.h"
#include "adapters.h"
#include "weights.h"
#include "row_product.h"
#include "tiles.h"
#include "trained_adapters.h"
}
#undef WITH_AMX
#pragma GCC target("amx-tile,amx-bf16")
#define WITH_AMX 1
namespace amx {
#include "weights.h"
#include "tiles.h"
#include "tile_product.h"
#include "half_adapters.h"
#include "trained_adapters.h"
}
#pragma GCC pop_options
#endif
#endif

#ifdef HAS_BFLOAT16
// Linux gives a process the tile registers only when it asks for them.
bool has_amx() {
#ifdef __linux__
  constexpr int REQUEST_STATE = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(7), "2"(0));
  const bool in_processor = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE
  return in_processor && syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// What the processor has: 0 the baseline, 1 AVX2, 2 AVX-512, 3 AVX512-BF16, 4 AMX.
int found_level() {
#ifdef HAS_VARIANTS
  const bool has_avx512 = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl");
#ifdef HAS_BFLOAT16
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? 4 : 3;
#endif
  if (has_avx512) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int highest_level = 4;  // a test may lower it

int level() {
  static const int found = found_level();
  return std::min(found, highest_level);
}

#ifdef HAS_VARIANTS
#define RUN(function, ...)                                            \
  if (level() >= 2) return avx512::function(__VA_ARGS__);             \
  if (level() == 1) return avx2::function(__VA_ARGS__);               \
  baseline::function(__VA_ARGS__)
#else
#define RUN(function, ...) baseline::function(__VA_ARGS__)
#endif

template <class T>
void run(const Adapters<T, float>& p, int num_threads) { RUN(apply_adapters, p, num_threads); }
template <class T>
void run(const Attention<T>& p, int num_threads) { RUN(paged_attention, p, num_threads); }
template <class T>
void run(const RowAttention<T>& p, int num_threads) { RUN(row_attention, p, num_threads); }
template <class T>
void run(const RowAttention<T>& p, const RowGradient<T>& g, int num_threads) { RUN(row_attention_gradient, p, g, num_threads); }
template <class T>
void run(const Norm<T>& p, int num_threads) { RUN(rms_norm, p, num_threads); }
template <class T>
void run(const Rotation<T>& p, int num_threads) { RUN(rotate, p, num_threads); }
template <class T>
void run(const Gated<T>& p, int num_threads) { RUN(gated_activation, p, num_threads); }
template <class T>
void run(const NormGradient<T>& p, int num_threads) { RUN(rms_norm_gradient, p, num_threads); }
template <class T>
void run(const RotationGradient<T>& p, int num_threads) { RUN(rotate_gradient, p, num_threads); }
template <class T>
void run(const GatedGradient<T>& p, int num_threads) { RUN(gated_activation_gradient, p, num_threads); }
void run(const FourBitCodes& p, int num_threads) { RUN(quantize_four_bit, p, num_threads); }
template <class T>
void run(const PairSum<T>& p, int num_threads) { RUN(sum_pairs, p, num_threads); }
template <class T>
void run_most_likely(const T* x, int64_t* found, int num_rows, int width, int num_threads) {
  RUN(most_likely, x, found, num_rows, width, num_threads);
}
void run(const RecurrentStep& p, int num_threads) { RUN(recurrent_step, p, num_threads); }

// All: rows starts[g] to starts[g + 1] of x belong to group g, which has `out` rows of the weight.
template <class T>
void run_groups(const PackedWeight<T>& w, float* y, const float* x, const int32_t* starts, int num_groups, int in,
                int out, int num_threads) {
  RUN(product, w, y, x, starts, num_groups, in, out, num_threads);
}
// The caller has seen that the level is 1 at least.
template <class Weight>
void run_groups(const Weight& w, float* y, const float* x, const int32_t* starts, int num_groups, int in, int out,
                int num_threads) {
#ifdef HAS_VARIANTS
  if (level() >= 2) return avx512::product(w, y, x, starts, num_groups, in, out, num_threads);
  avx2::product(w, y, x, starts, num_groups, in, out, num_threads);
#endif
}
// The caller has seen that the level is 3 at least.
template <class Weight>
void run_groups(const Weight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in, int out,
                int num_threads) {
#ifdef HAS_BFLOAT16
  if (level() == 4) return amx::product(w, y, x, starts, num_groups, in, out, num_threads);
  avx512_bf16::product(w, y, x, starts, num_groups, in, out, num_threads);
#endif
}

template <class Weight, class T>
void run_product(const Weight& w, T* y, const T* x, int num_tokens, int in, int out, int num_threads) {
  const int32_t starts[2] = {0, num_tokens};
  run_groups(w, y, x, starts, 1, in, out, num_threads);
}

// What acts at the modules of which extents (modules, slots, replicas) and widths tell.
struct Work {
  std::vector<Segment> segments;
  std::vector<Module> modules;
  std::vector<Columns> columns;
  std::vector<int> places;
  long num_hidden = 0, num_sums = 0, num_multiplications = 0;

  void read(const int64_t* extents, int num_slots, int num_replicas, const int64_t* widths,
            int num_modules, const int32_t* tokens, const int32_t* slots, const int32_t* replicas,
            const int32_t* starts, int count, long num_tokens, int in, bool in_tiles, int num_threads) {
    segments.clear();
    segments.reserve(size_t(num_modules) * count);  // so that none moves
    modules.clear();
    modules.reserve(num_modules);
    columns.clear();
    places.assign(num_modules * num_tokens, NO_ADAPTER);
    num_hidden = num_sums = num_multiplications = 0;
    int column = 0;
    for (int module = 0; module < num_modules; module++) {
      const Extent* own = reinterpret_cast<const Extent*>(extents) + long(module) * num_slots * num_replicas;
      const Segment* first_segment = segments.data() + segments.size();
      int* own_places = places.data() + module * num_tokens;
      const int width = int(widths[module]);
      num_multiplications += num_tokens * width;
      for (int i = 0; i < count; i++) {
        const int first = starts[i], last = starts[i + 1];
        if (first == last) continue;  // padding of tables that stay in place
        const Extent* extent = own + (long(slots[first]) * num_replicas + replicas[first]);
        if (extent->rank == 0 && extent->gain < 0 && extent->bias < 0) continue;
        segments.push_back({first, last, int(extent->rank), column, width, extent, num_hidden, own_places});
        const int num_entries = last - first, rank = int(extent->rank);
        num_hidden += in_tiles ? long(tiles_of(num_entries)) * tiles_of(rank) : long(num_entries) * rank;
        num_multiplications += long(num_entries) * rank * (in + width);
      }
      const int own_count = int(segments.data() + segments.size() - first_segment);
      modules.push_back({column, width, own_count, first_segment, own_places});
      const long own_sums = find_places(modules.back(), tokens, own_places);
      num_sums = std::max(num_sums, own_sums);
      const bool are_few = num_tokens <= FEW_TOKENS;
      // A thread writes whole segments' outputs if there are enough, and reads long rows of B; unless a
      // token has several adapters, whose sum one thread makes.
      const int num_shares = SHARES_A_THREAD * std::abs(num_threads);
      if (!in_tiles && own_sums == 0 && own_count >= num_shares)
        for (const Segment* s = first_segment; s != first_segment + own_count; s++)
          split(modules.back(), s->last - s->first > LONG_ENTRIES ? MAX_COLUMNS : LONG_COLUMNS, s, s + 1);
      else {
        const int share = in_tiles ? 0 : (width / num_shares + 63) / 64 * 64;
        const int at_once = are_few ? std::clamp(share, MIN_COLUMNS, MAX_COLUMNS) : MAX_COLUMNS;
        split(modules.back(), at_once, first_segment, first_segment + own_count);
      }
      column += width;
    }
  }

  void split(const Module& m, int at_once, const Segment* first, const Segment* last) {
    const int end = m.column + m.width;
    for (int at = m.column; at < end; at += at_once) columns.push_back({&m, at, std::min(at + at_once, end), first, last});
  }

  int threads(int num_threads) const { return num_multiplications < MIN_PARALLEL_WORK ? 1 : num_threads; }

  static long find_places(const Module& m, const int32_t* tokens, int* places) {
    long count = 0;
    for (int i = 0; i < m.num_segments; i++)
      for (int entry = m.segments[i].first; entry < m.segments[i].last; entry++) {
        int& place = places[tokens[entry]];
        if (place == NO_ADAPTER) place = ONE_ADAPTER;
        else if (place == ONE_ADAPTER) place = int(count++);
      }
    return count;
  }
};

template <class T>
void apply_adapters(T* y, const T* base, const T* x, const T* bias, const float* memory,
                    const float* vectors, const int64_t* extents, int num_slots, int num_replicas,
                    const int64_t* widths, int num_modules, const int32_t* tokens,
                    const int32_t* slots, const int32_t* replicas, const float* weights,
                    const int32_t* starts, int num_segments, int num_tokens, int in, int out,
                    int num_threads) {
  static thread_local Scratch hidden;
  static thread_local Work work;
  work.read(extents, num_slots, num_replicas, widths, num_modules, tokens, slots, replicas, starts,
            num_segments, num_tokens, in, false, num_threads);
  run(Adapters<T, float>{y, base, x, bias, memory, vectors, weights, tokens, &work.modules, &work.columns,
                  hidden.get<float>(work.num_hidden), num_tokens, work.num_sums, in, out},
      work.threads(num_threads));
}

// An argument of a played call, from 8 bytes.
template <class T>
T argument(const int64_t& word) {
  if constexpr (std::is_pointer<T>::value) return reinterpret_cast<T>(word);
  else if constexpr (std::is_floating_point<T>::value) {
    double x;
    std::memcpy(&x, &word, sizeof x);
    return T(x);
  } else return T(word);
}
template <class... A, size_t... I>
void call(void (*function)(A...), const int64_t* words, std::index_sequence<I...>) {
  function(argument<A>(words[I])...);
}
template <class... A>
void call(void (*function)(A...), const int64_t* words) {
  call(function, words, std::index_sequence_for<A...>{});
}
using Played = void (*)(const int64_t* words);

}  // namespace

extern "C" {
int loramux_abi() { return 12; }  // raise it with every change of a signature below
int loramux_level() { return level(); }
void loramux_limit_level(int highest) { highest_level = highest; }
// How many threads torch takes for ops that this thread calls; returns the number before, 0 if
// torch has no such threads. torch's own function would change it for threads to come as well.
int loramux_set_torch_threads(int number) {
  if (!omp_get_max_threads || !omp_set_num_threads || number < 1) return 0;
  const int before = omp_get_max_threads();
  omp_set_num_threads(number);
  return before;
}
void loramux_recurrent_step(float* out, float* states, const int64_t* slots, const float* q,
                            const float* k, const float* v, const float* keep, const float* beta,
                            int num_rows, int num_heads, int num_keys, int num_values, int num_threads) {
  run(RecurrentStep{out, states, slots, q, k, v, keep, beta, num_rows, num_heads, num_keys, num_values},
      num_threads);
}
void loramux_dense_product(bf16* y, const bf16* x, const bf16* values, int num_tokens, int in, int out,
                           int num_threads) {
  run_product(SixteenBitWeight{values}, y, x, num_tokens, in, out, num_threads);
}
void loramux_grouped_dense_product(bf16* y, const bf16* x, const bf16* values, const int32_t* starts,
                                   int num_groups, int in, int out, int num_threads) {
  run_groups(SixteenBitWeight{values}, y, x, starts, num_groups, in, out, num_threads);
}
void loramux_quantize_four_bit(uint8_t* packed, float* absmax, const bf16* weights, const float* bounds,
                               const uint8_t* order, long num_weights, int num_threads) {
  run(FourBitCodes{packed, absmax, weights, bounds, order, num_weights}, num_threads);
}
void loramux_sort_pairs(const int64_t* chosen, int64_t* tokens, int64_t* experts, int64_t* places,
                        int32_t* starts, int num_pairs, int per_token, int num_experts, int) {
  sort_pairs(chosen, tokens, experts, places, starts, num_pairs, per_token, num_experts);
}
void loramux_find_segments(int32_t* pairs, int32_t* segments, float* pair_weights,
                           int32_t* starts, int64_t* own_slots, int64_t* own_replicas, int64_t* own_experts,
                           const int32_t* tokens, const int32_t* slots, const int32_t* replicas,
                           const float* weights, const int32_t* num_entries, const int64_t* places,
                           const int64_t* experts, int max_segments, int per_token, int num_experts, int) {
  find_segments(Entries{tokens, slots, replicas, weights, num_entries},
                PairEntries{pairs, segments, pair_weights, starts, own_slots, own_replicas, own_experts, max_segments},
                places, experts, per_token, num_experts);
}
void loramux_find_extents(int64_t* found, const int64_t* table, const int64_t* slots, const int64_t* replicas,
                          const int64_t* experts, int num_replicas, int count, int in, int out, int) {
  find_extents(reinterpret_cast<Extent*>(found), reinterpret_cast<const Extent*>(table), num_replicas, slots,
               replicas, experts, count, in, out);
}

// The caller has seen that the level is 3 at least.
void loramux_apply_half_adapters(
    bf16* y, const bf16* base, const bf16* x, const bf16* bias, const uint16_t* memory, const float* vectors,
    const int64_t* extents, int num_slots, int num_replicas, const int64_t* widths, int num_modules,
    const int32_t* tokens, const int32_t* slots, const int32_t* replicas, const float* weights,
    const int32_t* starts, int num_segments, int num_tokens, int in, int out, int num_threads) {
#ifdef HAS_BFLOAT16
  static thread_local Scratch hidden;
  static thread_local Work work;
  work.read(extents, num_slots, num_replicas, widths, num_modules, tokens, slots, replicas, starts,
            num_segments, num_tokens, in, level() == 4, num_threads);
  if (level() == 4)
    return amx::apply_adapters(
        HalfAdapters{y, base, x, bias, memory, vectors, weights, tokens, &work.modules, &work.columns,
                     hidden.get<bf16>(work.num_hidden * HIDDEN_TILE), num_tokens, work.num_sums, in, out},
        work.threads(num_threads));
  avx512_bf16::apply_adapters(
      Adapters<bf16, float16>{y, base, x, bias, reinterpret_cast<const float16*>(memory), vectors, weights, tokens,
                           &work.modules, &work.columns, hidden.get<float>(work.num_hidden), num_tokens,
                           work.num_sums, in, out},
      work.threads(num_threads));
#endif
}

// Both: the caller has seen that the level is 3 at least, and that in and out are multiples of 32.
void loramux_train_adapter(bf16* y, bf16* hidden, const bf16* x, const bf16* a, const bf16* b, int num_tokens,
                           int in, int out, int rank, int num_threads) {
#ifdef HAS_BFLOAT16
  const TrainedAdapter p{y, hidden, x, a, b, num_tokens, in, out, rank};
  if (level() == 4) return amx::train_adapter(p, p.threads(num_threads));
  avx512_bf16::train_adapter(p, p.threads(num_threads));
#endif
}
void loramux_adapter_gradients(bf16* dx, float* da, float* db, const bf16* grad, bf16* hidden, const bf16* x,
                               const bf16* a, const bf16* b, int num_tokens, int in, int out, int rank,
                               int num_threads) {
#ifdef HAS_BFLOAT16
  const TrainedAdapter p{nullptr, hidden, x, a, b, num_tokens, in, out, rank};
  const AdapterGradients g{dx, da, db, grad};
  if (level() == 4) return amx::adapter_gradients(p, g, p.threads(num_threads));
  avx512_bf16::adapter_gradients(p, g, p.threads(num_threads));
#endif
}

// A program is, for every call: loramux_played_…, the number of its arguments, and these.
void loramux_play(const int64_t* program, long num_calls) {
  for (long i = 0; i < num_calls; i++, program += 2 + program[1]) reinterpret_cast<Played>(program[0])(program + 2);
}
#define PLAYED(name) \
  void loramux_played_##name(const int64_t* words) { call(loramux_##name, words); }
PLAYED(dense_product)
PLAYED(apply_half_adapters)
PLAYED(grouped_dense_product)
PLAYED(sort_pairs)
PLAYED(quantize_four_bit)
PLAYED(find_segments)
PLAYED(find_extents)
PLAYED(recurrent_step)
PLAYED(train_adapter)
PLAYED(adapter_gradients)

#define FOR_DTYPE(T, SUFFIX)                                                                         \
  void loramux_four_bit_product_##SUFFIX(                                                            \
      T* y, const T* x, const uint8_t* packed, const float* absmax, const float* code,               \
      const uint8_t* nested_codes, const float* nested_code, const float* nested_offsets,            \
      int num_tokens, int in, int out, int num_threads) {                                            \
    run_product(FourBitWeight{packed, absmax, code, nested_codes, nested_code, nested_offsets}, y,   \
                x, num_tokens, in, out, num_threads);                                                \
  }                                                                                                  \
  void loramux_grouped_four_bit_product_##SUFFIX(                                                    \
      T* y, const T* x, const uint8_t* packed, const float* absmax, const float* code,               \
      const uint8_t* nested_codes, const float* nested_code, const float* nested_offsets,            \
      const int32_t* starts, int num_groups, int in, int out, int num_threads) {                     \
    run_groups(FourBitWeight{packed, absmax, code, nested_codes, nested_code, nested_offsets}, y, x, \
               starts, num_groups, in, out, num_threads);                                            \
  }                                                                                                  \
  void loramux_int8_product_##SUFFIX(T* y, const T* x, const int8_t* codes, const float* absmax,     \
                                     int num_tokens, int in, int out, int num_threads) {             \
    run_product(EightBitWeight{codes, absmax}, y, x, num_tokens, in, out, num_threads);              \
  }                                                                                                  \
  void loramux_grouped_int8_product_##SUFFIX(T* y, const T* x, const int8_t* codes,                  \
                                             const float* absmax, const int32_t* starts,             \
                                             int num_groups, int in, int out, int num_threads) {     \
    run_groups(EightBitWeight{codes, absmax}, y, x, starts, num_groups, in, out, num_threads);       \
  }                                                                                                  \
  void loramux_panel_product_##SUFFIX(float* y, const float* x, const T* panels, int num_tokens,     \
                                      int in, int out, int num_threads) {                            \
    run_product(PackedWeight<T>{panels}, y, x, num_tokens, in, out, num_threads);                    \
  }                                                                                                  \
  void loramux_apply_adapters_##SUFFIX(                                                              \
      T* y, const T* base, const T* x, const T* bias, const float* memory, const float* vectors,     \
      const int64_t* extents, int num_slots, int num_replicas, const int64_t* widths,                \
      int num_modules, const int32_t* tokens, const int32_t* slots, const int32_t* replicas,         \
      const float* weights, const int32_t* starts, int num_segments, int num_tokens, int in,         \
      int out, int num_threads) {                                                                    \
    apply_adapters<T>(y, base, x, bias, memory, vectors, extents, num_slots, num_replicas, widths,   \
                      num_modules, tokens, slots, replicas, weights, starts, num_segments,           \
                      num_tokens, in, out, num_threads);                                             \
  }                                                                                                  \
  void loramux_attention_##SUFFIX(                                                                   \
      T* out, const T* q, const T* keys, const T* values, const int32_t* rows,                       \
      const int32_t* positions, const int32_t* tables, const float* sinks, int num_tokens,           \
      int num_heads, int num_kv_heads, int head_dim, int block_size, int table_width, int window,    \
      float scale, float softcap, int num_threads) {                                                 \
    run(Attention<T>{out, q, keys, values, rows, positions, tables, sinks, num_tokens, num_heads,    \
                     num_kv_heads, head_dim, block_size, table_width, window, scale, softcap},       \
        num_threads);                                                                                \
  }                                                                                                  \
  void loramux_row_attention_##SUFFIX(T* out, const T* q, const T* k, const T* v,                    \
                                      const int32_t* segments, int num_segments, int num_heads,      \
                                      int num_kv_heads, int head_dim, float scale, int num_threads) {\
    run(RowAttention<T>{out, q, k, v, reinterpret_cast<const RowSegment*>(segments), num_segments,   \
                        num_heads, num_kv_heads, head_dim, scale},                                   \
        num_threads);                                                                                \
  }                                                                                                  \
  void loramux_row_attention_gradient_##SUFFIX(                                                      \
      T* dq, T* dk, T* dv, const T* grad, const T* q, const T* k, const T* v,                        \
      const int32_t* segments, int num_segments, int num_heads, int num_kv_heads, int head_dim,      \
      float scale, int num_threads) {                                                                \
    run(RowAttention<T>{nullptr, q, k, v, reinterpret_cast<const RowSegment*>(segments),             \
                        num_segments, num_heads, num_kv_heads, head_dim, scale},                     \
        RowGradient<T>{dq, dk, dv, grad}, num_threads);                                              \
  }                                                                                                  \
  void loramux_rms_norm_##SUFFIX(T* y, T* total, const T* x, const T* residual, const T* weight,     \
                                 const T* branch_weight, int num_rows, int width, int plus_one,      \
                                 float eps, int num_threads) {                                       \
    run(Norm<T>{y, total, x, residual, weight, branch_weight, num_rows, width, plus_one, eps},       \
        num_threads);                                                                                \
  }                                                                                                  \
  void loramux_rotate_##SUFFIX(                                                                      \
      T* q_out, T* k_out, T* v_out, const T* q, const T* k, const T* v, const T* cos, const T* sin,  \
      const T* q_weight, const T* k_weight, const int64_t* slots, long q_stride, long k_stride,      \
      long v_stride, int num_tokens, int num_heads, int num_kv_heads, int head_dim, int rotated,     \
      int plus_one, float eps, int num_threads) {                                                    \
    run(Rotation<T>{q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, slots, q_stride,     \
                    k_stride, v_stride, num_tokens, num_heads, num_kv_heads, head_dim, rotated,      \
                    plus_one, eps},                                                                  \
        num_threads);                                                                                \
  }                                                                                                  \
  void loramux_most_likely_##SUFFIX(int64_t* found, const T* x, int num_rows, int width,             \
                                    int num_threads) {                                               \
    run_most_likely(x, found, num_rows, width, num_threads);                                         \
  }                                                                                                  \
  void loramux_sum_pairs_##SUFFIX(T* y, const T* x, const int64_t* places, const float* weights,     \
                                  int num_rows, int per_token, int width, int num_threads) {         \
    run(PairSum<T>{y, x, places, weights, num_rows, per_token, width}, num_threads);                 \
  }                                                                                                  \
  void loramux_rms_norm_gradient_##SUFFIX(T* dx, const T* grad, const T* other, const T* x,          \
                                          const T* weight, int num_rows, int width, int plus_one,    \
                                          float eps, int num_threads) {                              \
    run(NormGradient<T>{dx, grad, other, x, weight, num_rows, width, plus_one, eps}, num_threads);   \
  }                                                                                                  \
  void loramux_rotate_gradient_##SUFFIX(                                                             \
      T* dq, T* dk, const T* grad_q, const T* grad_k, const T* q, const T* k, const T* cos,          \
      const T* sin, const T* q_weight, const T* k_weight, long grad_q_stride, long grad_k_stride,    \
      long q_stride, long k_stride, int num_tokens, int num_heads, int num_kv_heads, int head_dim,   \
      int rotated, int plus_one, float eps, int num_threads) {                                       \
    run(RotationGradient<T>{dq, dk, grad_q, grad_k, q, k, cos, sin, q_weight, k_weight,              \
                            grad_q_stride, grad_k_stride, q_stride, k_stride, num_tokens, num_heads, \
                            num_kv_heads, head_dim, rotated, plus_one, eps},                         \
        num_threads);                                                                                \
  }                                                                                                  \
  void loramux_gated_activation_gradient_##SUFFIX(                                                   \
      T* dgate, T* dup, const T* grad, const T* gate, const T* up, long gate_stride, long up_stride, \
      int num_rows, int width, int is_gelu, int num_threads) {                                       \
    run(GatedGradient<T>{dgate, dup, grad, gate, up, gate_stride, up_stride, num_rows, width, is_gelu},\
        num_threads);                                                                                \
  }                                                                                                  \
  void loramux_gated_activation_##SUFFIX(T* y, const T* gate, const T* up, long gate_stride,         \
                                         long up_stride, int num_rows, int width, int is_gelu,       \
                                         int num_threads) {                                          \
    run(Gated<T>{y, gate, up, gate_stride, up_stride, num_rows, width, is_gelu}, num_threads);       \
  }
FOR_DTYPE(float, f32)
FOR_DTYPE(bf16, bf16)

#define PLAYED_IN(SUFFIX)        \
  PLAYED(four_bit_product_##SUFFIX) \
  PLAYED(grouped_four_bit_product_##SUFFIX) \
  PLAYED(int8_product_##SUFFIX) \
  PLAYED(grouped_int8_product_##SUFFIX) \
  PLAYED(panel_product_##SUFFIX) \
  PLAYED(apply_adapters_##SUFFIX) \
  PLAYED(attention_##SUFFIX)      \
  PLAYED(row_attention_##SUFFIX)  \
  PLAYED(row_attention_gradient_##SUFFIX) \
  PLAYED(rms_norm_##SUFFIX)       \
  PLAYED(rotate_##SUFFIX)         \
  PLAYED(gated_activation_##SUFFIX) \
  PLAYED(rms_norm_gradient_##SUFFIX) \
  PLAYED(rotate_gradient_##SUFFIX) \
  PLAYED(gated_activation_gradient_##SUFFIX) \
  PLAYED(most_likely_##SUFFIX)   \
  PLAYED(sum_pairs_##SUFFIX)
PLAYED_IN(f32)
PLAYED_IN(bf16)
}
