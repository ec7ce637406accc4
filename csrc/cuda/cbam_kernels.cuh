// Kernels of CBAM. Each is one pass over the images of a group that together fit into half of the second-level cache,
// so that all passes but the first read from there. No atomics: sums have a fixed order.
//
// A piece is what a thread loads at once: 16 bytes of one position's channels, or one element where those do not
// divide.
#pragma once

#include <cstring>

#include "../cbam.h"
#include "common.cuh"

namespace imgcls {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTilePixels = 32;  // positions that a block of the pixel-wise kernels takes
constexpr int kConvSums = 2;     // of `a` and `b`, behind the sums for the weights of the convolution

// What every kernel gets: parameters, the group's first image, and scratch of the whole batch.
struct CbamGroup {
  Cbam p;
  CbamGrad g;     // of the backward kernels; g.forward is p
  int64_t first;  // image of blockIdx.y == 0
  int64_t pixels;
  int32_t slices;      // blocks that share the positions of an image where a kernel sums over them
  bool maps, apply;    // CbamSteps
  const void* behind;  // gradient behind the ReLU, as x
  float* partial;      // (batch, slices, 2, channels)
  float* spread;   // (batch, 3, pixels): gate_p; gradient of y from the mean and, for each channel with it, the maximum
  float* dgate;    // (batch, channels): gradient before the sigmoid of gate_c
  float* dpooled;  // (batch, 2, channels): gradient of x from the mean and, for each position with it, the maximum
  float* dsums;    // (batch, 2, hidden): gradient by hidden_sums
  float* conv_sums;  // (batch, 2 * kernel * kernel + kConvSums)
};

// Through memcpy: the compiler may assume that a float and a uint4 are never the same memory.
template <typename T, int V>
__device__ __forceinline__ void load_piece(const T* from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = to_float(from[0]);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    T elements[V];
    memcpy(elements, &raw, sizeof raw);
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = to_float(elements[k]);
  }
}

