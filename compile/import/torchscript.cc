#include "compile/import/torchscript.h"

#include <ATen/core/jit_type.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <unordered_map>
#include <utility>

#include "compile/artifact/format_error.h"
#include "compile/import/records.h"
#include "compile/import/script_program.h"
#include "core/error.h"

namespace torchlift {
namespace compile {
namespace {

using c10::IValue;
using c10::TypeKind;

constexpr const char* kLoad = "load_torchscript";

// --- reading -------------------------------------------------------------------------------------

// What libtorch does not look at.
void check_archive(const std::string& path) {
  Records records(path);
  if (records.has("archive_format")) {
    format_error("it is an exported program, no TorchScript. load_exported reads it.");
  }
  if (!records.has("constants.pkl")) {
    format_error("it is no TorchScript: there is no constants.pkl in it.");
  }
  records.check_all();
}

torch::jit::Module read(const std::string& path, const TorchScriptOptions& options) {
  try {
    check_archive(path);
    torch::jit::Module module = torch::jit::load(path, options.device);
    if (options.training.has_value()) module.train(*options.training);
    return module;
  } catch (const FormatError&) {
    throw;
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    format_error("libtorch cannot read it: ", error.what());
  }
}

// --- inputs --------------------------------------------------------------------------------------

// An argument of the method: given in each call, as one tensor or a tuple of some, or always the
// same.
struct ScriptArgument {
  c10::TypePtr type;
  std::optional<IValue> fixed;
};

struct ScriptMethod {
  std::vector<ScriptArgument> arguments;  // without self
  std::vector<size_t> order;              // of those that calls give
  std::vector<std::string> input_names;   // of the tensors in them
};

// The tensors in an argument; throws unless its type says how many there are.
void add_inputs(const c10::Type& type, const std::string& name, std::vector<std::string>& names) {
  if (type.kind() == TypeKind::OptionalType) {
    return add_inputs(*type.castRaw<c10::OptionalType>()->getElementType(), name, names);
  }
  if (type.kind() == TypeKind::TensorType) {
    names.push_back(name);
    return;
  }
  if (type.kind() != TypeKind::TupleType) {
    unsupported_error("import", "argument '", name, "' is ", type.repr_str(),
                      ", which calls cannot give: they give tensors, and tuples of them. Fix it by "
                      "TorchScriptOptions::arguments.");
  }
  const auto& elements = type.castRaw<c10::TupleType>()->elements();
  for (size_t i = 0; i < elements.size(); ++i) {
    add_inputs(*elements[i], name + "." + std::to_string(i), names);
  }
}

IValue take(const c10::TypePtr& type, at::ArrayRef<at::Tensor> inputs, size_t& next) {
  if (type->kind() == TypeKind::OptionalType) {
    return take(type->expectRef<c10::OptionalType>().getElementType(), inputs, next);
  }
  if (type->kind() == TypeKind::TensorType) return inputs[next++];
  const auto tuple = type->expect<c10::TupleType>();
  std::vector<IValue> elements;
  for (const auto& element : tuple->elements()) elements.push_back(take(element, inputs, next));
  return tuple->schema() != nullptr ? c10::ivalue::Tuple::createNamed(std::move(elements), tuple)
                                    : c10::ivalue::Tuple::create(std::move(elements));
}

bool names(const std::vector<std::string>& list, const std::string& name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

size_t find_argument(const c10::FunctionSchema& schema, const std::string& name) {
  const auto index = schema.argumentIndexWithName(name);
  if (!index.has_value() || *index == 0) {
    format_error("the method has no argument '", name, "': ", schema, ".");
  }
  return static_cast<size_t>(*index);
}

void check_options(const c10::FunctionSchema& schema, const TorchScriptOptions& options) {
  for (const std::string& name : options.inputs) find_argument(schema, name);
  for (const auto& [name, value] : options.arguments) {
    const auto& type = *schema.arguments()[find_argument(schema, name)].type();
    if (value.type()->isSubtypeOf(type)) continue;
    format_error("argument '", name, "' is ", type.repr_str(), "; got ", value.type()->repr_str(),
                 ".");
  }
}

ScriptMethod read_method(const c10::FunctionSchema& schema, const TorchScriptOptions& options) {
  check_options(schema, options);
  ScriptMethod method;
  std::vector<std::string> inputs = options.inputs;
  for (size_t i = 1; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    const auto fixed = options.arguments.find(argument.name());
    ScriptArgument& own = method.arguments.emplace_back(ScriptArgument{argument.type(), {}});
    if (names(options.inputs, argument.name())) continue;
    if (fixed != options.arguments.end()) {
      own.fixed = fixed->second;
    } else if (argument.default_value().has_value()) {
      own.fixed = *argument.default_value();
    } else if (options.inputs.empty()) {
      inputs.push_back(argument.name());
    } else {
      format_error("argument '", argument.name(),
                   "' has no default: it must be among "
                   "TorchScriptOptions::inputs or arguments.");
    }
  }
  for (const std::string& name : inputs) {
    method.order.push_back(find_argument(schema, name) - 1);
    add_inputs(*method.arguments[method.order.back()].type, name, method.input_names);
  }
  return method;
}

// --- outputs -------------------------------------------------------------------------------------

void add_outputs(const IValue& value, std::vector<at::Tensor>& outputs) {
  if (value.isNone()) return;
  if (value.isTensor()) {
    outputs.push_back(value.toTensor());
  } else if (value.isScalar()) {
    const at::Scalar number = value.toScalar();
    outputs.push_back(at::scalar_tensor(number, at::TensorOptions().dtype(number.type())));
  } else if (value.isTuple()) {
    for (const IValue& each : value.toTupleRef().elements()) add_outputs(each, outputs);
  } else if (value.isList()) {
    for (const IValue& each : value.toListRef()) add_outputs(each, outputs);
  } else if (value.isGenericDict()) {
    for (const auto& item : value.toGenericDict()) add_outputs(item.value(), outputs);
  } else {
    unsupported_error("imported module", "the module returns ", value.type()->repr_str(),
                      "; tensors, numbers, None, and tuples, lists and dicts of them can be.");
  }
}

// --- state ---------------------------------------------------------------------------------------

struct ScriptTensors {
  std::vector<ImportedTensor> state;
  std::vector<const c10::TensorImpl*> own;  // the module's
};

void add_state(const std::string& name, const at::Tensor& tensor, bool is_parameter,
               ScriptTensors& tensors) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  const auto same = std::find(tensors.own.begin(), tensors.own.end(), impl);
  if (same != tensors.own.end()) {
    tensors.state[static_cast<size_t>(same - tensors.own.begin())].names.push_back(name);
    return;
  }
  tensors.own.push_back(impl);
  tensors.state.push_back({{name}, tensor.detach(), is_parameter});
}

ScriptTensors state_of(const torch::jit::Module& module) {
  ScriptTensors tensors;
  for (const auto& each : module.named_parameters()) {
    add_state(each.name, each.value, true, tensors);
  }
  for (const auto& each : module.named_buffers()) add_state(each.name, each.value, false, tensors);
  return tensors;
}

// --- the module ----------------------------------------------------------------------------------

class ScriptCode final : public ImportedCode {
 public:
  ScriptCode(const torch::jit::Module& module, std::vector<const c10::TensorImpl*> own,
             ScriptMethod method, const std::shared_ptr<torch::jit::Graph>& graph)
      : module_(module._ivalue()),
        own_(std::move(own)),
        method_(std::move(method)),
        objects_(module_, {own_.begin(), own_.end()}),
        program_(graph->copy()) {}

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> state,
                              at::ArrayRef<at::Tensor> inputs) const override {
    ScriptState::Tensors tensors;
    for (size_t i = 0; i < own_.size(); ++i) tensors.emplace(own_[i], state[i]);
    ScriptState call(objects_, tensors);
    // What a block of torch.no_grad() has not put back when an operator throws.
    const c10::AutoGradMode grad_mode(c10::GradMode::is_enabled());
    const std::vector<IValue> results = program_.run(arguments(inputs), call);
    call.finish();
    std::vector<at::Tensor> outputs;
    for (const IValue& result : results) add_outputs(result, outputs);
    return outputs;
  }

