// Threads, addresses and the order of the passes of CBAM on the CPU; the arithmetic is in cbam_isa.cpp.
//
// A thread takes a few images from beginning to end, so that all passes but the first find them in its cache: what
// needs neighbours follows a few rows behind what they are made from, and the direction turns between passes, because
// the rows that were read last are the ones still there.
#include "cbam.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"

namespace imgcls::cpu {

namespace {

constexpr int64_t kBandBytes = 64 * 1024;     // rows that a pass takes at once
constexpr int64_t kGroupBytes = 1024 * 1024;  // of images that stay in a second-level cache
constexpr int64_t kGroupImages = 32;          // that share one reading of w1 and w2, at most
constexpr int64_t kPerWeight = 4;             // bytes of images for each byte of w1 and w2
constexpr int64_t kVectorsPerItem = 16;       // rows of a weight gradient that a thread takes at once

const CbamTable& table() {
#if defined(IMGCLS_X86_KERNELS)
  switch (isa_level()) {
    case kAvx512: return cbam_table_avx512;
    case kAvx2: return cbam_table_avx2;
    default: break;
  }
#endif
  return cbam_table_base;
}

// Zeros, aligned for the widest vectors. By calloc: large blocks come from the system as zeros and are not written
// twice.
class Floats {
 public:
  explicit Floats(int64_t count) {
    constexpr size_t kLine = kPadding * sizeof(float);
    p_.reset(std::calloc(static_cast<size_t>(count) * sizeof(float) + 2 * kLine, 1));
    if (p_ == nullptr) throw std::bad_alloc();
    first_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p_.get()) + kLine - 1) / kLine * kLine);
  }
  float* at(int64_t index = 0) const { return first_ + index; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> p_;
  float* first_;
};

// Sizes and addresses that follow from the parameters.
struct Layout {
  explicit Layout(const Cbam& p)
      : pixels(p.height * p.width),
        channels(p.channels),
        columns(padded(p.channels)),
        hidden(padded(p.hidden)),
        pad(p.kernel / 2),
        stride(padded(p.width) + kPadding),
        map((p.height + 2 * pad) * stride),
        taps(static_cast<int64_t>(p.kernel) * p.kernel),
        row_bytes(p.width * p.channels * (p.dtype == DType::kFloat32 ? 4 : 2)) {
    band = std::clamp<int64_t>(kBandBytes / row_bytes, 1, p.height);
  }

  // Where `base` holds the position: row `y` of image `image`.
  template <typename T>
  T* row(T* base, int64_t image, int64_t y, int64_t height) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return base == nullptr ? nullptr : reinterpret_cast<Byte*>(base) + (image * height + y) * row_bytes;
  }

  int64_t pixels, channels;
  int64_t columns, hidden;  // channels and hidden, rounded up to whole vectors
  int64_t pad;              // rows and columns of zeros around a map
  int64_t stride, map;      // floats of a row, and of a whole map with its zeros
  int64_t taps;             // weights of one channel of the convolution
  int64_t row_bytes, band;  // of a row of positions; rows that a pass takes at once
};

// Images that a thread takes at once: what fits into its cache, or more where w1 and w2 weigh more than they do.
int64_t images_per_group(const Cbam& p, int64_t image_bytes, int threads) {
  const int64_t weight_bytes = 2 * static_cast<int64_t>(sizeof(float)) * p.channels * p.hidden;
  const int64_t fitting =
      std::clamp<int64_t>(std::max(kGroupBytes, kPerWeight * weight_bytes) / image_bytes, 1, kGroupImages);
  return std::clamp<int64_t>(p.batch / threads, 1, fitting);
}