template <typename T, int V>
__device__ __forceinline__ void store_piece(T* to, const float (&from)[V]) {
  if constexpr (V == 1) {
    to[0] = from_float<T>(from[0]);
  } else {
    T elements[V];
#pragma unroll
    for (int k = 0; k < V; ++k) elements[k] = from_float<T>(from[k]);
    uint4 raw;
    memcpy(&raw, elements, sizeof raw);
    *reinterpret_cast<uint4*>(to) = raw;
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

__device__ __forceinline__ float warp_most(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays one

__device__ __forceinline__ int64_t image_of(const CbamGroup& q) { return q.first + blockIdx.y; }

// One position's channels, in the element type.
template <typename T>
__device__ __forceinline__ const T* position(const void* base, const CbamGroup& q, int64_t image, int64_t pixel) {
  return static_cast<const T*>(base) + (image * q.pixels + pixel) * q.p.channels;
}
template <typename T>
__device__ __forceinline__ T* position(void* base, const CbamGroup& q, int64_t image, int64_t pixel) {
  return static_cast<T*>(base) + (image * q.pixels + pixel) * q.p.channels;
}

__device__ __forceinline__ float* channels_of(const CbamGroup& q, int64_t image, int which) {
  return q.p.channel + (3 * image + which) * q.p.channels;
}
__device__ __forceinline__ float* map_of(const CbamGroup& q, int64_t image, int which) {
  return q.p.spatial + (3 * image + which) * q.pixels;
}
__device__ __forceinline__ float* spread_of(const CbamGroup& q, int64_t image, int which) {
  return q.spread + (3 * image + which) * q.pixels;
}
__device__ __forceinline__ float* partial_of(const CbamGroup& q, int64_t image, int slice, int which) {
  return q.partial + ((image * q.slices + slice) * 2 + which) * q.p.channels;
}

__device__ __forceinline__ float gate_at(const CbamGroup& q, float logit) {
  return q.p.affine == nullptr ? sigmoid(logit) : sigmoid(q.p.affine[0] * logit + q.p.affine[1]);
}

// The sum of weight[tap] * map[neighbour] around a position, by all lanes of a warp. `turned`: the transposed
// convolution.
__device__ __forceinline__ float around(const CbamGroup& q, const float* map, const float* weight, int64_t pixel,
                                        bool turned) {
  const int size = q.p.kernel, pad = size / 2, taps = size * size;
  const int64_t y = pixel / q.p.width, x = pixel % q.p.width;
  float total = 0.0f;
  for (int tap = static_cast<int>(threadIdx.x) % kWarp; tap < taps; tap += kWarp) {
    const int64_t v = y + tap / size - pad, u = x + tap % size - pad;
    if (v < 0 || v >= q.p.height || u < 0 || u >= q.p.width) continue;
    total += weight[turned ? taps - 1 - tap : tap] * map[v * q.p.width + u];
  }
  return warp_sum(total);
}

// Sums over the positions of a slice: threads side by side take pieces side by side, the rest of a block further
// positions. each(pixel, channel, first, second) adds to V sums and V others; `join` puts the second ones of two
// threads together. The result is in partial_of.
template <int V, typename Each, typename Join>
__device__ __forceinline__ void sum_slice(const CbamGroup& q, float start, Each each, Join join) {
  const int pieces = q.p.channels / V, thread = static_cast<int>(threadIdx.x);
  int across = kThreads;
  while (across / 2 >= pieces) across /= 2;
  const int rows = kThreads / across, row = thread / across;
  const int64_t begin = q.pixels * blockIdx.x / q.slices, end = q.pixels * (blockIdx.x + 1) / q.slices;
  float* shared = reinterpret_cast<float*>(shared_memory());  // (2 V, kThreads)
  for (int base = 0; base < pieces; base += across) {
    const int piece = base + thread % across;
    float first[V], second[V];
    for (int k = 0; k < V; ++k) first[k] = 0.0f, second[k] = start;
    if (piece < pieces)
      for (int64_t pixel = begin + row; pixel < end; pixel += rows) each(pixel, piece * V, first, second);
    for (int k = 0; k < V; ++k) {
      shared[k * kThreads + thread] = first[k];
      shared[(V + k) * kThreads + thread] = second[k];
    }
    __syncthreads();
    if (row == 0 && piece < pieces) {
      for (int k = 0; k < V; ++k) {
        for (int other = 1; other < rows; ++other) {
          first[k] += shared[k * kThreads + other * across + thread];
          second[k] = join(second[k], shared[(V + k) * kThreads + other * across + thread]);
        }
        partial_of(q, image_of(q), static_cast<int>(blockIdx.x), 0)[piece * V + k] = first[k];
        partial_of(q, image_of(q), static_cast<int>(blockIdx.x), 1)[piece * V + k] = second[k];
      }
    }
    __syncthreads();
  }
}

// Forward ----------------------------------------------------------------------------------------------------------

// Blocks: (slices, images).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_slices(CbamGroup q) {
  const int64_t image = image_of(q);
  sum_slice<V>(
      q, -INFINITY,
      [&](int64_t pixel, int c, float (&total)[V], float (&most)[V]) {
        float x[V];
        load_piece<T, V>(position<T>(q.p.x, q, image, pixel) + c, x);
        for (int k = 0; k < V; ++k) total[k] += x[k], most[k] = fmaxf(most[k], x[k]);
      },
      [](float a, float b) { return fmaxf(a, b); });
}

// Blocks: (1, images). Mean, maximum and gate of every channel; `hidden` floats of shared memory.
template <int kNone = 0>
__global__ void __launch_bounds__(kThreads) make_gates(CbamGroup q) {
  const int64_t image = image_of(q);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, channels = q.p.channels, hidden = q.p.hidden;
  float *mean = channels_of(q, image, 0), *most = channels_of(q, image, 1), *gate = channels_of(q, image, 2);
  for (int c = thread; c < channels; c += kThreads) {
    float total = 0.0f, high = -INFINITY;
    for (int slice = 0; slice < q.slices; ++slice) {
      total += partial_of(q, image, slice, 0)[c];
      high = fmaxf(high, partial_of(q, image, slice, 1)[c]);
    }
    mean[c] = total / static_cast<float>(q.pixels);
    most[c] = high;
  }
  __syncthreads();
  float* both = reinterpret_cast<float*>(shared_memory());  // (hidden)
  float* sums = q.p.hidden_sums + 2 * image * hidden;
  for (int r = thread / kWarp; r < hidden; r += kWarps) {
    float of_mean = 0.0f, of_most = 0.0f;
    for (int c = lane; c < channels; c += kWarp) {
      const float w = q.p.w1[static_cast<int64_t>(r) * channels + c];
      of_mean += w * mean[c];
      of_most += w * most[c];
    }
    of_mean = warp_sum(of_mean);
    of_most = warp_sum(of_most);
    if (lane == 0) {
      sums[r] = of_mean;
      sums[hidden + r] = of_most;
      both[r] = relu(of_mean) + relu(of_most);
    }
  }
  __syncthreads();
  for (int c = thread; c < channels; c += kThreads) {
    float total = 0.0f;
    for (int r = 0; r < hidden; ++r) total += both[r] * q.p.w2[static_cast<int64_t>(c) * hidden + r];
    gate[c] = sigmoid(total);
  }
}

// Blocks: (tiles of positions, images); a warp takes one position after the other.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) make_stats(CbamGroup q) {
  const int64_t image = image_of(q);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, channels = q.p.channels;
  const float* gate = channels_of(q, image, 2);
  for (int k = static_cast<int>(threadIdx.x) / kWarp; k < kTilePixels; k += kWarps) {
    const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kTilePixels + k;
    if (pixel >= q.pixels) break;
    float total = 0.0f, most = -INFINITY;
    for (int c = lane * V; c < channels; c += kWarp * V) {
      float x[V];
      load_piece<T, V>(position<T>(q.p.x, q, image, pixel) + c, x);
      for (int e = 0; e < V; ++e) {
        const float y = x[e] * gate[c + e];
        total += y;
        most = fmaxf(most, y);
      }
    }
    total = warp_sum(total);
    most = warp_most(most);
    if (lane == 0) {
      map_of(q, image, 0)[pixel] = total / static_cast<float>(channels);
      map_of(q, image, 1)[pixel] = most;
    }
  }
}

// Blocks: (tiles of positions, images). The logits of a tile where they are asked for, then the result.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) finish(CbamGroup q) {
  const int64_t image = image_of(q), begin = static_cast<int64_t>(blockIdx.x) * kTilePixels;
  const int thread = static_cast<int>(threadIdx.x), channels = q.p.channels, taps = q.p.kernel * q.p.kernel;
  const int tile = static_cast<int>(q.pixels - begin < kTilePixels ? q.pixels - begin : kTilePixels);
  float* gates = reinterpret_cast<float*>(shared_memory());  // (kTilePixels)
  float* logits = map_of(q, image, 2);
  for (int k = thread / kWarp; k < tile; k += kWarps) {
    float logit;
    if (q.maps) {
      logit = around(q, map_of(q, image, 0), q.p.conv, begin + k, false) +
              around(q, map_of(q, image, 1), q.p.conv + taps, begin + k, false);
      if (thread % kWarp == 0) logits[begin + k] = logit;
    } else {
      logit = logits[begin + k];
    }
    if (thread % kWarp == 0) gates[k] = gate_at(q, logit);
  }
  if (!q.apply) return;
  __syncthreads();
  const float* gate = channels_of(q, image, 2);
  const int pieces = channels / V;
  for (int64_t item = thread; item < static_cast<int64_t>(tile) * pieces; item += kThreads) {
    const int k = static_cast<int>(item / pieces), c = static_cast<int>(item % pieces) * V;
    float x[V], other[V];
    load_piece<T, V>(position<T>(q.p.x, q, image, begin + k) + c, x);
    if (q.p.residual != nullptr) load_piece<T, V>(position<T>(q.p.residual, q, image, begin + k) + c, other);
    for (int e = 0; e < V; ++e) {
      x[e] = x[e] * gate[c + e] * gates[k];
      if (q.p.residual != nullptr) x[e] += other[e];
      if (q.p.relu) x[e] = relu(x[e]);
    }
    store_piece<T, V>(position<T>(q.p.out, q, image, begin + k) + c, x);
  }
}