 private:
  std::vector<IValue> arguments(at::ArrayRef<at::Tensor> inputs) const {
    std::vector<IValue> all = {module_};
    for (const ScriptArgument& argument : method_.arguments) {
      all.push_back(argument.fixed.value_or(IValue()));
    }
    size_t next = 0;
    for (const size_t i : method_.order) all[i + 1] = take(method_.arguments[i].type, inputs, next);
    return all;
  }

  const IValue module_;
  const std::vector<const c10::TensorImpl*> own_;
  const ScriptMethod method_;
  const ScriptObjects objects_;
  const ScriptProgram program_;
};

ImportedModule load(const std::string& path, const TorchScriptOptions& options) {
  const torch::jit::Module module = read(path, options);
  const auto found = module.find_method(options.method);
  if (!found.has_value()) {
    std::string all;
    for (const auto& each : module.get_methods()) all += (all.empty() ? "" : ", ") + each.name();
    format_error("the module has no method '", options.method, "'; it has ", all, ".");
  }
  ScriptMethod method = read_method(found->function().getSchema(), options);
  ScriptTensors tensors = state_of(module);
  std::vector<std::string> input_names = method.input_names;
  return ImportedModule(std::move(tensors.state), std::move(input_names),
                        std::make_shared<const ScriptCode>(module, std::move(tensors.own),
                                                           std::move(method), found->graph()));
}

}  // namespace
}  // namespace compile

ImportedModule load_torchscript(const std::string& path, const TorchScriptOptions& options) {
  return compile::naming_file(compile::kLoad, path, [&] { return compile::load(path, options); });
}

}  // namespace torchlift
