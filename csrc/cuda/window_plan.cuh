// What the window-attention kernels share: where tokens lie, how they come and go, and the terms of the logits.
#pragma once

#include "../kernels.h"
#include "tiles.cuh"

namespace imgcls {

// WindowAttention with everything derived that is equal for all threads.
struct Plan {
  const void* qkv;
  const float* bias;
  const float* head_scale;
  void* out;
  float* lse;
  const void* grad;
  void* dqkv;
  float* partial;  // a slice for every CTA; see slice_floats
  int32_t batch;
  int32_t heads, tokens, padded_tokens;  // of a window; padded: up to a multiple of kRows
  int32_t height, width, down, across;   // the image, in pixels and in windows
  int32_t window_y, window_x;            // pixels between the first tokens of neighbouring windows
  int32_t token_y, token_x;              // pixels between neighbouring tokens of a window
  int32_t window_h, window_w, shift_h, shift_w;
  bool grid, shifted;
  bool want_bias, want_head_scale;  // gradients
  int32_t stages;                   // windows in shared memory: the one at work, and with 2 the next one
  float scale;
  float mask;  // mask_value in units of log2
};

// Floats that one CTA of a backward kernel leaves behind: the gradient of the bias, padded and in the order in which
// lanes hold it, and the gradient of head_scale in the first of the last four.
__host__ __device__ inline int64_t slice_floats(int64_t padded_tokens) { return padded_tokens * padded_tokens + 4; }

// Where in a slice the four elements of `lane` lie that belong to tile `tile` of the `block`-th 16 rows.
__host__ __device__ inline int64_t slice_offset(int64_t padded_tokens, int block, int tile, int lane) {
  return ((block * (padded_tokens / kTile) + tile) * kWarp + lane) * 4;
}

// One window of the batch. Three small numbers, because a thread keeps several of them all the time.
struct Window {
  int image;
  int y, x;  // its place among the windows of its image

  __device__ Window(const Plan& p, int number)
      : image(number / p.across / p.down), y(number / p.across % p.down), x(number % p.across) {}

  __device__ bool exists(const Plan& p) const { return image < p.batch; }

  __device__ int64_t index(const Plan& p) const { return (static_cast<int64_t>(image) * p.down + y) * p.across + x; }

  // To the window that lies as far from this one as `step` from window 0; no division, this is done for every window.
  __device__ void advance(const Plan& p, const Window& step) {
    image += step.image;
    y += step.y;
    x += step.x;
    if (x >= p.across) {
      x -= p.across;
      ++y;
    }
    if (y >= p.down) {
      y -= p.down;
      ++image;
    }
  }

  // The pixel of the token at `place` (x: down, y: right, in pixels from the first token), counted through the batch.
  __device__ int64_t pixel(const Plan& p, int2 place) const {
    int row = y * p.window_y + place.x + p.shift_h;
    int column = x * p.window_x + place.y + p.shift_w;
    if (row >= p.height) row -= p.height;
    if (column >= p.width) column -= p.width;
    return (static_cast<int64_t>(image) * p.height + row) * p.width + column;
  }

  // Whether tokens of different regions can meet here.
  __device__ bool masked(const Plan& p) const { return p.shifted && (p.grid || y == p.down - 1 || x == p.across - 1); }

  __device__ int region(const Plan& p, int2 place) const {
    const int row = y * p.window_y + place.x;
    const int column = x * p.window_x + place.y;
    const int down = row < p.height - p.window_h ? 0 : row < p.height - p.shift_h ? 1 : 2;
    const int right = column < p.width - p.window_w ? 0 : column < p.width - p.shift_w ? 1 : 2;
    return down * 3 + right;
  }
};

// Shared memory, dealt out from the front. Every part starts at a multiple of 16 bytes.
struct Shared {
  unsigned char* next = shared_memory();

  template <typename T>
  __device__ T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return part;
  }
};

// places[t]: pixels from the first token of a window to token t, down and right.
__device__ inline void fill_places(const Plan& p, int2* places, int count) {
#pragma unroll 1
  for (int t = static_cast<int>(threadIdx.x); t < count; t += static_cast<int>(blockDim.x)) {
    places[t] = make_int2(t / p.window_w * p.token_y, t % p.window_w * p.token_x);
  }
}

__device__ inline void fill_regions(const Plan& p, const Window& window, const int2* places, int* regions, int count) {
#pragma unroll 1
  for (int t = static_cast<int>(threadIdx.x); t < count; t += static_cast<int>(blockDim.x)) {
    regions[t] = window.region(p, places[t]);
  }
}