// A matrix whose rows are whole vectors: `w` itself where they are, else a copy.
class Rows {
 public:
  Rows(const float* w, int64_t rows, int64_t columns) : copy_(0), p_(w) {
    const int64_t width = padded(columns);
    if (width == columns || w == nullptr) return;
    copy_ = Floats(rows * width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(w + r * columns, columns, copy_.at(r * width));
    p_ = copy_.at();
  }
  const float* at() const { return p_; }

 private:
  Floats copy_;
  const float* p_;
};

typedef float Four __attribute__((vector_size(16)));

#if defined(__clang__)
#define IMGCLS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IMGCLS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FourIndices{__VA_ARGS__}))
typedef int32_t FourIndices __attribute__((vector_size(16)));
#endif

// to[j][i] = from[i][j]
void transpose_square(const float (&from)[kPadding][kPadding], float (&to)[kPadding][kPadding]) {
  for (int64_t i = 0; i < kPadding; i += 4)
    for (int64_t j = 0; j < kPadding; j += 4) {
      Four row[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&row[k], &from[i + k][j], sizeof row[k]);
      const Four low0 = IMGCLS_SHUFFLE(row[0], row[1], 0, 4, 1, 5), low1 = IMGCLS_SHUFFLE(row[2], row[3], 0, 4, 1, 5);
      const Four high0 = IMGCLS_SHUFFLE(row[0], row[1], 2, 6, 3, 7), high1 = IMGCLS_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
      const Four column[4] = {IMGCLS_SHUFFLE(low0, low1, 0, 1, 4, 5), IMGCLS_SHUFFLE(low0, low1, 2, 3, 6, 7),
                              IMGCLS_SHUFFLE(high0, high1, 0, 1, 4, 5), IMGCLS_SHUFFLE(high0, high1, 2, 3, 6, 7)};
      for (int k = 0; k < 4; ++k) std::memcpy(&to[j + k][i], &column[k], sizeof column[k]);
    }
}

void copy_line(const float* from, int64_t count, float* to) {
  if (count == kPadding)
    std::memcpy(to, from, kPadding * sizeof(float));  // of fixed size: no call
  else
    std::copy_n(from, count, to);
}

// `from` (rows, columns), whose rows lie `width` apart, turned into `to` (columns, rows), whose rows lie `step` apart.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t width, float* to, int64_t step) {
  // Squares touch each line of memory once: where the sizes are powers of two, the lines of a column evict each other.
  float square[kPadding][kPadding] = {}, turned[kPadding][kPadding];
  for (int64_t r = 0; r < rows; r += kPadding)
    for (int64_t c = 0; c < columns; c += kPadding) {
      const int64_t height = std::min(kPadding, rows - r), across = std::min(kPadding, columns - c);
      for (int64_t i = 0; i < height; ++i) copy_line(from + (r + i) * width + c, across, square[i]);
      transpose_square(square, turned);
      for (int64_t j = 0; j < across; ++j) copy_line(turned[j], height, to + (c + j) * step + r);
    }
}

// `w` (rows, columns) as (columns, padded(rows)).
Floats transposed(const float* w, int64_t rows, int64_t columns) {
  if (w == nullptr) return Floats(0);
  Floats out(columns * padded(rows));
  transpose(w, rows, columns, columns, out.at(), padded(rows));
  return out;
}

float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays one

// Rows [from, to) of a map without zeros around it, into the one with zeros.
void fill_map(const Layout& at, const float* rows, int64_t width, int64_t from, int64_t to, float* map) {
  for (int64_t y = from; y < to; ++y) std::copy_n(rows + y * width, width, map + (y + at.pad) * at.stride + at.pad);
}

void affine_of(const Cbam& p, float* a, float* b) {
  *a = p.affine ? p.affine[0] : 1.0f;
  *b = p.affine ? p.affine[1] : 0.0f;
}

// Forward ----------------------------------------------------------------------------------------------------------

class Forward {
 public:
  Forward(const Cbam& p, CbamSteps steps, int64_t group, int threads)
      : p_(p),
        table_(table()),
        pass_(table_.passes[static_cast<int>(p.dtype)]),
        at_(p),
        maps_(steps != CbamSteps::kApply),
        apply_(steps != CbamSteps::kMaps),
        w1_(transposed(p.w1, p.hidden, p.channels)),
        w2_(transposed(p.w2, p.channels, p.hidden)) {
    affine_of(p, &a_, &b_);
    for (int thread = 0; thread < threads; ++thread) work_.emplace_back(at_, group);
  }

