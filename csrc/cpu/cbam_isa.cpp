// The passes of CBAM over one image; compiled once per instruction set.
//
// A pass keeps the sums of a tile of positions in registers and runs along their channels, so that memory is read in
// order and what belongs to a channel is loaded once per tile. Which positions share a tile depends on their number
// alone.
#include "cbam.h"
#include "simd.h"

namespace {

using imgcls::cpu::CbamPasses;
using imgcls::cpu::CbamPixels;
using imgcls::cpu::CbamSpread;
using imgcls::cpu::CbamTable;
using imgcls::cpu::kCbamKernelMax;

constexpr int kTile = IMGCLS_LANES == 16 ? 4 : 2;  // positions of one tile: 32 registers, or 16
constexpr int kRowVectors = 4;                     // vectors of a convolution's row that are summed at once
constexpr int kProducts = 4;                       // vectors that one reading of a weight matrix serves

#define IMGCLS_INLINE_LAMBDA __attribute__((always_inline))

// A whole vector of channels.
struct Whole {
  template <typename Element>
  IMGCLS_INLINE Vec load(const typename Element::Type* p) {
    return Element::load(p);
  }
  template <typename Element>
  IMGCLS_INLINE void store(typename Element::Type* p, Vec v) {
    Element::store(p, v);
  }
  IMGCLS_INLINE Vec or_else(Vec v, float) { return v; }
};

// The first `count` channels of a vector: the end of a position that is no multiple of the vector.
struct Part {
  int64_t count;

  template <typename Element>
  inline __attribute__((always_inline)) Vec load(const typename Element::Type* p) const {
    typename Element::Type tail[kLanes] = {};
    for (int64_t k = 0; k < count; ++k) tail[k] = p[k];
    return Element::load(tail);
  }
  template <typename Element>
  inline __attribute__((always_inline)) void store(typename Element::Type* p, Vec v) const {
    typename Element::Type tail[kLanes];
    Element::store(tail, v);
    for (int64_t k = 0; k < count; ++k) p[k] = tail[k];
  }
  // v, with `other` in the lanes behind the end.
  inline __attribute__((always_inline)) Vec or_else(Vec v, float other) const {
    float lanes[kLanes];
    ::store(lanes, v);
    for (int64_t k = count; k < kLanes; ++k) lanes[k] = other;
    return ::load(lanes);
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// each(Whole or Part, channel) along the channels of a position.
template <typename Each>
IMGCLS_INLINE void along_channels(int64_t channels, Each each) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) each(Whole{}, c);
  if (c < channels) each(Part{channels - c}, c);
}

// run(Count<positions in the tile>, first position) over all positions.
template <typename Run>
IMGCLS_INLINE void in_tiles(int64_t pixels, Run run) {
  int64_t p = 0;
  for (; p + kTile <= pixels; p += kTile) run(Count<kTile>{}, p);
  switch (pixels - p) {
    case 3: return run(Count<3>{}, p);
    case 2: return run(Count<2>{}, p);
    case 1: return run(Count<1>{}, p);
    default: return;
  }
}

template <typename Element>
IMGCLS_INLINE const typename Element::Type* at_position(const void* base, int64_t position, int64_t channels) {
  return static_cast<const typename Element::Type*>(base) + position * channels;
}

template <typename Element>
IMGCLS_INLINE typename Element::Type* at_position(void* base, int64_t position, int64_t channels) {
  return static_cast<typename Element::Type*>(base) + position * channels;
}

template <typename Element>
void pool(const CbamPixels& at, float* mean, float* most) {
  const int64_t channels = at.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    store(mean + c, splat(0.0f));
    store(most + c, splat(-__builtin_inff()));
  }
  in_tiles(at.pixels, [&](auto tile, int64_t p) IMGCLS_INLINE_LAMBDA {
    const auto* x = at_position<Element>(at.x, p, channels);
    along_channels(channels, [&](auto slice, int64_t c) IMGCLS_INLINE_LAMBDA {
      Vec total = splat(0.0f), high = load(most + c);
#pragma GCC unroll 8
      for (int k = 0; k < tile.value; ++k) {
        const Vec v = slice.template load<Element>(x + k * channels + c);
        total += v;
        high = larger(v, high);
      }
      store(mean + c, load(mean + c) + total);
      store(most + c, high);
    });
  });
  const Vec pixels = splat(static_cast<float>(at.pixels));
  for (int64_t c = 0; c < channels; c += kLanes) store(mean + c, load(mean + c) / pixels);
}

