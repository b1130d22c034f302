#include "compile/artifact/native_code.h"

#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

#include "compile/artifact/format_error.h"
#include "core/runtime.h"

namespace torchlift::compile {
namespace {

std::string machine_here() {
  struct utsname name {};
  return ::uname(&name) == 0 ? name.machine : "unknown";
}

// Of the first processor, as Linux lists them: "flags : fpu avx2 ..." (x86), "Features : ..."
// (ARM).
std::vector<std::string> cpu_features_here() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::vector<std::string> features;
    for (std::string word; words >> word;) features.push_back(word);
    std::sort(features.begin(), features.end());
    return features;
  }
  return {};
}

// Those that a compiler makes use of, by how they begin. The list also tells of mitigations,
// virtualization, clocks..., which differ between machines that run the same code.
bool is_instruction_set(const std::string& feature) {
  static const auto* x86 = new std::vector<std::string>{
      "sse",   "ssse", "avx",  "amx", "fma",  "f16c", "bmi",     "abm",   "popcnt",
      "movbe", "aes",  "vaes", "adx", "sha_", "gfni", "vpclmul", "pclmul"};
  static const auto* arm =
      new std::vector<std::string>{"asimd", "sve",   "sme",     "i8mm", "bf16",  "fphp", "fcma",
                                   "jscvt", "crc32", "atomics", "aes",  "pmull", "sha"};
  const auto& prefixes = machine_here() == "x86_64" ? *x86 : *arm;
  return std::any_of(prefixes.begin(), prefixes.end(),
                     [&](const std::string& prefix) { return feature.rfind(prefix, 0) == 0; });
}

void check_version(const std::string& what, const std::string& of_code, const std::string& here) {
  if (of_code == here) return;
  format_error("its machine code was made with ", what, " ", of_code, ", and this is ", what, " ",
               here, ". Save it anew with this version, or load it with backend=\"eager\", which ",
               "runs its graph instead.");
}

// A folder that is gone at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string path = (std::filesystem::temp_directory_path() / "torchlift-XXXXXX").string();
    if (::mkdtemp(path.data()) == nullptr) {
      format_error("its machine code needs a temporary folder, which cannot be made: ", path, ".");
    }
    path_ = path;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace

NativeCode native_code_for_here(at::Tensor package) {
  NativeCode code{.backend = "inductor",
                  .torchlift_version = version(),
                  .torch_version = built_for_torch(),
                  .machine = machine_here(),
                  .cpu_features = cpu_features_here(),
                  .package = std::move(package)};
  std::erase_if(code.cpu_features,
                [](const std::string& each) { return !is_instruction_set(each); });
  return code;
}

void check_fits_here(const NativeCode& code) {
  if (code.backend != "inductor") {
    format_error("its machine code is of the backend '", code.backend,
                 "', which this torchlift does not know.");
  }
  check_version("torchlift", code.torchlift_version, version());
  check_version("torch", code.torch_version, built_for_torch());
  if (code.machine != machine_here()) {
    format_error("its machine code is for ", code.machine, ", and this machine is ", machine_here(),
                 ". Save it anew here.");
  }
  const std::vector<std::string> here = cpu_features_here();
  const std::set<std::string> known(here.begin(), here.end());
  for (const std::string& feature : code.cpu_features) {
    if (known.count(feature) != 0) continue;
    format_error("its machine code may use ", feature, ", which this CPU does not have. Save it ",
                 "anew here, or load it with backend=\"eager\", which runs its graph instead.");
  }
}

struct NativeLibrary::Loader {
  explicit Loader(const std::string& path) : package(path) {}
  torch::inductor::AOTIModelPackageLoader package;
};

NativeLibrary::NativeLibrary(const NativeCode& code) {
  check_fits_here(code);
  const TemporaryFolder folder;
  const std::string path = folder.file("package.pt2");
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(code.package.const_data_ptr()),
             static_cast<std::streamsize>(code.package.nbytes()));
  file.close();
  if (!file) format_error("its machine code cannot be written to ", path, ".");
  try {
    loader_ = std::make_unique<Loader>(path);
  } catch (const c10::Error& error) {
    format_error("its machine code cannot be loaded: ", error.what_without_backtrace());
  } catch (const std::exception& error) {
    format_error("its machine code cannot be loaded: ", error.what());
  }
}

NativeLibrary::~NativeLibrary() = default;

std::vector<at::Tensor> NativeLibrary::run(const std::vector<at::Tensor>& inputs) const {
  return loader_->package.run(inputs);
}

}  // namespace torchlift::compile