  void run(int64_t first, int64_t count, int thread) {
    Work& work = work_[thread];
    if (maps_) gates(first, count, work);
    for (int64_t k = 0; k < count; ++k) {
      float* gate = work.gate.at(k * at_.columns);
      if (!maps_) std::copy_n(p_.channel + ((first + k) * 3 + 2) * at_.channels, at_.channels, gate);
      image(first + k, gate, work);
    }
  }

 private:
  struct Work {
    Work(const Layout& at, int64_t group)
        : pooled(2 * group * at.columns),
          sums(2 * group * at.hidden),
          hidden(group * at.hidden),
          gate(group * at.columns),
          maps(2 * at.map),
          row(at.stride),
          gate_p(at.pixels + kPadding) {}
    Floats pooled, sums, hidden, gate;  // of a group: (images, 2, columns) and hidden, (images, hidden) and columns
    Floats maps;                        // mean and maximum of one image, zeros around them
    Floats row;                         // of logits
    Floats gate_p;                      // of one image
  };

  // Mean, maximum and gate of each channel of some images.
  void gates(int64_t first, int64_t count, Work& work) const {
    const int64_t columns = at_.columns, hidden = at_.hidden, channels = at_.channels;
    for (int64_t k = 0; k < count; ++k) {
      float* mean = work.pooled.at(2 * k * columns);
      pass_.pool({at_.row(p_.x, first + k, 0, p_.height), at_.pixels, channels}, mean, mean + columns);
    }
    table_.products(w1_.at(), channels, hidden, 2 * count, work.pooled.at(), columns, 1, work.sums.at());
    for (int64_t k = 0; k < count; ++k) {
      const float *of_mean = work.sums.at(2 * k * hidden), *of_most = of_mean + hidden;
      for (int64_t r = 0; r < hidden; ++r) *work.hidden.at(k * hidden + r) = relu(of_mean[r]) + relu(of_most[r]);
      std::copy_n(of_mean, p_.hidden, p_.hidden_sums + 2 * (first + k) * p_.hidden);
      std::copy_n(of_most, p_.hidden, p_.hidden_sums + (2 * (first + k) + 1) * p_.hidden);
    }
    table_.products(w2_.at(), p_.hidden, columns, count, work.hidden.at(), hidden, 1, work.gate.at());
    table_.sigmoid(work.gate.at(), 1.0f, 0.0f, count * columns, work.gate.at());
    for (int64_t k = 0; k < count; ++k) {
      float* to = p_.channel + (first + k) * 3 * channels;
      std::copy_n(work.pooled.at(2 * k * columns), channels, to);
      std::copy_n(work.pooled.at((2 * k + 1) * columns), channels, to + channels);
      std::copy_n(work.gate.at(k * columns), channels, to + 2 * channels);
      // behind the last channel: NaN where a hidden sum is infinite, and a sum over the channels must not meet it
      std::fill(work.gate.at(k * columns + channels), work.gate.at((k + 1) * columns), 0.0f);
    }
  }

  // The rest of one image, from its last row to its first.
  void image(int64_t image, const float* gate, Work& work) const {
    float* spatial = p_.spatial + image * 3 * at_.pixels;
    int64_t seen = maps_ ? p_.height : 0, done = p_.height;  // rows from here on have statistics; are finished
    while (done > 0) {
      if (seen > 0) {
        const int64_t to = seen, from = std::max<int64_t>(seen - at_.band, 0), start = from * p_.width;
        pass_.stats({at_.row(p_.x, image, from, p_.height), (to - from) * p_.width, at_.channels}, gate,
                    spatial + start, spatial + at_.pixels + start);
        fill_map(at_, spatial, p_.width, from, to, work.maps.at());
        fill_map(at_, spatial + at_.pixels, p_.width, from, to, work.maps.at(at_.map));
        seen = from;
      }
      const int64_t ready = seen == 0 ? 0 : std::min(done, seen + at_.pad);
      for (int64_t y = ready; y < done; ++y) finish_row(y, spatial + 2 * at_.pixels, work);
      if (apply_ && ready < done) {
        pass_.apply({at_.row(p_.x, image, ready, p_.height), (done - ready) * p_.width, at_.channels}, gate,
                    work.gate_p.at(ready * p_.width), at_.row(p_.residual, image, ready, p_.height), p_.relu,
                    at_.row(p_.out, image, ready, p_.height));
      }
      done = ready;
    }
  }

