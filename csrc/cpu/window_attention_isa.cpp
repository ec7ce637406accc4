// Window attention of one head of one window; compiled once per instruction set.
//
// Rows of q, k, v are gathered into packed float32 matrices first, k transposed. The products then run over vectors of
// keys (logits) or of channels (everything else), in blocks that stay in registers.
#include "simd.h"
#include "window_attention.h"

namespace {

using imgcls::DType;
using imgcls::WindowAttention;
using imgcls::cpu::WindowTile;
using imgcls::cpu::WindowTileGrad;

constexpr int kRows = 4;                               // rows of logits in one block
constexpr int kWideRows = IMGCLS_LANES == 16 ? 8 : 4;  // rows of a product with at most two vectors of columns
constexpr float kShortest = 1e-12f;                    // of torch.nn.functional.normalize

IMGCLS_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Row `from` of head_dim elements as floats, times `factor`; the columns up to `padded` become zero.
template <typename Element>
IMGCLS_INLINE void read_row(float* to, const typename Element::Type* from, int64_t head_dim, int64_t padded,
                            float factor = 1.0f) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(to + d, Element::load(from + d) * splat(factor));
  if (d < padded) {
    typename Element::Type tail[kLanes] = {};
    std::memcpy(tail, from + d, (head_dim - d) * sizeof tail[0]);
    store(to + d, Element::load(tail) * splat(factor));
  }
}

template <typename Element>
IMGCLS_INLINE void write_row(typename Element::Type* to, const float* from, int64_t head_dim) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Element::store(to + d, load(from + d));
  if (d < head_dim) {
    typename Element::Type tail[kLanes];
    Element::store(tail, load(from + d));
    std::memcpy(to + d, tail, (head_dim - d) * sizeof tail[0]);
  }
}

// Part 0, 1, 2 (q, k, v) of a token in the packed tensor, or the token in a tensor of one part.
template <typename T>
IMGCLS_INLINE T* token(T* base, const WindowAttention& p, int64_t row, int32_t head, int parts = 1, int part = 0) {
  return base + ((row * parts + part) * p.heads + head) * static_cast<int64_t>(p.head_dim);
}

IMGCLS_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec total = splat(0.0f);
  for (int64_t d = 0; d < n; d += kLanes) total += load(a + d) * load(b + d);
  return sum(total);
}

IMGCLS_INLINE void multiply_row(float* row, float factor, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) store(row + d, load(row + d) * splat(factor));
}

// Divide a row by its length; returns 1 / length.
IMGCLS_INLINE float normalise(float* row, int64_t n) {
  const float length = __builtin_sqrtf(dot(row, row, n));
  const float inverse = 1.0f / (length < kShortest ? kShortest : length);
  multiply_row(row, inverse, n);
  return inverse;
}

// to (columns, tokens padded) = transpose of from (tokens, columns), with zeros behind the last token; columns is a
// multiple of kLanes.
IMGCLS_INLINE void transpose(float* to, const float* from, int64_t tokens, int64_t padded, int64_t columns) {
  for (int64_t j = 0; j < padded; j += kLanes) {
    for (int64_t d = 0; d < columns; d += kLanes) {
      Vec square[kLanes];
      if (j + kLanes <= tokens) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = load(from + (j + r) * columns + d);
      } else {
        for (int r = 0; r < kLanes; ++r) square[r] = j + r < tokens ? load(from + (j + r) * columns + d) : splat(0.0f);
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (d + r) * padded + j, square[r]);
    }
  }
}

// to (Rows, width) = a b with b (depth, row_b); a(r, t) = a[r * row_a + t * step_a].
template <int Rows, int Columns>
IMGCLS_INLINE void product_block(float* to, int64_t row_to, const float* a, int64_t row_a, int64_t step_a,
                                 const float* b, int64_t row_b, int64_t depth) {
  Vec acc[Rows][Columns] = {};
  multiply<Rows, Columns>(acc, a, row_a, step_a, b, row_b, depth);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store(to + r * row_to + c * kLanes, acc[r][c]);
}