// Backward ---------------------------------------------------------------------------------------------------------

// Blocks: (tiles of positions, images); a warp takes one position after the other.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) grad_apply(CbamGroup q) {
  const int64_t image = image_of(q);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, channels = q.p.channels;
  const float* gate = channels_of(q, image, 2);
  for (int k = static_cast<int>(threadIdx.x) / kWarp; k < kTilePixels; k += kWarps) {
    const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kTilePixels + k;
    if (pixel >= q.pixels) break;
    const float most = map_of(q, image, 1)[pixel];
    float dot = 0.0f, ties = 0.0f;
    for (int c = lane * V; c < channels; c += kWarp * V) {
      float x[V], dout[V], out[V];
      load_piece<T, V>(position<T>(q.p.x, q, image, pixel) + c, x);
      load_piece<T, V>(position<T>(q.g.grad, q, image, pixel) + c, dout);
      if (q.p.relu) {
        load_piece<T, V>(position<T>(q.p.out, q, image, pixel) + c, out);
        for (int e = 0; e < V; ++e) dout[e] = out[e] <= 0.0f ? 0.0f : dout[e];
        store_piece<T, V>(position<T>(q.g.masked, q, image, pixel) + c, dout);
      }
      for (int e = 0; e < V; ++e) {
        const float y = x[e] * gate[c + e];
        dot += dout[e] * y;
        ties += y == most ? 1.0f : 0.0f;
      }
    }
    dot = warp_sum(dot);
    ties = warp_sum(ties);
    if (lane == 0) {
      const float g = gate_at(q, map_of(q, image, 2)[pixel]);
      q.g.dlogits[image * q.pixels + pixel] = dot * g * (1.0f - g);
      q.g.ties[image * q.pixels + pixel] = ties;
    }
  }
}

