#include "compile/artifact/command_line.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <set>

namespace torchlift::compile {
namespace {

// What each command takes beside its file.
const std::map<std::string, std::set<std::string>> kOptions = {
    {"inspect", {}},
    {"validate", {}},
    {"run", {"--inputs", "--output", "--seed", "--threads", "--backend", "--allow-native-code"}},
    {"bench",
     {"--inputs", "--repeat", "--seed", "--threads", "--dim", "--backend", "--allow-native-code"}},
};

int64_t number(const std::string& text, const std::string& option, int64_t least) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stopped != end || value < least) {
    throw UsageError(option + " must be a whole number of at least " + std::to_string(least) +
                     ", and is '" + text + "'.");
  }
  return value;
}

class Parser {
 public:
  explicit Parser(const std::vector<std::string>& arguments) : arguments_(arguments) {}

  CommandLine run() {
    if (arguments_.empty()) throw UsageError("a command is missing.");
    line_.command = arguments_[0];
    const auto options = kOptions.find(line_.command);
    if (options == kOptions.end()) {
      throw UsageError("there is no command '" + line_.command +
                       "'; there are inspect, validate, run and bench.");
    }
    for (next_ = 1; next_ < arguments_.size();) {
      const std::string word = arguments_[next_++];
      if (word.rfind("--", 0) != 0) {
        file(word);
      } else if (options->second.count(word) == 0) {
        throw UsageError(line_.command + " has no option " + word + ".");
      } else {
        option(word);
      }
    }
    if (line_.file.empty()) throw UsageError(line_.command + " needs a file.");
    return line_;
  }

 private:
  void file(const std::string& word) {
    if (!line_.file.empty()) {
      throw UsageError(line_.command + " takes one file, and got '" + line_.file + "' and '" +
                       word + "'. Inputs follow --inputs.");
    }
    line_.file = word;
  }

  void option(const std::string& name) {
    if (name == "--inputs") {
      const size_t first = next_;
      while (has_value()) line_.inputs.push_back(arguments_[next_++]);
      if (next_ == first) throw UsageError("--inputs needs files.");
    } else if (name == "--output") {
      line_.output = value(name);
    } else if (name == "--seed") {
      line_.seed = static_cast<uint64_t>(number(value(name), name, 0));
    } else if (name == "--threads") {
      line_.threads = std::min<int64_t>(number(value(name), name, 1), 1 << 16);
    } else if (name == "--repeat") {
      line_.repeat = number(value(name), name, 1);
    } else if (name == "--backend") {
      line_.backend = value(name);
    } else if (name == "--allow-native-code") {
      line_.allow_native_code = true;
    } else {
      dim(value(name));
    }
  }

  void dim(const std::string& text) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      throw UsageError("--dim must be NAME=SIZE, and is '" + text + "'.");
    }
    line_.dims[text.substr(0, equals)] = number(text.substr(equals + 1), "--dim", 0);
  }

  bool has_value() const {
    return next_ < arguments_.size() && arguments_[next_].rfind("--", 0) != 0;
  }
  std::string value(const std::string& option) {
    if (!has_value()) throw UsageError(option + " needs a value.");
    return arguments_[next_++];
  }

  const std::vector<std::string>& arguments_;
  size_t next_ = 0;
  CommandLine line_;
};

}  // namespace

CommandLine parse_command_line(const std::vector<std::string>& arguments) {
  return Parser(arguments).run();
}

const char* const kUsage =
    R"(torchlift-run: looks at and runs torchlift artifacts (.tlc) and exported programs (.pt2).

  torchlift-run inspect FILE
      prints who wrote it, its signature, constants, and the graph as code
  torchlift-run validate FILE
      checks everything that can be checked without running it
  torchlift-run run FILE [--inputs INPUT...] [--output OUTPUT] [--seed N] [--threads N]
      runs it once. INPUTs are .npy files, in the order of the signature, or one .safetensors with the
      names of the signature (params.w). OUTPUT is a .safetensors file, or a folder for .npy files;
      without one, outputs are printed
  torchlift-run bench FILE [--inputs INPUT...] [--repeat N] [--seed N] [--threads N] [--dim NAME=SIZE]...
      prints the median time of a run, with random inputs if none are given
  run and bench also take
      --allow-native-code, for a file that holds machine code, which runs then: trust its author;
      --backend eager, to run the graph of such a file instead
  torchlift-run --help
  torchlift-run --version

Exit codes: 0, done; 1, the file or an input is bad; 2, the command line is wrong.
)";

}  // namespace torchlift::compile
