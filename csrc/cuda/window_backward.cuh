// Window attention backward. With P the softmax (again from the logits and lse), g the gradient of out and a the factor
// of the logits (Dao et al. 2022, appendix B.4):
//
//   dV = P^T g;  dP = g V^T;  delta_i = sum_j P_ij dP_ij;  dS = P * (dP - delta);  dQ = a dS K;  dK = a dS^T Q
//   dbias = sum of dS over windows;  dhead_scale = sum of dS * (q . k) = sum of q . (dS K), with q and k of length 1
//
// No atomics: each CTA adds its own windows in a fixed order into its slice of `partial`, and sum_slices adds the
// slices in order, so that the same device gives the same bits.
#pragma once

#include "window_plan.cuh"

namespace imgcls {

constexpr int kSmallGradThreads = 128;  // four warps: 64 queries, then 64 keys
constexpr int kLargeGradThreads = 256;  // at most
constexpr int kSmallGradBlocks = 2;     // of a multiprocessor that registers must leave room for
constexpr int kSumThreads = 256;

// Logits of 16 queries from `begin` on become probabilities: 0 for queries that a window does not have.
__device__ __forceinline__ void recall_rows(const Plan& p, Scores& s, int begin, float upper_lse, float lower_lse,
                                            int tiles) {
  const bool partly = begin + kRows > p.tokens;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n < tiles) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = power_of_two(s[n][e] - (e < 2 ? upper_lse : lower_lse));
        if (partly && begin + lane_row() + e / 2 * 8 >= p.tokens) s[n][e] = 0.0f;
      }
    }
  }
}

// lse of a query in log2 units.
__device__ __forceinline__ float lse_at(const Plan& p, const Window& window, int token) {
  if (token >= p.tokens) return 0.0f;
  return load_float(p.lse + (window.index(p) * p.heads + blockIdx.y) * p.tokens + token) * kLog2E;
}

// One part of the gradient of qkv, of a warp's 16 tokens.
template <typename T, int D>
__device__ __forceinline__ void store_gradient(const Plan& p, const Window& window, const int2* places, int part,
                                               int begin, const Results<D / kTile>& rows, float factor, T* stage) {
  const int64_t channels = static_cast<int64_t>(p.heads) * D;
  store_tokens<T, D>(p, window, places, begin, rows, factor, factor, stage,
                     static_cast<T*>(p.dqkv) + part * channels + static_cast<int64_t>(blockIdx.y) * D, 3 * channels);
}

// This CTA's slice of `partial`.
__device__ __forceinline__ float* slice_of(const Plan& p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * p.heads + blockIdx.y;
  return p.partial + number * slice_floats(p.padded_tokens);
}

// The sum of `value` over the block, in a fixed order, into *to. `scratch` holds one float for each warp.
__device__ __forceinline__ void store_block_sum(float value, float* scratch, float* to) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  if (lane_id() == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += scratch[warp];
    *to = sum;
  }
}

// Up to 64 tokens -----------------------------------------------------------------------------------------------------

template <typename T, int D>
int64_t small_backward_bytes(int stages) {
  return kKeys * (sizeof(int2) + sizeof(int)) + 2 * kKeys * sizeof(float) + kKeys * kKeys * sizeof(float) +
         (2 * kKeys * row_stride<T>(kKeys) + (stages * 4 + 1) * kKeys * row_stride<T>(D)) * sizeof(T);
}

// The head's bias, each lane's elements where only this lane reads them: no bank conflicts and no barrier.
__device__ __forceinline__ float4* own_bias(float4* bias, int tile) {
  return bias + tile * kSmallGradThreads + threadIdx.x;
}

