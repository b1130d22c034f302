#include "core/interpreter.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace torchlift {
namespace {

// The level whose interpreter the next operator at it passes by; null most of the time.
const Level*& passed_level() {
  static thread_local const Level* level = nullptr;
  return level;
}

class PassScope {
 public:
  explicit PassScope(const Level& level) : saved_(std::exchange(passed_level(), &level)) {}
  ~PassScope() { passed_level() = saved_; }
  PassScope(const PassScope&) = delete;
  PassScope& operator=(const PassScope&) = delete;

 private:
  const Level* saved_;
};

}  // namespace

void call_batching_rule(const c10::OperatorHandle& op, const LevelPtr& level,
                        torch::jit::Stack* stack) {
  const PassScope pass(*level);
  op.callBoxed(*stack);
}

bool interpret(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack) {
  if (passed_level() == level.get()) {
    passed_level() = nullptr;  // What the rule calls is none of its business.
    return false;
  }
  return level->interpreter()->run(op, level, stack);
}

bool interpret(const char* name, const char* overload, const LevelPtr& level,
               torch::jit::Stack* stack) {
  return interpret(c10::Dispatcher::singleton().findSchemaOrThrow(name, overload), level, stack);
}

}  // namespace torchlift
