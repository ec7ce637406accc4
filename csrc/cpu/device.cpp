// Stands in for cuda/*.cu in a build without CUDA. Python asks build_info() first, so the kernels here are never
// reached.
#include <stdexcept>

#include "../cbam.h"
#include "../kernels.h"

namespace imgcls {

CudaStatus cuda_status() { return {0, 0, "built without CUDA"}; }

int cuda_runtime_version() { return 0; }

namespace cuda {

namespace {
constexpr const char* kWhy = "built without CUDA";
}

void cbam(const Cbam&, CbamSteps, void*) { throw std::runtime_error(kWhy); }
void cbam_grad(const CbamGrad&, CbamSteps, void*) { throw std::runtime_error(kWhy); }
int64_t cbam_scratch(const Cbam&) { throw std::runtime_error(kWhy); }
int64_t cbam_grad_scratch(const Cbam&) { throw std::runtime_error(kWhy); }
void window_attention(const WindowAttention&, void*) { throw std::runtime_error(kWhy); }
void window_attention_grad(const WindowAttentionGrad&, void*) { throw std::runtime_error(kWhy); }
int64_t window_attention_scratch(const WindowAttention&) { throw std::runtime_error(kWhy); }
const char* window_attention_refusal(const WindowAttention&, bool) { return kWhy; }

}  // namespace cuda

}  // namespace imgcls
