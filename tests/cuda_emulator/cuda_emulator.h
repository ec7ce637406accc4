// Runs CUDA kernels on a CPU, slowly and without mercy, to find what is wrong with them before a GPU is at hand.
//
// csrc/cuda/common.cuh includes this file where IMGCLS_CUDA_EMULATOR is defined. Every CUDA thread is a fiber. A fiber
// runs until it waits: at __syncthreads for its block, at warp-wide instructions for its warp. Which one goes on is a
// matter of `Device::schedule`, so a missing barrier shows as results that depend on it. Further traps:
//   * shared memory holds 0xFF (NaN) when a block starts, and has guard bands that are checked when it ends;
//   * an asynchronous copy poisons its target at once and delivers at the wait, not before;
//   * copy_piece and load_float may only read addresses that were allowed; copies and matrix loads must be aligned, and
//   in
//     bounds on the side of shared memory;
//   * lanes that meet at different instructions, threads that wait for ever and copies that nobody waits for are
//   errors.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace imgcls::emulator {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xFF;

enum class Schedule : int { kFirstWarpAhead = 0, kLastWarpAhead = 1, kRandom = 2 };

struct Device {
  int multiprocessors = 2;
  int shared_per_block = 232448;  // bytes: an H200
  Schedule schedule = Schedule::kRandom;
  uint32_t seed = 1;
  int64_t only_y = -1;                                   // with a number from 0 on, only blocks of this blockIdx.y run
  std::vector<std::pair<const char*, int64_t>> allowed;  // global memory that copies may read
  std::map<const void*, int64_t> asked;                  // shared memory that kernels were given leave for
};

struct Copy {
  unsigned char* to;
  unsigned char value[16];
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t first;
  jmp_buf where;
  bool started = false;
  int thread = 0;
  std::vector<std::vector<Copy>> groups;  // the last one is open
};

struct Warp {
  int arrived = 0;
  const char* meeting = nullptr;  // the instruction at which lanes wait
  void* arguments[kLanes];
  std::vector<int> ready;  // threads that can go on
};

// What runs at the moment: one block.
struct Block {
  dim3 grid, index;
  int threads = 0, alive = 0, at_barrier = 0;
  std::vector<Warp> warps;
  const std::function<void()>* body = nullptr;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::string error;
};

inline Device device;
inline Block block;
inline std::vector<Fiber> fibers(kMostThreads);
inline uint32_t random_state = 1;

inline uint32_t random_below(size_t limit) {
  random_state = random_state * 1664525u + 1013904223u;  // Numerical Recipes, "quick and dirty" generator
  return (random_state >> 8) % static_cast<uint32_t>(limit);
}

// The end of this block: its fibers are left where they are.
[[noreturn]] inline void fail(const std::string& why) {
  block.error = why;
  _longjmp(block.scheduler, 1);
}

inline Warp& warp_of(int thread) { return block.warps[thread / kLanes]; }

inline void make_ready(int thread) { warp_of(thread).ready.push_back(thread); }

// Leaves the running fiber; comes back when somebody has made it ready.
inline void wait() {
  if (_setjmp(block.current->where) == 0) _longjmp(block.scheduler, 1);
}

inline void release_barrier() {
  block.at_barrier = 0;
  for (int t = 0; t < block.threads; ++t) make_ready(t);
}

inline void barrier() {
  if (++block.at_barrier == block.alive) {
    if (block.alive != block.threads) fail("__syncthreads after some threads have returned");
    release_barrier();
  }
  wait();
}

// All lanes of a warp bring their arguments; the last one does the work for all of them.
template <typename Arguments, typename Work>
void meet(const char* instruction, Arguments& mine, Work work) {
  const int thread = block.current->thread;
  Warp& warp = warp_of(thread);
  if (warp.arrived > 0 && warp.meeting != instruction) {
    fail(std::string("lanes of a warp meet at ") + warp.meeting + " and " + instruction);
  }
  warp.meeting = instruction;
  warp.arguments[thread % kLanes] = &mine;
  if (++warp.arrived < kLanes) {
    wait();
    return;
  }
  Arguments* lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<Arguments*>(warp.arguments[lane]);
  work(lanes);
  warp.arrived = 0;
  const int first = thread / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) make_ready(first + lane);
  wait();
}

