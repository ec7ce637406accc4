// Stands in for cuda/device.cu in a build without CUDA.
#include "../kernels.h"

namespace imgcls {

CudaStatus cuda_status() { return {0, 0, "built without CUDA"}; }

int cuda_runtime_version() { return 0; }

}  // namespace imgcls
