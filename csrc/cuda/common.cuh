// What every CUDA kernel here is built from: errors, launches, number conversions, and the few instructions that C++
// has no name for.
//
// tests/cuda_emulator runs the same kernels on a CPU: it defines IMGCLS_CUDA_EMULATOR and replaces the part of this
// file that this name guards. So kernels use no other special instruction, no static shared memory and no atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef IMGCLS_CUDA_EMULATOR
#include "cuda_emulator.h"
#endif

namespace imgcls {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPieceBytes = 16;                // what one asynchronous copy or vector load moves
constexpr int64_t kSharedUnasked = 48 * 1024;  // dynamic shared memory that needs no cudaFuncSetAttribute
constexpr int64_t kSharedReserved = 1024;  // what the system takes of every block (CUDA programming guide, compute 8.x)
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a sticky error here would surface in somebody else's next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Sizes of the current device.
struct DeviceLimits {
  int multiprocessors = 0;
  int64_t shared_per_block = 0;           // bytes that a kernel may ask for
  int64_t shared_per_multiprocessor = 0;  // bytes

  static cudaError_t query(DeviceLimits* limits) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
      return value;
    };
    limits->multiprocessors = ask(cudaDevAttrMultiProcessorCount);
    limits->shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    limits->shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    return error;
  }
};

// Lets a kernel have as much dynamic shared memory, once for each device.
inline void allow_shared(const void* kernel, int64_t shared_bytes, const char* what) {
  if (shared_bytes <= kSharedUnasked) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
             what);
}

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), dim3 grid, int threads, int64_t shared_bytes, void* stream,
            Args... args) {
  allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes, name);
#ifdef IMGCLS_CUDA_EMULATOR
  emulator::run(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, [&] { kernel(args...); });
#else
  void* addresses[] = {&args...};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)),
                              addresses, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
             name);
#endif
}

// Numbers ----------------------------------------------------------------------------------------------------------

template <typename T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));  // elements of one piece

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two neighbours in one register, `low` first in memory.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
}
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

// Instructions -----------------------------------------------------------------------------------------------------
#ifndef IMGCLS_CUDA_EMULATOR

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 2 to the power of x, to 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// A number that no thread of this launch writes.
__device__ __forceinline__ float load_float(const float* from) { return __ldg(from); }

// Starts to copy 16 bytes from global to shared memory. They are there after copies_wait, for the thread that copied;
// for the others after a barrier as well.
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all groups of copies but the `newest` last ones.
template <int newest>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(newest) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 m + r names row r of matrix m. A lane gets elements (lane / 4, 2 (lane
// % 4)) and the one to its right of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) * b (16 x 8), one tensor core instruction of the warp.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // IMGCLS_CUDA_EMULATOR

}  // namespace imgcls
