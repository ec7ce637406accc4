// Launchers of window attention: which kernel, with how much shared memory, on how many CTAs.
#include <algorithm>
#include <type_traits>

#include "window_backward.cuh"
#include "window_forward.cuh"

namespace imgcls {
namespace {

constexpr int kMostHeads = 65535;   // blocks along y
constexpr int64_t kMost = 1 << 30;  // images, rows, columns: a number plus a step must stay below 2^31
constexpr int kMostTokens = 1024;   // of a window: far beyond what shared memory holds
constexpr const char* kName = "window_attention";
constexpr const char* kTooLarge = "a window of this size and head_dim does not fit into the device's shared memory.";
constexpr const char* kNoLargeGrad = "the float32 gradient of heads of 64 channels takes windows of up to 64 tokens.";

// In float32 with heads of 64, large_backward needs more registers than a thread has: it would spill, at arithmetic
// without tensor cores. There is none, and the caller's fallback runs.
template <typename T, int D>
constexpr bool kHasLargeGrad = !(std::is_same_v<T, float> && D == 64);

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A kernel and how it wants to be started.
struct Choice {
  void (*kernel)(Plan) = nullptr;  // null: none of them fits into shared memory
  int threads = 0;
  int stages = 1;
  int64_t bytes = 0;  // of shared memory
};

// Warps for `tokens`, 16 at a time: as many as leave few of them idle in the last round.
int warps_for(int64_t padded_tokens, int most) {
  const int blocks = static_cast<int>(padded_tokens / kRows);
  const int rounds = (blocks + most - 1) / most;
  return (blocks + rounds - 1) / rounds;
}

// Whether a second stage is worth its shared memory: two CTAs hide more than one with a window on its way.
bool affordable(int64_t bytes, const DeviceLimits& limits) {
  return 2 * (bytes + kSharedReserved) <= limits.shared_per_multiprocessor;
}

template <typename T, int D>
Choice choose_forward(int tokens, const DeviceLimits& limits) {
  const int64_t padded = round_up(tokens, kRows);
  if (tokens <= kKeys) {
    const int stages = affordable(small_forward_bytes<T, D>(2), limits) ? 2 : 1;
    const int64_t bytes = small_forward_bytes<T, D>(stages);
    if (bytes <= limits.shared_per_block) return {small_forward<T, D>, kForwardThreads, stages, bytes};
  }
  for (int warps = warps_for(padded, kForwardThreads / kWarp); warps > 0; --warps) {
    const int64_t bytes = large_forward_bytes<T, D>(padded, warps);
    if (bytes <= limits.shared_per_block) return {large_forward<T, D>, warps * kWarp, 1, bytes};
  }
  return {};
}

template <typename T, int D>
Choice choose_backward(int tokens, const DeviceLimits& limits) {
  const int64_t padded = round_up(tokens, kRows);
  if (tokens <= kKeys) {
    const int stages = affordable(small_backward_bytes<T, D>(2), limits) ? 2 : 1;
    const int64_t bytes = small_backward_bytes<T, D>(stages);
    if (bytes <= limits.shared_per_block) return {small_backward<T, D>, kSmallGradThreads, stages, bytes};
  }
  if constexpr (kHasLargeGrad<T, D>) {
    for (int warps = warps_for(padded, kLargeGradThreads / kWarp); warps > 0; --warps) {
      const int64_t bytes = large_backward_bytes<T, D>(padded, warps);
      if (bytes <= limits.shared_per_block) return {large_backward<T, D>, warps * kWarp, 1, bytes};
    }
  }
  return {};
}

template <typename T>
Choice choose(const WindowAttention& p, bool gradient, const DeviceLimits& limits) {
  const int tokens = p.window_h * p.window_w;
  if (p.head_dim == 32) {
    return gradient ? choose_backward<T, 32>(tokens, limits) : choose_forward<T, 32>(tokens, limits);
  }
  return gradient ? choose_backward<T, 64>(tokens, limits) : choose_forward<T, 64>(tokens, limits);
}

Choice choose(const WindowAttention& p, bool gradient, const DeviceLimits& limits) {
  switch (p.dtype) {
    case DType::kFloat16: return choose<__half>(p, gradient, limits);
    case DType::kBFloat16: return choose<__nv_bfloat16>(p, gradient, limits);
    default: return choose<float>(p, gradient, limits);
  }
}

// Why `choose` found nothing.
const char* refusal_of_choice(const WindowAttention& p, bool gradient) {
  const bool large = p.window_h * p.window_w > kKeys;
  return gradient && large && p.dtype == DType::kFloat32 && p.head_dim == 64 ? kNoLargeGrad : kTooLarge;
}

int64_t count_windows(const WindowAttention& p) { return p.batch * (p.height / p.window_h) * (p.width / p.window_w); }

// CTAs along x, for each head: as many as run at once. The number depends on the device, the kernel and the number of
// heads and not on the batch, so that sums are made in the same order every time.
int64_t count_ctas(const WindowAttention& p, const Choice& choice, const DeviceLimits& limits) {
  const auto* kernel = reinterpret_cast<const void*>(choice.kernel);
  allow_shared(kernel, choice.bytes, kName);
  int resident = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, choice.threads, choice.bytes), kName);
  return std::max<int64_t>(1, static_cast<int64_t>(resident) * limits.multiprocessors / p.heads);
}

// The same, cut to the windows that there are: every CTA has one at least.
int64_t count_busy(const WindowAttention& p, const Choice& choice, const DeviceLimits& limits) {
  return std::min(count_ctas(p, choice, limits), count_windows(p));
}

bool misaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kPieceBytes != 0; }

