// Mutated headers through the probe and the JPEG proof, under AddressSanitizer and UndefinedBehaviorSanitizer.
//
//   fuzz_probe COUNT SEED FILE...
//
// Every answer is checked for sense (legal codes, a size where the status is good); a sanitizer's finding ends the
// program. The header is what the probe reads, so at most the first 4 KB of a seed are kept, and its last 64 bytes.
// Prints one line of JSON: inputs, seconds, and how many had which status.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "../../csrc/probe.h"
#include "../../csrc/probe/proof.h"

namespace {

using imgcls::Format;
using imgcls::Header;
using imgcls::Status;

constexpr size_t kKept = 4 << 10, kTail = 64;

struct Random {  // splitmix64: fast, and the same on every machine
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return n ? static_cast<size_t>(next() % n) : 0; }
};

using Content = std::vector<uint8_t>;

Content read_seed(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Content whole((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (whole.size() <= kKept + kTail) return whole;
  Content out(whole.begin(), whole.begin() + kKept);
  out.insert(out.end(), whole.end() - kTail, whole.end());
  return out;
}

size_t place(const Content& content, Random& random) {  // mostly near the beginning, where the structure is
  const size_t most = random.below(4) ? std::min<size_t>(content.size(), 256) : content.size();
  return random.below(most);
}

void store(Content& content, size_t at, uint64_t value, size_t bytes, bool big_endian) {
  for (size_t i = 0; i < bytes && at + i < content.size(); ++i) {
    content[at + i] = static_cast<uint8_t>(value >> 8 * (big_endian ? bytes - 1 - i : i));
  }
}

void mutate(Content& content, const Content& other, Random& random) {
  static constexpr uint64_t kOdd[] = {0,
                                      1,
                                      2,
                                      7,
                                      8,
                                      0x7F,
                                      0x80,
                                      0xFF,
                                      0x100,
                                      0x7FFF,
                                      0x8000,
                                      0xFFFF,
                                      0x10000,
                                      0x7FFFFFFF,
                                      0x80000000u,
                                      0xFFFFFFFFu,
                                      0xFFFFFFFFFFFFFFFFu};
  if (content.empty()) content.push_back(0);
  const size_t at = place(content, random);
  switch (random.below(9)) {
    case 0: content[at] ^= static_cast<uint8_t>(1u << random.below(8)); break;
    case 1: content[at] = static_cast<uint8_t>(random.next()); break;
    case 2: store(content, at, kOdd[random.below(17)], size_t{1} << random.below(4), random.below(2)); break;
    case 3: store(content, at, random.below(content.size() + 8), size_t{2} << random.below(2), random.below(2)); break;
    case 4: content.resize(random.below(content.size()) + 1); break;
    case 5: {
      const size_t n = std::min(random.below(64) + 1, content.size() - at);
      const Content piece(content.begin() + static_cast<long>(at), content.begin() + static_cast<long>(at + n));
      const size_t to = place(content, random);
      content.insert(content.begin() + static_cast<long>(to), piece.begin(), piece.end());
      break;
    }
    case 6: {
      const size_t n = std::min(random.below(32) + 1, content.size() - at);
      content.erase(content.begin() + static_cast<long>(at), content.begin() + static_cast<long>(at + n));
      break;
    }
    case 7: {
      if (other.empty()) break;
      const size_t from = random.below(other.size());
      const size_t n = std::min({random.below(128) + 1, other.size() - from, content.size() - at});
      std::copy_n(other.begin() + static_cast<long>(from), n, content.begin() + static_cast<long>(at));
      break;
    }
    default: {
      const size_t n = std::min(random.below(64) + 1, content.size() - at);
      std::fill_n(content.begin() + static_cast<long>(at), n, static_cast<uint8_t>(random.below(2) ? 0 : 0xFF));
    }
  }
}

void check(bool good, const char* what, const Content& content) {
  if (good) return;
  std::fprintf(stderr, "senseless answer: %s\n", what);
  std::ofstream("senseless.bin", std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<long>(content.size()));
  std::abort();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: fuzz_probe COUNT SEED FILE...\n");
    return 2;
  }
  const uint64_t count = std::strtoull(argv[1], nullptr, 10);
  Random random{std::strtoull(argv[2], nullptr, 10)};
  std::vector<Content> seeds;
  for (int i = 3; i < argc; ++i) seeds.push_back(read_seed(argv[i]));
  uint64_t by_status[5] = {}, by_format[7] = {}, sound = 0;
  const auto began = std::chrono::steady_clock::now();
  for (uint64_t i = 0; i < count; ++i) {
    Content content = seeds[random.below(seeds.size())];
    for (size_t left = random.below(6) + 1; left > 0; --left)
      mutate(content, seeds[random.below(seeds.size())], random);
    // an allocation of exactly this size, so that a read of one byte too many is seen
    const size_t n = content.size();
    uint8_t* bytes = static_cast<uint8_t*>(std::malloc(n ? n : 1));
    std::memcpy(bytes, content.data(), n);
    const Header header = imgcls::probe_bytes(bytes, n);
    check(header.status <= Status::kDamaged && header.format <= Format::kGif, "status or format", content);
    check(header.orientation >= 1 && header.orientation <= 8, "orientation", content);
    check(header.status != Status::kOk || (header.width > 0 && header.height > 0), "size", content);
    const imgcls::JpegProof proof = imgcls::prove_jpeg(bytes, n);
    check(!proof.sound || (header.format == Format::kJpeg && header.width == proof.width), "proof", content);
    std::free(bytes);
    ++by_status[static_cast<size_t>(header.status)];
    ++by_format[static_cast<size_t>(header.format)];
    sound += proof.sound;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  std::printf(
      "{\"inputs\": %llu, \"seconds\": %.1f, \"ok\": %llu, \"empty\": %llu, \"foreign\": %llu, \"damaged\": %llu, ",
      static_cast<unsigned long long>(count), seconds, static_cast<unsigned long long>(by_status[0]),
      static_cast<unsigned long long>(by_status[2]), static_cast<unsigned long long>(by_status[3]),
      static_cast<unsigned long long>(by_status[4]));
  std::printf("\"formats\": [");
  for (int i = 0; i < 7; ++i) std::printf("%s%llu", i ? ", " : "", static_cast<unsigned long long>(by_format[i]));
  std::printf("], \"sound_jpegs\": %llu}\n", static_cast<unsigned long long>(sound));
  return 0;
}
