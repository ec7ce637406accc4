// Launchers of CBAM: which kernels, over how many images at once.
#include <algorithm>

#include "cbam_kernels.cuh"

namespace imgcls {
namespace {

constexpr const char* kName = "cbam";
constexpr int64_t kSlicePixels = 64;    // positions that a block sums at least
constexpr int64_t kMostSlices = 64;     // blocks that share an image
constexpr int64_t kMostImages = 65535;  // blocks along y

using Kernel = void (*)(CbamGroup);

// The kernels that depend on the element type.
struct Kernels {
  Kernel pool_slices, make_stats, finish, grad_apply, grad_gate, grad_input;
  int piece;  // elements that a thread loads at once
};

template <typename T, int V>
Kernels kernels_with() {
  return {pool_slices<T, V>, make_stats<T, V>, finish<T, V>, grad_apply<T, V>, grad_gate<T, V>, grad_input<T, V>, V};
}

bool misaligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPieceBytes != 0; }

template <typename T>
Kernels kernels_of(const Cbam& p, const CbamGrad& g) {
  const void* images[] = {p.x, p.residual, p.out, g.grad, g.masked, g.dx};
  const bool pieces = p.channels % kPiece<T> == 0 && std::none_of(std::begin(images), std::end(images), misaligned);
  return pieces ? kernels_with<T, kPiece<T>>() : kernels_with<T, 1>();
}

Kernels kernels_for(const Cbam& p, const CbamGrad& g) {
  switch (p.dtype) {
    case DType::kFloat16: return kernels_of<__half>(p, g);
    case DType::kBFloat16: return kernels_of<__nv_bfloat16>(p, g);
    default: return kernels_of<float>(p, g);
  }
}

int64_t slices_of(const Cbam& p) { return std::clamp<int64_t>(p.height * p.width / kSlicePixels, 1, kMostSlices); }

int64_t partial_floats(const Cbam& p) { return p.batch * slices_of(p) * 2 * p.channels; }

int64_t conv_sums_of(const Cbam& p) { return 2 * p.kernel * p.kernel + kConvSums; }

CbamGroup group_of(const Cbam& p, CbamSteps steps) {
  CbamGroup q{};
  q.p = p;
  q.pixels = p.height * p.width;
  q.slices = static_cast<int32_t>(slices_of(p));
  q.maps = steps != CbamSteps::kApply;
  q.apply = steps != CbamSteps::kMaps;
  q.partial = p.scratch;
  return q;
}

// Images whose tensors (`tensors` of them are read again and again) fill half of the second-level cache.
int64_t images_at_once(const Cbam& p, int64_t tensors) {
  int device = 0, cache_bytes = 0;
  check_cuda(cudaGetDevice(&device), kName);
  check_cuda(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device), kName);
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t image_bytes = p.height * p.width * p.channels * element * tensors;
  return std::clamp<int64_t>(cache_bytes / 2 / image_bytes, 1, kMostImages);
}

// Starts one kernel after the other on the images of a group.
struct Starter {
  CbamGroup q;
  unsigned images;
  void* stream;

  void operator()(Kernel kernel, int64_t blocks, int64_t shared_floats) const {
    launch(kName, kernel, dim3(static_cast<unsigned>(blocks), images), kThreads,
           shared_floats * static_cast<int64_t>(sizeof(float)), stream, q);
  }
  int64_t tiles() const { return (q.pixels + kTilePixels - 1) / kTilePixels; }
};

template <typename Run>
void in_groups(CbamGroup q, int64_t at_once, void* stream, Run run) {
  for (q.first = 0; q.first < q.p.batch; q.first += at_once)
    run(Starter{q, static_cast<unsigned>(std::min(at_once, q.p.batch - q.first)), stream});
}

}  // namespace

namespace cuda {

int64_t cbam_scratch(const Cbam& p) { return partial_floats(p); }

int64_t cbam_grad_scratch(const Cbam& p) {
  return partial_floats(p) +
         p.batch * (3 * p.height * p.width + 3 * int64_t{p.channels} + 2 * int64_t{p.hidden} + conv_sums_of(p));
}

void cbam(const Cbam& p, CbamSteps steps, void* stream) {
  if (p.batch == 0) return;
  const Kernels kernels = kernels_for(p, CbamGrad());
  const CbamGroup all = group_of(p, steps);
  in_groups(all, images_at_once(p, 1), stream, [&](const Starter& start) {
    if (all.maps) {
      start(kernels.pool_slices, all.slices, 2 * kernels.piece * kThreads);
      start(make_gates<>, 1, p.hidden);
      start(kernels.make_stats, start.tiles(), 0);
    }
    start(kernels.finish, start.tiles(), kTilePixels);
  });
}

void cbam_grad(const CbamGrad& g, CbamSteps steps, void* stream) {
  const Cbam& p = g.forward;
  const Kernels kernels = kernels_for(p, g);
  CbamGroup all = group_of(p, steps);
  all.g = g;
  all.behind = all.apply && p.relu ? g.masked : g.grad;
  all.partial = g.scratch;
  all.spread = all.partial + partial_floats(p);
  all.dgate = all.spread + p.batch * 3 * all.pixels;
  all.dpooled = all.dgate + p.batch * p.channels;
  all.dsums = all.dpooled + p.batch * 2 * p.channels;
  all.conv_sums = all.dsums + p.batch * 2 * p.hidden;
  if (p.batch > 0) {
    in_groups(all, images_at_once(p, 2), stream, [&](const Starter& start) {
      if (all.apply) start(kernels.grad_apply, start.tiles(), 0);
      if (!all.maps) return;
      start(make_spread<>, start.tiles(), 0);
      start(kernels.grad_gate, all.slices, 2 * kernels.piece * kThreads);
      start(grad_gates<>, 1, kThreads);
      start(kernels.grad_input, start.tiles(), 0);
      start(grad_conv<>, conv_sums_of(p), kWarps);
    });
  }
  if (!all.maps) return;
  const int64_t weights = std::max(int64_t{p.channels} * p.hidden, conv_sums_of(p));
  Starter{all, 1, stream}(sum_images<>, (weights + kThreads - 1) / kThreads, 0);
}

}  // namespace cuda
}  // namespace imgcls
