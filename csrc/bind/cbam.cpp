#include "../cbam.h"

#include <pybind11/stl.h>

#include <array>

#include "bind.h"

namespace py = pybind11;
using namespace py::literals;

namespace imgcls {

namespace {

using Address = std::uintptr_t;
using Sizes = std::array<int64_t, 6>;  // batch, channels, height, width, hidden, kernel

Cbam parameters(Address x, Address w1, Address w2, Address conv, Address affine, Address residual, Address out,
                Address channel, Address hidden_sums, Address spatial, const Sizes& sizes, bool relu, int dtype) {
  Cbam p;
  p.x = pointer<const void>(x);
  p.w1 = pointer<const float>(w1);
  p.w2 = pointer<const float>(w2);
  p.conv = pointer<const float>(conv);
  p.affine = pointer<const float>(affine);
  p.residual = pointer<const void>(residual);
  p.out = pointer<void>(out);
  p.channel = pointer<float>(channel);
  p.hidden_sums = pointer<float>(hidden_sums);
  p.spatial = pointer<float>(spatial);
  p.batch = sizes[0], p.channels = static_cast<int32_t>(sizes[1]), p.height = sizes[2], p.width = sizes[3];
  p.hidden = static_cast<int32_t>(sizes[4]), p.kernel = static_cast<int32_t>(sizes[5]);
  p.relu = relu, p.dtype = static_cast<DType>(dtype);
  return p;
}

void forward(Address x, Address w1, Address w2, Address conv, Address affine, Address residual, Address out,
             Address channel, Address hidden_sums, Address spatial, Address scratch, const Sizes& sizes, bool relu,
             int dtype, int steps, bool on_cuda, Address stream, int threads) {
  Cbam p = parameters(x, w1, w2, conv, affine, residual, out, channel, hidden_sums, spatial, sizes, relu, dtype);
  p.scratch = pointer<float>(scratch);
  py::gil_scoped_release released;
  if (on_cuda)
    cuda::cbam(p, static_cast<CbamSteps>(steps), pointer<void>(stream));
  else
    cpu::cbam(p, static_cast<CbamSteps>(steps), threads);
}

void backward(Address x, Address w1, Address w2, Address conv, Address affine, Address out, Address channel,
              Address hidden_sums, Address spatial, Address grad, Address masked, Address dx, Address dw1, Address dw2,
              Address dconv, Address daffine, Address dlogits, Address ties, Address scratch, const Sizes& sizes,
              bool relu, int dtype, int steps, bool on_cuda, Address stream, int threads) {
  CbamGrad g;
  g.forward = parameters(x, w1, w2, conv, affine, 0, out, channel, hidden_sums, spatial, sizes, relu, dtype);
  g.grad = pointer<const void>(grad);
  g.masked = pointer<void>(masked);
  g.dx = pointer<void>(dx);
  g.dw1 = pointer<float>(dw1);
  g.dw2 = pointer<float>(dw2);
  g.dconv = pointer<float>(dconv);
  g.daffine = pointer<float>(daffine);
  g.dlogits = pointer<float>(dlogits);
  g.ties = pointer<float>(ties);
  g.scratch = pointer<float>(scratch);
  py::gil_scoped_release released;
  if (on_cuda)
    cuda::cbam_grad(g, static_cast<CbamSteps>(steps), pointer<void>(stream));
  else
    cpu::cbam_grad(g, static_cast<CbamSteps>(steps), threads);
}

int64_t scratch(const Sizes& sizes, int dtype, bool gradient) {
  const Cbam p = parameters(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, sizes, false, dtype);
  return gradient ? cuda::cbam_grad_scratch(p) : cuda::cbam_scratch(p);
}

}  // namespace

void bind_cbam(py::module_& m) {
  m.def("cbam", &forward, py::kw_only(), "x"_a, "w1"_a, "w2"_a, "conv"_a, "affine"_a, "residual"_a, "out"_a,
        "channel"_a, "hidden_sums"_a, "spatial"_a, "scratch"_a, "sizes"_a, "relu"_a, "dtype"_a, "steps"_a, "on_cuda"_a,
        "stream"_a, "threads"_a);
  m.def("cbam_grad", &backward, py::kw_only(), "x"_a, "w1"_a, "w2"_a, "conv"_a, "affine"_a, "out"_a, "channel"_a,
        "hidden_sums"_a, "spatial"_a, "grad"_a, "masked"_a, "dx"_a, "dw1"_a, "dw2"_a, "dconv"_a, "daffine"_a,
        "dlogits"_a, "ties"_a, "scratch"_a, "sizes"_a, "relu"_a, "dtype"_a, "steps"_a, "on_cuda"_a, "stream"_a,
        "threads"_a);
  m.def("cbam_scratch", &scratch, py::kw_only(), "sizes"_a, "dtype"_a, "gradient"_a);
}

}  // namespace imgcls