// Grid (any number, heads). A warp has 16 queries up to dQ, and 16 keys for dK and dV; P and dS change hands in shared
// memory. The gradient of the bias stays in registers over all windows of the CTA.
template <typename T, int D>
__global__ void __launch_bounds__(kSmallGradThreads, kSmallGradBlocks) small_backward(Plan p) {
  constexpr int stride = row_stride<T>(D);
  constexpr int weights_stride = row_stride<T>(kKeys);
  constexpr int matrix = kKeys * stride;
  Shared shared;
  int2* places = shared.take<int2>(kKeys);
  int* regions = shared.take<int>(kKeys);
  float* inverse = shared.take<float>(2 * kKeys);
  float4* bias = shared.take<float4>(kKeys * kKeys / 4);
  T* weights = shared.take<T>(kKeys * weights_stride);
  T* slopes = shared.take<T>(kKeys * weights_stride);
  T* stages = shared.take<T>(p.stages * 4 * matrix);
  const int begin = static_cast<int>(threadIdx.x) / kWarp * kRows;
  T* stage = shared.take<T>(matrix) + begin * stride;

  fill_places(p, places, kKeys);
  for (int m = 0; m < p.stages * 4; ++m) clear_rows<T, D>(stages + m * matrix, p.tokens, kKeys, Crew::block());
  Scores dbias;
  clear<kTiles>(dbias);
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) {
    const int i = begin + lane_row(), j = n * kTile + lane_column();
    *own_bias(bias, n) =
        make_float4(bias_at(p, i, j), bias_at(p, i, j + 1), bias_at(p, i + 8, j), bias_at(p, i + 8, j + 1));
  }
  float dfactor = 0.0f;
  const float factor = head_factor(p);
  const float factor2 = factor * kLog2E;
  __syncthreads();

  Window window(p, static_cast<int>(blockIdx.x));
  const Window step(p, static_cast<int>(gridDim.x));
  T* current = stages;
  const auto fetch = [&](const Window& which, T* to) {
    if (which.exists(p)) {
      copy_tokens<T, D, kQ, kGrad>(p, which, places, 0, p.tokens, to, matrix, Crew::block());
    }
    copies_commit();
  };
  fetch(window, current);
#pragma unroll 1
  while (window.exists(p)) {
    Window next = window;
    next.advance(p, step);
    T* other = p.stages == 1 || current != stages ? stages : stages + 4 * matrix;
    if (p.stages == 1) {
      copies_wait<0>();
    } else {
      fetch(next, other);
      copies_wait<1>();
    }
    const bool masked = window.masked(p);
    if (masked) fill_regions(p, window, places, regions, kKeys);
    __syncthreads();
    if (p.head_scale != nullptr) {
      normalise_rows<T, D>(current, 2 * kKeys, inverse, Crew::block());  // k follows q
      __syncthreads();
    }
    T* queries = current;
    T* keys = current + kK * matrix;
    T* values = current + kV * matrix;
    T* grads = current + kGrad * matrix;

    {
      Scores s, ds;
      dot_rows<T, D>(s, queries + begin * stride, keys);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 terms = *own_bias(bias, n);
        s[n][0] = s[n][0] * factor2 + terms.x;
        s[n][1] = s[n][1] * factor2 + terms.y;
        s[n][2] = s[n][2] * factor2 + terms.z;
        s[n][3] = s[n][3] * factor2 + terms.w;
      }
      if (masked) add_mask(p, s, regions, begin, 0, kTiles);
      recall_rows(p, s, begin, lse_at(p, window, begin + lane_row()), lse_at(p, window, begin + lane_row() + 8),
                  kTiles);
      fill_missing(p, s, 0.0f, 0, kTiles);
      dot_rows<T, D>(ds, grads + begin * stride, values);
      float delta[2] = {0.0f, 0.0f};
      T* weights_row = weights + (begin + lane_row()) * weights_stride + lane_column();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        delta[0] += s[n][0] * ds[n][0] + s[n][1] * ds[n][1];
        delta[1] += s[n][2] * ds[n][2] + s[n][3] * ds[n][3];
        store_pair(weights_row + n * kTile, s[n][0], s[n][1]);
        store_pair(weights_row + 8 * weights_stride + n * kTile, s[n][2], s[n][3]);
      }
      delta[0] = row_sum(delta[0]);
      delta[1] = row_sum(delta[1]);
      T* slopes_row = slopes + (begin + lane_row()) * weights_stride + lane_column();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          ds[n][e] = s[n][e] * (ds[n][e] - delta[e / 2]);
          dbias[n][e] += ds[n][e];
        }
        store_pair(slopes_row + n * kTile, ds[n][0], ds[n][1]);
        store_pair(slopes_row + 8 * weights_stride + n * kTile, ds[n][2], ds[n][3]);
      }
      Results<D / kTile> dq;
      clear<D / kTile>(dq);
      weigh_rows<T, D>(dq, ds, keys);
      if (p.head_scale != nullptr) dfactor += through_normalise<T, D>(dq, queries + begin * stride, inverse + begin);
      store_gradient<T, D>(p, window, places, kQ, begin, dq, factor, stage);
    }
    __syncthreads();
    Results<D / kTile> sums;
    clear<D / kTile>(sums);
    weigh_columns<T, D>(sums, weights + begin, grads);
    store_gradient<T, D>(p, window, places, kV, begin, sums, 1.0f, stage);
    clear<D / kTile>(sums);
    weigh_columns<T, D>(sums, slopes + begin, queries);
    if (p.head_scale != nullptr) through_normalise<T, D>(sums, keys + begin * stride, inverse + kKeys + begin);
    store_gradient<T, D>(p, window, places, kK, begin, sums, factor, stage);
    __syncthreads();
    if (p.stages == 1) fetch(next, other);
    window = next;
    current = other;
  }

  float* slice = slice_of(p);
  if (p.want_bias && begin < p.padded_tokens) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n * kTile < p.padded_tokens) {
        *reinterpret_cast<float4*>(slice + slice_offset(p.padded_tokens, begin / kRows, n, lane_id())) =
            make_float4(dbias[n][0], dbias[n][1], dbias[n][2], dbias[n][3]);
      }
    }
  }
  if (p.want_head_scale) store_block_sum(dfactor, inverse, slice + slice_floats(p.padded_tokens) - 4);
}

