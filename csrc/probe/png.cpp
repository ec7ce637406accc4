// PNG (W3C, third edition): walks the chunks by their lengths; pixel data is stepped over unread.
#include <algorithm>
#include <cstring>

#include "formats.h"
#include "inflate.h"

namespace imgcls {

namespace {

constexpr size_t kMaxText = 1 << 20;                     // Pillow refuses longer text chunks
constexpr size_t kMaxInflated = 4 << 20;                 // bytes, from all text chunks of a file
constexpr size_t kMaxBlocks = 1 << 13;                   // of compressed data in them
constexpr int kMaxTexts = 1 << 12;                       // text chunks that are looked at
constexpr size_t kTextHead = 512;                        // keyword, language and translated keyword of a text chunk
constexpr char kRawProfile[] = "Raw profile type exif";  // how ImageMagick kept EXIF before PNG had eXIf
constexpr char kXmpKeyword[] = "XML:com.adobe.xmp";

bool named(const char* name, const char* other) { return std::memcmp(name, other, 4) == 0; }

bool is_name(const char* name) {
  return std::all_of(name, name + 4, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
}

uint32_t crc32(const uint8_t* p, size_t n) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < n; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

bool depth_fits(uint8_t depth, uint8_t color) {
  if (color == 0) return depth == 1 || depth == 2 || depth == 4 || depth == 8 || depth == 16;
  if (color == 3) return depth == 1 || depth == 2 || depth == 4 || depth == 8;
  return (color == 2 || color == 4 || color == 6) && (depth == 8 || depth == 16);
}

// The profile is a text of hexadecimal digits behind three lines (empty, name, length).
std::string unhex_profile(const std::string& text) {
  std::string out;
  int lines = 0, high = -1;
  for (const char c : text) {
    if (c == '\n') ++lines;
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (lines < 3 || digit < 0) continue;
    if (high >= 0) out.push_back(static_cast<char>(high << 4 | digit));
    high = high >= 0 ? -1 : digit;
  }
  return out;
}

Bytes without_prefix(const Bytes& exif) {
  const bool prefixed = exif.text(0, 6) == std::string("Exif\0", 6);
  return prefixed ? Bytes(exif.text(6, kMaxText)) : exif;
}

struct Png {
  Reader& file;
  Header& header;
  Bytes exif{}, profile{}, xmp{};
  uint32_t frames = 0;      // as acTL tells
  bool controlled = false;  // met acTL
  bool first_is_frame = false;
  InflateBudget budget{kMaxInflated, kMaxBlocks};
  int texts = 0;

  Status read_header(uint64_t at, uint64_t length) {
    const uint8_t* p = length >= 13 ? file.view(at - 4, 21) : nullptr;  // name, 13 bytes, checksum
    if (!p || (length == 13 && crc32(p, 17) != be32(p + 17))) return Status::kDamaged;
    const uint8_t depth = p[12], color = p[13];
    if (!depth_fits(depth, color) || p[15] != 0) return Status::kDamaged;
    header.bit_depth = depth;
    header.channels = color == 2 ? 3 : color == 4 ? 2 : color == 6 ? 4 : 1;
    if (color == 3) header.detail |= kPalette;
    if (color == 4 || color == 6) header.detail |= kAlpha;
    if (p[16]) header.detail |= kInterlaced;
    return set_size(header, be32(p + 4), be32(p + 8));
  }

  Bytes expand(uint64_t at, uint64_t length) {
    std::string out;
    const bool good = inflate_zlib(Bytes(file, at, length).text(0, kMaxText), kMaxText, budget, out);
    return good ? Bytes(std::move(out)) : Bytes();
  }

  // tEXt, zTXt and iTXt, where their keyword is one that may hold an orientation.
  void read_text(const char* name, uint64_t at, uint64_t length) {
    if (++texts > kMaxTexts) return;
    const std::string head = Bytes(file, at, length).text(0, kTextHead);
    const size_t key_end = head.find('\0');
    if (key_end == std::string::npos) return;
    const std::string key = head.substr(0, key_end);
    Bytes* slot = key == kRawProfile ? &profile : key == kXmpKeyword ? &xmp : nullptr;
    if (key == "exif" && named(name, "tEXt")) slot = &exif;
    if (!slot) return;
    uint64_t start = key_end + 1;
    bool packed = false;
    if (named(name, "zTXt")) {
      packed = true;
      start += 1;
    } else if (named(name, "iTXt")) {
      packed = head.size() > start && head[start] != 0;
      const size_t language_end = head.find('\0', start + 2);
      const size_t keyword_end = language_end == std::string::npos ? language_end : head.find('\0', language_end + 1);
      if (keyword_end == std::string::npos) return;
      start = keyword_end + 1;
    }
    if (start > length) return;
    *slot = packed ? expand(at + start, length - start) : Bytes(file, at + start, length - start);
  }

  void read_metadata(const char* name, uint64_t at, uint64_t length) {
    if (named(name, "eXIf")) {
      exif = Bytes(file, at, length);
    } else if (named(name, "tEXt") || named(name, "zTXt") || named(name, "iTXt")) {
      read_text(name, at, length);
    } else if (named(name, "tRNS")) {
      header.detail |= kAlpha;
    } else if (named(name, "acTL")) {
      const uint8_t* p = length >= 8 ? file.view(at, 4) : nullptr;
      frames = p && !controlled ? be32(p) : 0;
      controlled = true;
    }
  }

  // Returns kDamaged only where no size was found. A file that ends early is kOk and truncated.
  Status walk() {
    bool sized = false, in_pixels = false, reading = true;
    uint64_t at = 8;
    for (int step = 0; step < kMaxSteps; ++step) {
      const uint8_t* p = file.view(at, 8);
      if (!p) break;
      const uint64_t length = be32(p);
      char name[4];
      std::memcpy(name, p + 4, 4);
      if (!is_name(name)) return in_pixels ? Status::kOk : Status::kDamaged;
      at += 8;
      if (length > file.size() - at || file.size() - at - length < 4) break;
      if (named(name, "IEND")) {
        header.truncated = !in_pixels;
        break;
      }
      if (named(name, "IDAT") || named(name, "fdAT")) {
        if (!sized) return Status::kDamaged;
        if (!in_pixels && !first_is_frame && frames) ++frames;  // a still in front of the animation
        reading = reading && (in_pixels || exif.empty());       // Pillow asks behind the pixels only without EXIF
        in_pixels = true;
      } else if (named(name, "fcTL")) {
        if (in_pixels && frames > 1) reading = false;  // what belongs to later frames is not the image's
        first_is_frame = true;
      } else if (named(name, "IHDR") && !in_pixels) {
        if (read_header(at, length) != Status::kOk) return Status::kDamaged;
        sized = true;
      } else if (reading) {
        read_metadata(name, at, length);
      }
      at += length + 4;
    }
    return sized ? Status::kOk : Status::kDamaged;
  }
};

}  // namespace

Status probe_png(Reader& file, Header& header) {
  Png png{file, header};
  header.truncated = 1;  // until pixels and IEND are met
  const Status status = png.walk();
  header.animated = png.frames > 1 && png.frames <= 0x80000000u;
  Bytes& exif = png.exif;
  if (exif.empty() && !png.profile.empty()) exif = Bytes(unhex_profile(png.profile.text(0, kMaxText)));
  header.orientation = find_orientation(without_prefix(exif), png.xmp);
  return status;
}

}  // namespace imgcls