  // Logits of a row, made or read, and its gates.
  void finish_row(int64_t y, float* logits, Work& work) const {
    float* row = work.row.at();
    logits += y * p_.width;
    if (maps_) {
      std::fill_n(row, at_.stride, 0.0f);
      for (int64_t k = 0; k < 2; ++k)
        table_.correlate(work.maps.at(k * at_.map + y * at_.stride), at_.stride, p_.conv + k * at_.taps, p_.kernel,
                         p_.width, row);
      std::copy_n(row, p_.width, logits);
    } else {
      std::copy_n(logits, p_.width, row);
    }
    if (!apply_) return;
    table_.sigmoid(row, a_, b_, padded(p_.width), row);
    std::copy_n(row, p_.width, work.gate_p.at(y * p_.width));
  }

  const Cbam& p_;
  const CbamTable& table_;
  const CbamPasses& pass_;
  const Layout at_;
  const bool maps_, apply_;
  const Floats w1_, w2_;  // turned: (channels, hidden), (hidden, columns)
  float a_, b_;
  std::vector<Work> work_;
};

// Backward ---------------------------------------------------------------------------------------------------------

// What the weight gradients are summed from: a row for each image, or two (mean and maximum), so that the sum runs in
// the order of the images.
struct Shares {
  Shares(const Cbam& p, const Layout& at)
      : pooled(p.batch * 2 * at.columns),
        dsums(p.batch * 2 * p.hidden),
        hidden(p.batch * p.hidden),
        dgate(p.batch * at.columns),
        dconv(p.batch * 2 * at.taps),
        daffine(p.batch * 2) {}
  Floats pooled, dsums;  // (2 batch, columns), (2 batch, hidden): gradient by hidden_sums
  Floats hidden, dgate;  // (batch, hidden), (batch, columns): gradient before the sigmoid of gate_c
  Floats dconv, daffine;
};

class Backward {
 public:
  Backward(const CbamGrad& g, CbamSteps steps, int64_t group, int threads)
      : g_(g),
        p_(g.forward),
        table_(table()),
        pass_(table_.passes[static_cast<int>(p_.dtype)]),
        at_(p_),
        apply_(steps != CbamSteps::kMaps),
        maps_(steps != CbamSteps::kApply),
        grad_(apply_ && p_.relu ? g.masked : g.grad),
        w1_(p_.w1, p_.hidden, p_.channels),
        w2_(p_.w2, p_.channels, p_.hidden),
        flipped_(2 * at_.taps),
        shares_(p_, at_) {
    affine_of(p_, &a_, &b_);
    for (int64_t k = 0; maps_ && k < 2; ++k)
      std::reverse_copy(p_.conv + k * at_.taps, p_.conv + (k + 1) * at_.taps, flipped_.at(k * at_.taps));
    for (int thread = 0; thread < threads; ++thread) work_.emplace_back(at_, group);
  }

  void run(int64_t first, int64_t count, int thread) {
    Work& work = work_[thread];
    for (int64_t k = 0; k < count; ++k) {
      load_image(first + k, k, work);
      sweep(first + k, k, work);
      if (maps_) map_weights(first + k, work);
    }
    if (!maps_) return;
    gates(first, count, work);
    for (int64_t k = 0; k < count; ++k) inputs(first + k, k, work);
  }

