#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace imgcls {

namespace {
constexpr size_t kFirstRead = 8192;  // holds the whole header of most files
constexpr size_t kNextRead = 2048;   // what follows a seek is a few markers or chunk heads
constexpr size_t kMaxPieces = 1024;  // EXIF is at most a few segments
}  // namespace

Reader::~Reader() {
  if (fd_ >= 0) ::close(fd_);
}

Status Reader::open(const std::string& path) {
  if (path.find('\0') != std::string::npos) return Status::kUnreadable;  // open() would see only the part before it
  // Without O_NONBLOCK a FIFO among the files would wait for a writer for ever.
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd_ < 0) return Status::kUnreadable;
  struct stat facts;
  if (::fstat(fd_, &facts) != 0 || !S_ISREG(facts.st_mode)) return Status::kUnreadable;
  size_ = facts.st_size > 0 ? static_cast<uint64_t>(facts.st_size) : 0;
  return size_ == 0 ? Status::kEmpty : Status::kOk;
}

Status Reader::open(const uint8_t* bytes, size_t n) {
  memory_ = bytes;
  size_ = n;
  return n == 0 ? Status::kEmpty : Status::kOk;
}

const uint8_t* Reader::load(uint64_t offset, size_t n) {
  size_t want = std::max(n, window_.empty() ? kFirstRead : kNextRead);
  want = static_cast<size_t>(std::min<uint64_t>(want, size_ - offset));
  if (window_.size() < want) window_.resize(std::max(want, kFirstRead));
  start_ = offset;
  filled_ = 0;
  while (filled_ < want) {
    const ssize_t got = ::pread(fd_, window_.data() + filled_, want - filled_, static_cast<off_t>(offset + filled_));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) failed_ = true;
    if (got <= 0) break;
    filled_ += static_cast<uint64_t>(got);
  }
  return filled_ >= n ? window_.data() : nullptr;
}

void Bytes::append(Reader& file, uint64_t offset, uint64_t length) {
  if (pieces_.size() >= kMaxPieces) return;
  file_ = &file;
  pieces_.push_back({offset, length});
  size_ += length;  // each length was checked against the file's size, so the sum stays far below 2^64
}

bool Bytes::read(uint64_t at, uint8_t* to, size_t n) const {
  if (at > size_ || n > size_ - at) return false;
  if (!file_) {
    std::memcpy(to, memory_.data() + at, n);
    return true;
  }
  for (const Piece& piece : pieces_) {
    if (at >= piece.length) {
      at -= piece.length;
      continue;
    }
    while (n > 0 && at < piece.length) {
      const size_t part = static_cast<size_t>(std::min<uint64_t>({n, piece.length - at, Reader::kMaxView}));
      const uint8_t* from = file_->view(piece.offset + at, part);
      if (!from) return false;
      std::memcpy(to, from, part);
      to += part, n -= part, at += part;
    }
    if (n == 0) return true;
    at = 0;
  }
  return n == 0;
}

std::string Bytes::text(uint64_t at, size_t limit) const {
  if (at >= size_) return {};
  std::string out(static_cast<size_t>(std::min<uint64_t>(limit, size_ - at)), '\0');
  if (!read(at, reinterpret_cast<uint8_t*>(out.data()), out.size())) out.clear();
  return out;
}

}  // namespace imgcls
