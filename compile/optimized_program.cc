#include "compile/optimized_program.h"

#include <exception>
#include <mutex>
#include <optional>
#include <utility>

#include "compile/executable.h"

namespace torchlift::compile {

struct OptimizedProgram::Optimized {
  std::once_flag once;
  std::optional<Executable> executable;  // none where a pass cannot do with the graph
};

OptimizedProgram::OptimizedProgram(Graph graph)
    : program_(std::move(graph)), optimized_(std::make_shared<Optimized>()) {}

std::vector<at::Tensor> OptimizedProgram::run(at::ArrayRef<at::Tensor> inputs,
                                              const RunOptions& options) const {
  if (program_.needs_dispatch(inputs)) return program_.run(inputs, options);
  std::call_once(optimized_->once, [&] {
    try {
      optimized_->executable.emplace(program_.graph(), ExecutableOptions{.blocks = false});
    } catch (const std::exception&) {
      // Writes without a functional form; or constants on which an operator throws, as it then does
      // in the run.
    }
  });
  return optimized_->executable.has_value() ? optimized_->executable->run(inputs, options)
                                            : program_.run(inputs, options);
}

}  // namespace torchlift::compile
