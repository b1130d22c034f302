#include "compile/import/records.h"

#include <ATen/ops/empty.h>

#include "compile/artifact/format_error.h"

// APPNOTE.TXT of PKWARE says how a zip file is laid out: 4.3.7 the header of a file, 4.3.12 an
// entry of the directory, 4.3.14 to 4.3.16 its end, 4.5.3 numbers of 64 bits. All are little
// endian.

namespace torchlift::compile {
namespace {

constexpr uint32_t kHeader = 0x04034B50;
constexpr uint32_t kEntry = 0x02014B50;
constexpr uint32_t kEnd = 0x06054B50;
constexpr uint32_t kLargeEnd = 0x06064B50;
constexpr uint32_t kLocator = 0x07064B50;

constexpr uint64_t kHeaderSize = 30;
constexpr uint64_t kEntrySize = 46;
constexpr uint64_t kEndSize = 22;
constexpr uint64_t kLocatorSize = 20;

template <class Number>
Number number_at(const FileBytes& file, uint64_t offset) {
  unsigned char bytes[sizeof(Number)];
  file.read(offset, sizeof(Number), bytes);
  uint64_t number = 0;
  for (size_t i = 0; i < sizeof(Number); ++i) number |= uint64_t{bytes[i]} << (8 * i);
  return static_cast<Number>(number);
}

void expect(const FileBytes& file, uint64_t offset, uint32_t signature) {
  if (number_at<uint32_t>(file, offset) != signature) {
    format_error("it is no zip archive, or it is damaged: there is no header at byte ", offset,
                 ".");
  }
}

}  // namespace

Records::Records(const std::string& path) : path_(path), file_(path) { read_directory(); }

// --- the directory -------------------------------------------------------------------------------

void Records::read_directory() {
  // It ends with the file: torch writes no comment after it.
  if (file_.size() < kEndSize)
    format_error("it is no zip archive: it has ", file_.size(), " bytes.");
  const uint64_t end = file_.size() - kEndSize;
  expect(file_, end, kEnd);
  uint64_t count = number_at<uint16_t>(file_, end + 10);
  uint64_t offset = number_at<uint32_t>(file_, end + 16);
  // Of an archive of more than 4 GB, or of more than 65534 files.
  if (end >= kLocatorSize && number_at<uint32_t>(file_, end - kLocatorSize) == kLocator) {
    const auto large = number_at<uint64_t>(file_, end - kLocatorSize + 8);
    expect(file_, large, kLargeEnd);
    count = number_at<uint64_t>(file_, large + 32);
    offset = number_at<uint64_t>(file_, large + 48);
  }
  add_entries(offset, count);
}

void Records::add_entries(uint64_t offset, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    expect(file_, offset, kEntry);
    const uint64_t name_size = number_at<uint16_t>(file_, offset + 28);
    const std::string name = file_.read_string(offset + kEntrySize, name_size);
    // All lie in a folder that has the archive's name.
    const size_t folder = name.find('/');
    if (folder == std::string::npos) format_error("'", name, "' in it lies in no folder.");
    if (!entries_.emplace(name.substr(folder + 1), entry_at(offset)).second) {
      format_error("'", name, "' is twice in it.");
    }
    offset += kEntrySize + name_size + number_at<uint16_t>(file_, offset + 30) +
              number_at<uint16_t>(file_, offset + 32);
  }
}

Records::Entry Records::entry_at(uint64_t offset) const {
  Entry entry;
  entry.compressed = number_at<uint16_t>(file_, offset + 10) != 0;
  entry.checksum = number_at<uint32_t>(file_, offset + 16);
  entry.size = number_at<uint32_t>(file_, offset + 24);
  entry.header = number_at<uint32_t>(file_, offset + 42);
  const uint64_t extra = offset + kEntrySize + number_at<uint16_t>(file_, offset + 28);
  read_large(extra, number_at<uint16_t>(file_, offset + 30), entry);
  return entry;
}

// What is too large for 32 bits stands among the extra fields, in this order: the size, the size
// when compressed, the place.
void Records::read_large(uint64_t extra, uint64_t size, Entry& entry) const {
  constexpr uint64_t kTooLarge = 0xFFFFFFFF;
  constexpr uint16_t kLargeField = 1;
  const uint64_t end = extra + size;
  while (extra + 4 <= end) {
    const auto field = number_at<uint16_t>(file_, extra);
    const auto field_size = number_at<uint16_t>(file_, extra + 2);
    uint64_t place = extra + 4;
    extra = place + field_size;
    if (field != kLargeField) continue;
    if (entry.size == kTooLarge) {
      entry.size = number_at<uint64_t>(file_, place);
      // Files that are not compressed have the same size twice.
      place += 16;
    }
    if (entry.header == kTooLarge) entry.header = number_at<uint64_t>(file_, place);
  }
}

// --- files ---------------------------------------------------------------------------------------

const Records::Entry& Records::find(const std::string& name) const {
  // Code, and not much of it.
  constexpr uint64_t kMaxCompressed = uint64_t{256} << 20;
  const auto found = entries_.find(name);
  if (found == entries_.end()) format_error("there is no '", name, "' in it.");
  const Entry& entry = found->second;
  // What is larger than what it lies in would fill the memory.
  if (entry.size > (entry.compressed ? kMaxCompressed : file_.size())) {
    format_error("'", name, "' would have ", entry.size, " bytes; the file has ", file_.size(),
                 ".");
  }
  return entry;
}

std::string Records::text(const std::string& name) {
  const Entry& entry = find(name);
  std::string result(entry.size, '\0');
  read(name, entry, result.data());
  return result;
}

at::Tensor Records::bytes(const std::string& name) {
  const Entry& entry = find(name);
  at::Tensor result =
      at::empty({static_cast<int64_t>(entry.size)}, at::TensorOptions().dtype(at::kByte));
  read(name, entry, result.mutable_data_ptr());
  return result;
}

void Records::check_all() {
  for (const auto& each : entries_) bytes(each.first);
}

void Records::read(const std::string& name, const Entry& entry, void* to) {
  if (entry.size == 0) return;
  if (entry.compressed) {
    if (inflating_ == nullptr) {
      inflating_ = std::make_unique<caffe2::serialize::PyTorchStreamReader>(path_);
    }
    const uint64_t got = inflating_->getRecord(name, to, entry.size);
    if (got != entry.size) format_error("'", name, "' has ", got, " bytes, not ", entry.size, ".");
  } else {
    expect(file_, entry.header, kHeader);
    const uint64_t place = entry.header + kHeaderSize +
                           number_at<uint16_t>(file_, entry.header + 26) +
                           number_at<uint16_t>(file_, entry.header + 28);
    file_.read(place, entry.size, to);
  }
  if (crc32(to, entry.size) == entry.checksum) return;
  format_error("'", name,
               "' is damaged: its checksum is another. (Or it was written without "
               "checksums, by torch.serialization.set_crc32_options(False).)");
}

}  // namespace torchlift::compile