template <int Rows>
IMGCLS_INLINE void product_rows(float* to, int64_t row_to, const float* a, int64_t row_a, int64_t step_a,
                                const float* b, int64_t row_b, int64_t depth, int64_t width) {
  int64_t c = 0;
  for (; c + kBlock * kLanes <= width; c += kBlock * kLanes)
    product_block<Rows, kBlock>(to + c, row_to, a, row_a, step_a, b + c, row_b, depth);
  for (; c + 2 * kLanes <= width; c += 2 * kLanes)
    product_block<Rows, 2>(to + c, row_to, a, row_a, step_a, b + c, row_b, depth);
  for (; c < width; c += kLanes) product_block<Rows, 1>(to + c, row_to, a, row_a, step_a, b + c, row_b, depth);
}

// to (rows, width) = a b, any number of rows
__attribute__((noinline)) void product(float* to, int64_t row_to, const float* a, int64_t row_a, int64_t step_a,
                                       const float* b, int64_t row_b, int64_t depth, int64_t width, int64_t rows) {
  int64_t r = 0;
  if (width <= 2 * kLanes)
    for (; r + kWideRows <= rows; r += kWideRows)
      product_rows<kWideRows>(to + r * row_to, row_to, a + r * row_a, row_a, step_a, b, row_b, depth, width);
  for (; r + kRows <= rows; r += kRows)
    product_rows<kRows>(to + r * row_to, row_to, a + r * row_a, row_a, step_a, b, row_b, depth, width);
  for (; r < rows; ++r) product_rows<1>(to + r * row_to, row_to, a + r * row_a, row_a, step_a, b, row_b, depth, width);
}

// Bias and shift mask added to `count` rows of logits, from row `first` on.
IMGCLS_INLINE void add_bias(float* logits, const WindowTile& t, int64_t first, int64_t count, int64_t padded) {
  for (int64_t r = 0; r < count; ++r) {
    float* row = logits + r * padded;
    const float* bias = t.bias + (first + r) * t.bias_row;
    if (t.regions == nullptr) {
      for (int64_t j = 0; j < padded; j += kLanes) store(row + j, load(row + j) + load(bias + j));
      continue;
    }
    const IVec own = IVec{} + t.regions[first + r];
    for (int64_t j = 0; j < padded; j += kLanes) {
      IVec other;
      std::memcpy(&other, t.regions + j, sizeof other);
      const Vec mask = other != own ? splat(t.p->mask_value) : splat(0.0f);
      store(row + j, load(row + j) + load(bias + j) + mask);
    }
  }
}

// A row of logits becomes exp(logit - largest); returns the sum, and the largest through `most`.
IMGCLS_INLINE float exponentiate(float* row, int64_t padded, float* most) {
  Vec high = load(row);
  for (int64_t j = kLanes; j < padded; j += kLanes) high = larger(high, load(row + j));
  *most = largest(high);
  const Vec shift = splat(*most);
  Vec total = splat(0.0f);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec e = exponential(load(row + j) - shift);
    total += e;
    store(row + j, e);
  }
  return sum(total);
}

// Scratch of the forward pass, in this order.
struct Forward {
  float *q, *k, *v, *kt, *logits, *out;
  int64_t padded, width;

  Forward(float* scratch, int64_t tokens, int64_t head_dim) : padded(round_up(tokens)), width(round_up(head_dim)) {
    q = scratch;
    k = q + tokens * width;
    v = k + tokens * width;
    kt = v + tokens * width;
    logits = kt + width * padded;
    out = logits + kWideRows * padded;
  }
  static int64_t floats(int64_t tokens, int64_t head_dim) {
    const int64_t padded = round_up(tokens), width = round_up(head_dim);
    return 3 * tokens * width + width * padded + kWideRows * padded + kWideRows * width;
  }
};

