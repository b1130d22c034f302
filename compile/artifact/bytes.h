#ifndef TORCHLIFT_COMPILE_ARTIFACT_BYTES_H_
#define TORCHLIFT_COMPILE_ARTIFACT_BYTES_H_

// File: compile/artifact/bytes.h
//
// Bytes to read from, in a file or in memory, and how files are written: whole or not at all.
//
//   const FileBytes file("model.tlc");
//   std::string magic(8, '\0');
//   file.read(0, magic.size(), magic.data());   // throws if the file is shorter
//
// Errors are FormatErrors (format_error.h).

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace torchlift::compile {

class ByteSource {
 public:
  ByteSource() = default;
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;
  virtual ~ByteSource() = default;
  virtual uint64_t size() const = 0;

  // Copies `count` bytes from `offset` on. Throws where there are fewer.
  void read(uint64_t offset, uint64_t count, void* to) const;
  std::string read_string(uint64_t offset, uint64_t count) const;

 private:
  virtual void do_read(uint64_t offset, uint64_t count, void* to) const = 0;
};

class MemoryBytes : public ByteSource {
 public:
  // `bytes` must outlive this.
  explicit MemoryBytes(std::string_view bytes) : bytes_(bytes) {}
  uint64_t size() const override { return bytes_.size(); }

 private:
  void do_read(uint64_t offset, uint64_t count, void* to) const override;

  std::string_view bytes_;
};

// A file is read, not mapped: one that somebody shortens meanwhile gives an error.
class FileBytes : public ByteSource {
 public:
  explicit FileBytes(const std::string& path);
  ~FileBytes() override;
  uint64_t size() const override { return size_; }

 private:
  void do_read(uint64_t offset, uint64_t count, void* to) const override;

  std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

// Writes a file beside `path`, which finish() renames to it: a program that is interrupted leaves
// no half of a file, and readers of an old one keep it.
class FileWriter {
 public:
  explicit FileWriter(const std::string& path);
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;
  ~FileWriter();
  void write(const void* bytes, size_t count);
  void write(std::string_view bytes) { write(bytes.data(), bytes.size()); }
  void finish();

 private:
  std::string path_;
  std::string partial_;
  std::FILE* file_ = nullptr;
};

// The CRC-32 of zlib and PNG; `before` continues one.
uint32_t crc32(const void* bytes, size_t count, uint32_t before = 0);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_BYTES_H_
