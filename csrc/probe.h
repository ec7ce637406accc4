// Reads the headers of many image files with many threads, decoding nothing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace imgcls {

enum class Format : uint8_t { kUnknown = 0, kJpeg = 1, kPng = 2, kWebp = 3, kBmp = 4, kTiff = 5, kGif = 6 };

enum class Status : uint8_t {
  kOk = 0,
  kUnreadable = 1,  // missing, no permission, not a regular file, or a read error
  kEmpty = 2,
  kForeign = 3,  // not one of the six formats
  kDamaged = 4,  // one of the six by its first bytes, but no usable size
};

// Bits of Header::detail: what makes an image unusual enough to choose another decoder.
enum Detail : uint8_t {
  kOddJpegFrame = 1,  // arithmetic, lossless, hierarchical, not 8-bit, or of two components
  kPalette = 2,       // colours are indices into a table
  kAlpha = 4,         // alpha channel or a transparent colour
  kCmyk = 8,          // four inks (CMYK or YCCK)
  kOddBmp = 16,       // any BMP but 24-bit uncompressed
  kInterlaced = 32,   // progressive JPEG, interlaced PNG or GIF
};

struct Header {
  int64_t size_bytes = 0;
  int32_t width = 0;   // as stored, before any rotation
  int32_t height = 0;  // as stored, before any rotation
  Format format = Format::kUnknown;
  Status status = Status::kUnreadable;
  uint8_t channels = 0;     // as stored: a palette image has one
  uint8_t bit_depth = 0;    // bits of one sample, or of one palette index
  uint8_t orientation = 1;  // EXIF 1..8
  uint8_t animated = 0;     // more than one frame or page
  uint8_t truncated = 0;    // the end marker or promised bytes are missing; only a decode can tell how bad it is
  uint8_t detail = 0;       // Detail bits
};

// Never throws; every kind of bad file has a Status.
Header probe_file(const std::string& path) noexcept;

// The same of a file's n bytes in memory.
Header probe_bytes(const uint8_t* bytes, size_t n) noexcept;

// out[i] describes paths[i]. Uses at most `threads` threads, the calling one among them.
void probe_files(const std::vector<std::string>& paths, int threads, Header* out);

}  // namespace imgcls
