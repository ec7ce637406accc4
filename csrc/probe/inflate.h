#pragma once

#include <cstddef>
#include <string>

namespace imgcls {

// What expanding may cost, for all streams of one file together. Both run out, in whatever a stream is wrong.
struct InflateBudget {
  size_t bytes;   // that come out
  size_t blocks;  // of the format; building the codes of each costs time, even of an empty one
};

// Expands a zlib stream (RFC 1950, 1951) for the compressed text chunks of PNG. Small rather than fast, and without
// a dependency that a build machine may lack. False for broken input, more than `limit` bytes or more than is left.
bool inflate_zlib(const std::string& in, size_t limit, InflateBudget& budget, std::string& out);

}  // namespace imgcls
