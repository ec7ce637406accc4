// A kernel with a choice of faults, to see that the emulator notices each of them: threads hand their piece of memory
// to the thread at the other end of the block.
#include "emulated_runtime.h"

namespace {

using namespace imgcls;

enum Fault : int {
  kNone = 0,
  kNoWait = 1,
  kNoBarrier = 2,
  kHalfAWarp = 3,
  kDifferentInstructions = 4,
  kEarlyReturn = 5,
  kMisaligned = 6,
  kOutsideTensor = 7,
  kOutsideShared = 8,
  kNoLeave = 9,
};

constexpr int kThreads = 128;

__global__ void mirror(const float4* from, float4* to, int fault) {
  float4* pieces = reinterpret_cast<float4*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  if (fault == kEarlyReturn && thread == 40) return;
  const auto* piece = reinterpret_cast<const char*>(from + thread + (fault == kOutsideTensor ? 1 : 0));
  copy_piece(pieces + thread, piece + (fault == kMisaligned ? 4 : 0));
  copies_commit();
  if (fault != kNoWait) copies_wait<0>();
  if (fault != kNoBarrier) __syncthreads();
  if (fault == kHalfAWarp && thread < 16) __syncwarp();
  if (fault == kDifferentInstructions) {
    if (thread % 2 == 0) {
      __syncwarp();
    } else {
      __shfl_xor_sync(kAllLanes, 1.0f, 1);
    }
  }
  if (fault == kOutsideShared) pieces[kThreads + thread / 64].x = 1.0f;
  to[thread] = pieces[kThreads - 1 - thread];
}

}  // namespace

extern "C" const char* mirror_with(int fault, const float* from, float* to) {
  return reason_of([&] {
    const int64_t bytes = fault == kNoLeave ? 2 * kSharedUnasked : kThreads * sizeof(float4);
    const auto* pieces = reinterpret_cast<const float4*>(from);
    auto* results = reinterpret_cast<float4*>(to);
    const auto body = [&] { mirror(pieces, results, fault); };
    imgcls::emulator::run(reinterpret_cast<const void*>(mirror), dim3(2), kThreads, bytes, body);
  });
}
