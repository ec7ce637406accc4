// Between cbam.cpp (threads, addresses, order of the passes) and cbam_isa.cpp (arithmetic, once per instruction set).
//
// A pass runs over some positions of one image that lie side by side in memory, (pixels, channels) in the element type.
// Arrays over the channels have `padded(channels)` floats, arrays over the positions `padded(pixels)`; what is behind
// the end is zero where a pass reads it and arbitrary where it writes.
#pragma once

#include <cstdint>

#include "../cbam.h"

namespace imgcls::cpu {

constexpr int64_t kPadding = 16;   // floats: the widest vector of any instruction set
constexpr int kCbamKernelMax = 7;  // largest kernel of the convolution

static inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

struct CbamPixels {
  const void* x;
  int64_t pixels, channels;
};

// Gradient of y from what is known of each position: (pixels) gate_p, flat (from the mean), peak (from the maximum, for
// each channel that has it), most (the maximum).
struct CbamSpread {
  const float *gate, *flat, *peak, *most;
};

// The passes that depend on the element type.
struct CbamPasses {
  // mean and most (channels) of all positions
  void (*pool)(const CbamPixels& at, float* mean, float* most);
  // mean and most (pixels) of y = x * gate over the channels
  void (*stats)(const CbamPixels& at, const float* gate, float* mean, float* most);
  // out = x * gate * gate_p + residual, with ReLU if asked; residual may be null
  void (*apply)(const CbamPixels& at, const float* gate, const float* gate_p, const void* residual, bool relu,
                void* out);
  // dot (pixels): sum of grad * y over the channels; ties (pixels): channels with y == most. With `out`, grad counts
  // only where out > 0 and is stored like that in `masked`.
  void (*grad_apply)(const CbamPixels& at, const void* grad, const void* out, void* masked, const float* gate,
                     const float* most, float* dot, float* ties);
  // Added to: dgate (channels), sum of dy * x over the positions; ties (channels), positions with x == most.
  void (*grad_gate)(const CbamPixels& at, const void* grad, const float* gate, const CbamSpread& spread,
                    const float* most, float* dgate, float* ties);
  // dx = dy * gate + flat + (x == most ? peak : 0), the last three over the channels
  void (*grad_input)(const CbamPixels& at, const void* grad, const float* gate, const CbamSpread& spread,
                     const float* flat, const float* peak, const float* most, void* dx);
};

struct CbamTable {
  CbamPasses passes[3];  // by DType

  // out (vectors, columns) = in (vectors, rows) times w (rows, columns); columns is padded. Row t of vector v of `in`
  // is in[v * row + t * step].
  void (*products)(const float* w, int64_t rows, int64_t columns, int64_t vectors, const float* in, int64_t row,
                   int64_t step, float* out);
  // out = 1 / (1 + e^-(a * in + b)) over n floats, n padded
  void (*sigmoid)(const float* in, float a, float b, int64_t n, float* out);
  // One row of a convolution: out[x] += sum over dy, dx of weight[dy * kernel + dx] * in[dy * stride + x + dx]; out has
  // padded(width) floats
  void (*correlate)(const float* in, int64_t stride, const float* weight, int64_t kernel, int64_t width, float* out);
  // out[dy * kernel + dx] = sum over y, x of grad[y * stride + x] * in[(y + dy) * stride + x + dx]
  void (*correlate_weights)(const float* in, const float* grad, int64_t stride, int64_t height, int64_t width,
                            int64_t kernel, float* out);
};

extern const CbamTable cbam_table_base, cbam_table_avx2, cbam_table_avx512;

}  // namespace imgcls::cpu
