// CBAM of csrc/cuda on the emulated device, with C names for ctypes.
#include "../../csrc/cuda/cbam.cu"

#include "emulated_runtime.h"

extern "C" {

int64_t scratch_floats(const imgcls::Cbam* p, int gradient) {
  return gradient ? imgcls::cuda::cbam_grad_scratch(*p) : imgcls::cuda::cbam_scratch(*p);
}

const char* forward(const imgcls::Cbam* p, int steps) {
  return reason_of([&] { imgcls::cuda::cbam(*p, static_cast<imgcls::CbamSteps>(steps), nullptr); });
}

const char* backward(const imgcls::CbamGrad* p, int steps) {
  return reason_of([&] { imgcls::cuda::cbam_grad(*p, static_cast<imgcls::CbamSteps>(steps), nullptr); });
}

}  // extern "C"
