#include "compile/artifact/runner.h"

#include <ATen/Parallel.h>
#include <ATen/core/Formatting.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>
#include <iomanip>
#include <map>
#include <ostream>
#include <sstream>
#include <utility>

#include "compile/artifact/artifact.h"
#include "compile/artifact/command_line.h"
#include "compile/artifact/format_error.h"
#include "compile/artifact/loaded_program.h"
#include "compile/artifact/native_code.h"
#include "compile/artifact/runner_io.h"
#include "compile/import/exported_program.h"
#include "compile/replay.h"
#include "core/error.h"
#include "core/runtime.h"

namespace torchlift::compile {
namespace {

// Text from a file may hold what moves the cursor of a terminal.
std::string printable(std::string text) {
  for (char& c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte < 0x20 && c != '\n') || byte == 0x7F) c = '?';
  }
  return text;
}

std::string plural(size_t count, const std::string& word) {
  return std::to_string(count) + " " + word + (count == 1 ? "" : "s");
}

// An artifact, or what torch.export.save wrote, with its weights as constants.
Artifact read_program(const std::string& file) {
  if (!file.ends_with(".pt2")) return load_artifact(file);
  Artifact artifact;
  artifact.graph = read_exported(file);
  artifact.signature = flat_signature(artifact.graph);
  artifact.name = std::filesystem::path(file).stem().string();
  return artifact;
}

std::string writer_of(const Artifact& artifact) {
  if (artifact.torchlift_version.empty()) return "torch.export";
  return "torchlift " + artifact.torchlift_version + " with torch " + artifact.torch_version;
}

// --- inspect -------------------------------------------------------------------------------------

std::string typed(const Structure& structure, const Graph& graph, const std::vector<ValueId>& ids) {
  return structure.str([&](size_t i) {
    return ids[i] == kNoValue ? std::string("undefined")
                              : graph.type(ids[i]).str(graph.symbol_names());
  });
}

struct Totals {
  size_t nodes = 0;
  size_t constants = 0;
  std::map<const void*, uint64_t> storages;
  std::map<std::string, size_t> operators;
};

void add_totals(const Graph& graph, Totals& totals) {
  for (const Constant& constant : graph.constants) {
    ++totals.constants;
    const auto& storage = constant.tensor.storage();
    totals.storages[storage.unsafeGetStorageImpl()] = storage.nbytes();
  }
  for (const Node& node : graph.nodes) {
    ++totals.nodes;
    ++totals.operators[node.full_name()];
    for (const auto& inner : node.subgraphs) add_totals(*inner, totals);
  }
}

void print_operators(const Totals& totals, std::ostream& out) {
  std::vector<std::pair<size_t, std::string>> sorted;
  for (const auto& [name, count] : totals.operators) sorted.emplace_back(count, name);
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  out << "operators:  " << totals.nodes;
  const char* separator = " (";
  for (const auto& [count, name] : sorted) {
    out << std::exchange(separator, ", ") << count << " " << name;
  }
  out << (sorted.empty() ? "" : ")") << "\n";
}

void print_native(const NativeCode& code, std::ostream& out) {
  out << "machine code: by " << code.backend << " (" << code.package.numel()
      << " bytes), for torchlift " << code.torchlift_version << ", torch " << code.torch_version
      << ", " << code.machine << " with";
  for (const std::string& each : code.cpu_features) out << " " << each;
  out << "\n";
  try {
    check_fits_here(code);
  } catch (const FormatError& error) {
    out << "              not for this machine: " << error.what() << "\n";
  }
}

void inspect(const CommandLine& line, std::ostream& out) {
  const Artifact artifact = read_program(line.file);
  const Graph& graph = artifact.graph;
  std::ostringstream text;
  text << line.file << ": " << artifact.name << ", written by " << writer_of(artifact) << "\n"
       << "signature:  " << typed(artifact.signature.inputs, graph, graph.inputs) << " -> "
       << typed(artifact.signature.outputs, graph, graph.outputs) << "\n";
  for (const Symbol& symbol : graph.symbols) {
    text << "dynamic:    " << symbol.name << ", dim " << symbol.dim << " of "
         << graph.value(graph.inputs[static_cast<size_t>(symbol.input)]).name << ", at least "
         << symbol.least << "\n";
  }
  Totals totals;
  add_totals(graph, totals);
  uint64_t bytes = 0;
  for (const auto& storage : totals.storages) bytes += storage.second;
  text << "constants:  " << totals.constants << " (" << bytes << " bytes)\n";
  print_operators(totals, text);
  if (artifact.native.has_value()) print_native(*artifact.native, text);
  for (const auto& [key, value] : artifact.metadata) {
    text << "metadata:   " << key << " = " << value << "\n";
  }
  text << "\n" << graph.str();
  out << printable(text.str());
}

