// Vectors of floats as wide as the instruction set that this translation unit is compiled for, by the vector extension
// of GCC and Clang. Included only by *_isa.cpp, which CMake compiles once per instruction set.
//
// Everything is in an anonymous namespace, and no std:: template is used: the linker must never take a function that
// was compiled with AVX-512 for one that runs on an older machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"

#if defined(__AVX512F__)
#define IMGCLS_LANES 16
#elif defined(__AVX2__)
#define IMGCLS_LANES 8
#else
#define IMGCLS_LANES 4
#endif

#define IMGCLS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = IMGCLS_LANES;
// Vectors of columns that one block of the matrix products keeps in registers: 32 registers allow four.
constexpr int kBlock = IMGCLS_LANES == 16 ? 4 : 2;

typedef float Vec __attribute__((vector_size(4 * IMGCLS_LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * IMGCLS_LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * IMGCLS_LANES)));
typedef uint16_t HVec __attribute__((vector_size(2 * IMGCLS_LANES)));

IMGCLS_INLINE Vec splat(float x) { return Vec{} + x; }

IMGCLS_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

IMGCLS_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The larger one; b where they cannot be compared. Keeps a NaN of b, not of a.
IMGCLS_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Lanes `by` places further on, around the end.
template <int by>
IMGCLS_INLINE Vec rotate(Vec v) {
  IVec from;
  for (int k = 0; k < kLanes; ++k) from[k] = (k + by) % kLanes;
  return __builtin_shuffle(v, from);
}

IMGCLS_INLINE float sum(Vec v) {
  if (kLanes > 8) v += rotate<kLanes == 16 ? 8 : 0>(v);
  if (kLanes > 4) v += rotate<kLanes >= 8 ? 4 : 0>(v);
  v += rotate<2>(v);
  v += rotate<1>(v);
  return v[0];
}

IMGCLS_INLINE float largest(Vec v) {
  if (kLanes > 8) v = larger(v, rotate<kLanes == 16 ? 8 : 0>(v));
  if (kLanes > 4) v = larger(v, rotate<kLanes >= 8 ? 4 : 0>(v));
  v = larger(v, rotate<2>(v));
  v = larger(v, rotate<1>(v));
  return v[0];
}

// e^x for x up to 88, about 2 units in the last place; exactly 0 below the smallest normal result, NaN stays NaN.
// Cody and Waite's reduction, the polynomial of Cephes' expf.
IMGCLS_INLINE Vec exponential(Vec x) {
  const Vec low = splat(-87.33654f);
  const Vec y = x < low ? low : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec shifted = y * splat(1.44269504088896341f) + magic;
  const Vec whole = shifted - magic;
  const Vec r = y - whole * splat(0.693359375f) + whole * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  // the low bits of `shifted` are the whole number: moved into the exponent they multiply by 2^whole
  const Vec power = reinterpret_cast<Vec>((reinterpret_cast<IVec>(shifted) << 23) + (127 << 23));
  return x < low ? splat(0.0f) : p * power;
}

// Floats from and to the element types, rounding to nearest even as PyTorch does.
struct Float32 {
  typedef float Type;
  static IMGCLS_INLINE Vec load(const float* p) { return ::load(p); }
  static IMGCLS_INLINE void store(float* p, Vec v) { ::store(p, v); }
};

struct BFloat16 {
  typedef uint16_t Type;
  static IMGCLS_INLINE Vec load(const uint16_t* p) {
    HVec h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec>(__builtin_convertvector(h, UVec) << 16);
  }
  static IMGCLS_INLINE void store(uint16_t* p, Vec v) {
    const UVec bits = reinterpret_cast<UVec>(v);
    const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UVec nan = UVec{} + 0x7fc0u;
    const HVec h = __builtin_convertvector(v == v ? rounded : nan, HVec);
    std::memcpy(p, &h, sizeof h);
  }
};

struct Float16 {
  typedef uint16_t Type;
  static IMGCLS_INLINE Vec load(const uint16_t* p) {
    HVec h;
    std::memcpy(&h, p, sizeof h);
    const UVec bits = __builtin_convertvector(h, UVec);
    const UVec magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const Vec scaled = reinterpret_cast<Vec>(magnitude) * splat(0x1p112f);  // moves the exponent's bias; exact
    const UVec special = magnitude | 0x7f800000u;                           // infinity and NaN
    return reinterpret_cast<Vec>((magnitude >= 0x0f800000u ? special : reinterpret_cast<UVec>(scaled)) | sign);
  }
  static IMGCLS_INLINE void store(uint16_t* p, Vec v) {
    const UVec bits = reinterpret_cast<UVec>(v);
    const UVec sign = bits & 0x80000000u, magnitude = bits ^ sign;
    // below 2^-14 the result has no exponent: adding 0.5 lets the hardware round at the right place
    const UVec small = reinterpret_cast<UVec>(reinterpret_cast<Vec>(magnitude) + splat(0.5f)) - 0x3f000000u;
    const UVec normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    const UVec infinite = UVec{} + 0x7c00u, nan = UVec{} + 0x7e00u;
    UVec result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x47800000u ? infinite : result;
    result = magnitude > 0x7f800000u ? nan : result;
    const HVec h = __builtin_convertvector(result | (sign >> 16), HVec);
    std::memcpy(p, &h, sizeof h);
  }
};

// Swaps the off-diagonal blocks of every 2 x 2 square of blocks of `half` x `half`: one of the log2(kLanes) steps of
// a transposition (Eklundh, "A fast computer method for matrix transposing", 1972).
template <int half>
IMGCLS_INLINE void swap_blocks(Vec (&rows)[kLanes]) {
  IVec upper, lower;
  for (int k = 0; k < kLanes; ++k) {
    upper[k] = k & half ? kLanes + k - half : k;
    lower[k] = k & half ? kLanes + k : k + half;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (r & half) continue;
    const Vec a = rows[r], b = rows[r + half];
    rows[r] = __builtin_shuffle(a, b, upper);
    rows[r + half] = __builtin_shuffle(a, b, lower);
  }
}

// rows[i][j] <- rows[j][i]
IMGCLS_INLINE void transpose_square(Vec (&rows)[kLanes]) {
  if (kLanes > 8) swap_blocks<kLanes == 16 ? 8 : 1>(rows);
  if (kLanes > 4) swap_blocks<kLanes >= 8 ? 4 : 1>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

// A product of matrices that stays in registers: acc[r][c] += sum_t a[r * row_a + t * step_a] * b[t * row_b + c *
// kLanes].
template <int Rows, int Columns>
IMGCLS_INLINE void multiply(Vec (&acc)[Rows][Columns], const float* a, int64_t row_a, int64_t step_a, const float* b,
                            int64_t row_b, int64_t depth) {
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) right[c] = load(b + t * row_b + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec left = splat(a[r * row_a + t * step_a]);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) acc[r][c] += left * right[c];
    }
  }
}

}  // namespace