// What no device takes.
const char* refusal_of_sizes(const WindowAttention& p) {
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    return "the dtype must be float32, float16 or bfloat16.";
  }
  if (p.head_dim != 32 && p.head_dim != 64) return "head_dim must be 32 or 64.";
  if (p.heads < 1 || p.heads > kMostHeads) return "heads must be 1 to 65535.";
  if (p.window_h < 1 || p.window_w < 1 || int64_t{p.window_h} * p.window_w > kMostTokens) {
    return "a window must have 1 to 1024 tokens.";
  }
  if (p.batch < 0 || p.height < 1 || p.width < 1 || p.batch > kMost || p.height > kMost || p.width > kMost) {
    return "batch, height and width must be at most 2^30.";
  }
  if (p.height % p.window_h != 0 || p.width % p.window_w != 0) return "windows must divide the image.";
  if (p.shift_h < 0 || p.shift_w < 0 || p.shift_h >= p.height || p.shift_w >= p.width) {
    return "the shift must be at least 0 and smaller than the image.";
  }
  if (misaligned(p.qkv) || misaligned(p.out)) return "qkv and out must begin at a multiple of 16 bytes.";
  return nullptr;
}

[[noreturn]] void refuse(const char* why) { throw std::runtime_error(std::string(kName) + ": " + why); }

// How to run on the current device. Throws std::runtime_error where window_attention_refusal has a sentence.
Choice decide(const WindowAttention& p, bool gradient, DeviceLimits* limits) {
  if (const char* why = refusal_of_sizes(p)) refuse(why);
  check_cuda(DeviceLimits::query(limits), kName);
  const Choice choice = choose(p, gradient, *limits);
  if (choice.kernel == nullptr) refuse(refusal_of_choice(p, gradient));
  return choice;
}

Plan plan_of(const WindowAttention& p, const Choice& choice) {
  Plan plan{};
  plan.qkv = p.qkv;
  plan.bias = p.bias;
  plan.head_scale = p.head_scale;
  plan.out = p.out;
  plan.lse = p.lse;
  plan.batch = static_cast<int32_t>(p.batch);
  plan.heads = p.heads;
  plan.tokens = p.window_h * p.window_w;
  plan.padded_tokens = static_cast<int32_t>(round_up(plan.tokens, kRows));
  plan.height = static_cast<int32_t>(p.height);
  plan.width = static_cast<int32_t>(p.width);
  plan.down = plan.height / p.window_h;
  plan.across = plan.width / p.window_w;
  plan.grid = p.grid != 0;
  plan.window_y = plan.grid ? 1 : p.window_h;
  plan.window_x = plan.grid ? 1 : p.window_w;
  plan.token_y = plan.grid ? plan.down : 1;
  plan.token_x = plan.grid ? plan.across : 1;
  plan.window_h = p.window_h;
  plan.window_w = p.window_w;
  plan.shift_h = p.shift_h;
  plan.shift_w = p.shift_w;
  plan.shifted = p.shift_h != 0 || p.shift_w != 0;
  plan.stages = choice.stages;
  plan.scale = p.scale;
  plan.mask = p.mask_value * kLog2E;
  return plan;
}

}  // namespace

namespace cuda {

const char* window_attention_refusal(const WindowAttention& p, bool gradient) {
  if (const char* why = refusal_of_sizes(p)) return why;
  DeviceLimits limits;
  if (DeviceLimits::query(&limits) != cudaSuccess) {
    cudaGetLastError();
    return "there is no CUDA device.";
  }
  return choose(p, gradient, limits).kernel == nullptr ? refusal_of_choice(p, gradient) : nullptr;
}

void window_attention(const WindowAttention& p, void* stream) {
  DeviceLimits limits;
  const Choice choice = decide(p, false, &limits);
  const int64_t ctas = count_busy(p, choice, limits);
  if (ctas == 0) return;
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(p.heads));
  launch(kName, choice.kernel, grid, choice.threads, choice.bytes, stream, plan_of(p, choice));
}

int64_t window_attention_scratch(const WindowAttention& p) {
  if (p.bias == nullptr && p.head_scale == nullptr) return 0;
  DeviceLimits limits;
  const Choice choice = decide(p, true, &limits);
  return count_busy(p, choice, limits) * p.heads * slice_floats(round_up(p.window_h * p.window_w, kRows));
}

void window_attention_grad(const WindowAttentionGrad& p, void* stream) {
  const WindowAttention& forward = p.forward;
  if (misaligned(p.grad) || misaligned(p.dqkv) || misaligned(p.scratch)) {
    refuse("grad, dqkv and scratch must begin at a multiple of 16 bytes.");
  }
  DeviceLimits limits;
  const Choice choice = decide(forward, true, &limits);
  const int64_t ctas = count_busy(forward, choice, limits);
  Plan plan = plan_of(forward, choice);
  plan.grad = p.grad;
  plan.dqkv = p.dqkv;
  plan.partial = p.scratch;
  plan.want_bias = p.dbias != nullptr;
  plan.want_head_scale = p.dhead_scale != nullptr;
  if (ctas > 0) {
    const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(forward.heads));
    launch(kName, choice.kernel, grid, choice.threads, choice.bytes, stream, plan);
  }
  if (plan.want_bias || plan.want_head_scale) {
    const int64_t blocks = round_up(slice_floats(plan.padded_tokens), kSumThreads) / kSumThreads;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(forward.heads));
    launch(kName, sum_slices, grid, kSumThreads, 0, stream, static_cast<const float*>(p.scratch),
           static_cast<int>(ctas), plan.heads, plan.tokens, plan.padded_tokens, p.dbias, p.dhead_scale);
  }
}

}  // namespace cuda
}  // namespace imgcls