// The gradient by logits is dlogits times this.
__device__ __forceinline__ float logit_factor(const CbamGroup& q) {
  return q.apply && q.p.affine != nullptr ? q.p.affine[0] : 1.0f;
}

// Blocks: (tiles of positions, images).
template <int kNone = 0>
__global__ void __launch_bounds__(kThreads) make_spread(CbamGroup q) {
  const int64_t image = image_of(q);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, taps = q.p.kernel * q.p.kernel;
  const float *dlogits = q.g.dlogits + image * q.pixels, *ties = q.g.ties + image * q.pixels;
  const float factor = logit_factor(q);
  for (int k = static_cast<int>(threadIdx.x) / kWarp; k < kTilePixels; k += kWarps) {
    const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kTilePixels + k;
    if (pixel >= q.pixels) break;
    const float flat = around(q, dlogits, q.p.conv, pixel, true) * factor;
    const float peak = around(q, dlogits, q.p.conv + taps, pixel, true) * factor;
    if (lane == 0) {
      spread_of(q, image, 0)[pixel] = gate_at(q, map_of(q, image, 2)[pixel]);
      spread_of(q, image, 1)[pixel] = flat / static_cast<float>(q.p.channels);
      spread_of(q, image, 2)[pixel] = peak / ties[pixel];
    }
  }
}

// What is known of one position, and from it the gradient of y.
struct CbamPosition {
  float gate, flat, peak, most;

