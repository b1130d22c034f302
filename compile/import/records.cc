#include "compile/import/records.h"

#include <ATen/ops/empty.h>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

// A number of a zip file, which are little endian.
template <class Number>
Number number_at(const FileBytes& file, uint64_t offset) {
  unsigned char bytes[sizeof(Number)];
  file.read(offset, sizeof(Number), bytes);
  Number number = 0;
  for (size_t i = 0; i < sizeof(Number); ++i) {
    number = static_cast<Number>(number | static_cast<Number>(bytes[i]) << (8 * i));
  }
  return number;
}

}  // namespace

Records::Records(const std::string& path) : file_(path), reader_(path) {
  for (const std::string& name : reader_.getAllRecords()) names_.insert(name);
  read_directory();
}

std::string Records::text(const std::string& name) {
  std::string result(size_of(name), '\0');
  read(name, result.data(), result.size());
  return result;
}

at::Tensor Records::bytes(const std::string& name) {
  const uint64_t size = size_of(name);
  at::Tensor result = at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte));
  read(name, result.mutable_data_ptr(), size);
  return result;
}

void Records::check_all() {
  for (const std::string& name : names_) bytes(name);
}

uint64_t Records::size_of(const std::string& name) {
  // Code is compressed, weights are not.
  constexpr uint64_t kMaxCompressed = uint64_t{256} << 20;
  const auto entry = entries_.find(name);
  if (!has(name) || entry == entries_.end()) format_error("there is no '", name, "' in it.");
  const uint64_t size = reader_.getRecordSize(name);
  // One that is larger than what it lies in would fill the memory.
  if (size > (entry->second.compressed ? kMaxCompressed : file_.size())) {
    format_error("'", name, "' has ", size, " bytes, more than there can be.");
  }
  return size;
}

void Records::read(const std::string& name, void* to, uint64_t size) {
  if (size == 0) return;
  const uint64_t got = reader_.getRecord(name, to, size);
  if (got != size) format_error("'", name, "' has ", got, " bytes, and should have ", size, ".");
  if (crc32(to, size) == entries_.at(name).checksum) return;
  format_error("'", name,
               "' is damaged: its checksum is another. (Or it was written without "
               "checksums, by torch.serialization.set_crc32_options(False).)");
}

// See APPNOTE.TXT of PKWARE, 4.3.12 to 4.3.16.
void Records::read_directory() {
  constexpr uint64_t kEndSize = 22, kLocatorSize = 20;
  constexpr uint32_t kEnd = 0x06054B50, kLocator = 0x07064B50, kLargeEnd = 0x06064B50;
  if (file_.size() < kEndSize) format_error("it is no zip archive.");
  // The end of the directory is the end of the file: torch writes no comment after it.
  const uint64_t end = file_.size() - kEndSize;
  if (number_at<uint32_t>(file_, end) != kEnd) format_error("it is no zip archive, or it is cut.");
  uint64_t count = number_at<uint16_t>(file_, end + 10);
  uint64_t offset = number_at<uint32_t>(file_, end + 16);
  // Of an archive of more than 4 GB, or more than 65534 files.
  if (end >= kLocatorSize && number_at<uint32_t>(file_, end - kLocatorSize) == kLocator) {
    const auto large = number_at<uint64_t>(file_, end - kLocatorSize + 8);
    if (number_at<uint32_t>(file_, large) != kLargeEnd) format_error("its directory is damaged.");
    count = number_at<uint64_t>(file_, large + 32);
    offset = number_at<uint64_t>(file_, large + 48);
  }
  add_entries(offset, count);
}

void Records::add_entries(uint64_t offset, uint64_t count) {
  constexpr uint32_t kEntry = 0x02014B50;
  constexpr uint64_t kEntrySize = 46;
  for (uint64_t i = 0; i < count; ++i) {
    if (number_at<uint32_t>(file_, offset) != kEntry) format_error("its directory is damaged.");
    const auto name_size = number_at<uint16_t>(file_, offset + 28);
    const std::string name = file_.read_string(offset + kEntrySize, name_size);
    // All lie in a folder that has the archive's name.
    const size_t folder = name.find('/');
    const bool is_new =
        entries_
            .emplace(folder == std::string::npos ? name : name.substr(folder + 1),
                     Entry{.checksum = number_at<uint32_t>(file_, offset + 16),
                           .compressed = number_at<uint16_t>(file_, offset + 10) != 0})
            .second;
    if (!is_new) format_error("'", name, "' is twice in it.");
    offset += kEntrySize + name_size + number_at<uint16_t>(file_, offset + 30) +
              number_at<uint16_t>(file_, offset + 32);
  }
}

}  // namespace torchlift::compile