inline void fiber_main() {
  (*block.body)();
  --block.alive;
  for (const std::vector<Copy>& group : block.current->groups) {
    if (!group.empty()) fail("a thread returned with copies under way");
  }
  if (block.at_barrier > 0 && block.at_barrier == block.alive) fail("a thread returned while others wait for it");
  _longjmp(block.scheduler, 1);
}

// The thread that goes on, or -1.
inline int pick() {
  const int count = static_cast<int>(block.warps.size());
  const int start = device.schedule == Schedule::kRandom ? static_cast<int>(random_below(count)) : 0;
  for (int k = 0; k < count; ++k) {
    const int which = device.schedule == Schedule::kLastWarpAhead ? count - 1 - k : (start + k) % count;
    std::vector<int>& ready = block.warps[which].ready;
    if (ready.empty()) continue;
    const size_t place = random_below(ready.size());
    const int thread = ready[place];
    ready[place] = ready.back();
    ready.pop_back();
    return thread;
  }
  return -1;
}

inline void resume(Fiber& fiber) {
  block.current = &fiber;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.get();
  fiber.first.uc_stack.ss_size = kStackBytes;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
  setcontext(&fiber.first);
}

inline void run_block() {
  for (int t = 0; t < block.threads; ++t) {
    fibers[t].started = false;
    fibers[t].thread = t;
    fibers[t].groups.assign(1, {});
    make_ready(t);
  }
  _setjmp(block.scheduler);  // every wait and every end comes back to here
  if (!block.error.empty() || block.alive == 0) return;
  const int thread = pick();
  if (thread < 0) {
    block.error = "threads wait for each other at different barriers";
    return;
  }
  resume(fibers[thread]);
}

inline void check_guards(const std::vector<unsigned char>& memory, int64_t offset) {
  for (int64_t i = 0; i < static_cast<int64_t>(memory.size()); ++i) {
    const bool inside = i >= offset && i < offset + block.shared_bytes;
    if (!inside && memory[i] != kPoison) throw std::runtime_error("emulator: a write outside shared memory");
  }
}

// One launch. Blocks run one after the other, in an order that depends on the schedule.
inline void run(const void* kernel, dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  const auto given = device.asked.find(kernel);
  if (shared_bytes > 48 * 1024 && (given == device.asked.end() || given->second < shared_bytes)) {
    throw std::runtime_error("emulator: more shared memory than the kernel was given leave for");
  }
  if (threads < 1 || threads > kMostThreads || threads % kLanes != 0) throw std::runtime_error("emulator: threads");
  random_state = device.seed;
  std::vector<unsigned char> memory(static_cast<size_t>(shared_bytes) + 2 * kGuardBytes);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t number = device.schedule == Schedule::kLastWarpAhead ? blocks - 1 - k : k;
    const uint64_t y = number / grid.x % grid.y;
    if (device.only_y >= 0 && y != static_cast<uint64_t>(device.only_y)) continue;
    std::memset(memory.data(), kPoison, memory.size());
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + kGuardBytes / 2 + 127) / 128 * 128;
    block.grid = grid;
    block.index = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(y),
                       static_cast<unsigned>(number / grid.x / grid.y));
    block.threads = block.alive = threads;
    block.at_barrier = 0;
    block.warps.assign(static_cast<size_t>(threads / kLanes), Warp());
    block.body = &body;
    block.shared = reinterpret_cast<unsigned char*>(start);
    block.shared_bytes = shared_bytes;
    block.error.clear();
    run_block();
    if (!block.error.empty()) throw std::runtime_error("emulator: " + block.error);
    check_guards(memory, block.shared - memory.data());
  }
}

inline uint3 thread_index() { return make_uint3(static_cast<unsigned>(block.current->thread), 0, 0); }
inline dim3 block_size() { return dim3(static_cast<unsigned>(block.threads), 1, 1); }

inline void check_shared(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  if (first < block.shared || first + bytes > block.shared + block.shared_bytes)
    fail("an address outside shared memory");
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("a misaligned address in shared memory");
}

// Addresses must be multiples of the size, as on a GPU.
inline void check_global(const void* address, size_t bytes) {
  const char* first = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a misaligned address in global memory");
  for (const auto& [begin, size] : device.allowed) {
    if (first >= begin && first + bytes <= begin + size) return;
  }
  fail("a read from outside the tensors");
}

}  // namespace imgcls::emulator