  __device__ __forceinline__ CbamPosition(const CbamGroup& q, int64_t image, int64_t pixel)
      : gate(spread_of(q, image, 0)[pixel]),
        flat(spread_of(q, image, 1)[pixel]),
        peak(spread_of(q, image, 2)[pixel]),
        most(map_of(q, image, 1)[pixel]) {}
  __device__ __forceinline__ float grad_of_y(float dout, float y) const {
    return dout * gate + flat + (y == most ? peak : 0.0f);
  }
};

// Blocks: (slices, images).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) grad_gate(CbamGroup q) {
  const int64_t image = image_of(q);
  const float *gate = channels_of(q, image, 2), *most = channels_of(q, image, 1);
  sum_slice<V>(
      q, 0.0f,
      [&](int64_t pixel, int c, float (&total)[V], float (&ties)[V]) {
        const CbamPosition here(q, image, pixel);
        float x[V], dout[V];
        load_piece<T, V>(position<T>(q.p.x, q, image, pixel) + c, x);
        load_piece<T, V>(position<T>(q.behind, q, image, pixel) + c, dout);
        for (int k = 0; k < V; ++k) {
          total[k] += here.grad_of_y(dout[k], x[k] * gate[c + k]) * x[k];
          ties[k] += x[k] == most[c + k] ? 1.0f : 0.0f;
        }
      },
      [](float a, float b) { return a + b; });
}

// Blocks: (1, images). From the gradient of gate_c to the ones of mean and maximum; kThreads floats of shared memory.
template <int kNone = 0>
__global__ void __launch_bounds__(kThreads) grad_gates(CbamGroup q) {
  const int64_t image = image_of(q);
  const int thread = static_cast<int>(threadIdx.x), channels = q.p.channels, hidden = q.p.hidden;
  const float* gate = channels_of(q, image, 2);
  float *dgate = q.dgate + image * channels, *dsums = q.dsums + 2 * image * hidden;
  float *flat = q.dpooled + 2 * image * channels, *peak = flat + channels;
  for (int c = thread; c < channels; c += kThreads) {
    float total = 0.0f, ties = 0.0f;
    for (int slice = 0; slice < q.slices; ++slice) {
      total += partial_of(q, image, slice, 0)[c];
      ties += partial_of(q, image, slice, 1)[c];
    }
    dgate[c] = total * gate[c] * (1.0f - gate[c]);
    peak[c] = ties;
  }
  __syncthreads();
  int across = kThreads;
  while (across / 2 >= hidden) across /= 2;
  const int rows = kThreads / across, row = thread / across;
  float* shared = reinterpret_cast<float*>(shared_memory());  // (kThreads)
  for (int base = 0; base < hidden; base += across) {
    const int r = base + thread % across;
    float total = 0.0f;
    if (r < hidden)
      for (int c = row; c < channels; c += rows) total += q.p.w2[static_cast<int64_t>(c) * hidden + r] * dgate[c];
    shared[thread] = total;
    __syncthreads();
    if (row == 0 && r < hidden) {
      for (int other = 1; other < rows; ++other) total += shared[other * across + thread];
      const float* sums = q.p.hidden_sums + 2 * image * hidden;
      dsums[r] = sums[r] <= 0.0f ? 0.0f : total;
      dsums[hidden + r] = sums[hidden + r] <= 0.0f ? 0.0f : total;
    }
    __syncthreads();
  }
  for (int c = thread; c < channels; c += kThreads) {
    float of_mean = 0.0f, of_most = 0.0f;
    for (int r = 0; r < hidden; ++r) {
      const float w = q.p.w1[static_cast<int64_t>(r) * channels + c];
      of_mean += w * dsums[r];
      of_most += w * dsums[hidden + r];
    }
    flat[c] = of_mean / static_cast<float>(q.pixels);
    peak[c] = of_most / peak[c];
  }
}

