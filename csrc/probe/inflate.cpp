#include "inflate.h"

#include <algorithm>
#include <array>
#include <cstdint>

namespace imgcls {

namespace {

struct Bits {
  const std::string& in;
  size_t at;
  uint32_t held = 0;
  int count = 0;
  bool dry = false;  // asked for more than there is; every answer is 0 from then on

  uint32_t take(int n) {
    while (count < n) {
      if (at >= in.size()) {
        dry = true;
        return 0;
      }
      held |= uint32_t{static_cast<uint8_t>(in[at++])} << count;
      count += 8;
    }
    const uint32_t value = held & ((1u << n) - 1);
    held >>= n;
    count -= n;
    return value;
  }
};

// Canonical Huffman code (RFC 1951, 3.2.2), decoded bit by bit.
struct Code {
  std::array<uint16_t, 16> count{};
  std::array<uint16_t, 288> symbol{};

  // False for lengths that promise more codes than there are.
  bool build(const uint8_t* lengths, int n) {
    count.fill(0);
    for (int i = 0; i < n; ++i) ++count[lengths[i]];
    count[0] = 0;
    int left = 1;
    for (int bits = 1; bits < 16; ++bits) {
      left = left * 2 - count[bits];
      if (left < 0) return false;
    }
    std::array<uint16_t, 16> next{};
    for (int bits = 1; bits < 15; ++bits) next[bits + 1] = static_cast<uint16_t>(next[bits] + count[bits]);
    for (int i = 0; i < n; ++i) {
      if (lengths[i]) symbol[next[lengths[i]]++] = static_cast<uint16_t>(i);
    }
    return true;
  }

  int decode(Bits& bits) const {
    int code = 0, first = 0, index = 0;
    for (int length = 1; length < 16; ++length) {
      code |= static_cast<int>(bits.take(1));
      if (bits.dry) return -1;
      if (code - first < count[length]) return symbol[static_cast<size_t>(index + code - first)];
      index += count[length];
      first = (first + count[length]) << 1;
      code <<= 1;
    }
    return -1;
  }
};

bool stored(Bits& bits, size_t limit, std::string& out) {
  bits.held = 0, bits.count = 0;  // to the next byte
  if (bits.in.size() - bits.at < 4) return false;
  const auto byte = [&](size_t i) { return size_t{static_cast<uint8_t>(bits.in[bits.at + i])}; };
  const size_t n = byte(0) | byte(1) << 8;
  bits.at += 4;
  if (n > bits.in.size() - bits.at || n > limit - out.size()) return false;
  out.append(bits.in, bits.at, n);
  bits.at += n;
  return true;
}

bool compressed(Bits& bits, const Code& literal, const Code& distance, size_t limit, std::string& out) {
  static constexpr uint16_t kLength[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                         31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  static constexpr uint8_t kLengthBits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                            2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
  static constexpr uint16_t kBack[] = {1,    2,    3,    4,    5,    7,    9,    13,    17,    25,
                                       33,   49,   65,   97,   129,  193,  257,  385,   513,   769,
                                       1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
  for (;;) {
    const int symbol = literal.decode(bits);
    if (symbol < 0 || symbol > 285) return false;
    if (symbol == 256) return true;
    if (symbol < 256) {
      if (out.size() >= limit) return false;
      out.push_back(static_cast<char>(symbol));
      continue;
    }
    const size_t n = kLength[symbol - 257] + size_t{bits.take(kLengthBits[symbol - 257])};
    const int code = distance.decode(bits);
    if (code < 0 || code > 29) return false;
    const size_t back = kBack[code] + size_t{bits.take(code < 2 ? 0 : code / 2 - 1)};
    if (bits.dry || back > out.size() || n > limit - out.size()) return false;
    for (size_t i = 0; i < n; ++i) out.push_back(out[out.size() - back]);
  }
}

bool read_codes(Bits& bits, Code& literal, Code& distance) {
  static constexpr uint8_t kOrder[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  const int literals = static_cast<int>(bits.take(5)) + 257;
  const int distances = static_cast<int>(bits.take(5)) + 1;
  const int lengths = static_cast<int>(bits.take(4)) + 4;
  if (bits.dry || literals > 286 || distances > 30) return false;
  std::array<uint8_t, 320> length{};
  for (int i = 0; i < lengths; ++i) length[kOrder[i]] = static_cast<uint8_t>(bits.take(3));
  Code lengths_code;
  if (!lengths_code.build(length.data(), 19)) return false;
  length.fill(0);
  for (int i = 0; i < literals + distances;) {
    const int symbol = lengths_code.decode(bits);
    if (symbol < 0) return false;
    if (symbol < 16) {
      length[static_cast<size_t>(i++)] = static_cast<uint8_t>(symbol);
      continue;
    }
    if (symbol == 16 && i == 0) return false;
    const uint8_t value = symbol == 16 ? length[static_cast<size_t>(i - 1)] : 0;
    int repeat = symbol == 16   ? 3 + static_cast<int>(bits.take(2))
                 : symbol == 17 ? 3 + static_cast<int>(bits.take(3))
                                : 11 + static_cast<int>(bits.take(7));
    if (i + repeat > literals + distances) return false;
    while (repeat-- > 0) length[static_cast<size_t>(i++)] = value;
  }
  return literal.build(length.data(), literals) && distance.build(length.data() + literals, distances);
}

void fixed_codes(Code& literal, Code& distance) {
  std::array<uint8_t, 288> length{};
  for (size_t i = 0; i < 288; ++i) length[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
  literal.build(length.data(), 288);
  length.fill(5);
  distance.build(length.data(), 30);
}

}  // namespace

namespace {

bool inflate(const std::string& in, size_t limit, size_t& blocks, std::string& out) {
  if (in.size() < 2 || (in[0] & 0x0F) != 8 || (in[1] & 0x20)) return false;
  Bits bits{in, 2};
  for (bool last = false; !last;) {
    last = bits.take(1) != 0;
    const uint32_t kind = bits.take(2);
    if (bits.dry || kind == 3 || blocks == 0) return false;
    --blocks;
    if (kind == 0) {
      if (!stored(bits, limit, out)) return false;
      continue;
    }
    Code literal, distance;
    if (kind == 1) {
      fixed_codes(literal, distance);
    } else if (!read_codes(bits, literal, distance)) {
      return false;
    }
    if (!compressed(bits, literal, distance, limit, out)) return false;
  }
  return true;
}

}  // namespace

bool inflate_zlib(const std::string& in, size_t limit, InflateBudget& budget, std::string& out) {
  out.clear();
  const bool good = inflate(in, std::min(limit, budget.bytes), budget.blocks, out);
  budget.bytes -= out.size();
  return good;
}

}  // namespace imgcls
