// Window attention forward: one window and head at a time, by one block of threads; each warp has 16 queries.
#pragma once

#include "window_plan.cuh"

namespace imgcls {

constexpr int kForwardThreads = 128;  // four warps: 64 queries at a time; at most, for windows of more than 64

// CTAs of a multiprocessor that registers must leave room for.
template <typename T>
constexpr int kForwardBlocks = std::is_same_v<T, float> ? 2 : 3;

// Softmax over blocks of keys, for the lane's two rows (Milakov and Gimelshein 2018, algorithm 3).
struct RunningSoftmax {
  float top[2] = {-INFINITY, -INFINITY};  // highest logit so far
  float sum[2] = {0.0f, 0.0f};            // of exp2(logit - top)
  float fade[2];                          // factor for everything that was summed before the latest block

  // Logits become exp2(logit - top).
  __device__ __forceinline__ void absorb(Scores& s, int tiles) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = top[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n < tiles) high = fmaxf(high, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      }
      high = row_max(high);
      // Nothing but -inf so far: inf - inf would spoil the keys to come. If none comes, 0 / 0 makes the row NaN, as it
      // must.
      const float base = high == -INFINITY ? 0.0f : high;
      float here = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n < tiles) {
          s[n][half * 2] = power_of_two(s[n][half * 2] - base);
          s[n][half * 2 + 1] = power_of_two(s[n][half * 2 + 1] - base);
          here += s[n][half * 2] + s[n][half * 2 + 1];
        }
      }
      fade[half] = power_of_two(top[half] - base);
      sum[half] = sum[half] * fade[half] + row_sum(here);
      top[half] = high;
    }
  }
};

// The softmax denominators of a warp's rows, as natural logarithms.
__device__ __forceinline__ void store_lse(const Plan& p, const Window& window, const RunningSoftmax& rows, int begin) {
  if (p.lse == nullptr || lane_column() != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = begin + lane_row() + half * 8;
    if (token < p.tokens) {
      p.lse[(window.index(p) * p.heads + blockIdx.y) * p.tokens + token] =
          (rows.top[half] + log2f(rows.sum[half])) * kLn2;
    }
  }
}

template <typename T, int D>
__device__ __forceinline__ void store_out(const Plan& p, const Window& window, const int2* places,
                                          const RunningSoftmax& rows, const Results<D / kTile>& sums, int begin,
                                          T* stage) {
  store_tokens<T, D>(p, window, places, begin, sums, 1.0f / rows.sum[0], 1.0f / rows.sum[1], stage,
                     static_cast<T*>(p.out) + static_cast<int64_t>(blockIdx.y) * D, static_cast<int64_t>(p.heads) * D);
  store_lse(p, window, rows, begin);
}

// Up to 64 tokens -----------------------------------------------------------------------------------------------------

template <typename T, int D>
int64_t small_forward_bytes(int stages) {
  return kKeys * (sizeof(int2) + sizeof(int)) + stages * 3 * kKeys * row_stride<T>(D) * sizeof(T);
}

// Grid (any number, heads). The head's bias stays in registers while windows stream by; with two stages the next window
// is on its way while one is worked on.
template <typename T, int D>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<T>) small_forward(Plan p) {
  constexpr int matrix = kKeys * row_stride<T>(D);
  Shared shared;
  int2* places = shared.take<int2>(kKeys);
  int* regions = shared.take<int>(kKeys);
  T* stages = shared.take<T>(p.stages * 3 * matrix);

  const int begin = static_cast<int>(threadIdx.x) / kWarp * kRows;
  fill_places(p, places, kKeys);
  for (int m = 0; m < p.stages * 3; ++m) clear_rows<T, D>(stages + m * matrix, p.tokens, kKeys, Crew::block());
  Scores bias;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bias[n][e] = bias_at(p, begin + lane_row() + e / 2 * 8, n * kTile + lane_column() + e % 2);
    }
  }
  fill_missing(p, bias, -INFINITY, 0, kTiles);
  const float factor = head_factor(p) * kLog2E;
  __syncthreads();

  Window window(p, static_cast<int>(blockIdx.x));
  const Window step(p, static_cast<int>(gridDim.x));
  T* current = stages;
  const auto fetch = [&](const Window& which, T* to) {
    if (which.exists(p)) copy_tokens<T, D, kQ, kV>(p, which, places, 0, p.tokens, to, matrix, Crew::block());
    copies_commit();
  };
  fetch(window, current);