// Blocks: (tiles of positions, images).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) grad_input(CbamGroup q) {
  const int64_t image = image_of(q), begin = static_cast<int64_t>(blockIdx.x) * kTilePixels;
  const int channels = q.p.channels, pieces = channels / V;
  const int tile = static_cast<int>(q.pixels - begin < kTilePixels ? q.pixels - begin : kTilePixels);
  const float *gate = channels_of(q, image, 2), *most = channels_of(q, image, 1);
  const float *flat = q.dpooled + 2 * image * channels, *peak = flat + channels;
  for (int64_t item = threadIdx.x; item < static_cast<int64_t>(tile) * pieces; item += kThreads) {
    const int64_t pixel = begin + item / pieces;
    const int c = static_cast<int>(item % pieces) * V;
    const CbamPosition here(q, image, pixel);
    float x[V], dout[V];
    load_piece<T, V>(position<T>(q.p.x, q, image, pixel) + c, x);
    load_piece<T, V>(position<T>(q.behind, q, image, pixel) + c, dout);
    for (int e = 0; e < V; ++e) {
      const float dy = here.grad_of_y(dout[e], x[e] * gate[c + e]);
      x[e] = dy * gate[c + e] + flat[c + e] + (x[e] == most[c + e] ? peak[c + e] : 0.0f);
    }
    store_piece<T, V>(position<T>(q.g.dx, q, image, pixel) + c, x);
  }
}

// Blocks: (weights of the convolution and kConvSums more, images). One sum over the positions of one image each.
template <int kNone = 0>
__global__ void __launch_bounds__(kThreads) grad_conv(CbamGroup q) {
  const int64_t image = image_of(q);
  const int size = q.p.kernel, pad = size / 2, taps = size * size, sum = static_cast<int>(blockIdx.x);
  const float* dlogits = q.g.dlogits + image * q.pixels;
  float total = 0.0f;
  for (int64_t pixel = threadIdx.x; pixel < q.pixels; pixel += kThreads) {
    if (sum >= 2 * taps) {  // of a: dlogits * logits; of b: dlogits
      total += dlogits[pixel] * (sum == 2 * taps ? map_of(q, image, 2)[pixel] : 1.0f);
      continue;
    }
    const int tap = sum % taps;
    const int64_t y = pixel / q.p.width + tap / size - pad, x = pixel % q.p.width + tap % size - pad;
    if (y < 0 || y >= q.p.height || x < 0 || x >= q.p.width) continue;
    total += dlogits[pixel] * map_of(q, image, sum / taps)[y * q.p.width + x];
  }
  total = warp_sum(total);
  float* shared = reinterpret_cast<float*>(shared_memory());  // (kWarps)
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) total += shared[warp];
  q.conv_sums[image * (2 * taps + kConvSums) + sum] = sum < 2 * taps ? total * logit_factor(q) : total;
}

// Threads: one for each weight. Sums over the images, in their order.
template <int kNone = 0>
__global__ void __launch_bounds__(kThreads) sum_images(CbamGroup q) {
  const int64_t channels = q.p.channels, hidden = q.p.hidden, taps = 2 * q.p.kernel * q.p.kernel;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item < taps + kConvSums) {
    float total = 0.0f;
    for (int64_t n = 0; n < q.p.batch; ++n) total += q.conv_sums[n * (taps + kConvSums) + item];
    if (item < taps)
      q.g.dconv[item] = total;
    else if (q.g.daffine != nullptr)
      q.g.daffine[item - taps] = total;
  }
  if (item >= channels * hidden) return;
  float of_w1 = 0.0f, of_w2 = 0.0f;
  const int64_t r1 = item / channels, c1 = item % channels, c2 = item / hidden, r2 = item % hidden;
  for (int64_t n = 0; n < q.p.batch; ++n) {
    const float *dsums = q.dsums + 2 * n * hidden, *sums = q.p.hidden_sums + 2 * n * hidden;
    of_w1 += dsums[r1] * channels_of(q, n, 0)[c1] + dsums[hidden + r1] * channels_of(q, n, 1)[c1];
    of_w2 += q.dgate[n * channels + c2] * (relu(sums[r2]) + relu(sums[hidden + r2]));
  }
  q.g.dw1[item] = of_w1;
  q.g.dw2[item] = of_w2;
}

}  // namespace imgcls