// More tokens ---------------------------------------------------------------------------------------------------------

template <typename T, int D>
int64_t large_backward_bytes(int64_t padded_tokens, int warps) {
  return padded_tokens * (sizeof(int2) + sizeof(int) + 4 * sizeof(float)) +
         (4 * padded_tokens + warps * kRows) * row_stride<T>(D) * sizeof(T);
}

// A window in shared memory, as large_backward holds it.
template <typename T>
struct LargeWindow {
  int2* places;
  int* regions;
  float *lse, *delta;  // of each query; lse in log2 units
  float* inverse;      // 1 / length of each query, then of each key
  T *queries, *keys, *values, *grads;
  T* stage;  // 16 rows of this warp
  bool masked;
};

// Probabilities and dP between 16 tokens from `row` on and a block of others from `column` on. ROWS_ARE_QUERIES: else
// the rows are keys, and everything is transposed.
template <typename T, int D, bool ROWS_ARE_QUERIES>
__device__ __forceinline__ void recall(const Plan& p, const LargeWindow<T>& w, float factor, int row, int column,
                                       int tiles, Scores& s, Scores& dp) {
  constexpr int stride = row_stride<T>(D);
  const T* left = ROWS_ARE_QUERIES ? w.queries : w.keys;
  const T* right = ROWS_ARE_QUERIES ? w.keys : w.queries;
  dot_rows<T, D>(s, left + row * stride, right + column * stride, tiles);
  scale_and_add_bias<!ROWS_ARE_QUERIES>(p, s, factor, row, column, tiles);
  if (w.masked) add_mask(p, s, w.regions, row, column, tiles);
  if (ROWS_ARE_QUERIES) {
    recall_rows(p, s, row, w.lse[row + lane_row()], w.lse[row + lane_row() + 8], tiles);
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n < tiles) {
        const float2 lse = *reinterpret_cast<const float2*>(w.lse + column + n * kTile + lane_column());
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = power_of_two(s[n][e] - (e % 2 == 0 ? lse.x : lse.y));
      }
    }
  }
  fill_missing(p, s, 0.0f, column, tiles);
  dot_rows<T, D>(dp, (ROWS_ARE_QUERIES ? w.grads : w.values) + row * stride,
                 (ROWS_ARE_QUERIES ? w.values : w.grads) + column * stride, tiles);
}

