// Whether a JPEG may be given to a decoder that cannot be restarted. libjpeg and its relatives end a whole batch, or
// the process, on what they do not expect; so everything that they look at, down to the entropy-coded bytes, is
// checked here by the rules under which they go through without an error. What passes is well-formed (ITU-T T.81);
// what does not may still be a good picture, for a more patient decoder.
#include "proof.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "reader.h"

namespace imgcls {

namespace {

constexpr int kMaxBlocks = 10;  // of one MCU: T.81, B.2.3

struct Component {
  uint8_t id = 0, h = 0, v = 0, quant = 0;
  bool has_dc = false;        // met in a scan that codes its mean values
  uint64_t coefficients = 0;  // of a progressive picture: those that a first scan has coded
};

class Walk {
 public:
  Walk(const uint8_t* p, size_t n) : p_(p), n_(n) {}

  JpegProof run() {
    proof_.sound = n_ >= 4 && p_[0] == 0xFF && p_[1] == 0xD8;
    size_t at = 2;
    while (at + 2 <= n_) {
      if (p_[at] != 0xFF) {  // junk between segments: some decoders step over it
        proof_.sound = false;
        at = next_marker(at);
        continue;
      }
      const uint8_t marker = p_[at + 1];
      if (marker == 0xFF) {  // a fill byte
        ++at;
        continue;
      }
      if (marker == 0xD9) {
        finish(at + 2);
        return proof_;
      }
      at += 2;
      if (marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {  // without a length, and out of place here
        proof_.sound = false;
        continue;
      }
      const size_t length = at + 2 <= n_ ? be16(p_ + at) : 0;
      if (length < 2 || length > n_ - at) {
        proof_.sound = false;
        if (at + 2 > n_) break;
        at += 2;
        continue;
      }
      ++proof_.segments;
      if (!segment(marker, at + 2, length - 2)) proof_.sound = false;
      at += length;
      if (marker == 0xDA) at = entropy(at);
    }
    proof_.sound = false;  // no end of image
    return proof_;
  }

 private:
  size_t next_marker(size_t at) const {
    const void* found = at < n_ ? std::memchr(p_ + at, 0xFF, n_ - at) : nullptr;
    return found ? static_cast<size_t>(static_cast<const uint8_t*>(found) - p_) : n_;
  }

  // Where the entropy-coded data from `at` on ends: at a marker that is none of its own.
  size_t entropy(size_t at) {
    for (;;) {
      at = next_marker(at);
      if (at + 2 > n_) return n_;
      const uint8_t code = p_[at + 1];
      if (code == 0x00) {
        at += 2;
      } else if (code >= 0xD0 && code <= 0xD7) {
        if (restart_ == 0) proof_.sound = false;
        at += 2;
      } else if (code == 0xFF) {
        ++at;
      } else {
        return at;
      }
    }
  }

  bool segment(uint8_t marker, size_t at, size_t n) {
    switch (marker) {
      case 0xDB: return quantisation(at, n);
      case 0xC4: return huffman(at, n);
      case 0xC0:
      case 0xC1:
      case 0xC2: return frame(marker, at, n);
      case 0xDA: return scan(at, n);
      case 0xDD:
        if (n != 2) return false;
        restart_ = be16(p_ + at);
        return true;
      default: return (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
    }
  }

  bool quantisation(size_t at, size_t n) {
    for (const size_t end = at + n; at < end;) {
      const uint8_t head = p_[at++];
      const size_t bytes = head >> 4 ? 128 : 64;
      if (head >> 4 > 1 || (head & 15) > 3 || bytes > end - at) return false;
      quant_[head & 15] = true;
      at += bytes;
    }
    return n > 0;
  }

  bool huffman(size_t at, size_t n) {
    for (const size_t end = at + n; at < end;) {
      if (end - at < 17) return false;
      const uint8_t head = p_[at++];
      if (head >> 4 > 1 || (head & 15) > 3) return false;
      uint32_t symbols = 0, code = 0;
      for (int bits = 1; bits <= 16; ++bits) {  // T.81, annex C: the codes of each length must fit
        const uint8_t count = p_[at + static_cast<size_t>(bits) - 1];
        code += count;
        if (code > 1u << bits) return false;
        code <<= 1;
        symbols += count;
      }
      at += 16;
      if (symbols == 0 || symbols > 256 || symbols > end - at) return false;
      if (head >> 4 == 0) {
        for (uint32_t i = 0; i < symbols; ++i) {
          if (p_[at + i] > 15) return false;
        }
      }
      (head >> 4 ? ac_ : dc_)[head & 15] = true;
      at += symbols;
    }
    return n > 0;
  }

  bool frame(uint8_t marker, size_t at, size_t n) {
    if (count_ > 0 || n < 6) return false;
    const int components = p_[at + 5];
    proof_.height = be16(p_ + at + 1);
    proof_.width = be16(p_ + at + 3);
    if (components != 1 && components != 3 && components != 4) return false;
    if (p_[at] != 8 || proof_.width == 0 || proof_.height == 0 || n != 6 + size_t{3} * components) return false;
    progressive_ = marker == 0xC2;
    uint8_t widest = 1, highest = 1;
    for (int i = 0; i < components; ++i) {
      const uint8_t* q = p_ + at + 6 + 3 * i;
      Component& c = component_[i];
      c.id = q[0], c.h = q[1] >> 4, c.v = q[1] & 15, c.quant = q[2];
      if (c.h < 1 || c.h > 4 || c.v < 1 || c.v > 4 || c.quant > 3) return false;
      for (int j = 0; j < i; ++j) {
        if (component_[j].id == c.id) return false;
      }
      widest = std::max(widest, c.h), highest = std::max(highest, c.v);
    }
    for (int i = 0; i < components; ++i) {  // libjpeg enlarges by whole numbers only
      if (widest % component_[i].h || highest % component_[i].v) return false;
    }
    count_ = components;
    return true;
  }

  Component* find(uint8_t id) {
    for (int i = 0; i < count_; ++i) {
      if (component_[i].id == id) return &component_[i];
    }
    return nullptr;
  }

  bool scan(size_t at, size_t n) {
    ++proof_.scans;
    if (count_ == 0 || n < 1) return false;
    const int members = p_[at];
    if (members < 1 || members > count_ || n != 4 + size_t{2} * members) return false;
    const uint8_t* tail = p_ + at + 1 + 2 * members;
    const int first = tail[0], last = tail[1], high = tail[2] >> 4, low = tail[2] & 15;
    if (!progressive_ && (first != 0 || last != 63 || high != 0 || low != 0)) return false;
    if (progressive_) {
      if (first > last || last > 63 || (first == 0 && last != 0) || (first > 0 && members != 1)) return false;
      if (low > 13 || (high != 0 && low != high - 1)) return false;
    }
    const uint64_t band = (last == 63 ? ~uint64_t{0} : (uint64_t{1} << (last + 1)) - 1) & ~((uint64_t{1} << first) - 1);
    int blocks = 0;
    const Component* before = nullptr;
    for (int i = 0; i < members; ++i) {
      const uint8_t* q = p_ + at + 1 + 2 * i;
      Component* c = find(q[0]);
      if (!c || (before && c <= before)) return false;  // in the frame's order, each once
      before = c;
      if (q[1] >> 4 > 3 || (q[1] & 15) > 3 || !quant_[c->quant]) return false;
      blocks += c->h * c->v;
      if (progressive_) {
        if (first == 0 && high == 0 && !dc_[q[1] >> 4]) return false;
        if (first > 0 && !ac_[q[1] & 15]) return false;
        if (first > 0 && !c->has_dc) return false;
        if (high == 0 && (c->coefficients & band)) return false;          // coded before
        if (high != 0 && (c->coefficients & band) != band) return false;  // refines what is not there
        c->coefficients |= band;
        c->has_dc = c->has_dc || first == 0;
      } else {
        if (!dc_[q[1] >> 4] || !ac_[q[1] & 15] || c->has_dc) return false;
        c->has_dc = true;
      }
    }
    return members == 1 || blocks <= kMaxBlocks;
  }

  void finish(size_t end) {
    proof_.ends = end == n_;
    if (count_ == 0) proof_.sound = false;
    for (int i = 0; i < count_; ++i) {
      if (!component_[i].has_dc) proof_.sound = false;
    }
  }

  const uint8_t* p_;
  size_t n_;
  JpegProof proof_;
  std::array<Component, 4> component_{};
  int count_ = 0;
  bool progressive_ = false;
  uint16_t restart_ = 0;
  std::array<bool, 4> quant_{}, dc_{}, ac_{};
};

}  // namespace

JpegProof prove_jpeg(const uint8_t* bytes, size_t n) noexcept { return Walk(bytes, n).run(); }

}  // namespace imgcls
