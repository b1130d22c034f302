#include "compile/import/records.h"

#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <string>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

std::string path() { return ::testing::TempDir() + "records.zip"; }

// Two files, one of them compressed.
std::string archive() {
  {
    caffe2::serialize::PyTorchStreamWriter writer(path());
    writer.writeRecord("a", "some bytes", 10);
    writer.writeRecord("code/b", std::string(1000, 'x').data(), 1000, /*compress=*/true);
    writer.writeEndOfFile();
  }
  std::ifstream file(path(), std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string error_of(const std::string& bytes) {
  std::ofstream(path(), std::ios::binary) << bytes;
  try {
    Records(path()).check_all();
  } catch (const FormatError& error) {
    return error.what();
  }
  return "no error";
}

template <class Number>
void put(std::string& bytes, size_t offset, Number number) {
  std::memcpy(bytes.data() + offset, &number, sizeof(number));
}

TEST(RecordsTest, ReadsWhatWasWritten) {
  archive();
  Records records(path());
  EXPECT_EQ(records.text("a"), "some bytes");
  EXPECT_EQ(records.text("code/b"), std::string(1000, 'x'));
  EXPECT_TRUE(records.entries().at("code/b").compressed);
  EXPECT_EQ(records.bytes("a").numel(), 10);
  EXPECT_FALSE(records.has("b"));
  EXPECT_THROW(records.text("b"), FormatError);
}

TEST(RecordsTest, DamageIsNoticed) {
  std::string bytes = archive();
  bytes[bytes.find("some bytes")] = 'S';
  EXPECT_THAT(error_of(bytes), HasSubstr("'a' is damaged: its checksum is another"));
  EXPECT_THAT(error_of(archive().substr(0, 100)), HasSubstr("no zip archive"));
  EXPECT_THAT(error_of(""), HasSubstr("it has 0 bytes"));
}

// The numbers of the first entry of the directory, as archives of more than 4 GB have them.
TEST(RecordsTest, NumbersOf64Bits) {
  const std::string bytes = archive();
  const size_t entry = bytes.find("PK\x01\x02");
  const size_t end = bytes.rfind("PK\x05\x06");
  uint16_t name_size = 0;
  std::memcpy(&name_size, bytes.data() + entry + 28, 2);
  const auto large = [&](uint64_t size, uint64_t header) {
    std::string field(4 + 24, '\0');
    put<uint16_t>(field, 0, 1);
    put<uint16_t>(field, 2, 24);
    put<uint64_t>(field, 4, size);
    put<uint64_t>(field, 12, size);
    put<uint64_t>(field, 20, header);
    std::string changed = bytes;
    put<uint32_t>(changed, entry + 20, 0xFFFFFFFF);
    put<uint32_t>(changed, entry + 24, 0xFFFFFFFF);
    put<uint32_t>(changed, entry + 42, 0xFFFFFFFF);
    put<uint16_t>(changed, entry + 30, static_cast<uint16_t>(field.size()));
    changed.insert(entry + 46 + name_size, field);
    // The end of the directory, of 64 bits, and where it is.
    std::string ends(56 + 20, '\0');
    ends.replace(0, 4, "PK\x06\x06");
    uint16_t count = 0;
    std::memcpy(&count, bytes.data() + end + 10, 2);
    put<uint64_t>(ends, 32, count);
    put<uint64_t>(ends, 48, entry);
    ends.replace(56, 4, "PK\x06\x07");
    put<uint64_t>(ends, 64, end + field.size());
    changed.insert(end + field.size(), ends);
    return changed;
  };
  std::ofstream(path(), std::ios::binary) << large(10, 0);
  EXPECT_EQ(Records(path()).text("a"), "some bytes");
  EXPECT_THAT(error_of(large(uint64_t{1} << 60, 0)), HasSubstr("would have 1152921504606846976"));
  EXPECT_THAT(error_of(large(10, ~uint64_t{0})), HasSubstr("byte"));
}

}  // namespace
}  // namespace torchlift::compile