// delta of 16 queries, for all lanes and, in shared memory, for the other warps.
template <typename T, int D>
__device__ __forceinline__ void find_delta(const Plan& p, const LargeWindow<T>& w, float factor, int begin,
                                           float (&delta)[2]) {
  delta[0] = delta[1] = 0.0f;
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += kKeys) {
    const int tiles = tiles_from(p, first);
    Scores s, dp;
    recall<T, D, true>(p, w, factor, begin, first, tiles, s, dp);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n < tiles) {
        delta[0] += s[n][0] * dp[n][0] + s[n][1] * dp[n][1];
        delta[1] += s[n][2] * dp[n][2] + s[n][3] * dp[n][3];
      }
    }
  }
  delta[0] = row_sum(delta[0]);
  delta[1] = row_sum(delta[1]);
  if (lane_column() == 0) {
    w.delta[begin + lane_row()] = delta[0];
    w.delta[begin + lane_row() + 8] = delta[1];
  }
}

// Adds a block of results to the sums of the windows before; tiles lie one after the other.
__device__ __forceinline__ void add_to_slice(float* sums, const Scores& ds, int tiles, bool first_window) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n < tiles) {
      float4* sum = reinterpret_cast<float4*>(sums + n * 4 * kWarp);
      const float4 old = first_window ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *sum;
      *sum = make_float4(old.x + ds[n][0], old.y + ds[n][1], old.z + ds[n][2], old.w + ds[n][3]);
    }
  }
}

// dQ of 16 queries, their share of the bias gradient, and of dhead_scale as the return value.
template <typename T, int D>
__device__ __forceinline__ float query_rows(const Plan& p, const Window& window, const LargeWindow<T>& w, float factor,
                                            int begin, float* slice, bool first_window) {
  float delta[2];
  find_delta<T, D>(p, w, factor * kLog2E, begin, delta);
  float dfactor = 0.0f;
  Results<D / kTile> dq;
  clear<D / kTile>(dq);
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += kKeys) {
    const int tiles = tiles_from(p, first);
    Scores s, ds;
    recall<T, D, true>(p, w, factor * kLog2E, begin, first, tiles, s, ds);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n < tiles) {
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[n][e] = s[n][e] * (ds[n][e] - delta[e / 2]);
      }
    }
    weigh_rows<T, D>(dq, ds, w.keys + first * row_stride<T>(D), tiles);
    if (p.want_bias) {
      float* sums = slice + slice_offset(p.padded_tokens, begin / kRows, first / kTile, lane_id());
      add_to_slice(sums, ds, tiles, first_window);
    }
  }
  if (p.head_scale != nullptr) {
    dfactor = through_normalise<T, D>(dq, w.queries + begin * row_stride<T>(D), w.inverse + begin);
  }
  store_gradient<T, D>(p, window, w.places, kQ, begin, dq, factor, w.stage);
  return dfactor;
}

// dV and dK of 16 keys.
template <typename T, int D>
__device__ __forceinline__ void key_rows(const Plan& p, const Window& window, const LargeWindow<T>& w, float factor,
                                         int begin) {
  Results<D / kTile> dv, dk;
  clear<D / kTile>(dv);
  clear<D / kTile>(dk);
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += kKeys) {
    const int tiles = tiles_from(p, first);
    Scores s, ds;
    recall<T, D, false>(p, w, factor * kLog2E, begin, first, tiles, s, ds);
    weigh_rows<T, D>(dv, s, w.grads + first * row_stride<T>(D), tiles);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n < tiles) {
        const float2 delta = *reinterpret_cast<const float2*>(w.delta + first + n * kTile + lane_column());
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[n][e] = s[n][e] * (ds[n][e] - (e % 2 == 0 ? delta.x : delta.y));
      }
    }
    weigh_rows<T, D>(dk, ds, w.queries + first * row_stride<T>(D), tiles);
  }
  store_gradient<T, D>(p, window, w.places, kV, begin, dv, 1.0f, w.stage);
  if (p.head_scale != nullptr) {
    through_normalise<T, D>(dk, w.keys + begin * row_stride<T>(D), w.inverse + p.padded_tokens + begin);
  }
  store_gradient<T, D>(p, window, w.places, kK, begin, dk, factor, w.stage);
}