template <typename Element>
void stats(const CbamPixels& at, const float* gate, float* mean, float* most) {
  const int64_t channels = at.channels;
  in_tiles(at.pixels, [&](auto tile, int64_t p) IMGCLS_INLINE_LAMBDA {
    constexpr int n = decltype(tile)::value;
    const auto* x = at_position<Element>(at.x, p, channels);
    Vec total[n], high[n];
    for (int k = 0; k < n; ++k) total[k] = splat(0.0f), high[k] = splat(-__builtin_inff());
    along_channels(channels, [&](auto slice, int64_t c) IMGCLS_INLINE_LAMBDA {
      const Vec g = load(gate + c);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        const Vec y = slice.template load<Element>(x + k * channels + c) * g;
        total[k] += y;
        high[k] = larger(slice.or_else(y, -__builtin_inff()), high[k]);
      }
    });
    for (int k = 0; k < n; ++k) {
      mean[p + k] = sum(total[k]) / static_cast<float>(channels);
      most[p + k] = largest(high[k]);
    }
  });
}

template <typename Element, bool Residual, bool Relu>
void apply_as(const CbamPixels& at, const float* gate, const float* gate_p, const void* residual, void* out) {
  const int64_t channels = at.channels;
  in_tiles(at.pixels, [&](auto tile, int64_t p) IMGCLS_INLINE_LAMBDA {
    constexpr int n = decltype(tile)::value;
    const auto* x = at_position<Element>(at.x, p, channels);
    const auto* other = Residual ? at_position<Element>(residual, p, channels) : nullptr;
    auto* to = at_position<Element>(out, p, channels);
    Vec factor[n];
    for (int k = 0; k < n; ++k) factor[k] = splat(gate_p[p + k]);
    along_channels(channels, [&](auto slice, int64_t c) IMGCLS_INLINE_LAMBDA {
      const Vec g = load(gate + c);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        const int64_t i = k * channels + c;
        Vec v = slice.template load<Element>(x + i) * g * factor[k];
        // the tile to come: the processor's own prefetch stops at the end of each page
        __builtin_prefetch(to + i + n * channels, 1);
        if (Residual) {
          __builtin_prefetch(other + i + n * channels);
          v += slice.template load<Element>(other + i);
        }
        if (Relu) v = v < splat(0.0f) ? splat(0.0f) : v;  // a NaN stays one
        slice.template store<Element>(to + i, v);
      }
    });
  });
}

template <typename Element>
void apply(const CbamPixels& at, const float* gate, const float* gate_p, const void* residual, bool relu, void* out) {
  if (residual != nullptr)
    return relu ? apply_as<Element, true, true>(at, gate, gate_p, residual, out)
                : apply_as<Element, true, false>(at, gate, gate_p, residual, out);
  return relu ? apply_as<Element, false, true>(at, gate, gate_p, residual, out)
              : apply_as<Element, false, false>(at, gate, gate_p, residual, out);
}

template <typename Element, bool Relu>
void grad_apply_as(const CbamPixels& at, const void* grad, const void* out, void* masked, const float* gate,
                   const float* most, float* dot, float* ties) {
  const int64_t channels = at.channels;
  in_tiles(at.pixels, [&](auto tile, int64_t p) IMGCLS_INLINE_LAMBDA {
    constexpr int n = decltype(tile)::value;
    const auto* x = at_position<Element>(at.x, p, channels);
    const auto* from = at_position<Element>(grad, p, channels);
    const auto* result = Relu ? at_position<Element>(out, p, channels) : nullptr;
    auto* to = Relu ? at_position<Element>(masked, p, channels) : nullptr;
    Vec total[n], count[n], high[n];
    for (int k = 0; k < n; ++k) total[k] = splat(0.0f), count[k] = splat(0.0f), high[k] = splat(most[p + k]);
    along_channels(channels, [&](auto slice, int64_t c) IMGCLS_INLINE_LAMBDA {
      const Vec g = load(gate + c);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        const int64_t i = k * channels + c;
        const Vec y = slice.template load<Element>(x + i) * g;
        Vec dout = slice.template load<Element>(from + i);
        if (Relu) {
          dout = slice.template load<Element>(result + i) <= splat(0.0f) ? splat(0.0f) : dout;
          slice.template store<Element>(to + i, dout);
        }
        total[k] += dout * y;
        count[k] += slice.or_else(y, __builtin_nanf("")) == high[k] ? splat(1.0f) : splat(0.0f);
      }
    });
    for (int k = 0; k < n; ++k) {
      dot[p + k] = sum(total[k]);
      ties[p + k] = sum(count[k]);
    }
  });
}

