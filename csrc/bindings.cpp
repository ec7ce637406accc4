// The Python face of the extension: converts arguments and results, and nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bind/bind.h"
#include "kernels.h"
#include "probe.h"
#include "probe/proof.h"

namespace py = pybind11;
using namespace py::literals;
using imgcls::Header;

namespace {

template <typename T, typename Field>
py::array_t<T> column(const std::vector<Header>& headers, Field field) {
  py::array_t<T> out(static_cast<py::ssize_t>(headers.size()));
  T* to = out.mutable_data();
  for (const Header& header : headers) *to++ = static_cast<T>(field(header));
  return out;
}

std::vector<std::string> to_paths(const py::sequence& given) {
  std::vector<std::string> paths;
  paths.reserve(py::len(given));
  for (const py::handle item : given) {
    char* text = nullptr;
    Py_ssize_t length = 0;
    if (PyBytes_AsStringAndSize(item.ptr(), &text, &length) != 0) throw py::error_already_set();
    paths.emplace_back(text, static_cast<size_t>(length));
  }
  return paths;
}

py::dict probe(const py::sequence& given, int threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  const std::vector<std::string> paths = to_paths(given);
  std::vector<Header> headers(paths.size());
  {
    py::gil_scoped_release released;
    imgcls::probe_files(paths, threads, headers.data());
  }
  py::dict out;
  out["format"] = column<uint8_t>(headers, [](const Header& h) { return h.format; });
  out["status"] = column<uint8_t>(headers, [](const Header& h) { return h.status; });
  out["width"] = column<int32_t>(headers, [](const Header& h) { return h.width; });
  out["height"] = column<int32_t>(headers, [](const Header& h) { return h.height; });
  out["channels"] = column<uint8_t>(headers, [](const Header& h) { return h.channels; });
  out["bit_depth"] = column<uint8_t>(headers, [](const Header& h) { return h.bit_depth; });
  out["orientation"] = column<uint8_t>(headers, [](const Header& h) { return h.orientation; });
  out["animated"] = column<uint8_t>(headers, [](const Header& h) { return h.animated; });
  out["truncated"] = column<uint8_t>(headers, [](const Header& h) { return h.truncated; });
  out["detail"] = column<uint8_t>(headers, [](const Header& h) { return h.detail; });
  out["size_bytes"] = column<int64_t>(headers, [](const Header& h) { return h.size_bytes; });
  return out;
}

// A tuple rather than a dict: asked for every image of every epoch.
py::tuple prove(const py::bytes& given) {
  char* text = nullptr;
  Py_ssize_t length = 0;
  if (PyBytes_AsStringAndSize(given.ptr(), &text, &length) != 0) throw py::error_already_set();
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(text);
  const size_t n = static_cast<size_t>(length);
  Header header;
  imgcls::JpegProof proof;
  {
    py::gil_scoped_release released;
    header = imgcls::probe_bytes(bytes, n);
    if (header.format == imgcls::Format::kJpeg) proof = imgcls::prove_jpeg(bytes, n);
  }
  const bool sound = proof.sound && header.status == imgcls::Status::kOk && header.detail % 2 == 0 &&
                     proof.width == header.width && proof.height == header.height;
  return py::make_tuple(static_cast<int>(header.format), static_cast<int>(header.status), header.width, header.height,
                        static_cast<int>(header.orientation), sound, proof.ends, proof.scans);
}

py::dict build_info() {
  const int version = imgcls::cuda_runtime_version();
  py::dict out;
  out["version"] = IMGCLS_VERSION;
  out["compiler"] = IMGCLS_COMPILER;
  out["cuda"] = version > 0;
  out["cuda_archs"] = IMGCLS_CUDA_ARCHS;
  out["cuda_version"] =
      version > 0 ? std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) : std::string();
  out["why_no_cuda"] = IMGCLS_WHY_NO_CUDA;
  out["isa"] = imgcls::cpu::isa();
  return out;
}

py::dict cuda_status() {
  imgcls::CudaStatus status;
  {
    py::gil_scoped_release released;
    status = imgcls::cuda_status();
  }
  return py::dict("devices"_a = status.devices, "driver_version"_a = status.driver_version, "error"_a = status.error);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of imgcls_fast. Signatures and shapes: _C.pyi.";
  m.def("probe", &probe, "paths"_a, "threads"_a = 1);
  m.def("prove", &prove, "content"_a);
  m.def("build_info", &build_info);
  m.def("cuda_status", &cuda_status);
  m.def("isa", [] { return std::string(imgcls::cpu::isa()); });
  m.def("set_isa", &imgcls::cpu::set_isa, "name"_a);
  imgcls::bind_cbam(m);
  imgcls::bind_window_attention(m);
}