// Rows ---------------------------------------------------------------------------------------------------------------

// The parts of a token: three in qkv, and its row of `grad`.
constexpr int kQ = 0, kK = 1, kV = 2, kGrad = 3;

// Some threads of a block that share work, for example one warp.
struct Crew {
  int member, size;

  static __device__ Crew block() { return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}; }
  static __device__ Crew warp() { return {lane_id(), kWarp}; }
};

// Starts to copy parts FIRST to LAST of the tokens `begin` and up to, but without, `end`, of head blockIdx.y. Each part
// has a matrix of its own, `matrix` elements from the one before; row 0 is token `begin`.
template <typename T, int D, int FIRST, int LAST>
__device__ __forceinline__ void copy_tokens(const Plan& p, const Window& window, const int2* places, int begin, int end,
                                            T* to, int matrix, Crew crew) {
  constexpr int pieces = D / kPiece<T>;
  const int64_t channels = static_cast<int64_t>(p.heads) * D;
#pragma unroll 1
  for (int i = crew.member; i < (end - begin) * pieces; i += crew.size) {
    const int row = i / pieces;
    const int offset = i % pieces * kPiece<T>;
    const int64_t pixel = window.pixel(p, places[begin + row]);
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * D + offset;
    T* target = to + row * row_stride<T>(D) + offset;
#pragma unroll
    for (int part = FIRST; part <= LAST; ++part) {
      const T* from = part == kGrad ? static_cast<const T*>(p.grad) + pixel * channels + channel
                                    : static_cast<const T*>(p.qkv) + (pixel * 3 + part) * channels + channel;
      copy_piece(target + (part - FIRST) * matrix, from);
    }
  }
}

// Zeros into rows `begin` and up to, but without, `end` of a matrix: the places of tokens that a window does not have.
template <typename T, int D>
__device__ __forceinline__ void clear_rows(T* matrix, int begin, int end, Crew crew) {
  constexpr int pieces = row_stride<T>(D) / kPiece<T>;
#pragma unroll 1
  for (int i = begin * pieces + crew.member; i < end * pieces; i += crew.size) {
    reinterpret_cast<uint4*>(matrix)[i] = make_uint4(0, 0, 0, 0);
  }
}

constexpr float kShortest = 1e-12f;  // length below which a row is divided by this instead

// Divides rows by their length, in float32, and keeps 1 / length where `inverse` is given.
template <typename T, int D>
__device__ __forceinline__ void normalise_rows(T* matrix, int rows, float* inverse, Crew crew) {
#pragma unroll 1
  for (int r = crew.member; r < rows; r += crew.size) {
    uint4* row = reinterpret_cast<uint4*>(matrix + r * row_stride<T>(D));
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < D / kPiece<T>; ++c) {
      const uint4 piece = row[c];
      const T* values = reinterpret_cast<const T*>(&piece);
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) squares += to_float(values[e]) * to_float(values[e]);
    }
    const float length = sqrtf(squares);
    const float factor = 1.0f / (length < kShortest ? kShortest : length);  // a NaN stays one
#pragma unroll
    for (int c = 0; c < D / kPiece<T>; ++c) {
      uint4 piece = row[c];
      T* values = reinterpret_cast<T*>(&piece);
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) values[e] = from_float<T>(to_float(values[e]) * factor);
      row[c] = piece;
    }
    if (inverse != nullptr) inverse[r] = factor;
  }
}

// From the gradient of 16 rows of length 1 (`unit`) to that of the rows before normalise_rows:
//   (g - unit (unit . g)) / length, without the middle term for rows that were shorter than kShortest.
// Returns the lane's share of the sum of unit . g over the rows.
template <typename T, int D>
__device__ __forceinline__ float through_normalise(Results<D / kTile>& g, const T* unit, const float* inverse) {
  float sum = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row() + half * 8;
    const T* values = unit + row * row_stride<T>(D) + lane_column();
    float along = 0.0f;
#pragma unroll
    for (int n = 0; n < D / kTile; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) along += to_float(values[n * kTile + e]) * g[n][half * 2 + e];
    }
    sum += along;
    along = row_sum(along);
    const float factor = inverse[row];
    if (factor >= 1.0f / kShortest) along = 0.0f;
