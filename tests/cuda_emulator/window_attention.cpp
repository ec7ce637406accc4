// Window attention of csrc/cuda on the emulated device, with C names for ctypes.
#include "../../csrc/cuda/window_attention.cu"

#include "emulated_runtime.h"

extern "C" {

const char* refusal(const imgcls::WindowAttention* p, int gradient) {
  return imgcls::cuda::window_attention_refusal(*p, gradient != 0);
}

const char* scratch_floats(const imgcls::WindowAttention* p, int64_t* floats) {
  return reason_of([&] { *floats = imgcls::cuda::window_attention_scratch(*p); });
}

const char* forward(const imgcls::WindowAttention* p) {
  return reason_of([&] { imgcls::cuda::window_attention(*p, nullptr); });
}

const char* backward(const imgcls::WindowAttentionGrad* p) {
  return reason_of([&] { imgcls::cuda::window_attention_grad(*p, nullptr); });
}

}  // extern "C"
