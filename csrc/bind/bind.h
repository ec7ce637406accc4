// One function per kernel family, called by bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace imgcls {

void bind_cbam(pybind11::module_& m);
void bind_window_attention(pybind11::module_& m);

// An address that Python passed as a whole number; 0 is null.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace imgcls
