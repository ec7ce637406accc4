// The contract of every kernel: parameter structs and launchers, one family after the other, the same names on the GPU
// (cuda/*.cu) and on the CPU (cpu/*.cpp). No PyTorch and no Python in here: addresses, sizes and a stream come in.
//
// Whoever calls has checked everything: ops/*.py is the door. A launcher only throws std::runtime_error, for what the
// device refuses. README.md says how to add a family.
#pragma once

#include <cstdint>
#include <string>

namespace imgcls {

// Element type of a tensor behind an address. The numbers are part of the binding.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3, kInt64 = 4 };

// What the CUDA runtime says about this machine.
struct CudaStatus {
  int devices = 0;         // 0 without a driver or a GPU
  int driver_version = 0;  // newest CUDA that the driver supports, 1000 * major + 10 * minor; 0 without a driver
  std::string error;       // why there is no device; empty when there is one
};

// Starts the CUDA driver (cudaGetDeviceCount), so call it only on request. Never throws.
CudaStatus cuda_status();

// The CUDA runtime that was linked in, 1000 * major + 10 * minor; 0 in a build without CUDA.
int cuda_runtime_version();

// Window attention -----------------------------------------------------------------------------------------------
//
// Multi-head attention inside windows of an image, with the cyclic shift of Swin (Liu et al. 2021, section 3.2), the
// grid of MaxViT (Tu et al. 2022, section 3.3) and the cosine logits of Swin V2 (Liu et al. 2022, section 3.2),
// straight from the packed output of the qkv layer: partition, shift and their inverses are addresses, never copies. A
// sequence is an image of one row with one window.
//
//   window (wy, wx) of (height / window_h, width / window_w); token t = ty * window_w + tx, N = window_h * window_w
//   position in the shifted image:  y' = wy * window_h + ty,  x' = wx * window_w + tx          (grid == 0)
//                                   y' = ty * (height / window_h) + wy, x' likewise             (grid == 1)
//   position in memory:             y = (y' + shift_h) mod height, x = (x' + shift_w) mod width
//   logits(i, j) = a_h * q_i . k_j + bias(h, i, j) + mask(i, j);  out_i = sum_j softmax_j(logits(i, j)) v_j
//   a_h = scale without head_scale; with head_scale (cosine): a_h = head_scale[h], and q and k are first divided by
//   their length, max(|q|, 1e-12) mask(i, j) = mask_value where the tokens come from different regions of the shifted
//   image, else 0; the region of a token is region(y', height, window_h, shift_h) * 3 + region(x', width, window_w,
//   shift_w), with region(p, size, window, shift) = 0 for p < size - window, 1 for p < size - shift, else 2. Without
//   any shift there is no mask.
struct WindowAttention {
  const void* qkv = nullptr;          // (batch, height, width, 3, heads, head_dim) in dtype
  const float* bias = nullptr;        // (heads, N, N) float32, or null
  const float* head_scale = nullptr;  // (heads) float32 for cosine logits, or null
  void* out = nullptr;                // (batch, height, width, heads, head_dim) in dtype
  float* lse = nullptr;  // (batch * windows, heads, N) float32: ln of the softmax denominator; null: not kept
  int64_t batch = 0, height = 0, width = 0;
  int32_t heads = 0, head_dim = 0;
  int32_t window_h = 0, window_w = 0;
  int32_t shift_h = 0, shift_w = 0;
  int32_t grid = 0;
  float scale = 1.0f;
  float mask_value = -100.0f;
  DType dtype = DType::kFloat32;  // kFloat32, kFloat16 or kBFloat16; sums and softmax are float32 always
};

// Gradients of WindowAttention, from qkv and lse alone (out is not needed). All are fully written.
struct WindowAttentionGrad {
  WindowAttention forward;       // out is ignored; lse is required
  const void* grad = nullptr;    // (batch, height, width, heads, head_dim) in dtype
  void* dqkv = nullptr;          // as qkv
  float* dbias = nullptr;        // (heads, N, N) float32, or null
  float* dhead_scale = nullptr;  // (heads) float32, or null
  float* scratch = nullptr;      // of cuda::window_attention_scratch: partial sums, so that no atomics are needed
};

// CBAM -------------------------------------------------------------------------------------------------------------
// Structs and launchers of this family: cbam.h.

namespace cpu {
// `threads` at most; the result does not depend on it. head_dim up to 128, N up to 1024.
void window_attention(const WindowAttention& p, int threads);
void window_attention_grad(const WindowAttentionGrad& p, int threads);

// The instruction set that the kernels use on this machine: "avx512", "avx2" or "base".
const char* isa();
// Choose another one, for tests and benchmarks; "" is the best that the machine has. Throws std::invalid_argument.
void set_isa(const std::string& name);
}  // namespace cpu

namespace cuda {
// The current device is the caller's to set; the launch is asynchronous on `stream`. head_dim 32 or 64.
void window_attention(const WindowAttention& p, void* stream);
void window_attention_grad(const WindowAttentionGrad& p, void* stream);
int64_t window_attention_scratch(const WindowAttention& p);  // floats; depends on the current device
// Why the kernels do not take this (one sentence), or null when they do. Sizes are looked at before the device is.
const char* window_attention_refusal(const WindowAttention& p, bool gradient);
}  // namespace cuda

}  // namespace imgcls
