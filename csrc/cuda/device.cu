#include <cuda_runtime_api.h>

#include "../kernels.h"

namespace imgcls {

CudaStatus cuda_status() {
  CudaStatus status;
  if (cudaDriverGetVersion(&status.driver_version) != cudaSuccess) status.driver_version = 0;
  const cudaError_t error = cudaGetDeviceCount(&status.devices);
  if (error != cudaSuccess) {
    status.devices = 0;
    status.error = cudaGetErrorString(error);
    cudaGetLastError();  // a sticky error here would surface in somebody else's next call
  }
  return status;
}

int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace imgcls