#pragma unroll 1
  while (window.exists(p)) {
    Window next = window;
    next.advance(p, step);
    T* other = p.stages == 1 || current != stages ? stages : stages + 3 * matrix;
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
      normalise_rows<T, D>(current, 2 * kKeys, nullptr, Crew::block());  // k follows q
      __syncthreads();
    }
    if (begin < p.tokens) {
      T* queries = current + begin * row_stride<T>(D);
      Scores s;
      dot_rows<T, D>(s, queries, current + kK * matrix);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * factor + bias[n][e];
      }
      if (masked) add_mask(p, s, regions, begin, 0, kTiles);
      RunningSoftmax rows;
      rows.absorb(s, kTiles);
      Results<D / kTile> sums;
      clear<D / kTile>(sums);
      weigh_rows<T, D>(sums, s, current + kV * matrix);
      __syncwarp();  // all lanes have read the queries, whose place the results take
      store_out<T, D>(p, window, places, rows, sums, begin, queries);
    }
    __syncthreads();
    if (p.stages == 1) fetch(next, other);
    window = next;
    current = other;
  }
}

// More tokens ---------------------------------------------------------------------------------------------------------

template <typename T, int D>
int64_t large_forward_bytes(int64_t padded_tokens, int warps) {
  return padded_tokens * (sizeof(int2) + sizeof(int)) +
         (2 * padded_tokens + warps * kRows) * row_stride<T>(D) * sizeof(T);
}

// Grid (any number, heads). All keys and values of the window lie in shared memory; each warp takes 16 queries after
// the other through them, 64 keys at a time.
template <typename T, int D>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<T>) large_forward(Plan p) {
  constexpr int stride = row_stride<T>(D);
  const int matrix = p.padded_tokens * stride;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Shared shared;
  int2* places = shared.take<int2>(p.padded_tokens);
  int* regions = shared.take<int>(p.padded_tokens);
  T* keys = shared.take<T>(matrix);
  T* values = shared.take<T>(matrix);
  T* queries = shared.take<T>(static_cast<int>(blockDim.x) / kWarp * kRows * stride) + warp * kRows * stride;

  fill_places(p, places, p.padded_tokens);
  clear_rows<T, D>(keys, p.tokens, p.padded_tokens, Crew::block());
  clear_rows<T, D>(values, p.tokens, p.padded_tokens, Crew::block());
  const float factor = head_factor(p) * kLog2E;
  __syncthreads();

  const Window step(p, static_cast<int>(gridDim.x));
#pragma unroll 1
  for (Window window(p, static_cast<int>(blockIdx.x)); window.exists(p); window.advance(p, step)) {
    copy_tokens<T, D, kK, kV>(p, window, places, 0, p.tokens, keys, matrix, Crew::block());
    copies_commit();
    const bool masked = window.masked(p);
    if (masked) fill_regions(p, window, places, regions, p.padded_tokens);
    copies_wait<0>();
    __syncthreads();
    if (p.head_scale != nullptr) {
      normalise_rows<T, D>(keys, p.tokens, nullptr, Crew::block());
      __syncthreads();
    }
#pragma unroll 1
    for (int begin = warp * kRows; begin < p.tokens; begin += static_cast<int>(blockDim.x) / kWarp * kRows) {
      const int end = begin + kRows < p.tokens ? begin + kRows : p.tokens;
      copy_tokens<T, D, kQ, kQ>(p, window, places, begin, end, queries, 0, Crew::warp());
      clear_rows<T, D>(queries, end - begin, kRows, Crew::warp());
      copies_commit();
      copies_wait<0>();
      __syncwarp();
      if (p.head_scale != nullptr) {
        normalise_rows<T, D>(queries, kRows, nullptr, Crew::warp());
        __syncwarp();
      }
      RunningSoftmax rows;
      Results<D / kTile> sums;
      clear<D / kTile>(sums);
#pragma unroll 1
      for (int first = 0; first < p.tokens; first += kKeys) {
        const int tiles = tiles_from(p, first);
        Scores s;
        dot_rows<T, D>(s, queries, keys + first * stride, tiles);
        scale_and_add_bias<false>(p, s, factor, begin, first, tiles);
        if (masked) add_mask(p, s, regions, begin, first, tiles);
        fill_missing(p, s, -INFINITY, first, tiles);
        rows.absorb(s, tiles);
#pragma unroll
        for (int n = 0; n < D / kTile; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[n][e] *= rows.fade[e / 2];
        }
        weigh_rows<T, D>(sums, s, values + first * stride, tiles);
      }
      __syncwarp();
      store_out<T, D>(p, window, places, rows, sums, begin, queries);
    }
    __syncthreads();
  }
}

}  // namespace imgcls