template <typename Element>
void grad_apply(const CbamPixels& at, const void* grad, const void* out, void* masked, const float* gate,
                const float* most, float* dot, float* ties) {
  if (out != nullptr) return grad_apply_as<Element, true>(at, grad, out, masked, gate, most, dot, ties);
  return grad_apply_as<Element, false>(at, grad, out, masked, gate, most, dot, ties);
}

// What CbamSpread holds of one position, in all lanes.
struct Position {
  Vec gate, flat, peak, most;
};

IMGCLS_INLINE Position position(const CbamSpread& spread, int64_t p) {
  return {splat(spread.gate[p]), splat(spread.flat[p]), splat(spread.peak[p]), splat(spread.most[p])};
}

IMGCLS_INLINE Vec grad_of_y(const Position& at, Vec dout, Vec y) {
  return dout * at.gate + at.flat + (y == at.most ? at.peak : splat(0.0f));
}

template <typename Element>
void grad_gate(const CbamPixels& at, const void* grad, const float* gate, const CbamSpread& spread, const float* most,
               float* dgate, float* ties) {
  const int64_t channels = at.channels;
  in_tiles(at.pixels, [&](auto tile, int64_t p) IMGCLS_INLINE_LAMBDA {
    constexpr int n = decltype(tile)::value;
    const auto* x = at_position<Element>(at.x, p, channels);
    const auto* from = at_position<Element>(grad, p, channels);
    Position here[n];
    for (int k = 0; k < n; ++k) here[k] = position(spread, p + k);
    along_channels(channels, [&](auto slice, int64_t c) IMGCLS_INLINE_LAMBDA {
      const Vec g = load(gate + c), high = load(most + c);
      Vec total = splat(0.0f), count = load(ties + c);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        const Vec v = slice.template load<Element>(x + k * channels + c);
        total += grad_of_y(here[k], slice.template load<Element>(from + k * channels + c), v * g) * v;
        count += v == high ? splat(1.0f) : splat(0.0f);
      }
      store(dgate + c, load(dgate + c) + total);
      store(ties + c, count);
    });
  });
}

template <typename Element>
void grad_input(const CbamPixels& at, const void* grad, const float* gate, const CbamSpread& spread, const float* flat,
                const float* peak, const float* most, void* dx) {
  const int64_t channels = at.channels;
  in_tiles(at.pixels, [&](auto tile, int64_t p) IMGCLS_INLINE_LAMBDA {
    constexpr int n = decltype(tile)::value;
    const auto* x = at_position<Element>(at.x, p, channels);
    const auto* from = at_position<Element>(grad, p, channels);
    auto* to = at_position<Element>(dx, p, channels);
    Position here[n];
    for (int k = 0; k < n; ++k) here[k] = position(spread, p + k);
    along_channels(channels, [&](auto slice, int64_t c) IMGCLS_INLINE_LAMBDA {
      const Vec g = load(gate + c), base = load(flat + c), top = load(peak + c), high = load(most + c);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        const int64_t i = k * channels + c;
        const Vec v = slice.template load<Element>(x + i);
        const Vec dy = grad_of_y(here[k], slice.template load<Element>(from + i), v * g);
        slice.template store<Element>(to + i, dy * g + base + (v == high ? top : splat(0.0f)));
      }
    });
  });
}

template <int Vectors, int Columns>
IMGCLS_INLINE void product_block(const float* w, int64_t rows, int64_t columns, const float* in, int64_t row,
                                 int64_t step, float* out) {
  Vec total[Vectors][Columns];
  for (int v = 0; v < Vectors; ++v)
    for (int c = 0; c < Columns; ++c) total[v][c] = splat(0.0f);
  multiply<Vectors, Columns>(total, in, row, step, w, columns, rows);
  for (int v = 0; v < Vectors; ++v)
    for (int c = 0; c < Columns; ++c) store(out + v * columns + c * kLanes, total[v][c]);
}

