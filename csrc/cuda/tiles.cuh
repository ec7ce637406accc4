// Products of small matrices by one warp. The matrices lie in shared memory, row after row; results stay in registers,
// spread over the lanes as tensor cores leave them. float16 and bfloat16 are multiplied by tensor cores with float32
// sums, float32 by ordinary instructions in the same layout, without tf32.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace imgcls {

constexpr int kRows = 16;  // rows of a warp's results
constexpr int kTile = 8;   // columns of a tile
constexpr int kTiles = 8;  // tiles of a block of keys
constexpr int kKeys = 64;  // keys of a block: kTile * kTiles

template <int TILES>
using Results = float[TILES][4];
using Scores = Results<kTiles>;

// What a lane holds of each tile of 16 x 8 results (PTX ISA, mma.m16n8k16): elements 0 and 1 are (row, column) and
// (row, column + 1), elements 2 and 3 the same columns of row + 8.
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int lane_row() { return lane_id() / 4; }
__device__ __forceinline__ int lane_column() { return lane_id() % 4 * 2; }

// Elements from one row of `width` to the next: one piece more, so that eight rows start in eight different groups of
// banks and matrices load without conflict.
template <typename T>
__host__ __device__ constexpr int row_stride(int width) {
  return width + kPiece<T>;
}

template <int TILES>
__device__ __forceinline__ void clear(Results<TILES>& c) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

// Over the four lanes that hold one row.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// c[n] = a (16 x D) * rows 8 n .. 8 n + 7 of b (D wide), transposed, for the first `tiles` tiles; the others keep what
// they hold.
template <typename T, int D>
__device__ __forceinline__ void dot_rows(Scores& c, const T* a, const T* b, int tiles = kTiles) {
  constexpr int stride = row_stride<T>(D);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n < tiles) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
  }
  if constexpr (std::is_same_v<T, float>) {
    const float* upper = a + lane_row() * stride;
    const float* lower = upper + 8 * stride;
#pragma unroll 1
    for (int d = 0; d < D; d += kPiece<T>) {
      const float4 x = *reinterpret_cast<const float4*>(upper + d);
      const float4 y = *reinterpret_cast<const float4*>(lower + d);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n < tiles) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float4 z = *reinterpret_cast<const float4*>(b + (n * kTile + lane_column() + e) * stride + d);
            c[n][e] += x.x * z.x + x.y * z.y + x.z * z.z + x.w * z.w;
            c[n][e + 2] += y.x * z.x + y.y * z.y + y.z * z.z + y.w * z.w;
          }
        }
      }
    }
  } else {
    const int lane = lane_id();
#pragma unroll
    for (int d = 0; d < D; d += 32) {
      uint32_t left[2][4];
      load_matrices(left[0], a + lane % 16 * stride + d + lane / 16 * 8);
      load_matrices(left[1], a + lane % 16 * stride + d + 16 + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n < tiles) {
          uint32_t right[4];
          load_matrices(right, b + (n * kTile + lane % 8) * stride + d + lane / 8 * 8);
          multiply_add<T>(c[n], left[0], right[0], right[1]);
          multiply_add<T>(c[n], left[1], right[2], right[3]);
        }
      }
    }
  }
}

// The lane's two rows of c (16 x D) += upper and lower times a row of D.
template <int D>
__device__ __forceinline__ void add_weighted_row(Results<D / kTile>& c, float upper, float lower, const float* row) {
#pragma unroll
  for (int m = 0; m < D / kTile; ++m) {
    const float2 z = *reinterpret_cast<const float2*>(row + m * kTile + lane_column());
    c[m][0] += upper * z.x;
    c[m][1] += upper * z.y;
    c[m][2] += lower * z.x;
    c[m][3] += lower * z.y;
  }
}

// c (16 x D) += weights (16 x 8 tiles, in registers, rounded to T) * b (8 tiles x D). `tiles` is even.
template <typename T, int D>
__device__ __forceinline__ void weigh_rows(Results<D / kTile>& c, const Scores& weights, const T* b,
                                           int tiles = kTiles) {
  constexpr int stride = row_stride<T>(D);
  const int lane = lane_id();
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n < tiles) {
#pragma unroll 1
        for (int pair = 0; pair < kTile / 2; ++pair) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int holder = lane / 4 * 4 + pair;
            const float x = __shfl_sync(kAllLanes, weights[n][e], holder);
            const float y = __shfl_sync(kAllLanes, weights[n][e + 2], holder);
            add_weighted_row<D>(c, x, y, b + (n * kTile + pair * 2 + e) * stride);
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) {
      if (2 * k < tiles) {
        const float (&even)[4] = weights[2 * k];
        const float (&odd)[4] = weights[2 * k + 1];
        const uint32_t left[4] = {pack<T>(even[0], even[1]), pack<T>(even[2], even[3]), pack<T>(odd[0], odd[1]),
                                  pack<T>(odd[2], odd[3])};
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
          uint32_t right[4];
          load_matrices_transposed(right, b + (k * 16 + lane % 16) * stride + m * 16 + lane / 16 * 8);
          multiply_add<T>(c[2 * m], left, right[0], right[1]);
          multiply_add<T>(c[2 * m + 1], left, right[2], right[3]);
        }
      }
    }
  }
}

// c (16 x D) += 16 columns of `weights` (64 rows, kKeys wide, in shared memory, from the first of the 16), transposed,
// * b (64 x D).
template <typename T, int D>
__device__ __forceinline__ void weigh_columns(Results<D / kTile>& c, const T* weights, const T* b) {
  constexpr int stride = row_stride<T>(D);
  constexpr int weights_stride = row_stride<T>(kKeys);
  const int lane = lane_id();
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll 4
    for (int j = 0; j < kKeys; ++j) {
      const float x = weights[j * weights_stride + lane_row()];
      const float y = weights[j * weights_stride + lane_row() + 8];
      add_weighted_row<D>(c, x, y, b + j * stride);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t left[4];
      load_matrices_transposed(left, weights + (k * 16 + lane % 8 + lane / 16 * 8) * weights_stride + lane / 8 % 2 * 8);
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
        uint32_t right[4];
        load_matrices_transposed(right, b + (k * 16 + lane % 16) * stride + m * 16 + lane / 16 * 8);
        multiply_add<T>(c[2 * m], left, right[0], right[1]);
        multiply_add<T>(c[2 * m + 1], left, right[2], right[3]);
      }
    }
  }
}

}  // namespace imgcls
