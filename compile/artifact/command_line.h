#ifndef TORCHLIFT_COMPILE_ARTIFACT_COMMAND_LINE_H_
#define TORCHLIFT_COMPILE_ARTIFACT_COMMAND_LINE_H_

// File: compile/artifact/command_line.h
//
// The command line of torchlift-run, taken apart.
//
//   const CommandLine line = parse_command_line({"run", "f.tlc", "--inputs", "x.npy"});
//   line.command;   // "run"

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace torchlift::compile {

struct CommandLine {
  std::string command;
  std::string file;
  std::vector<std::string> inputs;
  std::optional<std::string> output;
  std::optional<uint64_t> seed;
  std::optional<int64_t> threads;
  std::optional<int64_t> repeat;
  std::string backend;
  bool allow_native_code = false;
  std::map<std::string, int64_t> dims;  // sizes of dynamic dims
};

// The message says what is wrong; the caller adds how to get help.
class UsageError : public std::runtime_error {
  using runtime_error::runtime_error;
};

// Throws UsageError.
CommandLine parse_command_line(const std::vector<std::string>& arguments);

// What --help prints.
extern const char* const kUsage;

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_COMMAND_LINE_H_
