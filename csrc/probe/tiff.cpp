// TIFF 6.0 and BigTIFF directories, for TIFF files and for the EXIF blocks of the other formats.
#include <algorithm>
#include <cstring>
#include <functional>

#include "formats.h"

namespace imgcls {

namespace {

constexpr size_t kMaxXmp = 1 << 20;
constexpr uint64_t kMaxParts = 1 << 16;  // strips or tiles of a page that are checked against the file's end
constexpr int kMaxPages = 64;            // pages that are checked so
constexpr size_t kBlock = 256;           // values read at once

struct Layout {
  bool big_endian = false;
  bool big = false;  // BigTIFF: 64-bit counts and offsets
  uint64_t first = 0;
};

struct Entry {
  uint16_t tag = 0, type = 0;
  uint64_t count = 0;
  uint64_t at = 0;  // where the value lies
};

uint64_t number(const Layout& layout, const uint8_t* p, size_t n) {
  uint64_t value = 0;
  for (size_t i = 0; i < n; ++i) value = value << 8 | p[layout.big_endian ? i : n - 1 - i];
  return value;
}

bool read_number(const Bytes& bytes, const Layout& layout, uint64_t at, size_t n, uint64_t& value) {
  uint8_t raw[8];
  if (!bytes.read(at, raw, n)) return false;
  value = number(layout, raw, n);
  return true;
}

size_t type_size(uint16_t type) {
  static constexpr uint8_t kSizes[] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8};
  return type < sizeof kSizes ? kSizes[type] : 0;
}

bool is_integer(uint16_t type) {
  return type == 3 || type == 4 || type == 6 || type == 8 || type == 9 || type == 13 || type == 16;
}

bool read_layout(const Bytes& bytes, Layout& layout) {
  uint8_t head[16] = {};
  if (!bytes.read(0, head, 8)) return false;
  if (std::memcmp(head, "MM", 2) != 0 && std::memcmp(head, "II", 2) != 0) return false;
  layout.big_endian = head[0] == 'M';
  const uint64_t version = number(layout, head + 2, 2);
  if (version == 43) {
    layout.big = true;
    if (!bytes.read(8, head + 8, 8)) return false;
    layout.first = number(layout, head + 8, 8);
    return true;
  }
  layout.first = number(layout, head + 4, 4);
  return version == 42 || version == 42 << 8;  // Pillow reads files with a swapped version as well
}

// Calls visit(entry) for each readable entry of the directory at `at`. False where the directory is cut short.
// As in Pillow, values that together exceed the file are passed over, and one behind its end closes the directory.
bool walk_directory(const Bytes& bytes, const Layout& layout, uint64_t at, uint64_t& next,
                    const std::function<void(const Entry&)>& visit) {
  const size_t word = layout.big ? 8 : 4;  // bytes of a count, an offset or an inline value
  const size_t step = 4 + 2 * word;
  uint64_t entries = 0, total = 0;
  if (!read_number(bytes, layout, at, layout.big ? 8 : 2, entries)) return false;
  at += layout.big ? 8 : 2;
  for (uint64_t i = 0; i < entries; ++i, at += step) {
    uint8_t raw[20];
    if (i > UINT16_MAX || !bytes.read(at, raw, step)) return false;
    Entry entry;
    entry.tag = static_cast<uint16_t>(number(layout, raw, 2));
    entry.type = static_cast<uint16_t>(number(layout, raw + 2, 2));
    entry.count = number(layout, raw + 4, word);
    entry.at = at + 4 + word;
    const size_t unit = type_size(entry.type);
    if (unit == 0 || entry.count == 0) continue;
    const bool absurd = entry.count > bytes.size();  // also keeps count * unit from overflowing
    if (absurd || entry.count * unit > word) {
      total = absurd ? UINT64_MAX : total + std::min(entry.count * unit, UINT64_MAX - total);
      if (total > bytes.size()) continue;
      entry.at = number(layout, raw + 4 + word, word);
      if (entry.at > bytes.size() || entry.count * unit > bytes.size() - entry.at) return false;
    }
    visit(entry);
  }
  return read_number(bytes, layout, at, word, next);
}

// Element `index` of an integer entry; 0 for any other type.
uint64_t value_of(const Bytes& bytes, const Layout& layout, const Entry& entry, uint64_t index = 0) {
  uint64_t value = 0;
  const size_t unit = type_size(entry.type);
  if (!is_integer(entry.type) || index >= entry.count) return 0;
  return read_number(bytes, layout, entry.at + index * unit, unit, value) ? value : 0;
}

uint8_t as_orientation(uint64_t value) { return value >= 1 && value <= 8 ? static_cast<uint8_t>(value) : 1; }

// XMP is searched, not parsed: tiff:Orientation="6" and <tiff:Orientation>6</tiff:Orientation>.
uint8_t xmp_orientation(const Bytes& xmp) {
  static constexpr char kKey[] = "tiff:Orientation";
  const std::string text = xmp.text(0, kMaxXmp);
  for (size_t at = text.find(kKey); at != std::string::npos; at = text.find(kKey, at + 1)) {
    size_t digit = at + sizeof kKey - 1;
    if (text.compare(digit, 2, "=\"") == 0) {
      digit += 2;
    } else if (text.compare(digit, 1, ">") == 0) {
      digit += 1;
    } else {
      continue;
    }
    if (digit < text.size() && text[digit] >= '0' && text[digit] <= '9') {
      return as_orientation(static_cast<uint64_t>(text[digit] - '0'));
    }
  }
  return 1;
}

struct Page {
  Entry width, height, bits, photometric, samples, extra, orientation, xmp;
  Entry offsets, lengths;  // of strips or tiles