  // After all images.
  void sum_images(int threads) {
    if (!maps_) return;
    const int64_t hidden = p_.hidden, columns = at_.columns, channels = at_.channels;
    const int64_t blocks = (hidden + kVectorsPerItem - 1) / kVectorsPerItem;
    Floats dw1(hidden * columns), dw2(hidden * columns);
    parallel_for(2 * blocks, threads, [&](int64_t item, int) {
      const int64_t r = item / 2 * kVectorsPerItem, count = std::min(kVectorsPerItem, hidden - r);
      if (item % 2 == 0)
        table_.products(shares_.pooled.at(), 2 * p_.batch, columns, count, shares_.dsums.at(r), 1, hidden,
                        dw1.at(r * columns));
      else
        table_.products(shares_.dgate.at(), p_.batch, columns, count, shares_.hidden.at(r), 1, hidden,
                        dw2.at(r * columns));
    });
    for (int64_t r = 0; r < hidden; ++r) std::copy_n(dw1.at(r * columns), channels, g_.dw1 + r * channels);
    transpose(dw2.at(), hidden, channels, columns, g_.dw2, hidden);
    sum_rows(shares_.dconv.at(), 2 * at_.taps, g_.dconv);
    if (g_.daffine) sum_rows(shares_.daffine.at(), 2, g_.daffine);
  }

 private:
  struct Work {
    Work(const Layout& at, int64_t group)
        : channel(3 * group * at.columns),
          dgate(group * at.columns),
          ties(group * at.columns),
          dpooled(2 * group * at.columns),
          dhidden(group * at.hidden),
          spread(3 * group * (at.pixels + kPadding)),
          maps(2 * at.map),
          dlogits(at.map),
          row(at.stride) {}
    Floats channel;        // (images, 3, columns): mean, maximum, gate
    Floats dgate, ties;    // (images, columns)
    Floats dpooled;        // (images, 2, columns): gradient by mean and by maximum
    Floats dhidden;        // (images, hidden)
    Floats spread;         // (images, 3, pixels + kPadding): gate, flat, peak of CbamSpread
    Floats maps, dlogits;  // of one image, zeros around them
    Floats row;
  };

  float* channel(int64_t k, int64_t which, Work& work) const { return work.channel.at((3 * k + which) * at_.columns); }
  float* spread(int64_t k, int64_t which, Work& work) const {
    return work.spread.at((3 * k + which) * (at_.pixels + kPadding));
  }
  const float* spatial(int64_t image, int64_t which) const { return p_.spatial + (3 * image + which) * at_.pixels; }

  CbamSpread spread_from(int64_t image, int64_t k, int64_t position, Work& work) const {
    return {spread(k, 0, work) + position, spread(k, 1, work) + position, spread(k, 2, work) + position,
            spatial(image, 1) + position};
  }

  CbamPixels pixels_of(int64_t image, int64_t from, int64_t to) const {
    return {at_.row(p_.x, image, from, p_.height), (to - from) * p_.width, at_.channels};
  }

  // What the forward half kept of image `image`, which is number k of its group.
  void load_image(int64_t image, int64_t k, Work& work) const {
    for (int64_t which = 0; which < 3; ++which)
      std::copy_n(p_.channel + (3 * image + which) * at_.channels, at_.channels, channel(k, which, work));
    float* gate = spread(k, 0, work);
    std::copy_n(spatial(image, 2), at_.pixels, gate);
    table_.sigmoid(gate, a_, b_, padded(at_.pixels), gate);
    if (!maps_) return;
    for (int64_t which = 0; which < 2; ++which)
      fill_map(at_, spatial(image, which), p_.width, 0, p_.height, work.maps.at(which * at_.map));
    std::fill_n(work.dgate.at(k * at_.columns), at_.columns, 0.0f);
    std::fill_n(work.ties.at(k * at_.columns), at_.columns, 0.0f);
    if (!apply_) fill_map(at_, g_.dlogits + image * at_.pixels, p_.width, 0, p_.height, work.dlogits.at());
  }

