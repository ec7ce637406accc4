// Bounds-checked access to a file that may be hostile: every byte is asked for, and the answer may be "not there".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../probe.h"

namespace imgcls {

inline uint16_t be16(const uint8_t* p) { return static_cast<uint16_t>(p[0] << 8 | p[1]); }
inline uint16_t le16(const uint8_t* p) { return static_cast<uint16_t>(p[1] << 8 | p[0]); }
inline uint32_t be32(const uint8_t* p) { return uint32_t{be16(p)} << 16 | be16(p + 2); }
inline uint32_t le32(const uint8_t* p) { return uint32_t{le16(p + 2)} << 16 | le16(p); }
inline uint32_t le24(const uint8_t* p) { return uint32_t{p[2]} << 16 | le16(p); }

// A loop over parts of a file ends after so many: a file of tiny parts must not hold a thread for minutes.
constexpr int kMaxSteps = 1 << 18;

// One open file and a window of its bytes. Uses pread, not mmap: a file that shrinks gives "not there" and no signal.
class Reader {
 public:
  static constexpr size_t kMaxView = 1 << 16;

  Reader() = default;
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // kOk, kUnreadable or kEmpty.
  Status open(const std::string& path);
  // Reads from memory instead, which must outlive this object.
  Status open(const uint8_t* bytes, size_t n);
  uint64_t size() const { return size_; }
  bool failed() const { return failed_; }

  // The n <= kMaxView bytes at offset, or nullptr where the file does not have them. Valid until the next call.
  const uint8_t* view(uint64_t offset, size_t n) {
    if (n > kMaxView || offset > size_ || n > size_ - offset) return nullptr;
    if (memory_) return memory_ + offset;
    if (offset >= start_ && offset - start_ <= filled_ && n <= filled_ - (offset - start_)) {
      return window_.data() + (offset - start_);
    }
    return load(offset, n);
  }

 private:
  const uint8_t* load(uint64_t offset, size_t n);

  int fd_ = -1;
  const uint8_t* memory_ = nullptr;
  bool failed_ = false;
  uint64_t size_ = 0;
  uint64_t start_ = 0;  // the window holds file bytes [start_, start_ + filled_)
  uint64_t filled_ = 0;
  std::vector<uint8_t> window_;
};

// A string of bytes that is read at random: pieces of a file laid end to end, or memory.
class Bytes {
 public:
  Bytes() = default;
  Bytes(Reader& file, uint64_t offset, uint64_t length) { append(file, offset, length); }
  explicit Bytes(std::string text) : memory_(std::move(text)), size_(memory_.size()) {}

  void append(Reader& file, uint64_t offset, uint64_t length);
  uint64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  // Copies n bytes from `at`; false where they are not all there.
  bool read(uint64_t at, uint8_t* to, size_t n) const;
  // At most `limit` bytes from `at`.
  std::string text(uint64_t at, size_t limit) const;

 private:
  struct Piece {
    uint64_t offset, length;
  };
  Reader* file_ = nullptr;
  std::vector<Piece> pieces_;
  std::string memory_;
  uint64_t size_ = 0;
};

}  // namespace imgcls