void validate(const CommandLine& line, std::ostream& out) {
  const Artifact artifact = read_program(line.file);
  const Program program(artifact.graph);
  Totals totals;
  add_totals(artifact.graph, totals);
  out << line.file << ": valid (" << plural(totals.nodes, "operator") << ", "
      << plural(totals.constants, "constant")
      << (artifact.native.has_value() ? ", machine code that was not looked into" : "") << ")\n";
}

LoadedProgram load_program(const Artifact& artifact, const CommandLine& line) {
  return LoadedProgram(
      artifact, {.allow_native_code = line.allow_native_code, .backend = line.backend}, line.file);
}

// --- run -----------------------------------------------------------------------------------------

void set_threads(const CommandLine& line) {
  if (line.threads.has_value()) at::set_num_threads(static_cast<int>(*line.threads));
}

void print_output(const std::string& name, const at::Tensor& tensor, std::ostream& out) {
  constexpr int64_t kPrinted = 100;
  out << name << ": ";
  if (!tensor.defined()) {
    out << "undefined\n";
    return;
  }
  out << type_of(tensor).str() << "\n";
  if (tensor.numel() > kPrinted) {
    out << "(" << tensor.numel() << " numbers; --output writes them)\n";
  } else {
    out << tensor << "\n";
  }
}

void run(const CommandLine& line, std::ostream& out) {
  const Artifact artifact = read_program(line.file);
  const std::vector<at::Tensor> inputs = read_inputs(artifact, line.inputs);
  set_threads(line);
  const LoadedProgram program = load_program(artifact, line);
  const std::vector<at::Tensor> outputs = program.run(inputs, {.seed = line.seed});
  if (line.output.has_value()) {
    for (const std::string& file : write_outputs(artifact, outputs, *line.output)) {
      out << file << "\n";
    }
    return;
  }
  const std::vector<std::string> names = output_names(artifact);
  for (size_t i = 0; i < outputs.size(); ++i) print_output(printable(names[i]), outputs[i], out);
}

// --- bench ---------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

double microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

// Times of runs; without a number of them, for about a second.
std::vector<double> times_of(const LoadedProgram& program, const std::vector<at::Tensor>& inputs,
                             const CommandLine& line) {
  constexpr int kWarmUp = 3;
  constexpr size_t kLeast = 10;
  constexpr size_t kMost = 100000;
  const RunOptions options{.seed = line.seed};
  for (int i = 0; i < kWarmUp; ++i) program.run(inputs, options);
  const auto end = Clock::now() + std::chrono::seconds(1);
  const auto enough = [&](size_t count) {
    if (line.repeat.has_value()) return count >= static_cast<size_t>(*line.repeat);
    return count >= kMost || (count >= kLeast && Clock::now() >= end);
  };
  std::vector<double> times;
  while (!enough(times.size())) {
    const auto start = Clock::now();
    program.run(inputs, options);
    times.push_back(microseconds(Clock::now() - start));
  }
  return times;
}

void bench(const CommandLine& line, std::ostream& out) {
  const Artifact artifact = read_program(line.file);
  set_threads(line);
  const std::vector<at::Tensor> inputs =
      line.inputs.empty() ? random_inputs(artifact, line.dims, line.seed.value_or(0))
                          : read_inputs(artifact, line.inputs);
  const LoadedProgram program = load_program(artifact, line);
  std::vector<double> times = times_of(program, inputs, line);
  std::sort(times.begin(), times.end());
  const size_t threads = static_cast<size_t>(at::get_num_threads());
  out << std::fixed << std::setprecision(1) << "median " << times[times.size() / 2]
      << " us, fastest " << times.front() << " us, slowest " << times.back() << " us; "
      << plural(times.size(), "run") << " on " << plural(threads, "thread") << "\n";
}

void dispatch(const CommandLine& line, std::ostream& out) {
  if (line.command == "inspect") inspect(line, out);
  if (line.command == "validate") validate(line, out);
  if (line.command == "run") run(line, out);
  if (line.command == "bench") bench(line, out);
}

}  // namespace

int run_command(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err) {
  const auto asks = [&](const char* word) { return arguments.size() == 1 && arguments[0] == word; };
  if (asks("--help") || asks("-h") || asks("help")) {
    out << kUsage;
    return 0;
  }
  if (asks("--version")) {
    out << "torchlift " << version() << ", for torch " << built_for_torch() << "\n";
    return 0;
  }
  const at::NoGradGuard no_grad;
  try {
    dispatch(parse_command_line(arguments), out);
    return 0;
  } catch (const UsageError& error) {
    err << "torchlift-run: " << error.what() << " See torchlift-run --help.\n";
    return 2;
  } catch (const c10::Error& error) {
    err << "torchlift-run: " << printable(error.what_without_backtrace()) << "\n";
  } catch (const std::exception& error) {
    err << "torchlift-run: " << printable(error.what()) << "\n";
  }
  return 1;
}

}  // namespace torchlift::compile
