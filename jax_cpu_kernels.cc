// Attention, GELU, and products of a few rows with large weights, on a CPU. float32.
//
// jax_cpu_library.py compiles this file; jax_cpu_kernels.py calls it, and says what the functions compute and why they
// are here. The products are made of one, `multiply`, whose sums stay in registers. Dimension key: jax_transformer.py;
// here also X = 3 * D, and Q queries.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include "xla/ffi/api/c_api.h"

// ---------------------------------------------------------------------------------------------------------------------
// vectors, as wide as the processor has them

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 8;  // of a tile: ROWS x 2 vectors of sums, and what they are made of
#elif defined(__AVX__)
constexpr int64_t LANES = 8, ROWS = 4;
#else
constexpr int64_t LANES = 4, ROWS = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
static void store(float* x, Floats values) { *reinterpret_cast<Floats*>(x) = values; }

// exp(x) for x <= 0, to 2 units in the last place, 0 below -87: 2^n times a polynomial (S. Moshier, Cephes, expf). NaN
// stays NaN.
static Floats exp_of_negative(Floats x) {
  const auto vanishes = x < -87.0f;  // it would be 2e-38
  x = vanishes ? Floats{} : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  for (const float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
  y = y * r * r + r + 1.0f;
  const Ints power_of_two = (n + 127) << 23;
  return vanishes ? Floats{} : y * reinterpret_cast<const Floats&>(power_of_two);
}

// ---------------------------------------------------------------------------------------------------------------------
// C (M, N) = A (M, K) B (K, N), or += with `add`; N a multiple of LANES

struct Strided {  // A, or its transpose: element (m, k) is data[m * row + k * column]
  const float* data;
  int64_t row, column;
};

struct Rows {  // B, C: a row is contiguous, the next one begins `row` further on
  float* data;
  int64_t row;
};

template <int64_t M, int64_t VECTORS>
static void multiply_tile(Strided a, Rows b, Rows c, int64_t K, bool add) {
  Floats sums[M][VECTORS];
  for (int64_t m = 0; m < M; ++m)
    for (int64_t v = 0; v < VECTORS; ++v) sums[m][v] = add ? load(c.data + m * c.row + v * LANES) : Floats{};
  for (int64_t k = 0; k < K; ++k) {
    Floats b_k[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) b_k[v] = load(b.data + k * b.row + v * LANES);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t v = 0; v < VECTORS; ++v) sums[m][v] += a.data[m * a.row + k * a.column] * b_k[v];
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t v = 0; v < VECTORS; ++v) store(c.data + m * c.row + v * LANES, sums[m][v]);
}

