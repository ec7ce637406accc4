#include "isa.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../kernels.h"

namespace imgcls::cpu {

namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512"};

Isa best() {
#if defined(IMGCLS_X86_KERNELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBase;
}

std::atomic<int>& chosen() {
  static std::atomic<int> level{best()};
  return level;
}

}  // namespace

Isa isa_level() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

const char* isa() { return kNames[isa_level()]; }

void set_isa(const std::string& name) {
  if (name.empty()) {
    chosen() = best();
    return;
  }
  for (int level = kBase; level <= kAvx512; ++level) {
    if (name != kNames[level]) continue;
    if (level > best()) throw std::invalid_argument("this machine has no " + name);
    chosen() = level;
    return;
  }
  throw std::invalid_argument("the instruction set must be base, avx2 or avx512, got " + name);
}

void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int)>& work) {
  const int count = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  std::atomic<int64_t> next{0};
  const auto run = [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item, thread);
  };
  std::vector<std::thread> others;  // new ones each time: a process may fork between two calls
  others.reserve(count > 1 ? count - 1 : 0);
  for (int thread = 1; thread < count; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace imgcls::cpu