// Grid (any number, heads). The whole window lies in shared memory. Each warp first takes queries, 16 at a time, then
// keys; the logits are found again for the keys, which costs products but spares the warps an exchange of N x N
// numbers.
template <typename T, int D>
__global__ void __launch_bounds__(kLargeGradThreads) large_backward(Plan p) {
  constexpr int stride = row_stride<T>(D);
  const int matrix = p.padded_tokens * stride;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int jump = static_cast<int>(blockDim.x) / kWarp * kRows;
  Shared shared;
  LargeWindow<T> w;
  w.places = shared.take<int2>(p.padded_tokens);
  w.regions = shared.take<int>(p.padded_tokens);
  w.lse = shared.take<float>(p.padded_tokens);
  w.delta = shared.take<float>(p.padded_tokens);
  w.inverse = shared.take<float>(2 * p.padded_tokens);
  w.queries = shared.take<T>(4 * matrix);
  w.keys = w.queries + kK * matrix;
  w.values = w.queries + kV * matrix;
  w.grads = w.queries + kGrad * matrix;
  w.stage = shared.take<T>(jump * stride) + warp * kRows * stride;

  fill_places(p, w.places, p.padded_tokens);
  for (int m = kQ; m <= kGrad; ++m) {
    clear_rows<T, D>(w.queries + m * matrix, p.tokens, p.padded_tokens, Crew::block());
  }
  const float factor = head_factor(p);
  float* slice = slice_of(p);
  float dfactor = 0.0f;
  bool first_window = true;
  __syncthreads();

  const Window step(p, static_cast<int>(gridDim.x));
#pragma unroll 1
  for (Window window(p, static_cast<int>(blockIdx.x)); window.exists(p); window.advance(p, step)) {
    copy_tokens<T, D, kQ, kGrad>(p, window, w.places, 0, p.tokens, w.queries, matrix, Crew::block());
    copies_commit();
    w.masked = window.masked(p);
    if (w.masked) fill_regions(p, window, w.places, w.regions, p.padded_tokens);
#pragma unroll 1
    for (int t = static_cast<int>(threadIdx.x); t < p.padded_tokens; t += static_cast<int>(blockDim.x)) {
      w.lse[t] = lse_at(p, window, t);
    }
    copies_wait<0>();
    __syncthreads();
    if (p.head_scale != nullptr) {
      normalise_rows<T, D>(w.queries, 2 * p.padded_tokens, w.inverse, Crew::block());  // keys follow
      __syncthreads();
    }
#pragma unroll 1
    for (int begin = warp * kRows; begin < p.tokens; begin += jump) {
      dfactor += query_rows<T, D>(p, window, w, factor, begin, slice, first_window);
    }
    first_window = false;
    __syncthreads();
#pragma unroll 1
    for (int begin = warp * kRows; begin < p.tokens; begin += jump) key_rows<T, D>(p, window, w, factor, begin);
    __syncthreads();
  }
  if (p.want_head_scale) store_block_sum(dfactor, w.delta, slice + slice_floats(p.padded_tokens) - 4);
}

// The slices of all CTAs ---------------------------------------------------------------------------------------------

// Grid (any number, heads). Adds the slices in order: one thread for each element.
__global__ void __launch_bounds__(kSumThreads) sum_slices(const float* partial, int slices, int heads, int tokens,
                                                          int padded_tokens, float* dbias, float* dhead_scale) {
  const int head = static_cast<int>(blockIdx.y);
  const int64_t size = slice_floats(padded_tokens);
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element > size - 4) return;  // the element at size - 4 is that of head_scale
  const bool of_head_scale = element == size - 4;
  if (of_head_scale ? dhead_scale == nullptr : dbias == nullptr) return;
  const int lane = static_cast<int>(element / 4) % kWarp;
  const int tile = static_cast<int>(element / (4 * kWarp));
  const int part = static_cast<int>(element % 4);
  const int i = tile / (padded_tokens / kTile) * kRows + lane / 4 + part / 2 * 8;
  const int j = tile % (padded_tokens / kTile) * kTile + lane % 4 * 2 + part % 2;
  if (!of_head_scale && (i >= tokens || j >= tokens)) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int slice = 0; slice < slices; ++slice) {
    sum += load_float(partial + (static_cast<int64_t>(slice) * heads + head) * size + element);
  }
  if (of_head_scale) {
    dhead_scale[head] = sum;
  } else {
    dbias[(static_cast<int64_t>(head) * tokens + i) * tokens + j] = sum;
  }
}

}  // namespace imgcls