#pragma unroll
    for (int n = 0; n < D / kTile; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = g[n][half * 2 + e];
        value = (value - to_float(values[n * kTile + e]) * along) * factor;
      }
    }
  }
  return sum;
}

// Writes a warp's 16 rows, times a factor for each of the lane's two, to tokens `begin` and on; rows that are no tokens
// are left out. `to` is the first token's place for this head and part, `pitch` elements lie between pixels. The detour
// through `stage` (16 rows of this warp) makes whole pieces of what the lanes hold scattered.
template <typename T, int D>
__device__ __forceinline__ void store_tokens(const Plan& p, const Window& window, const int2* places, int begin,
                                             const Results<D / kTile>& rows, float upper, float lower, T* stage, T* to,
                                             int64_t pitch) {
  constexpr int pieces = D / kPiece<T>;
  constexpr int stride = row_stride<T>(D);
  T* target = stage + lane_row() * stride + lane_column();
#pragma unroll
  for (int n = 0; n < D / kTile; ++n) {
    store_pair(target + n * kTile, rows[n][0] * upper, rows[n][1] * upper);
    store_pair(target + 8 * stride + n * kTile, rows[n][2] * lower, rows[n][3] * lower);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane_id(); i < kRows * pieces; i += kWarp) {
    const int row = i / pieces;
    const int offset = i % pieces * kPiece<T>;
    if (begin + row < p.tokens) {
      *reinterpret_cast<uint4*>(to + window.pixel(p, places[begin + row]) * pitch + offset) =
          *reinterpret_cast<const uint4*>(stage + row * stride + offset);
    }
  }
  __syncwarp();
}

// Logits -------------------------------------------------------------------------------------------------------------
//
// All in units of log2, so that exp2 ends the work: factor * q . k + bias + mask.

// The bias of query i and key j in log2 units; 0 for tokens that a window does not have.
__device__ __forceinline__ float bias_at(const Plan& p, int i, int j) {
  if (p.bias == nullptr || i >= p.tokens || j >= p.tokens) return 0.0f;
  const float* of_head = p.bias + static_cast<int64_t>(blockIdx.y) * p.tokens * p.tokens;
  return load_float(of_head + static_cast<uint32_t>(i * p.tokens + j)) * kLog2E;
}

// The factor of this head, natural: scale, or head_scale for cosine logits.
__device__ __forceinline__ float head_factor(const Plan& p) {
  return p.head_scale == nullptr ? p.scale : load_float(p.head_scale + blockIdx.y);
}

// Adds the mask between 16 tokens from `row` on and 8 tiles of tokens from `column` on.
__device__ __forceinline__ void add_mask(const Plan& p, Scores& s, const int* regions, int row, int column, int tiles) {
  const int upper = regions[row + lane_row()];
  const int lower = regions[row + lane_row() + 8];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n < tiles) {
      const int2 across = *reinterpret_cast<const int2*>(regions + column + n * kTile + lane_column());
      if (upper != across.x) s[n][0] += p.mask;
      if (upper != across.y) s[n][1] += p.mask;
      if (lower != across.x) s[n][2] += p.mask;
      if (lower != across.y) s[n][3] += p.mask;
    }
  }
}

// Products become logits: times `factor`, plus the bias, for 16 rows from `row` on and a block from `column` on. Rows
// are queries and columns keys, or, TRANSPOSED, the other way round.
template <bool TRANSPOSED>
__device__ __forceinline__ void scale_and_add_bias(const Plan& p, Scores& s, float factor, int row, int column,
                                                   int tiles) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n < tiles) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + lane_row() + e / 2 * 8, c = column + n * kTile + lane_column() + e % 2;
        s[n][e] = s[n][e] * factor + (TRANSPOSED ? bias_at(p, c, r) : bias_at(p, r, c));
      }
    }
  }
}

// `value` into the columns of tokens that a window does not have, in a block from `column` on.
__device__ __forceinline__ void fill_missing(const Plan& p, Scores& s, float value, int column, int tiles) {
  if (column + tiles * kTile <= p.tokens) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + n * kTile + lane_column() + e % 2 >= p.tokens) s[n][e] = value;
    }
  }
}

// Tiles of the block of keys (or queries) that begins at `begin`: an even number, because products take 16 at a time.
__device__ __forceinline__ int tiles_from(const Plan& p, int begin) {
  const int left = (p.padded_tokens - begin) / kTile;
  return left < kTiles ? left : kTiles;
}

}  // namespace imgcls
