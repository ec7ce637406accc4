// The functions of the CUDA runtime that launchers call, for the emulated device, and the device's settings, with C
// names for ctypes. A function that can fail returns null, or says why not until the next call.
#pragma once

#include "../../csrc/cuda/common.cuh"

using imgcls::emulator::device;

namespace {

const char* reason_of(const std::function<void()>& work) {
  static std::string reason;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return device.multiprocessors > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool whole = attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor;
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? device.multiprocessors
               : device.shared_per_block + (whole ? imgcls::kSharedReserved : 0);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > device.shared_per_block) return cudaErrorInvalidValue;
  device.asked[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorNoDevice ? "no device" : "an error"; }

// Settings --------------------------------------------------------------------------------------------------------

void set_device(int multiprocessors, int shared_per_block) {
  device.multiprocessors = multiprocessors;
  device.shared_per_block = shared_per_block;
}

void set_schedule(int schedule, unsigned seed) {
  device.schedule = static_cast<imgcls::emulator::Schedule>(schedule);
  device.seed = seed;
}

void set_only_y(int64_t y) { device.only_y = y; }

void forget_memory() { device.allowed.clear(); }
void allow_memory(const void* begin, int64_t bytes) {
  device.allowed.emplace_back(static_cast<const char*>(begin), bytes);
}

}  // extern "C"