// q times the scale, k transposed, v; with cosine logits q and k are divided by their lengths, kept in q_inverse,
// k_inverse.
template <typename Element>
IMGCLS_INLINE void gather(const WindowTile& t, int64_t tokens, int64_t width, float* q, float* k, float* v,
                          float* q_inverse, float* k_inverse) {
  const WindowAttention& p = *t.p;
  const auto* qkv = static_cast<const typename Element::Type*>(p.qkv);
  for (int64_t i = 0; i < tokens; ++i) {
    const auto* first = token(qkv, p, t.rows[i], t.head, 3, 0);
    const int64_t part = static_cast<int64_t>(p.heads) * p.head_dim;
    float *qi = q + i * width, *ki = k + i * width;
    read_row<Element>(qi, first, p.head_dim, width, p.head_scale ? 1.0f : p.scale);
    read_row<Element>(ki, first + part, p.head_dim, width);
    read_row<Element>(v + i * width, first + 2 * part, p.head_dim, width);
    if (!p.head_scale) continue;
    const float a = normalise(qi, width), b = normalise(ki, width);
    if (q_inverse) q_inverse[i] = a, k_inverse[i] = b;
    multiply_row(qi, p.head_scale[t.head], width);
  }
}

template <typename Element>
IMGCLS_INLINE void forward(const WindowTile& t) {
  const WindowAttention& p = *t.p;
  const int64_t tokens = static_cast<int64_t>(p.window_h) * p.window_w;
  const Forward s(t.scratch, tokens, p.head_dim);
  auto* out = static_cast<typename Element::Type*>(p.out);
  gather<Element>(t, tokens, s.width, s.q, s.k, s.v, nullptr, nullptr);
  transpose(s.kt, s.k, tokens, s.padded, s.width);
  for (int64_t first = 0; first < tokens; first += kWideRows) {
    const int64_t count = tokens - first < kWideRows ? tokens - first : kWideRows;
    product(s.logits, s.padded, s.q + first * s.width, s.width, 1, s.kt, s.padded, p.head_dim, s.padded, count);
    add_bias(s.logits, t, first, count, s.padded);
    float inverse[kWideRows];
    for (int64_t r = 0; r < count; ++r) {
      float most;
      const float total = exponentiate(s.logits + r * s.padded, s.padded, &most);
      inverse[r] = 1.0f / total;
      if (t.lse) t.lse[first + r] = most + __builtin_logf(total);
    }
    product(s.out, s.width, s.logits, s.padded, 1, s.v, s.width, tokens, s.width, count);
    for (int64_t r = 0; r < count; ++r) {
      multiply_row(s.out + r * s.width, inverse[r], s.width);
      write_row<Element>(token(out, p, t.rows[first + r], t.head), s.out + r * s.width, p.head_dim);
    }
  }
}

// Scratch of the backward pass, in this order.
struct Backward {
  float *q, *k, *v, *g, *kt, *vt, *prob, *ds, *dq, *dk, *dv, *q_inverse, *k_inverse;
  int64_t padded, width;

  Backward(float* scratch, int64_t tokens, int64_t head_dim) : padded(round_up(tokens)), width(round_up(head_dim)) {
    const int64_t rows = tokens * width, columns = width * padded, square = tokens * padded;
    q = scratch;
    k = q + rows, v = k + rows, g = v + rows, dq = g + rows, dk = dq + rows, dv = dk + rows;
    kt = dv + rows, vt = kt + columns;
    prob = vt + columns, ds = prob + square;
    q_inverse = ds + square, k_inverse = q_inverse + padded;
  }
  static int64_t floats(int64_t tokens, int64_t head_dim) {
    const int64_t padded = round_up(tokens), width = round_up(head_dim);
    return 7 * tokens * width + 2 * width * padded + 2 * tokens * padded + 2 * padded;
  }
};

// From the gradient of x / |x| to that of x: (dy - y (y . dy)) / |x|; below the shortest length the division is by a
// constant.
IMGCLS_INLINE void normalise_grad(float* dy, const float* y, float inverse, int64_t n) {
  const float along = inverse < 1.0f / kShortest ? dot(dy, y, n) : 0.0f;
  for (int64_t d = 0; d < n; d += kLanes) store(dy + d, (load(dy + d) - load(y + d) * splat(along)) * splat(inverse));
}