template <int Vectors>
void products_of(const float* w, int64_t rows, int64_t columns, const float* in, int64_t row, int64_t step,
                 float* out) {
  int64_t c = 0;
  for (; c + kBlock * kLanes <= columns; c += kBlock * kLanes)
    product_block<Vectors, kBlock>(w + c, rows, columns, in, row, step, out + c);
  for (; c < columns; c += kLanes) product_block<Vectors, 1>(w + c, rows, columns, in, row, step, out + c);
}

void products(const float* w, int64_t rows, int64_t columns, int64_t vectors, const float* in, int64_t row,
              int64_t step, float* out) {
  for (; vectors >= kProducts; vectors -= kProducts, in += kProducts * row, out += kProducts * columns)
    products_of<kProducts>(w, rows, columns, in, row, step, out);
  for (; vectors > 0; --vectors, in += row, out += columns) products_of<1>(w, rows, columns, in, row, step, out);
}

void sigmoid(const float* in, float a, float b, int64_t n, float* out) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec x = splat(a) * load(in + k) + splat(b);
    const Vec e = exponential(x < zero ? x : -x), upper = one / (one + e);
    store(out + k, x < zero ? e * upper : upper);
  }
}

template <int Vectors>
IMGCLS_INLINE void correlate_block(const float* in, int64_t stride, const float* weight, int64_t kernel, float* out) {
  Vec total[Vectors];
  for (int v = 0; v < Vectors; ++v) total[v] = load(out + v * kLanes);
  for (int64_t dy = 0; dy < kernel; ++dy)
    for (int64_t dx = 0; dx < kernel; ++dx) {
      const Vec factor = splat(weight[dy * kernel + dx]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) total[v] += factor * load(in + dy * stride + dx + v * kLanes);
    }
  for (int v = 0; v < Vectors; ++v) store(out + v * kLanes, total[v]);
}

void correlate(const float* in, int64_t stride, const float* weight, int64_t kernel, int64_t width, float* out) {
  int64_t x = 0;
  for (; x + (kRowVectors - 1) * kLanes < width; x += kRowVectors * kLanes)
    correlate_block<kRowVectors>(in + x, stride, weight, kernel, out + x);
  for (; x < width; x += kLanes) correlate_block<1>(in + x, stride, weight, kernel, out + x);
}

template <int Kernel>
void correlate_weights_of(const float* in, const float* grad, int64_t stride, int64_t height, int64_t width,
                          float* out) {
  for (int dy = 0; dy < Kernel; ++dy) {
    Vec total[Kernel];
    for (int dx = 0; dx < Kernel; ++dx) total[dx] = splat(0.0f);
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; x += kLanes) {
        const Vec g = load(grad + y * stride + x);
#pragma GCC unroll 8
        for (int dx = 0; dx < Kernel; ++dx) total[dx] += g * load(in + (y + dy) * stride + x + dx);
      }
    for (int dx = 0; dx < Kernel; ++dx) out[dy * Kernel + dx] = sum(total[dx]);
  }
}

void correlate_weights(const float* in, const float* grad, int64_t stride, int64_t height, int64_t width,
                       int64_t kernel, float* out) {
  static_assert(kCbamKernelMax == 7, "a case for each odd kernel");
  switch (kernel) {
    case 7: return correlate_weights_of<7>(in, grad, stride, height, width, out);
    case 5: return correlate_weights_of<5>(in, grad, stride, height, width, out);
    case 3: return correlate_weights_of<3>(in, grad, stride, height, width, out);
    default: return correlate_weights_of<1>(in, grad, stride, height, width, out);
  }
}

template <typename Element>
constexpr CbamPasses kPassesOf = {pool<Element>,       stats<Element>,     apply<Element>,
                                  grad_apply<Element>, grad_gate<Element>, grad_input<Element>};

}  // namespace

#define IMGCLS_JOIN(a, b) a##b
#define IMGCLS_NAMED(a, b) IMGCLS_JOIN(a, b)

namespace imgcls::cpu {

const CbamTable IMGCLS_NAMED(cbam_table_, IMGCLS_ISA) = {
    {kPassesOf<Float32>, kPassesOf<Float16>, kPassesOf<BFloat16>},  // the order of DType
    products,
    sigmoid,
    correlate,
    correlate_weights};

}  // namespace imgcls::cpu