#define threadIdx (::imgcls::emulator::thread_index())
#define blockIdx (::imgcls::emulator::block.index)
#define blockDim (::imgcls::emulator::block_size())
#define gridDim (::imgcls::emulator::block.grid)

inline void __syncthreads() { imgcls::emulator::barrier(); }

inline void __syncwarp() {
  int nothing = 0;
  imgcls::emulator::meet("__syncwarp", nothing, [](int**) {});
}

namespace imgcls::emulator {

struct Exchange {
  float value;
  int from;
  float result;
};

inline float exchange(const char* instruction, unsigned mask, float value, int from) {
  if (mask != 0xffffffffu) fail("a shuffle of some lanes only");
  Exchange mine{value, from, 0.0f};
  meet(instruction, mine, [](Exchange** lanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->result = lanes[lanes[lane]->from]->value;
  });
  return mine.result;
}

}  // namespace imgcls::emulator

inline float __shfl_sync(unsigned mask, float value, int from) {
  return imgcls::emulator::exchange("__shfl_sync", mask, value, from % 32);
}
inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  return imgcls::emulator::exchange("__shfl_xor_sync", mask, value, (static_cast<int>(threadIdx.x) % 32) ^ lanes);
}

// What common.cuh has in assembly -------------------------------------------------------------------------------------

namespace imgcls {

inline unsigned char* shared_memory() { return emulator::block.shared; }

inline float power_of_two(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

inline float load_float(const float* from) {
  emulator::check_global(from, sizeof(float));
  return *from;
}

inline void copy_piece(void* to, const void* from) {
  emulator::check_shared(to, 16);
  emulator::check_global(from, 16);
  emulator::Copy copy{static_cast<unsigned char*>(to), {}};
  std::memcpy(copy.value, from, 16);
  std::memset(to, emulator::kPoison, 16);
  emulator::block.current->groups.back().push_back(copy);
}

inline void copies_commit() { emulator::block.current->groups.emplace_back(); }

template <int newest>
void copies_wait() {
  auto& groups = emulator::block.current->groups;
  while (groups.size() > newest + 1) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.value, 16);
    groups.erase(groups.begin());
  }
}

struct MatrixLoad {
  const uint16_t* row;
  uint32_t* to;
};

// Element (row, column) of matrix m lies where lane 8 m + row pointed to.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulator::check_shared(row, 16);
  MatrixLoad mine{static_cast<const uint16_t*>(row), to};
  emulator::meet("ldmatrix", mine, [](MatrixLoad** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const uint16_t* source = lanes[8 * m + lane / 4]->row + lane % 4 * 2;
        lanes[lane]->to[m] = source[0] | uint32_t{source[1]} << 16;
      }
    }
  });
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulator::check_shared(row, 16);
  MatrixLoad mine{static_cast<const uint16_t*>(row), to};
  emulator::meet("ldmatrix.trans", mine, [](MatrixLoad** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int first = 8 * m + lane % 4 * 2;
        lanes[lane]->to[m] = lanes[first]->row[lane / 4] | uint32_t{lanes[first + 1]->row[lane / 4]} << 16;
      }
    }
  });
}

template <typename T>
float half_of(uint32_t both, int which) {
  const uint16_t bits = static_cast<uint16_t>(both >> (16 * which));
  T value;
  std::memcpy(&value, &bits, sizeof(bits));
  return static_cast<float>(value);
}

struct TensorCore {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// The layout of PTX ISA, mma.m16n8k16, with group = lane / 4 and pair = lane % 4:
//   a[0]: (group, 2 pair), a[1]: (group + 8, 2 pair), a[2]: (group, 2 pair + 8), a[3]: (group + 8, 2 pair + 8)
//   b[0]: (2 pair, group), b[1]: (2 pair + 8, group);  c[0]: (group, 2 pair), c[2]: (group + 8, 2 pair)
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  TensorCore mine{c, a, {b0, b1}};
  emulator::meet("mma", mine, [](TensorCore** lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + r / 2 * 8 + e] = half_of<T>(lanes[lane]->a[r], e);
        for (int r = 0; r < 2; ++r) b[pair + r * 8 + e][group] = half_of<T>(lanes[lane]->b[r], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        float sum = lanes[lane]->c[e];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane]->c[e] = sum;
      }
    }
  });
}

}  // namespace imgcls
