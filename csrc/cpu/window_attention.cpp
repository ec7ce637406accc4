// Threads and addresses of window attention on the CPU; the arithmetic is in window_attention_isa.cpp.
#include "window_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"

namespace imgcls::cpu {

namespace {

// The windows are cut into so many parts, each with its own sum of the bias gradient: as many as fit into kSumBytes, in
// these bounds, whatever the number of threads, so that results do not depend on it.
constexpr int64_t kFewestParts = 8, kMostParts = 64, kSumBytes = 32 << 20;

const WindowTable& table() {
#if defined(IMGCLS_X86_KERNELS)
  switch (isa_level()) {
    case kAvx512: return window_table_avx512;
    case kAvx2: return window_table_avx2;
    default: break;
  }
#endif
  return window_table_base;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

int32_t region(int64_t position, int64_t size, int64_t window, int64_t shift) {
  return position < size - window ? 0 : position < size - shift ? 1 : 2;
}

// Addresses of a call, and the scratch of each thread.
class Windows {
 public:
  Windows(const WindowAttention& p, const WindowTable& t, int threads, int64_t scratch)
      : p_(p), tokens_(static_cast<int64_t>(p.window_h) * p.window_w), rows_(threads), regions_(threads) {
    down_ = p.height / p.window_h;
    across_ = p.width / p.window_w;
    padded_ = (tokens_ + t.lanes - 1) / t.lanes * t.lanes;
    for (int thread = 0; thread < threads; ++thread) {
      rows_[thread].resize(tokens_);
      regions_[thread].resize(padded_);
      scratch_.push_back(allocate(scratch));
    }
    pad_bias();
  }

  // A head of a window; valid until this thread asks for the next.
  WindowTile tile(int64_t window, int32_t head, int thread) {
    const int64_t image = window / (down_ * across_), rest = window % (down_ * across_);
    const int64_t wy = rest / across_, wx = rest % across_;
    const bool bordered = (p_.shift_h > 0 && wy == down_ - 1) || (p_.shift_w > 0 && wx == across_ - 1);
    int64_t* row = rows_[thread].data();
    int32_t* part = regions_[thread].data();
    for (int64_t ty = 0; ty < p_.window_h; ++ty) {
      const int64_t sy = p_.grid ? ty * down_ + wy : wy * p_.window_h + ty, y = (sy + p_.shift_h) % p_.height;
      for (int64_t tx = 0; tx < p_.window_w; ++tx) {
        const int64_t sx = p_.grid ? tx * across_ + wx : wx * p_.window_w + tx, x = (sx + p_.shift_w) % p_.width;
        *row++ = (image * p_.height + y) * p_.width + x;
        *part++ = region(sy, p_.height, p_.window_h, p_.shift_h) * 3 + region(sx, p_.width, p_.window_w, p_.shift_w);
      }
    }
    WindowTile t{};
    t.p = &p_;
    t.rows = rows_[thread].data();
    t.bias = bias_.get() + (p_.bias ? head * tokens_ * padded_ : 0);
    t.bias_row = p_.bias ? padded_ : 0;
    t.regions = bordered ? regions_[thread].data() : nullptr;
    t.lse = p_.lse ? p_.lse + (window * p_.heads + head) * tokens_ : nullptr;
    t.scratch = scratch_[thread].get();
    t.head = head;
    return t;
  }

 private:
  // Rows of the bias with -inf behind the last token, so that padded keys get the probability 0.
  void pad_bias() {
    const int64_t rows = p_.bias ? p_.heads * tokens_ : 1;
    bias_ = allocate(rows * padded_);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = bias_.get() + r * padded_;
      if (p_.bias)
        std::copy_n(p_.bias + r * tokens_, tokens_, to);
      else
        std::fill_n(to, tokens_, 0.0f);
      std::fill(to + tokens_, to + padded_, -std::numeric_limits<float>::infinity());
    }
  }

  const WindowAttention& p_;
  int64_t tokens_, down_, across_, padded_;
  std::vector<std::vector<int64_t>> rows_;
  std::vector<std::vector<int32_t>> regions_;
  std::vector<Buffer> scratch_;
  Buffer bias_;
};

int bounded(int threads, int64_t items) {
  return static_cast<int>(std::clamp<int64_t>(items, 1, std::max(threads, 1)));
}

}  // namespace

void window_attention(const WindowAttention& p, int threads) {
  const WindowTable& t = table();
  const int64_t items = p.batch * (p.height / p.window_h) * (p.width / p.window_w) * p.heads;
  threads = bounded(threads, items);
  Windows windows(p, t, threads, t.forward_scratch(static_cast<int64_t>(p.window_h) * p.window_w, p.head_dim));
  parallel_for(items, threads, [&](int64_t item, int thread) {
    t.forward(windows.tile(item / p.heads, static_cast<int32_t>(item % p.heads), thread));
  });
}

void window_attention_grad(const WindowAttentionGrad& g, int threads) {
  const WindowTable& t = table();
  const WindowAttention& p = g.forward;
  const int64_t tokens = static_cast<int64_t>(p.window_h) * p.window_w;
  const int64_t count = p.batch * (p.height / p.window_h) * (p.width / p.window_w);
  const int64_t padded = (tokens + t.lanes - 1) / t.lanes * t.lanes, square = tokens * padded;
  const int64_t fitting = kSumBytes / (p.heads * square * static_cast<int64_t>(sizeof(float)));
  const int64_t parts = std::min(count, std::clamp(fitting, kFewestParts, kMostParts));
  threads = bounded(threads, parts);
  Windows windows(p, t, threads, t.backward_scratch(tokens, p.head_dim));
  Buffer dbias = g.dbias ? allocate(parts * p.heads * square) : nullptr;
  std::vector<double> dscale(parts * p.heads, 0.0);
  parallel_for(parts, threads, [&](int64_t part, int thread) {
    float* sums = dbias ? dbias.get() + part * p.heads * square : nullptr;
    if (sums) std::fill_n(sums, p.heads * square, 0.0f);
    for (int64_t window = part * count / parts; window < (part + 1) * count / parts; ++window) {
      for (int32_t head = 0; head < p.heads; ++head) {
        WindowTileGrad tile{windows.tile(window, head, thread), g.grad, g.dqkv, nullptr, nullptr};
        tile.dbias = sums ? sums + head * square : nullptr;
        tile.dhead_scale = g.dhead_scale ? &dscale[part * p.heads + head] : nullptr;
        t.backward(tile);
      }
    }
  });
  for (int64_t head = 0; g.dhead_scale && head < p.heads; ++head) {
    double total = 0.0;
    for (int64_t part = 0; part < parts; ++part) total += dscale[part * p.heads + head];
    g.dhead_scale[head] = static_cast<float>(total);
  }
  std::vector<double> total(g.dbias ? tokens : 0);
  for (int64_t row = 0; g.dbias && row < p.heads * tokens; ++row) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t part = 0; part < parts; ++part) {
      const float* from = dbias.get() + part * p.heads * square + row * padded;
      for (int64_t j = 0; j < tokens; ++j) total[j] += from[j];
    }
    std::copy(total.begin(), total.end(), g.dbias + row * tokens);
  }
}

}  // namespace imgcls::cpu