  // From the first row to the last: the gradient by the logits, and `pad` rows behind it the one by gate_c.
  void sweep(int64_t image, int64_t k, Work& work) const {
    int64_t seen = apply_ ? 0 : p_.height, done = maps_ ? 0 : p_.height;
    while (seen < p_.height || done < p_.height) {
      if (seen < p_.height) {
        const int64_t to = std::min(seen + at_.band, p_.height);
        logit_rows(image, k, seen, to, work);
        seen = to;
      }
      if (!maps_) continue;
      const int64_t ready = seen == p_.height ? seen : std::max(done, seen - at_.pad);
      for (int64_t y = done; y < ready; ++y) spread_row(image, k, y, work);
      if (ready > done)
        pass_.grad_gate(pixels_of(image, done, ready), at_.row(grad_, image, done, p_.height), channel(k, 2, work),
                        spread_from(image, k, done * p_.width, work), channel(k, 1, work),
                        work.dgate.at(k * at_.columns), work.ties.at(k * at_.columns));
      done = ready;
    }
  }

  void logit_rows(int64_t image, int64_t k, int64_t from, int64_t to, Work& work) const {
    const int64_t start = from * p_.width;
    float* dlogits = g_.dlogits + image * at_.pixels;
    pass_.grad_apply(pixels_of(image, from, to), at_.row(g_.grad, image, from, p_.height),
                     p_.relu ? at_.row(static_cast<const void*>(p_.out), image, from, p_.height) : nullptr,
                     at_.row(g_.masked, image, from, p_.height), channel(k, 2, work), spatial(image, 1) + start,
                     dlogits + start, g_.ties + image * at_.pixels + start);
    const float *gate = spread(k, 0, work), *logits = spatial(image, 2);
    double da = 0.0, db = 0.0;  // terms of both signs
    for (int64_t p = start; p < to * p_.width; ++p) {
      dlogits[p] *= gate[p] * (1.0f - gate[p]);
      da += static_cast<double>(dlogits[p]) * logits[p];
      db += dlogits[p];
    }
    *shares_.daffine.at(2 * image) += static_cast<float>(da);
    *shares_.daffine.at(2 * image + 1) += static_cast<float>(db);
    if (!maps_) return;
    for (int64_t y = from; y < to; ++y) {
      float* row = work.dlogits.at((y + at_.pad) * at_.stride + at_.pad);
      for (int64_t x = 0; x < p_.width; ++x) row[x] = a_ * dlogits[y * p_.width + x];
    }
  }

  // The gradient of a row's mean and maximum over the channels, for each channel.
  void spread_row(int64_t image, int64_t k, int64_t y, Work& work) const {
    const float* ties = g_.ties + image * at_.pixels + y * p_.width;
    for (int64_t which = 0; which < 2; ++which) {
      float *row = work.row.at(), *to = spread(k, 1 + which, work) + y * p_.width;
      std::fill_n(row, at_.stride, 0.0f);
      table_.correlate(work.dlogits.at(y * at_.stride), at_.stride, flipped_.at(which * at_.taps), p_.kernel, p_.width,
                       row);
      for (int64_t x = 0; x < p_.width; ++x) to[x] = row[x] / (which == 0 ? static_cast<float>(at_.channels) : ties[x]);
    }
  }

  void map_weights(int64_t image, Work& work) const {
    for (int64_t which = 0; which < 2; ++which)
      table_.correlate_weights(work.maps.at(which * at_.map), work.dlogits.at(at_.pad * at_.stride + at_.pad),
                               at_.stride, p_.height, p_.width, p_.kernel,
                               shares_.dconv.at((2 * image + which) * at_.taps));
  }