  void keep(const Entry& entry) {
    Entry* slot = slot_of(entry.tag);
    if (slot && slot->count == 0) *slot = entry;  // the first of two equal tags counts
  }

 private:
  Entry* slot_of(uint16_t tag) {
    switch (tag) {
      case 256: return &width;
      case 257: return &height;
      case 258: return &bits;
      case 262: return &photometric;
      case 273:
      case 324: return &offsets;
      case 274: return &orientation;
      case 277: return &samples;
      case 279:
      case 325: return &lengths;
      case 338: return &extra;
      case 700: return &xmp;
      default: return nullptr;
    }
  }
};

// Elements [first, first + n) of an entry; zeros where it has none.
void read_values(const Bytes& bytes, const Layout& layout, const Entry& entry, uint64_t first, size_t n,
                 uint64_t* values) {
  uint8_t raw[kBlock * 8];
  std::fill(values, values + n, 0);
  const size_t unit = type_size(entry.type);
  if (!is_integer(entry.type) || first >= entry.count) return;
  n = static_cast<size_t>(std::min<uint64_t>(n, entry.count - first));
  if (!bytes.read(entry.at + first * unit, raw, n * unit)) return;
  for (size_t i = 0; i < n; ++i) values[i] = number(layout, raw + i * unit, unit);
}

// By blocks: the two arrays may lie far apart, and going to and fro for every strip would be a read each.
bool parts_are_there(const Bytes& bytes, const Layout& layout, const Page& page) {
  const uint64_t parts = std::min(page.offsets.count, kMaxParts);
  uint64_t at[kBlock], length[kBlock];
  for (uint64_t first = 0; first < parts; first += kBlock) {
    const size_t n = static_cast<size_t>(std::min<uint64_t>(kBlock, parts - first));
    read_values(bytes, layout, page.offsets, first, n, at);
    read_values(bytes, layout, page.lengths, first, n, length);
    for (size_t i = 0; i < n; ++i) {
      if (at[i] > bytes.size() || length[i] > bytes.size() - at[i]) return false;
    }
  }
  return true;
}

// Whether the pages behind the first are in the file as well.
bool pages_are_there(const Bytes& bytes, const Layout& layout, uint64_t at) {
  uint64_t before = layout.first;
  for (int i = 0; i < kMaxPages && at > before; ++i) {  // a directory that points back would never end
    Page page;
    before = at;
    if (!walk_directory(bytes, layout, at, at, [&](const Entry& entry) { page.keep(entry); })) return false;
    if (!parts_are_there(bytes, layout, page)) return false;
  }
  return true;
}

}  // namespace

uint8_t find_orientation(const Bytes& exif, const Bytes& xmp) {
  Layout layout;
  Entry found;
  if (!exif.empty() && read_layout(exif, layout) && !layout.big) {
    uint64_t next = 0;
    walk_directory(exif, layout, layout.first, next, [&](const Entry& entry) {
      if (entry.tag == 274 && found.count == 0) found = entry;
    });
  }
  if (found.count > 0) return as_orientation(value_of(exif, layout, found));
  return xmp.empty() ? 1 : xmp_orientation(xmp);
}

Status probe_tiff(Reader& file, Header& header) {
  const Bytes bytes(file, 0, file.size());
  Layout layout;
  Page page;
  uint64_t next = 0;
  if (!read_layout(bytes, layout)) return Status::kDamaged;
  const bool whole = walk_directory(bytes, layout, layout.first, next, [&](const Entry& e) { page.keep(e); });
  header.truncated = !whole || !parts_are_there(bytes, layout, page) || !pages_are_there(bytes, layout, next);
  header.animated = whole && next != 0 && next != layout.first;

  const auto value = [&](const Entry& entry, uint64_t otherwise) {
    return entry.count ? value_of(bytes, layout, entry) : otherwise;
  };
  const uint64_t photometric = value(page.photometric, 0);
  const uint64_t samples = value(page.samples, 1), bits = value(page.bits, 1);
  if (samples > UINT8_MAX || bits > UINT8_MAX) return Status::kDamaged;
  header.channels = static_cast<uint8_t>(samples);
  header.bit_depth = static_cast<uint8_t>(bits);
  if (photometric == 3) header.detail |= kPalette;
  if (photometric == 5) header.detail |= kCmyk;
  const uint64_t extra = value(page.extra, 0);
  if (extra == 1 || extra == 2) header.detail |= kAlpha;
  if (page.orientation.count) {
    header.orientation = as_orientation(value(page.orientation, 1));
  } else if (page.xmp.count) {
    header.orientation = xmp_orientation(Bytes(file, page.xmp.at, page.xmp.count * type_size(page.xmp.type)));
  }
  return set_size(header, value(page.width, 0), value(page.height, 0));
}

}  // namespace imgcls
