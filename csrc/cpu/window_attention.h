// Between window_attention.cpp (threads, addresses) and window_attention_isa.cpp (arithmetic, once per instruction
// set).
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace imgcls::cpu {

// One head of one window. N tokens; Np is N rounded up to the table's `lanes`.
struct WindowTile {
  const WindowAttention* p;
  const int64_t* rows;     // (N) token of the window -> token in memory
  const float* bias;       // (N, bias_row): this head's bias, -inf in the columns from N on
  int64_t bias_row;        // Np, or 0 where all rows are one
  const int32_t* regions;  // (Np), or null where no two tokens of the window are masked from each other
  float* lse;              // (N) or null; written by the forward pass only
  float* scratch;          // forward_scratch or backward_scratch floats, 64-byte aligned
  int32_t head;
};

struct WindowTileGrad {
  WindowTile tile;
  const void* grad;
  void* dqkv;
  float* dbias;         // (N, Np), added to; or null
  double* dhead_scale;  // (1), added to; or null
};

struct WindowTable {
  int32_t lanes;
  int64_t (*forward_scratch)(int64_t tokens, int64_t head_dim);   // floats
  int64_t (*backward_scratch)(int64_t tokens, int64_t head_dim);  // floats
  void (*forward)(const WindowTile& tile);
  void (*backward)(const WindowTileGrad& tile);
};

extern const WindowTable window_table_base, window_table_avx2, window_table_avx512;

}  // namespace imgcls::cpu