  // From the gradient by gate_c to the ones by mean and maximum over the positions, for some images.
  void gates(int64_t first, int64_t count, Work& work) const {
    const int64_t columns = at_.columns, hidden = p_.hidden;
    float* dsums = shares_.dsums.at(2 * first * hidden);
    for (int64_t k = 0; k < count; ++k) {
      const float *gate = channel(k, 2, work), *dgate = work.dgate.at(k * columns);
      for (int64_t c = 0; c < at_.channels; ++c)
        *shares_.dgate.at((first + k) * columns + c) = dgate[c] * gate[c] * (1.0f - gate[c]);
      for (int64_t which = 0; which < 2; ++which)
        std::copy_n(channel(k, which, work), columns, shares_.pooled.at((2 * (first + k) + which) * columns));
    }
    table_.products(w2_.at(), at_.channels, at_.hidden, count, shares_.dgate.at(first * columns), columns, 1,
                    work.dhidden.at());
    for (int64_t k = 0; k < count; ++k) {
      const float* sums = p_.hidden_sums + 2 * (first + k) * hidden;
      for (int64_t r = 0; r < hidden; ++r) {
        const float dhidden = *work.dhidden.at(k * at_.hidden + r);
        dsums[2 * k * hidden + r] = sums[r] <= 0.0f ? 0.0f : dhidden;
        dsums[(2 * k + 1) * hidden + r] = sums[hidden + r] <= 0.0f ? 0.0f : dhidden;
        *shares_.hidden.at((first + k) * hidden + r) = relu(sums[r]) + relu(sums[hidden + r]);
      }
    }
    table_.products(w1_.at(), hidden, columns, 2 * count, dsums, hidden, 1, work.dpooled.at());
  }

  // dx of one image, from its last row to its first.
  void inputs(int64_t image, int64_t k, Work& work) const {
    float *flat = work.dpooled.at(2 * k * at_.columns), *peak = flat + at_.columns;
    const float* ties = work.ties.at(k * at_.columns);
    for (int64_t c = 0; c < at_.channels; ++c) {
      flat[c] /= static_cast<float>(at_.pixels);
      peak[c] /= ties[c];
    }
    for (int64_t to = p_.height; to > 0;) {
      const int64_t from = std::max<int64_t>(to - at_.band, 0);
      pass_.grad_input(pixels_of(image, from, to), at_.row(grad_, image, from, p_.height), channel(k, 2, work),
                       spread_from(image, k, from * p_.width, work), flat, peak, channel(k, 1, work),
                       at_.row(g_.dx, image, from, p_.height));
      to = from;
    }
  }

  void sum_rows(const float* rows, int64_t count, float* to) const {
    std::fill_n(to, count, 0.0f);
    for (int64_t image = 0; image < p_.batch; ++image)
      for (int64_t k = 0; k < count; ++k) to[k] += rows[image * count + k];
  }

  const CbamGrad& g_;
  const Cbam& p_;
  const CbamTable& table_;
  const CbamPasses& pass_;
  const Layout at_;
  const bool apply_, maps_;
  const void* grad_;    // gradient behind the ReLU
  const Rows w1_, w2_;  // (hidden, columns), (channels, hidden)
  Floats flipped_;      // conv turned by half a turn
  Shares shares_;
  float a_, b_;
  std::vector<Work> work_;
};

// work(first image, images, thread) for groups that cover the batch.
template <typename Run>
void in_groups(int64_t batch, int64_t group, int threads, Run run) {
  parallel_for((batch + group - 1) / group, threads,
               [&](int64_t item, int thread) { run(item * group, std::min(group, batch - item * group), thread); });
}

int bounded(int threads, int64_t batch) {
  return static_cast<int>(std::clamp<int64_t>(batch, 1, std::max(threads, 1)));
}

}  // namespace

void cbam(const Cbam& p, CbamSteps steps, int threads) {
  threads = bounded(threads, p.batch);
  const int64_t group = images_per_group(p, Layout(p).row_bytes * p.height, threads);
  Forward forward(p, steps, group, threads);
  in_groups(p.batch, group, threads,
            [&](int64_t first, int64_t count, int thread) { forward.run(first, count, thread); });
}

void cbam_grad(const CbamGrad& g, CbamSteps steps, int threads) {
  const Cbam& p = g.forward;
  threads = bounded(threads, p.batch);
  const int64_t group = images_per_group(p, 2 * Layout(p).row_bytes * p.height, threads);
  Backward backward(g, steps, group, threads);
  in_groups(p.batch, group, threads,
            [&](int64_t first, int64_t count, int thread) { backward.run(first, count, thread); });
  backward.sum_images(threads);
}

}  // namespace imgcls::cpu
