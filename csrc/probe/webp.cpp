// WebP container (RFC 9649).
#include <algorithm>
#include <cstring>

#include "formats.h"

namespace imgcls {

namespace {

constexpr uint8_t kHasAnimation = 0x02, kHasXmp = 0x04, kHasExif = 0x08, kHasAlpha = 0x10;

// A lossy still: RFC 6386, 9.1.
Status read_lossy(const uint8_t* p, Header& header) {
  const bool key_frame = (p[0] & 1) == 0 && p[3] == 0x9D && p[4] == 0x01 && p[5] == 0x2A;
  return key_frame ? set_size(header, le16(p + 6) & 0x3FFF, le16(p + 8) & 0x3FFF) : Status::kDamaged;
}

// A lossless still: RFC 9649, 3.4.
Status read_lossless(const uint8_t* p, Header& header) {
  if (p[0] != 0x2F) return Status::kDamaged;
  const uint32_t bits = le32(p + 1);
  if (bits >> 29) return Status::kDamaged;
  if (bits >> 28 & 1) header.detail |= kAlpha;
  return set_size(header, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1);
}

// The chunks behind the extended header. EXIF and XMP count only where the header's flags promise them.
void read_extended(Reader& file, uint64_t at, uint64_t end, uint8_t flags, Header& header) {
  Bytes exif, xmp;
  int frames = 0;
  for (int step = 0; step < kMaxSteps && end - at >= 8; ++step) {
    const uint8_t* p = file.view(at, 8);
    if (!p) break;
    const uint64_t length = le32(p + 4);
    at += 8;
    if (length > end - at) break;
    if (std::memcmp(p, "ANMF", 4) == 0) ++frames;
    if ((flags & kHasExif) && exif.empty() && std::memcmp(p, "EXIF", 4) == 0) exif = Bytes(file, at, length);
    if ((flags & kHasXmp) && xmp.empty() && std::memcmp(p, "XMP ", 4) == 0) xmp = Bytes(file, at, length);
    at += std::min(length + (length & 1), end - at);
  }
  if (exif.text(0, 6) == std::string("Exif\0", 6)) exif = Bytes(exif.text(6, Reader::kMaxView));
  header.animated = (flags & kHasAnimation) && frames > 1;
  header.orientation = find_orientation(exif, xmp);
}

}  // namespace

Status probe_webp(Reader& file, Header& header) {
  const uint8_t* p = file.view(0, 30);
  header.truncated = !p;
  if (!p) return Status::kDamaged;
  const uint64_t promised = uint64_t{le32(p + 4)} + 8;
  header.truncated = promised > file.size();
  header.bit_depth = 8;
  Status status = Status::kDamaged;
  if (std::memcmp(p + 12, "VP8 ", 4) == 0) {
    status = read_lossy(p + 20, header);
  } else if (std::memcmp(p + 12, "VP8L", 4) == 0) {
    status = read_lossless(p + 20, header);
  } else if (std::memcmp(p + 12, "VP8X", 4) == 0) {
    const uint8_t flags = p[20];
    const uint64_t length = le32(p + 16);
    const uint64_t next = 20 + length + (length & 1);
    const uint64_t end = std::min(promised, file.size());
    if (length < 10 || next > promised) return Status::kDamaged;
    if (flags & kHasAlpha) header.detail |= kAlpha;
    status = set_size(header, le24(p + 24) + 1, le24(p + 27) + 1);
    if (next <= end) read_extended(file, next, end, flags, header);
  }
  header.channels = header.detail & kAlpha ? 4 : 3;
  return status;
}

}  // namespace imgcls
