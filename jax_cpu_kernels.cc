// Attention, and products of a few rows with large weights, on a CPU. float32.
//
// jax_cpu_library.py compiles this file; jax_cpu_kernels.py calls it, and says what the functions compute and why they
// are here. They are made of one product of matrices, `multiply`, whose sums stay in registers. Dimension key:
// jax_transformer.py; here also X = 3 * D, and W = T rounded up to whole vectors.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
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
static int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static float sum(Floats x) {
  float total = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) total += x[lane];
  return total;
}

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial (S. Moshier, Cephes, expf). NaN stays NaN.
static Floats exp_of_negative(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;  // 2e-38 instead of 0
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  for (const float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
  y = y * r * r + r + 1.0f;
  const Ints power_of_two = (n + 127) << 23;
  return y * reinterpret_cast<const Floats&>(power_of_two);
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

constexpr int64_t QUERIES = 32;  // of a head at a time: their scores stay in a core's cache

// What one head of one row needs to remember for a moment; each thread has its own.
static float* scratch(int64_t floats) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

// x (T, H) -> scale * x (H, W), zeros from T on
static void transpose(Rows x, float scale, int64_t T, int64_t H, Rows out) {
  for (int64_t h = 0; h < H; ++h) {
    for (int64_t t = 0; t < T; ++t) out.data[h * out.row + t] = scale * x.data[t * x.row + h];
    std::fill(out.data + h * out.row + T, out.data + (h + 1) * out.row, 0.0f);
  }
}

// scores of query t -> exp(score - largest), zeros after key t; returns the largest and the sum
static std::pair<float, float> exponentials(float* scores, int64_t t, int64_t keys) {
  std::fill(scores + t + 1, scores + keys, -std::numeric_limits<float>::infinity());
  Floats largest = load(scores);
  for (int64_t s = LANES; s < keys; s += LANES) largest = load(scores + s) > largest ? load(scores + s) : largest;
  float max = largest[0];
  for (int64_t lane = 1; lane < LANES; ++lane) max = std::max(max, largest[lane]);
  Floats sums = {};
  for (int64_t s = 0; s < keys; s += LANES) {
    store(scores + s, exp_of_negative(load(scores + s) - max));
    sums += load(scores + s);
  }
  std::fill(scores + t + 1, scores + keys, 0.0f);
  return {max, sum(sums)};
}

// Which weights are dropped: jax_transformer.dropout of all weights (G, T, S).
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

  // For LANES weights from this index on: 0, or 1 / (1 - rate).
  Floats factors(uint32_t index) const {
    if (threshold == 0) return Floats{} + 1.0f;
    Bits x = {};
    for (int64_t lane = 0; lane < LANES; ++lane) x[lane] = index + lane;
    const Floats scale = Floats{} + static_cast<float>(1 / (1 - threshold / 4294967296.0));
    return hash(hash(x ^ seeds[0]) ^ seeds[1]) >= threshold ? scale : Floats{};
  }
};

// qkv_RX, dropout_3 -> y_RD, logsum_GT
extern "C" XLA_FFI_Error* causal_attention(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  float *qkv = array(call->args.args[0]), *y = array(call->rets.rets[0]), *logsum = array(call->rets.rets[1]);
  const Dropout dropout(call->args.args[1]);
  const int64_t R = size(call->rets.rets[0], 0), D = size(call->rets.rets[0], 1);
  const int64_t G = size(call->rets.rets[1], 0), T = size(call->rets.rets[1], 1);
  const int64_t N = G * T / R, H = D / N, X = 3 * D, W = round_up(T);

  for_each(call, G, [=](int64_t g) {
    const Rows q = {qkv + g / N * T * X + g % N * H, X}, k = {q.data + D, X}, v = {k.data + D, X};
    const Rows out = {y + g / N * T * D + g % N * H, D};
    float* memory = scratch((H + QUERIES) * W);
    const Rows k_HS = {memory, W}, scores_QS = {memory + H * W, W};
    transpose(k, 1 / std::sqrt(float(H)), T, H, k_HS);
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), Q = end - start, keys = round_up(end);
      float sums[QUERIES];
      multiply({q.data + start * X, X, 1}, k_HS, scores_QS, Q, keys, H);
      for (int64_t t = start; t < end; ++t) {
        float* weights = scores_QS.data + (t - start) * W;
        const auto [largest, sum] = exponentials(weights, t, keys);
        logsum[g * T + t] = largest + std::log(sum);
        sums[t - start] = sum;
        for (int64_t s = 0; s < keys && dropout.threshold > 0; s += LANES)
          store(weights + s, load(weights + s) * dropout.factors((g * T + t) * T + s));
      }
      multiply({scores_QS.data, W, 1}, v, {out.data + start * D, D}, Q, H, end);
      for (int64_t t = start; t < end; ++t) {
        float* y_H = out.data + t * D;
        for (int64_t h = 0; h < H; h += LANES) store(y_H + h, load(y_H + h) * (1 / sums[t - start]));
      }
    }
  });
  return nullptr;
}