template <typename Element>
IMGCLS_INLINE void backward(const WindowTileGrad& g) {
  const WindowTile& t = g.tile;
  const WindowAttention& p = *t.p;
  const int64_t tokens = static_cast<int64_t>(p.window_h) * p.window_w;
  const Backward s(t.scratch, tokens, p.head_dim);
  const int64_t n = s.padded, w = s.width;
  gather<Element>(t, tokens, w, s.q, s.k, s.v, s.q_inverse, s.k_inverse);
  const auto* grad = static_cast<const typename Element::Type*>(g.grad);
  for (int64_t i = 0; i < tokens; ++i) read_row<Element>(s.g + i * w, token(grad, p, t.rows[i], t.head), p.head_dim, w);
  transpose(s.kt, s.k, tokens, n, w);
  transpose(s.vt, s.v, tokens, n, w);
  product(s.prob, n, s.q, w, 1, s.kt, n, p.head_dim, n, tokens);
  product(s.ds, n, s.g, w, 1, s.vt, n, p.head_dim, n, tokens);
  add_bias(s.prob, t, 0, tokens, n);
  for (int64_t i = 0; i < tokens; ++i) {
    float *prob = s.prob + i * n, *ds = s.ds + i * n;
    // as in the forward pass, not from lse: the distance to the row's largest is smaller, so it is rounded less
    float most;
    const float inverse = 1.0f / exponentiate(prob, n, &most);
    Vec weighted = splat(0.0f);
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec probability = load(prob + j) * splat(inverse);
      weighted += probability * load(ds + j);
      store(prob + j, probability);
    }
    const Vec delta = splat(sum(weighted));
    for (int64_t j = 0; j < n; j += kLanes) store(ds + j, load(prob + j) * (load(ds + j) - delta));
    if (g.dbias)
      for (int64_t j = 0; j < n; j += kLanes) store(g.dbias + i * n + j, load(g.dbias + i * n + j) + load(ds + j));
  }
  product(s.dq, w, s.ds, n, 1, s.k, w, tokens, w, tokens);
  product(s.dk, w, s.ds, 1, n, s.q, w, tokens, w, tokens);
  product(s.dv, w, s.prob, 1, n, s.g, w, tokens, w, tokens);
  const float scale = p.head_scale ? p.head_scale[t.head] : p.scale;
  auto* dqkv = static_cast<typename Element::Type*>(g.dqkv);
  double dscale = 0.0;
  for (int64_t i = 0; i < tokens; ++i) {
    float *dq = s.dq + i * w, *dk = s.dk + i * w, *q = s.q + i * w;
    if (p.head_scale) {
      multiply_row(q, 1.0f / scale, w);  // the normalised q again
      dscale += dot(dq, q, w);
    }
    multiply_row(dq, scale, w);
    if (p.head_scale) {
      normalise_grad(dq, q, s.q_inverse[i], w);
      normalise_grad(dk, s.k + i * w, s.k_inverse[i], w);
    }
    write_row<Element>(token(dqkv, p, t.rows[i], t.head, 3, 0), dq, p.head_dim);
    write_row<Element>(token(dqkv, p, t.rows[i], t.head, 3, 1), dk, p.head_dim);
    write_row<Element>(token(dqkv, p, t.rows[i], t.head, 3, 2), s.dv + i * w, p.head_dim);
  }
  if (g.dhead_scale) *g.dhead_scale += dscale;
}

void run_forward(const WindowTile& t) {
  switch (t.p->dtype) {
    case DType::kFloat16: return forward<Float16>(t);
    case DType::kBFloat16: return forward<BFloat16>(t);
    default: return forward<Float32>(t);
  }
}

void run_backward(const WindowTileGrad& t) {
  switch (t.tile.p->dtype) {
    case DType::kFloat16: return backward<Float16>(t);
    case DType::kBFloat16: return backward<BFloat16>(t);
    default: return backward<Float32>(t);
  }
}

}  // namespace

#define IMGCLS_JOIN(a, b) a##b
#define IMGCLS_NAMED(a, b) IMGCLS_JOIN(a, b)

namespace imgcls::cpu {

const WindowTable IMGCLS_NAMED(window_table_, IMGCLS_ISA) = {kLanes, Forward::floats, Backward::floats, run_forward,
                                                             run_backward};

}  // namespace imgcls::cpu
