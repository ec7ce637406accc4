#pragma once

#include <cstddef>
#include <string>

namespace imgcls {

// Expands a zlib stream (RFC 1950, 1951) for the compressed text chunks of PNG. Small rather than fast, and without
// a dependency that a build machine may lack. False for broken input or more than `limit` bytes.
bool inflate_zlib(const std::string& in, size_t limit, std::string& out);

}  // namespace imgcls
