#ifndef TORCHLIFT_COMPILE_IMPORT_SCRIPT_PROGRAM_H_
#define TORCHLIFT_COMPILE_IMPORT_SCRIPT_PROGRAM_H_

// File: compile/import/script_program.h
//
// Runs a method of TorchScript, one operator after the other.
//
//   const ScriptProgram program(graph);
//   const c10::IValue result = program.run({self, x}, state);
//
// NOTE [running TorchScript]
// TorchScript's own executor fuses operators and differentiates by formulas of its own, which know
// nothing of transforms; and what an operator throws comes out of it as a plain runtime_error, in
// place of the UnsupportedError that says what to do. So the graph is walked here: operators go
// through the dispatcher, on whatever tensors there are; numbers, lists and control flow are
// computed as they come. A condition that is a number computed from a tensor asks for that number,
// which is an error inside of vmap and trace that says so.
//
// The module is never changed, so that a call is a function and threads do not meet: tensors of its
// state are replaced by those of the call (ScriptState), what is assigned to an attribute is seen
// in the call and, if it is a buffer, copied into the call's. A call that would keep something else
// in the module (append to its list, assign a number) throws.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace torch::jit {
struct Graph;
}

namespace torchlift::compile {

// What belongs to a module and may not be changed: its submodules, lists and dicts.
class ScriptObjects {
 public:
  // own: the tensors of the module's state.
  ScriptObjects(const c10::IValue& module, std::unordered_set<const c10::TensorImpl*> own)
      : own_(std::move(own)) {
    add(module);
  }
  bool has(const c10::IValue& value) const {
    return value.isPtrType() && objects_.count(value.internalToPointer()) > 0;
  }
  // Whether it is a list, dict or tuple with a tensor of the state in it (the weights of recurrent
  // layers).
  bool holds_state(const c10::IValue& value) const {
    return value.isPtrType() && holders_.count(value.internalToPointer()) > 0;
  }

 private:
  // Whether there is a tensor of the state in it.
  bool add(const c10::IValue& value);
  bool add_parts(const c10::IValue& value);

  std::unordered_set<const c10::TensorImpl*> own_;
  std::unordered_set<const void*> objects_;
  std::unordered_set<const void*> holders_;
};

// The state of a module in one call.
class ScriptState {
 public:
  using Tensors = std::unordered_map<const c10::TensorImpl*, at::Tensor>;

  // tensors: what stands for each of the module's own.
  ScriptState(const ScriptObjects& objects, const Tensors& tensors)
      : objects_(objects), tensors_(tensors) {}

  c10::IValue get(const c10::IValue& object, const std::string& attribute);
  void set(const c10::IValue& object, const std::string& attribute, c10::IValue value);
  // Copies what was assigned to buffers into the call's.
  void finish() const;
  // Throws if it is the module's.
  void check_writable(const c10::IValue& container, const std::string& by) const;

 private:
  struct Assigned {
    at::Tensor target;
    at::Tensor value;
    std::string attribute;
  };
  using Place = std::pair<const void*, std::string>;

  const at::Tensor* find(const c10::IValue& value) const;
  // With the call's tensors in it; the same one each time.
  c10::IValue replaced(const c10::IValue& value);
  c10::IValue make_replaced(const c10::IValue& value);

  const ScriptObjects& objects_;
  const Tensors& tensors_;
  std::map<Place, Assigned> assigned_;
  std::unordered_map<const void*, c10::IValue> replaced_;  // by the module's own
  std::unordered_set<const void*> copies_;                 // those in replaced_
};

class ScriptProgram {
 public:
  // The graph is inlined here. Throws UnsupportedError for what it cannot run, naming it.
  explicit ScriptProgram(std::shared_ptr<torch::jit::Graph> graph);

  std::vector<c10::IValue> run(std::vector<c10::IValue> inputs, ScriptState& state) const;

 private:
  struct Step;
  struct Block;
  class Compiler;
  class Runner;

  std::shared_ptr<torch::jit::Graph> graph_;
  std::vector<c10::IValue> frame_;  // a place for each value, with the constants in theirs
  std::shared_ptr<const Block> block_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_SCRIPT_PROGRAM_H_