// The rows in tiles of M, what is left in smaller ones.
template <int64_t M = ROWS>
static void multiply(Strided a, Rows b, Rows c, int64_t rows, int64_t N, int64_t K, bool add = false) {
  for (; rows >= M; rows -= M, a.data += M * a.row, c.data += M * c.row) {
    int64_t n = 0;
    for (; n + 2 * LANES <= N; n += 2 * LANES) multiply_tile<M, 2>(a, {b.data + n, b.row}, {c.data + n, c.row}, K, add);
    if (n < N) multiply_tile<M, 1>(a, {b.data + n, b.row}, {c.data + n, c.row}, K, add);
  }
  if constexpr (M > 1) {
    if (rows > 0) multiply<M / 2>(a, b, c, rows, N, K, add);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// XLA's side: arrays, and the threads it lends

static float* array(void* buffer) { return static_cast<float*>(static_cast<XLA_FFI_Buffer*>(buffer)->data); }
static int64_t size(void* buffer, int axis) { return static_cast<XLA_FFI_Buffer*>(buffer)->dims[axis]; }
static int64_t size(void* buffer) {
  int64_t elements = 1;
  for (int axis = 0; axis < static_cast<XLA_FFI_Buffer*>(buffer)->rank; ++axis) elements *= size(buffer, axis);
  return elements;
}

// Whether XLA only asks which version of its interface this is made for, as it does once for every function.
static bool tells_version(XLA_FFI_CallFrame* call) {
  const auto* extension = call->extension_start;  // its type has another name in each version of JAX
  if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = reinterpret_cast<const XLA_FFI_Metadata_Extension*>(extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return true;
}

static bool succeeded(XLA_FFI_CallFrame* call, XLA_FFI_Error* error) {
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  call->api->XLA_FFI_Error_Destroy(&args);
  return false;
}

static int64_t threads_of(XLA_FFI_CallFrame* call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, call->ctx, &threads};
  return succeeded(call, call->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? threads : 1;
}

// run(i) for each i below count, in this thread and in those of XLA's that are free. A thread that comes late finds
// nothing to do and is not waited for: it may be busy with another such function, which waits for this one.
template <typename Run>
static void for_each(XLA_FFI_CallFrame* call, int64_t count, Run run) {
  struct Counts {
    std::atomic<int64_t> begun{0}, done{0};
  };
  const auto counts = std::make_shared<Counts>();
  auto work = [counts, count, run] {
    for (int64_t i; (i = counts->begun++) < count; ++counts->done) run(i);
  };
  using Work = decltype(work);
  XLA_FFI_Task* const task = [](void* data) { (*std::unique_ptr<Work>(static_cast<Work*>(data)))(); };

  for (int64_t helper = 1; helper < std::min(threads_of(call), count); ++helper) {
    auto copy = std::make_unique<Work>(work);
    XLA_FFI_ThreadPool_Schedule_Args args = {
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, call->ctx, task, copy.get()};
    if (!succeeded(call, call->api->XLA_FFI_ThreadPool_Schedule(&args))) break;
    copy.release();  // it is the task's now
  }
  work();
  while (counts->done < count) std::this_thread::yield();
}

// ---------------------------------------------------------------------------------------------------------------------
// attention, as it is computed without ever holding all scores (Dao et al. 2022, "FlashAttention")

constexpr int64_t QUERIES = 2 * LANES;  // of a head at a time, a column each: what is summed up for one stays in a lane

// What one head of one row needs to remember for a moment; each thread has its own.
static float* scratch(int64_t floats) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

// Rows [start, end) of x (T, H), times scale, as columns (H, QUERIES); zeros in those that are not there
static void transpose(Rows x, float scale, int64_t start, int64_t end, int64_t H, Rows columns) {
  for (int64_t h = 0; h < H; ++h) {
    float* out = columns.data + h * columns.row;
    for (int64_t t = start; t < end; ++t) out[t - start] = scale * x.data[t * x.row + h];
    std::fill(out + (end - start), out + QUERIES, 0.0f);
  }
}

// Which weights are dropped: jax_ops.dropout of all weights (G, T, S).
struct Dropout {
  uint32_t seeds[2], threshold;  // dropped where the hash of the index is below: rate * 2^32

  explicit Dropout(void* buffer) {
    const uint32_t* data = reinterpret_cast<const uint32_t*>(array(buffer));
    seeds[0] = data[0], seeds[1] = data[1], threshold = data[2];
  }

  static Bits hash(Bits x) {  // "lowbias32"
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  // The second seed of each of LANES queries, the first of which is row `row` of all weights: jax_ops.seed_of_rows.
  Bits seeds_of_rows(int64_t row, int64_t T) const {
    Bits high_words = {};
    for (int64_t lane = 0; lane < LANES; ++lane) high_words[lane] = (row + lane) * T >> 32;
    return seeds[1] ^ hash(high_words);
  }

  // Of these queries, which lie T apart, the weight for one key, that of the first at `index`: 0, or 1 / (1 - rate).
  Floats factors(uint32_t index, uint32_t T, Bits row_seeds) const {
    if (threshold == 0) return Floats{} + 1.0f;
    Bits x = {};
    for (int64_t lane = 0; lane < LANES; ++lane) x[lane] = index + lane * T;
    const Floats scale = Floats{} + static_cast<float>(1 / (1 - threshold / 4294967296.0));
    return hash(hash(x ^ seeds[0]) ^ row_seeds) >= threshold ? scale : Floats{};
  }
};

// Of scores (S, QUERIES), hide each of the keys [start, end) from the queries before it; the first query is `start`.
static void hide(Rows scores, int64_t start, int64_t end) {
  for (int64_t s = start; s < end; ++s)
    std::fill_n(scores.data + s * scores.row, s - start, -std::numeric_limits<float>::infinity());
}

// qkv_RX, dropout_3 -> y_RD, logsum_GT
extern "C" XLA_FFI_Error* causal_attention(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  float *qkv = array(call->args.args[0]), *y = array(call->rets.rets[0]), *logsum = array(call->rets.rets[1]);
  const Dropout dropout(call->args.args[1]);
  const int64_t R = size(call->rets.rets[0], 0), D = size(call->rets.rets[0], 1);
  const int64_t G = size(call->rets.rets[1], 0), T = size(call->rets.rets[1], 1);
  const int64_t N = G * T / R, H = D / N, X = 3 * D;

  for_each(call, G, [=](int64_t g) {
    const Rows q = {qkv + g / N * T * X + g % N * H, X}, k = {q.data + D, X}, v = {k.data + D, X};
    const Rows out = {y + g / N * T * D + g % N * H, D};
    const Rows q_HQ = {scratch((H + T) * QUERIES), QUERIES}, scores_SQ = {q_HQ.data + H * QUERIES, QUERIES};
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), Q = end - start;
      transpose(q, 1 / std::sqrt(float(H)), start, end, H, q_HQ);
      multiply({k.data, X, 1}, q_HQ, scores_SQ, end, QUERIES, H);
      hide(scores_SQ, start, end);
      float sums[QUERIES];
      for (int64_t lanes = 0; lanes < Q; lanes += LANES) {
        const int64_t row = g * T + start + lanes;
        const Bits seeds = dropout.seeds_of_rows(row, T);
        float* scores = scores_SQ.data + lanes;
        Floats largest = load(scores), sum = {};
        for (int64_t s = 1; s < end; ++s) {
          const Floats score = load(scores + s * QUERIES);
          largest = score > largest ? score : largest;
        }
        for (int64_t s = 0; s < end; ++s) {
          const Floats weight = exp_of_negative(load(scores + s * QUERIES) - largest);
          sum += weight;
          store(scores + s * QUERIES, weight * dropout.factors(row * T + s, T, seeds));
        }
        store(sums + lanes, sum);
        for (int64_t lane = 0; lane < std::min(LANES, Q - lanes); ++lane)
          logsum[row + lane] = largest[lane] + std::log(sum[lane]);
      }
      multiply({scores_SQ.data, 1, QUERIES}, v, {out.data + start * D, D}, Q, H, end);
      for (int64_t t = start; t < end; ++t) {
        float* y_H = out.data + t * D;
        for (int64_t h = 0; h < H; h += LANES) store(y_H + h, load(y_H + h) * (1 / sums[t - start]));
      }
    }
  });
  return nullptr;
}

// qkv_RX, dropout_3, logsum_GT, dy_RD -> dqkv_RX
extern "C" XLA_FFI_Error* causal_attention_gradient(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  float *qkv = array(call->args.args[0]), *logsum = array(call->args.args[2]);
  float *dy = array(call->args.args[3]), *dqkv = array(call->rets.rets[0]);
  const Dropout dropout(call->args.args[1]);
  const int64_t R = size(call->args.args[3], 0), D = size(call->args.args[3], 1);
  const int64_t G = size(call->args.args[2], 0), T = size(call->args.args[2], 1);
  const int64_t N = G * T / R, H = D / N, X = 3 * D;
  const float scale = 1 / std::sqrt(float(H));

  for_each(call, G, [=](int64_t g) {
    const int64_t at_qkv = g / N * T * X + g % N * H;
    const Rows q = {qkv + at_qkv, X}, k = {q.data + D, X}, v = {k.data + D, X};
    const Rows dq = {dqkv + at_qkv, X}, dk = {dq.data + D, X}, dv = {dk.data + D, X};
    const Rows dout = {dy + g / N * T * D + g % N * H, D};
    float* memory = scratch(2 * (H + T) * QUERIES);
    const Rows q_HQ = {memory, QUERIES}, dout_HQ = {memory + H * QUERIES, QUERIES};
    const Rows weights_SQ = {dout_HQ.data + H * QUERIES, QUERIES};
    const Rows dscores_SQ = {weights_SQ.data + T * QUERIES, QUERIES};
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), Q = end - start;
      transpose(q, scale, start, end, H, q_HQ);
      transpose(dout, 1, start, end, H, dout_HQ);
      multiply({k.data, X, 1}, q_HQ, weights_SQ, end, QUERIES, H);     // scores, still
      multiply({v.data, X, 1}, dout_HQ, dscores_SQ, end, QUERIES, H);  // dweights, still
      hide(weights_SQ, start, end);
      for (int64_t lanes = 0; lanes < Q; lanes += LANES) {
        const int64_t row = g * T + start + lanes;
        const Bits seeds = dropout.seeds_of_rows(row, T);
        float *weights = weights_SQ.data + lanes, *dscores = dscores_SQ.data + lanes;
        float logs[LANES] = {};
        std::copy_n(logsum + row, std::min(LANES, Q - lanes), logs);
        Floats mean = {};  // of dweights, weighted
        for (int64_t s = 0; s < end; ++s) {
          const Floats x = load(weights + s * QUERIES) - load(logs);
          const Floats weight = exp_of_negative(x > 0.0f ? Floats{} : x);
          const Floats factors = dropout.factors(row * T + s, T, seeds);
          mean += weight * (load(dscores + s * QUERIES) * factors);
          store(weights + s * QUERIES, weight);
        }
        for (int64_t s = 0; s < end; ++s) {
          const Floats weight = load(weights + s * QUERIES);
          const Floats factors = dropout.factors(row * T + s, T, seeds);
          store(dscores + s * QUERIES, weight * (load(dscores + s * QUERIES) * factors - mean) * scale);
          store(weights + s * QUERIES, weight * factors);
        }
      }
      multiply({dscores_SQ.data, 1, QUERIES}, k, {dq.data + start * X, X}, Q, H, end);
      // Keys before this block have a sum already, its own do not.
      for (const auto& [from, to, add] : {std::tuple(int64_t{0}, start, true), std::tuple(start, end, false)}) {
        const Strided dscores = {dscores_SQ.data + from * QUERIES, QUERIES, 1};
        const Strided weights = {weights_SQ.data + from * QUERIES, QUERIES, 1};
        multiply(dscores, {q.data + start * X, X}, {dk.data + from * X, X}, to - from, H, Q, add);
        multiply(weights, {dout.data + start * D, D}, {dv.data + from * X, X}, to - from, H, Q, add);
      }
    }
  });
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// GELU in its two forms, and its slope, in one pass and from one exponential

struct Gelu {
  Floats y, slope;
};

// x Phi(x), Phi the normal distribution. For u >= 0, Phi(-u) = exp(-u^2 / 2) P(1 / (1 + 0.3 u)), with a polynomial P of
// degree 8, fitted by linear programming: its largest error is 2e-7 of Phi(-u).
static Gelu gelu_erf_of(Floats x) {
  const Floats u = x < 0.0f ? -x : x, bell = exp_of_negative(-0.5f * u * u), t = 1.0f / (0.3f * u + 1.0f);
  Floats p = Floats{} + 3.61151621e-2f;
  for (const float c : {-1.59022316e-1f, 2.09457532e-1f, -5.65093793e-2f, 1.30039081e-1f, 9.94709507e-2f,
                        1.20824166e-1f, 1.19624749e-1f})
    p = p * t + c;
  const Floats tail = bell * p * t, phi = x < 0.0f ? tail : 1.0f - tail;
  return {x * phi, phi + x * bell * 0.398942280f};
}

// Its approximation x / (1 + exp(-2 z)) = x (1 + tanh z) / 2, where 2 z = sqrt(8 / pi) (x + 0.044715 x^3)
static Gelu gelu_tanh_of(Floats x) {
  const Floats two_z = x * (1.595769122f + 0.0713548163f * x * x);
  const Floats tail = exp_of_negative(x < 0.0f ? two_z : -two_z), share = 1.0f / (1.0f + tail);
  const Floats phi = x < 0.0f ? tail * share : share;
  return {x * phi, phi + x * tail * share * share * (1.595769122f + 0.2140644489f * x * x)};
}

// x -> y, or y and slope
template <Gelu (*gelu_of)(Floats)>
static void by_element(XLA_FFI_CallFrame* call) {
  const float* x = array(call->args.args[0]);
  float* y = array(call->rets.rets[0]);
  float* slope = call->rets.size > 1 ? array(call->rets.rets[1]) : nullptr;
  const int64_t count = size(call->args.args[0]);
  constexpr int64_t AT_ONCE = 8192;

  for_each(call, (count + AT_ONCE - 1) / AT_ONCE, [=](int64_t block) {
    const int64_t end = std::min((block + 1) * AT_ONCE, count);
    for (int64_t i = block * AT_ONCE; i < end; i += LANES) {
      if (i + LANES <= end) {
        const Gelu gelu = gelu_of(load(x + i));
        store(y + i, gelu.y);
        if (slope) store(slope + i, gelu.slope);
      } else {  // the last vector is not full
        Floats values = {};
        for (int64_t lane = 0; lane < end - i; ++lane) values[lane] = x[i + lane];
        const Gelu gelu = gelu_of(values);
        for (int64_t lane = 0; lane < end - i; ++lane) {
          y[i + lane] = gelu.y[lane];
          if (slope) slope[i + lane] = gelu.slope[lane];
        }
      }
    }
  });
}

extern "C" XLA_FFI_Error* gelu_erf(XLA_FFI_CallFrame* call) {
  if (!tells_version(call)) by_element<gelu_erf_of>(call);
  return nullptr;
}

extern "C" XLA_FFI_Error* gelu_tanh(XLA_FFI_CallFrame* call) {
  if (!tells_version(call)) by_element<gelu_tanh_of>(call);
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// x_RK, kernel_PKC -> y_RM: the C columns of a panel are read from memory once, in one piece, for all rows

extern "C" XLA_FFI_Error* product_with_panels(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  float *x = array(call->args.args[0]), *kernel = array(call->args.args[1]), *y = array(call->rets.rets[0]);
  const int64_t R = size(call->args.args[0], 0), K = size(call->args.args[0], 1);
  const int64_t P = size(call->args.args[1], 0), C = size(call->args.args[1], 2), M = size(call->rets.rets[0], 1);

  for_each(call, P, [=](int64_t p) {
    const Rows panel = {kernel + p * K * C, C};
    const int64_t columns = std::min(C, M - p * C);
    if (columns == C) return multiply({x, K, 1}, panel, {y + p * C, M}, R, C, K);
    float* memory = scratch(R * C);  // the last panel may be wider than what is left of y
    multiply({x, K, 1}, panel, {memory, C}, R, C, K);
    for (int64_t r = 0; r < R; ++r) std::copy_n(memory + r * C, columns, y + r * M + p * C);
  });
  return nullptr;
}
