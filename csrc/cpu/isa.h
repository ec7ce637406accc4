// Which instruction set the CPU kernels use, and how they share the work between threads.
#pragma once

#include <cstdint>
#include <functional>

namespace imgcls::cpu {

// Each family has one table of functions per instruction set, made by its *_isa.cpp; index them with this.
enum Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2 };
Isa isa_level();

// work(item, thread) for every item of 0..items-1, on at most `threads` threads; thread < threads. Returns when all are
// done. Which thread gets an item is not fixed, so results must not depend on it. `work` must not throw.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int)>& work);

}  // namespace imgcls::cpu
