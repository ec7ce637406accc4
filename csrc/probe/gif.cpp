// GIF87a and GIF89a.
#include <algorithm>
#include <cstring>

#include "formats.h"

namespace imgcls {

namespace {

constexpr uint64_t kWalkLimit =
    1 << 18;  // bytes: GIF has no lengths to seek by, so a long file is not walked to its end

uint64_t table_bytes(uint8_t flags) { return flags & 0x80 ? uint64_t{3} << ((flags & 7) + 1) : 0; }

struct Walk {
  Reader& file;
  Header& header;
  uint64_t width, height;
  uint8_t screen_flags;
  uint64_t at;
  int frames = 0;
  bool loops = false;    // the NETSCAPE extension: says "animated" when the second frame is too far away
  bool trailer = false;  // met the end marker
  bool gave_up = false;  // stopped at kWalkLimit

  // Steps over data blocks up to the empty one. False at the end of the file or of our patience.
  bool skip_blocks() {
    for (;;) {
      const uint8_t* p = file.view(at, 1);
      if (!p) return false;
      at += 1 + uint64_t{*p};
      if (*p == 0) return true;
      if (at > kWalkLimit) return !(gave_up = true);
    }
  }

  bool read_extension() {
    const uint8_t* p = file.view(at, 3);
    if (!p) return false;
    if (p[0] == 0xF9 && p[1] >= 1 && (p[2] & 1) && frames == 0) header.detail |= kAlpha;
    if (p[0] == 0xFF && p[1] >= 11) {
      p = file.view(at + 2, 11);
      loops = loops || (p && std::memcmp(p, "NETSCAPE2.0", 11) == 0);
    }
    at += 1;
    return skip_blocks();
  }

  bool read_image() {
    const uint8_t* p = file.view(at, 9);
    if (!p) return false;
    const uint8_t flags = p[8];
    if (frames == 0) {  // as in Pillow, a first frame that exceeds the screen enlarges it
      width = std::max<uint64_t>(width, le16(p) + le16(p + 4));
      height = std::max<uint64_t>(height, le16(p + 2) + le16(p + 6));
      header.bit_depth = static_cast<uint8_t>(((flags & 0x80 ? flags : screen_flags) & 7) + 1);
      if (flags & 0x40) header.detail |= kInterlaced;
    }
    at += 9 + table_bytes(flags);
    if (!file.view(at, 1)) return false;  // the code size
    ++frames;
    at += 1;
    return skip_blocks();
  }

  void run() {
    for (;;) {
      const uint8_t* p = file.view(at, 1);
      if (!p) return;
      ++at;
      if (*p == ';') {
        trailer = true;
        return;
      }
      if (*p == '!' && !read_extension()) return;
      if (*p == ',' && !read_image()) return;
      if (at > kWalkLimit) {
        gave_up = true;
        return;
      }
    }
  }
};

bool ends_with_trailer(Reader& file) {
  constexpr uint64_t kTail = 1024;  // zero padding is common
  const uint64_t n = std::min(file.size(), kTail);
  const uint8_t* p = file.view(file.size() - n, static_cast<size_t>(n));
  uint64_t end = n;
  while (p && end > 0 && p[end - 1] == 0) --end;
  return p && end > 0 && p[end - 1] == ';';
}

}  // namespace

Status probe_gif(Reader& file, Header& header) {
  const uint8_t* p = file.view(0, 13);
  header.truncated = !p;
  if (!p) return Status::kDamaged;
  Walk walk{file, header, le16(p + 6), le16(p + 8), p[10], 13 + table_bytes(p[10])};
  header.channels = 1;
  header.detail |= kPalette;
  walk.run();
  header.animated = walk.frames > 1 || (walk.gave_up && walk.loops);
  header.truncated = walk.gave_up ? !ends_with_trailer(file) : !walk.trailer;
  return walk.frames == 0 ? Status::kDamaged : set_size(header, walk.width, walk.height);
}

}  // namespace imgcls
