// The contract of every kernel: parameter structs and launchers, one family after the other, the same names on the GPU
// (cuda/*.cu) and on the CPU (cpu/*.cpp). No PyTorch and no Python in here: addresses, sizes and a stream come in.
//
// No kernel family exists yet. README.md says how to add one.
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

}  // namespace imgcls
