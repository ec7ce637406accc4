#pragma once

#include <cstddef>
#include <cstdint>

namespace imgcls {

struct JpegProof {
  bool sound = false;  // well-formed from the first byte to the end of image, each component coded
  bool ends = false;   // nothing follows the end of image
  int32_t width = 0, height = 0;
  int32_t scans = 0;     // up to the end of image, also where it is not sound
  int32_t segments = 0;  // with a length, scans among them
};

// Walks all n bytes of a JPEG in memory, decoding nothing. Never throws.
JpegProof prove_jpeg(const uint8_t* bytes, size_t n) noexcept;

}  // namespace imgcls
