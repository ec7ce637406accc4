// Windows and OS/2 bitmaps: BITMAPCOREHEADER (12 bytes) up to BITMAPV5HEADER (124 bytes).
#include "formats.h"

namespace imgcls {

namespace {

constexpr uint32_t kRaw = 0, kRle8 = 1, kRle4 = 2, kBitFields = 3;

struct Bitmap {
  uint64_t width = 0, height = 0;
  uint32_t bits = 0, compression = kRaw, data_bytes = 0, colors = 0, alpha_mask = 0;
  uint32_t entry_bytes = 4;  // of one palette entry
};

bool read_bitmap(Reader& file, uint32_t header_bytes, Bitmap& bmp) {
  const uint8_t* p = file.view(14, header_bytes);
  if (!p) return false;
  if (header_bytes == 12) {
    bmp.width = le16(p + 4), bmp.height = le16(p + 6), bmp.bits = le16(p + 10), bmp.entry_bytes = 3;
  } else {
    bmp.width = le32(p + 4);
    const uint32_t height = le32(p + 8);
    bmp.height = height >> 24 == 0xFF ? (uint64_t{1} << 32) - height : height;  // negative: rows from top to bottom
    bmp.bits = le16(p + 14);
    bmp.compression = le32(p + 16);
    bmp.data_bytes = le32(p + 20);
    bmp.colors = le32(p + 32);
    if (header_bytes >= 56 && bmp.compression == kBitFields) bmp.alpha_mask = le32(p + 52);
  }
  if (bmp.colors == 0 && bmp.bits <= 8) bmp.colors = 1u << bmp.bits;
  return true;
}

bool is_header(uint32_t n) { return n == 12 || n == 40 || n == 52 || n == 56 || n == 64 || n == 108 || n == 124; }

uint64_t pixels_end(uint64_t offset, uint32_t header_bytes, const Bitmap& bmp) {
  const uint64_t palette = bmp.bits <= 8 ? uint64_t{bmp.colors} * bmp.entry_bytes : 0;
  const uint64_t behind_header = 14 + uint64_t{header_bytes};
  if (offset == 0 || (offset == behind_header && bmp.bits <= 8)) offset = behind_header + palette;
  if (bmp.compression == kRle8 || bmp.compression == kRle4) return offset + bmp.data_bytes;
  const uint64_t row_bytes = (bmp.width * bmp.bits + 31) / 32 * 4;  // both sizes are below 2^31 here
  return row_bytes > (UINT64_MAX - offset) / bmp.height ? UINT64_MAX : offset + row_bytes * bmp.height;
}

}  // namespace

Status probe_bmp(Reader& file, Header& header) {
  const uint8_t* p = file.view(0, 18);
  header.truncated = !p;
  if (!p) return Status::kDamaged;
  const uint64_t offset = le32(p + 10);
  const uint32_t header_bytes = le32(p + 14);
  Bitmap bmp;
  if (!is_header(header_bytes)) return Status::kDamaged;
  header.truncated = !read_bitmap(file, header_bytes, bmp);
  const bool palette = bmp.bits == 1 || bmp.bits == 4 || bmp.bits == 8;
  if (!palette && bmp.bits != 16 && bmp.bits != 24 && bmp.bits != 32) return Status::kDamaged;
  if (bmp.compression > kBitFields || (palette && bmp.colors > 65536)) return Status::kDamaged;
  if (set_size(header, bmp.width, bmp.height) != Status::kOk) return Status::kDamaged;

  header.truncated = pixels_end(offset, header_bytes, bmp) > file.size();
  header.channels = palette ? 1 : bmp.alpha_mask ? 4 : 3;
  header.bit_depth = static_cast<uint8_t>(palette ? bmp.bits : bmp.bits == 16 ? 5 : 8);
  if (palette) header.detail |= kPalette;
  if (bmp.alpha_mask) header.detail |= kAlpha;
  if (bmp.bits != 24 || bmp.compression != kRaw) header.detail |= kOddBmp;
  return Status::kOk;
}

}  // namespace imgcls
