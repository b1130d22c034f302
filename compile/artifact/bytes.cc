#include "compile/artifact/bytes.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {

// The file formats are little endian, and numbers are copied as they are.
static_assert(std::endian::native == std::endian::little);

namespace {

std::string reason() { return std::strerror(errno); }

// Eight tables: eight bytes a step ("slicing by 8").
using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320U : 0U);
    tables[0][i] = crc;
  }
  for (size_t t = 1; t < tables.size(); ++t) {
    for (size_t i = 0; i < 256; ++i) {
      const uint32_t crc = tables[t - 1][i];
      tables[t][i] = (crc >> 8) ^ tables[0][crc & 0xFF];
    }
  }
  return tables;
}

constexpr CrcTables kCrcTables = make_crc_tables();

}  // namespace

// --- reading -------------------------------------------------------------------------------------

void ByteSource::read(uint64_t offset, uint64_t count, void* to) const {
  if (offset > size() || count > size() - offset) {
    format_error("bytes ", offset, " to ", offset + count, " are needed, and there are ", size(),
                 ".");
  }
  if (count > 0) do_read(offset, count, to);
}

std::string ByteSource::read_string(uint64_t offset, uint64_t count) const {
  // Before the string is made: a count from a file may be anything.
  if (offset > size() || count > size() - offset) {
    format_error(count, " bytes from byte ", offset, " on are needed, and there are ", size(), ".");
  }
  std::string result(count, '\0');
  read(offset, count, result.data());
  return result;
}

void MemoryBytes::do_read(uint64_t offset, uint64_t count, void* to) const {
  std::memcpy(to, bytes_.data() + offset, count);
}

FileBytes::FileBytes(const std::string& path) : path_(path) {
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) format_error("the file cannot be opened: ", reason(), ".");
  struct stat status {};
  const bool regular = ::fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
  if (!regular) ::close(descriptor_);
  if (!regular) format_error("this is no regular file.");
  size_ = static_cast<uint64_t>(status.st_size);
}

FileBytes::~FileBytes() { ::close(descriptor_); }

void FileBytes::do_read(uint64_t offset, uint64_t count, void* to) const {
  constexpr uint64_t kPiece = uint64_t{1} << 30;
  auto* cursor = static_cast<char*>(to);
  while (count > 0) {
    const ssize_t got =
        ::pread(descriptor_, cursor, std::min(count, kPiece), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) format_error("the file cannot be read: ", reason(), ".");
    if (got == 0) format_error("the file became shorter while it was read.");
    cursor += got;
    offset += static_cast<uint64_t>(got);
    count -= static_cast<uint64_t>(got);
  }
}

// --- writing -------------------------------------------------------------------------------------

FileWriter::FileWriter(const std::string& path) : path_(path) {
  // Of this process and thread alone.
  static std::atomic<uint64_t> count{0};
  partial_ = path + ".partial-" + std::to_string(::getpid()) + "-" + std::to_string(count++);
  file_ = std::fopen(partial_.c_str(), "wb");
  if (file_ == nullptr) format_error("the file cannot be written: ", reason(), ".");
}

FileWriter::~FileWriter() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  std::remove(partial_.c_str());
}

void FileWriter::write(const void* bytes, size_t count) {
  if (count == 0) return;
  if (std::fwrite(bytes, 1, count, file_) != count) {
    format_error("the file cannot be written: ", reason(), ".");
  }
}

void FileWriter::finish() {
  if (std::fflush(file_) != 0) format_error("the file cannot be written: ", reason(), ".");
  std::fclose(file_);
  file_ = nullptr;
  if (std::rename(partial_.c_str(), path_.c_str()) == 0) return;
  const std::string why = reason();
  std::remove(partial_.c_str());
  format_error("the file cannot be written: ", why, ".");
}

uint32_t crc32(const void* bytes, size_t count, uint32_t before) {
  const auto* cursor = static_cast<const unsigned char*>(bytes);
  uint32_t crc = ~before;
  for (; count >= 8; count -= 8, cursor += 8) {
    uint64_t word = 0;
    std::memcpy(&word, cursor, 8);
    word ^= crc;
    crc = 0;
    for (size_t i = 0; i < 8; ++i) crc ^= kCrcTables[7 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; count > 0; --count, ++cursor) crc = (crc >> 8) ^ kCrcTables[0][(crc ^ *cursor) & 0xFF];
  return ~crc;
}

}  // namespace torchlift::compile
