#include "probe.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>

#include "probe/formats.h"
#include "probe/reader.h"

namespace imgcls {

namespace {

Format sniff(Reader& file) {
  uint8_t head[16] = {};
  const size_t n = static_cast<size_t>(std::min<uint64_t>(file.size(), sizeof head));
  const uint8_t* p = file.view(0, n);
  if (!p) return Format::kUnknown;
  std::memcpy(head, p, n);
  const auto starts = [&](const char* text, size_t length, size_t at = 0) {
    return std::memcmp(head + at, text, length) == 0;
  };
  if (starts("\xFF\xD8\xFF", 3)) return Format::kJpeg;
  if (starts("\x89PNG\r\n\x1A\n", 8)) return Format::kPng;
  if (starts("RIFF", 4) && starts("WEBP", 4, 8)) return Format::kWebp;
  if (starts("GIF87a", 6) || starts("GIF89a", 6)) return Format::kGif;
  if (starts("BM", 2)) return Format::kBmp;
  if (starts("II*\0", 4) || starts("MM\0*", 4) || starts("MM*\0", 4) || starts("II\0*", 4) || starts("II+\0", 4) ||
      starts("MM\0+", 4)) {
    return Format::kTiff;
  }
  return Format::kUnknown;
}

Status read_header(Reader& file, Header& header) {
  switch (header.format) {
    case Format::kJpeg: return probe_jpeg(file, header);
    case Format::kPng: return probe_png(file, header);
    case Format::kWebp: return probe_webp(file, header);
    case Format::kBmp: return probe_bmp(file, header);
    case Format::kTiff: return probe_tiff(file, header);
    case Format::kGif: return probe_gif(file, header);
    case Format::kUnknown: break;
  }
  return Status::kForeign;
}

template <typename... Source>
Header probe_source(const Source&... source) noexcept {
  Header header;
  try {
    Reader file;
    header.status = file.open(source...);
    header.size_bytes = static_cast<int64_t>(file.size());
    if (header.status != Status::kOk) return header;
    header.format = sniff(file);
    header.status = read_header(file, header);
    if (file.failed()) header.status = Status::kUnreadable;
  } catch (...) {  // only out of memory is left; one file must not end the scan of a million
    header.status = Status::kUnreadable;
  }
  return header;
}

}  // namespace

Header probe_file(const std::string& path) noexcept { return probe_source(path); }

Header probe_bytes(const uint8_t* bytes, size_t n) noexcept { return probe_source(bytes, n); }

void probe_files(const std::vector<std::string>& paths, int threads, Header* out) {
  constexpr size_t kBatch = 16;  // files taken at once
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (;;) {
      const size_t begin = next.fetch_add(kBatch);
      if (begin >= paths.size()) return;
      for (size_t i = begin; i < std::min(begin + kBatch, paths.size()); ++i) out[i] = probe_file(paths[i]);
    }
  };
  const size_t batches = (paths.size() + kBatch - 1) / kBatch;
  const size_t helpers = std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), batches);
  std::vector<std::thread> pool;
  try {
    pool.reserve(helpers);
    for (size_t i = 1; i < helpers; ++i) pool.emplace_back(work);
  } catch (const std::system_error&) {  // the machine gives no more threads: go on with those that there are
  }
  work();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace imgcls
