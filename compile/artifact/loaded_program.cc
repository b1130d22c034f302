#include "compile/artifact/loaded_program.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "compile/artifact/format_error.h"
#include "compile/artifact/native_code.h"
#include "compile/artifact/native_plan.h"
#include "compile/passes/written_memory.h"
#include "compile/seed_scope.h"
#include "core/error.h"
#include "core/level.h"

namespace torchlift::compile {
namespace {

// What machine code threw.
struct CodeError {
  std::string text;
};

// The bytes of a storage, in another one.
c10::Storage copied(const at::Tensor& t) {
  const auto count = static_cast<int64_t>(t.storage().nbytes());
  at::Tensor bytes = at::empty({0}, t.options().dtype(at::kByte).requires_grad(false));
  bytes.set_(t.storage(), 0, {count}, {1});
  return bytes.clone().storage();
}

// The graph with other memory for the constants that it writes into, and for those that share it
// with them. See NOTE [state of loaded programs].
Graph with_own_state(Graph graph) {
  const RuleDepthScope within(1);  // What is made here is of no level.
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages;
  for (const ValueId id : written_constants(graph)) {
    const at::Tensor& t = graph.find_constant(id)->tensor;
    if (!t.has_storage()) continue;
    const c10::StorageImpl* memory = t.storage().unsafeGetStorageImpl();
    if (storages.count(memory) == 0) storages.emplace(memory, copied(t));
  }
  for (Constant& constant : graph.constants) {
    const at::Tensor& t = constant.tensor;
    if (!t.has_storage()) continue;
    const auto found = storages.find(t.storage().unsafeGetStorageImpl());
    if (found == storages.end()) continue;
    constant.tensor = at::empty({0}, t.options().requires_grad(false))
                          .set_(found->second, t.storage_offset(), t.sizes(), t.strides());
  }
  return graph;
}

}  // namespace

struct LoadedProgram::Native {
  NativeFrame frame;
  NativeLibrary library;

  Native(const Graph& graph, const NativeCode& code) : frame(graph), library(code) {}

  // Throws CodeError, before anything is written, if the code throws.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs,
                              const RunOptions& options) const {
    // As in the replay: below autograd, and the casts were recorded.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    std::optional<SeedScope> seeded;
    if (options.seed.has_value()) seeded.emplace(*options.seed, std::vector<c10::Device>());
    return frame.run(inputs, [&](const std::vector<at::Tensor>& all) { return compute(all); });
  }

  std::vector<at::Tensor> compute(const std::vector<at::Tensor>& inputs) const {
    try {
      return library.run(inputs);
    } catch (const c10::Error& error) {
      throw CodeError{error.what_without_backtrace()};
    } catch (const std::exception& error) {
      throw CodeError{error.what()};
    }
  }
};

LoadedProgram::LoadedProgram(const Artifact& artifact, const LoadOptions& options,
                             const std::string& file)
    : program_(with_own_state(artifact.graph)) {
  if (!options.backend.empty() && options.backend != "eager") {
    transform_error("load", file, ": there is no backend '", options.backend,
                    "' to load it with. \"eager\" runs the graph of the file; without a backend, "
                    "what the file holds runs.");
  }
  if (!artifact.native.has_value() || options.backend == "eager") return;
  naming_file("load", file, [&] {
    if (!options.allow_native_code) {
      format_error("it holds machine code, made by ", artifact.native->backend,
                   ", and loading it runs it. If you trust who made the file, load it with "
                   "allow_native_code (torchlift-run: --allow-native-code); or with "
                   "backend=\"eager\", which runs its graph instead.");
    }
    native_ = std::make_shared<const Native>(program_.graph(), *artifact.native);
    backend_ = artifact.native->backend;
  });
}

std::vector<at::Tensor> LoadedProgram::run(at::ArrayRef<at::Tensor> inputs,
                                           const RunOptions& options) const {
  if (native_ == nullptr || program_.needs_dispatch(inputs)) return program_.run(inputs, options);
  const std::vector<at::Tensor> prepared = program_.prepared(inputs);
  if (!native_->frame.can_run(prepared)) return program_.run(inputs, options);
  try {
    return native_->run(prepared, options);
  } catch (const CodeError&) {
    // The graph gives the error of the operator, or does without one what the code refuses.
    return program_.run(inputs, options);
  }
}

void LoadedProgram::try_out(at::ArrayRef<at::Tensor> inputs) const {
  if (native_ == nullptr || program_.needs_dispatch(inputs)) return;
  const std::vector<at::Tensor> prepared = program_.prepared(inputs);
  if (!native_->frame.can_run(prepared)) return;
  try {
    native_->run(prepared, {.seed = 0});
  } catch (const CodeError& error) {
    unsupported_error("save", "the machine code that ", backend_,
                      " made cannot run the example arguments: ", error.text,
                      "\nThe backend 'eager' saves the function without machine code.");
  }
}

}  // namespace torchlift::compile
