// One function per format. Each gets an open file whose first bytes fit, fills what it finds and returns kOk or
// kDamaged.
#pragma once

#include "../probe.h"
#include "reader.h"

namespace imgcls {

Status probe_jpeg(Reader& file, Header& header);
Status probe_png(Reader& file, Header& header);
Status probe_webp(Reader& file, Header& header);
Status probe_bmp(Reader& file, Header& header);
Status probe_tiff(Reader& file, Header& header);
Status probe_gif(Reader& file, Header& header);

// EXIF orientation 1..8, else the one that XMP tells, else 1. Either may be empty.
uint8_t find_orientation(const Bytes& exif, const Bytes& xmp);

// Stores a size that fits the columns; kDamaged for an empty or absurd one.
inline Status set_size(Header& header, uint64_t width, uint64_t height) {
  if (width == 0 || height == 0 || width > INT32_MAX || height > INT32_MAX) return Status::kDamaged;
  header.width = static_cast<int32_t>(width);
  header.height = static_cast<int32_t>(height);
  return Status::kOk;
}

}  // namespace imgcls
