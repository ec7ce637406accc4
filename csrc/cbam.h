// The contract of the CBAM kernels (kernels.h tells the rules): parameter structs and launchers.
//
// Convolutional block attention (Woo et al. 2018, equations 1 to 3) of channels-last images, with the sum of a residual
// branch and the ReLU behind it:
//   gate_c  = sigmoid(w2 relu(w1 mean_p(x)) + w2 relu(w1 max_p(x)))      p: positions of the image, c: channels
//   y       = x * gate_c
//   logits  = conv(mean_c(y), max_c(y))      one kernel x kernel convolution of two channels into one, zero padding
//   gate_p  = sigmoid(a * logits + b)        a, b: what batch normalisation does to one channel
//   out     = relu(y * gate_p + residual)
// Positions or channels that share a maximum share its gradient, as torch.amax has it; the gradient of ReLU at 0 is 0.
#pragma once

#include "kernels.h"

namespace imgcls {

// The two halves of the formula. Batch normalisation in training sits between them and couples the images of a batch;
// otherwise they run as one, image by image.
enum class CbamSteps : int32_t {
  kMaps = 1,   // up to logits: reads x, w1, w2, conv; writes channel, hidden_sums, spatial
  kApply = 2,  // from logits on: reads x, channel, spatial, affine, residual; writes out
  kBoth = 3,
};

struct Cbam {
  const void* x = nullptr;         // (batch, height, width, channels) in dtype
  const float* w1 = nullptr;       // (hidden, channels)
  const float* w2 = nullptr;       // (channels, hidden)
  const float* conv = nullptr;     // (2, kernel, kernel): of the mean, then of the maximum
  const float* affine = nullptr;   // (2): a, b; null: 1, 0
  const void* residual = nullptr;  // as x, or null
  void* out = nullptr;             // as x
  float* channel = nullptr;        // (batch, 3, channels): mean and maximum over the positions, gate_c
  float* hidden_sums = nullptr;    // (batch, 2, hidden): w1 mean and w1 maximum, before the ReLU
  float* spatial = nullptr;        // (batch, 3, height, width): mean and maximum of y over the channels, logits
  float* scratch = nullptr;        // scratch() floats; unused on the CPU
  int64_t batch = 0, height = 0, width = 0;
  int32_t channels = 0, hidden = 0;
  int32_t kernel = 7;  // odd, at most 7
  bool relu = false;
  DType dtype = DType::kFloat32;  // kFloat32, kFloat16 or kBFloat16; everything that has no element type is float32
};

// Gradients, all fully written. Which fields a half reads and writes:
//   kApply: reads grad, x, channel, spatial, affine (out with relu); writes dlogits, ties (masked with relu)
//   kMaps:  reads grad (after the ReLU), x, w1, w2, conv, affine, channel, hidden_sums, spatial, dlogits, ties;
//           writes dx, dw1, dw2, dconv
//   kBoth:  as one after the other, with daffine; dlogits is the gradient by a * logits + b
struct CbamGrad {
  Cbam forward;
  const void* grad = nullptr;  // as x: gradient by out
  void* masked = nullptr;      // as x: grad where out > 0, else 0; that is the gradient of the residual. Only with relu
  void* dx = nullptr;          // as x
  float* dw1 = nullptr;        // as w1
  float* dw2 = nullptr;        // as w2
  float* dconv = nullptr;      // as conv
  float* daffine = nullptr;    // (2)
  // (batch, height, width). kApply writes the gradient by a * logits + b, kMaps reads the one by logits
  float* dlogits = nullptr;
  float* ties = nullptr;     // (batch, height, width): how many channels share the maximum
  float* scratch = nullptr;  // grad_scratch() floats; unused on the CPU
};

namespace cpu {
// `threads` at most, an image each; the result does not depend on their number.
void cbam(const Cbam& p, CbamSteps steps, int threads);
void cbam_grad(const CbamGrad& p, CbamSteps steps, int threads);
}  // namespace cpu

namespace cuda {
// The current device is the caller's to set; launches are asynchronous on `stream`.
void cbam(const Cbam& p, CbamSteps steps, void* stream);
void cbam_grad(const CbamGrad& p, CbamSteps steps, void* stream);
int64_t cbam_scratch(const Cbam& p);       // floats, for the forward half
int64_t cbam_grad_scratch(const Cbam& p);  // floats, for the gradients
}  // namespace cuda

}  // namespace imgcls
