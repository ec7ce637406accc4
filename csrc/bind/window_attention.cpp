#include <pybind11/stl.h>

#include <array>
#include <string>

#include "../kernels.h"
#include "bind.h"

namespace py = pybind11;
using namespace py::literals;

namespace imgcls {

namespace {

using Address = std::uintptr_t;
using Sizes = std::array<int64_t, 9>;  // batch, height, width, heads, head_dim, window_h, window_w, shift_h, shift_w

WindowAttention parameters(Address qkv, Address bias, Address head_scale, Address out, Address lse, const Sizes& sizes,
                           bool grid, float scale, float mask_value, int dtype) {
  WindowAttention p;
  p.qkv = pointer<const void>(qkv);
  p.bias = pointer<const float>(bias);
  p.head_scale = pointer<const float>(head_scale);
  p.out = pointer<void>(out);
  p.lse = pointer<float>(lse);
  p.batch = sizes[0], p.height = sizes[1], p.width = sizes[2];
  p.heads = static_cast<int32_t>(sizes[3]), p.head_dim = static_cast<int32_t>(sizes[4]);
  p.window_h = static_cast<int32_t>(sizes[5]), p.window_w = static_cast<int32_t>(sizes[6]);
  p.shift_h = static_cast<int32_t>(sizes[7]), p.shift_w = static_cast<int32_t>(sizes[8]);
  p.grid = grid ? 1 : 0;
  p.scale = scale, p.mask_value = mask_value, p.dtype = static_cast<DType>(dtype);
  return p;
}

void forward(Address qkv, Address bias, Address head_scale, Address out, Address lse, const Sizes& sizes, bool grid,
             float scale, float mask_value, int dtype, bool on_cuda, Address stream, int threads) {
  const WindowAttention p = parameters(qkv, bias, head_scale, out, lse, sizes, grid, scale, mask_value, dtype);
  py::gil_scoped_release released;
  if (on_cuda)
    cuda::window_attention(p, pointer<void>(stream));
  else
    cpu::window_attention(p, threads);
}

void backward(Address qkv, Address bias, Address head_scale, Address lse, Address grad, Address dqkv, Address dbias,
              Address dhead_scale, Address scratch, const Sizes& sizes, bool grid, float scale, float mask_value,
              int dtype, bool on_cuda, Address stream, int threads) {
  WindowAttentionGrad g;
  g.forward = parameters(qkv, bias, head_scale, 0, lse, sizes, grid, scale, mask_value, dtype);
  g.grad = pointer<const void>(grad);
  g.dqkv = pointer<void>(dqkv);
  g.dbias = pointer<float>(dbias);
  g.dhead_scale = pointer<float>(dhead_scale);
  g.scratch = pointer<float>(scratch);
  py::gil_scoped_release released;
  if (on_cuda)
    cuda::window_attention_grad(g, pointer<void>(stream));
  else
    cpu::window_attention_grad(g, threads);
}

// What a question about sizes needs: no addresses, only whether there are a bias and a scale per head.
WindowAttention shape_of(const Sizes& sizes, bool has_bias, bool cosine, bool grid, int dtype) {
  static const float present = 0.0f;
  WindowAttention p = parameters(0, 0, 0, 0, 0, sizes, grid, 1.0f, 0.0f, dtype);
  p.bias = has_bias ? &present : nullptr;
  p.head_scale = cosine ? &present : nullptr;
  return p;
}

}  // namespace

void bind_window_attention(py::module_& m) {
  m.def("window_attention", &forward, py::kw_only(), "qkv"_a, "bias"_a, "head_scale"_a, "out"_a, "lse"_a, "sizes"_a,
        "grid"_a, "scale"_a, "mask_value"_a, "dtype"_a, "on_cuda"_a, "stream"_a, "threads"_a);
  m.def("window_attention_grad", &backward, py::kw_only(), "qkv"_a, "bias"_a, "head_scale"_a, "lse"_a, "grad"_a,
        "dqkv"_a, "dbias"_a, "dhead_scale"_a, "scratch"_a, "sizes"_a, "grid"_a, "scale"_a, "mask_value"_a, "dtype"_a,
        "on_cuda"_a, "stream"_a, "threads"_a);
  m.def(
      "window_attention_scratch",
      [](const Sizes& sizes, bool has_bias, bool cosine, bool grid, int dtype) {
        return cuda::window_attention_scratch(shape_of(sizes, has_bias, cosine, grid, dtype));
      },
      py::kw_only(), "sizes"_a, "has_bias"_a, "cosine"_a, "grid"_a, "dtype"_a);
  m.def(
      "window_attention_refusal",
      [](const Sizes& sizes, bool has_bias, bool cosine, bool grid, int dtype, bool gradient) -> std::string {
        const char* why = cuda::window_attention_refusal(shape_of(sizes, has_bias, cosine, grid, dtype), gradient);
        return why == nullptr ? "" : why;
      },
      py::kw_only(), "sizes"_a, "has_bias"_a, "cosine"_a, "grid"_a, "dtype"_a, "gradient"_a);
}

}  // namespace imgcls
