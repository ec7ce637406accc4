// JPEG (ITU-T T.81, annex B): walks the marker segments up to the first scan by their lengths, so that embedded
// thumbnails and profiles are stepped over unread.
#include <algorithm>
#include <cstring>

#include "formats.h"

namespace imgcls {

namespace {

constexpr uint64_t kTail = 4096;    // cameras and editors leave padding or a trailer behind the end marker
constexpr int kMaxJunk = 1 << 20;   // bytes between segments that are no marker
constexpr char kExif[] = "Exif\0";  // with its closing NUL six bytes
constexpr char kXmp[] = "http://ns.adobe.com/xap/1.0/";

bool starts_with(Reader& file, uint64_t at, uint64_t length, const char* text, size_t n) {
  const uint8_t* p = length >= n ? file.view(at, n) : nullptr;
  return p && std::memcmp(p, text, n) == 0;
}

bool is_frame(uint8_t code) {
  return (code >= 0xC0 && code <= 0xCF && code != 0xC4 && code != 0xC8 && code != 0xCC) || code == 0xDE;
}

bool has_no_payload(uint8_t code) {
  return code == 0xC8 || (code >= 0xD0 && code <= 0xD9) || (code >= 0xF0 && code <= 0xFD);
}

Status read_frame(Reader& file, uint64_t at, uint64_t length, uint8_t code, Header& header) {
  const uint8_t* p = length >= 6 ? file.view(at, 6) : nullptr;
  if (!p || (length - 6) % 3 != 0 || p[0] > 16 || p[5] == 0 || p[5] > 4) return Status::kDamaged;
  header.bit_depth = p[0];
  header.channels = p[5];
  header.detail = 0;
  const bool usual_coding = code == 0xC0 || code == 0xC1 || code == 0xC2;
  if (!usual_coding || p[5] == 2 || p[0] != 8) header.detail |= kOddJpegFrame;
  if (p[5] == 4) header.detail |= kCmyk;
  if (code == 0xC2 || code == 0xC6 || code == 0xCA || code == 0xCE) header.detail |= kInterlaced;
  return set_size(header, be16(p + 3), be16(p + 1));
}

// Inside a scan FF is always followed by 00 or a marker, so FF D9 behind its start is an end of image.
bool has_end_marker(Reader& file, uint64_t scan) {
  const uint64_t from = file.size() > kTail ? std::max(scan, file.size() - kTail) : scan;
  if (from >= file.size()) return false;
  const size_t n = static_cast<size_t>(std::min<uint64_t>(file.size() - from, kTail));
  const uint8_t* p = file.view(from, n);
  for (size_t i = n; p && i >= 2; --i) {
    if (p[i - 2] == 0xFF && p[i - 1] == 0xD9) return true;
  }
  return false;
}

struct Segments {
  Bytes exif, xmp;
  uint64_t scan = 0;  // where the first scan's segment starts; 0: the file ended before it
  bool framed = false;
};

void read_app1(Reader& file, uint64_t at, uint64_t length, Segments& found) {
  if (starts_with(file, at, length, kExif, sizeof kExif)) {
    found.exif.append(file, at + sizeof kExif, length - sizeof kExif);  // a long EXIF goes on in the next segment
  } else if (starts_with(file, at, length, kXmp, sizeof kXmp)) {
    found.xmp = Bytes(file, at + sizeof kXmp, length - sizeof kXmp);
  }
}

// False: damaged. Where a file with broken segments is read differently by different decoders, this follows Pillow.
bool walk(Reader& file, Header& header, Segments& found) {
  uint64_t at = 2;
  int junk = 0;
  for (int step = 0; step < kMaxSteps;) {
    const uint8_t* p = file.view(at, 2);
    if (!p) return true;
    const uint8_t code = p[1];
    if (p[0] != 0xFF || code == 0xFF || code == 0x00) {
      at += p[0] == 0xFF && code == 0x00 ? 2 : 1;
      if (++junk > kMaxJunk) return false;
      continue;
    }
    if (code < 0xC0) return false;
    ++step;
    at += 2;
    if (has_no_payload(code)) continue;
    if (code == 0xDA) {
      found.scan = at;
      return true;
    }
    p = file.view(at, 2);
    if (!p) return true;
    const uint64_t length = std::max<int>(be16(p), 2) - 2;
    at += 2;
    if (length > file.size() - at) return true;
    if (is_frame(code)) {
      if (read_frame(file, at, length, code, header) != Status::kOk) return false;
      found.framed = true;
    } else if (code == 0xE1) {
      read_app1(file, at, length, found);
    }
    at += length;
  }
  return false;
}

}  // namespace

Status probe_jpeg(Reader& file, Header& header) {
  Segments found;
  if (!walk(file, header, found)) return Status::kDamaged;
  header.truncated = found.scan == 0 || !has_end_marker(file, found.scan);
  if (!found.framed) return Status::kDamaged;
  header.orientation = find_orientation(found.exif, found.xmp);
  return Status::kOk;
}

}  // namespace imgcls