// qkv_RX, dropout_3, y_RD, logsum_GT, dy_RD -> dqkv_RX
extern "C" XLA_FFI_Error* causal_attention_gradient(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  float *qkv = array(call->args.args[0]), *y = array(call->args.args[2]), *logsum = array(call->args.args[3]);
  float *dy = array(call->args.args[4]), *dqkv = array(call->rets.rets[0]);
  const Dropout dropout(call->args.args[1]);
  const int64_t R = size(call->args.args[2], 0), D = size(call->args.args[2], 1);
  const int64_t G = size(call->args.args[3], 0), T = size(call->args.args[3], 1);
  const int64_t N = G * T / R, H = D / N, X = 3 * D, W = round_up(T);
  const float scale = 1 / std::sqrt(float(H));

  for_each(call, G, [=](int64_t g) {
    const int64_t at_qkv = g / N * T * X + g % N * H, at_y = g / N * T * D + g % N * H;
    const Rows q = {qkv + at_qkv, X}, k = {q.data + D, X}, v = {k.data + D, X}, out = {y + at_y, D};
    const Rows dq = {dqkv + at_qkv, X}, dk = {dq.data + D, X}, dv = {dk.data + D, X}, dout = {dy + at_y, D};
    float* memory = scratch(2 * (H + QUERIES) * W);
    const Rows k_HS = {memory, W}, v_HS = {memory + H * W, W};
    const Rows weights_QS = {memory + 2 * H * W, W}, dscores_QS = {weights_QS.data + QUERIES * W, W};
    transpose(k, scale, T, H, k_HS);
    transpose(v, 1, T, H, v_HS);
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), Q = end - start, keys = round_up(end);
      const Rows q_QH = {q.data + start * X, X}, dout_QH = {dout.data + start * D, D};
      multiply({q_QH.data, X, 1}, k_HS, weights_QS, Q, keys, H);       // scores, still
      multiply({dout_QH.data, D, 1}, v_HS, dscores_QS, Q, keys, H);  // dweights, still
      for (int64_t t = start; t < end; ++t) {
        float *weights = weights_QS.data + (t - start) * W, *dscores = dscores_QS.data + (t - start) * W;
        Floats products = {};
        for (int64_t h = 0; h < H; h += LANES) products += load(out.data + t * D + h) * load(dout.data + t * D + h);
        const float mean = sum(products);  // of dweights, weighted
        for (int64_t s = 0; s < keys; s += LANES) {
          const Floats x = load(weights + s) - logsum[g * T + t], factors = dropout.factors((g * T + t) * T + s);
          const Floats before_dropout = exp_of_negative(x > 0.0f ? Floats{} : x);
          store(weights + s, before_dropout * factors);
          store(dscores + s, before_dropout * (load(dscores + s) * factors - mean) * scale);
        }
        std::fill(weights + t + 1, weights + keys, 0.0f);
        std::fill(dscores + t + 1, dscores + keys, 0.0f);
      }
      multiply({dscores_QS.data, W, 1}, k, {dq.data + start * X, X}, Q, H, end);
      // Transposed, so that keys are its rows: those before this block have a sum already, its own do not.
      for (const auto& [from, to, add] : {std::tuple(int64_t{0}, start, true), std::tuple(start, end, false)}) {
        multiply({dscores_QS.data + from, 1, W}, q_QH, {dk.data + from * X, X}, to - from, H, Q, add);
        multiply({weights_QS.data + from, 1, W}, dout_QH, {dv.data + from * X, X}, to - from, H, Q, add);
      }
    }
  });
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
