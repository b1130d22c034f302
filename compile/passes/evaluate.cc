#include "compile/passes/evaluate.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <array>
#include <exception>

#include "compile/wrapped_number.h"
#include "core/error.h"
#include "core/keys.h"

namespace torchlift::compile {
namespace {

using c10::IValue;

// Levels find operators by these keys; autocast and Python modes would see them as well.
c10::DispatchKeySet keys_above_kernels() {
  return c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
         c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Python,
                              c10::DispatchKey::PythonTLSSnapshot, kFrontKey, kModeKey, kForwardKey,
                              kMarkerKey});
}

bool is_optional_tensor_list(const c10::Type& type) {
  return type.kind() == c10::TypeKind::ListType &&
         type.castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::OptionalType;
}

IValue list_of(const std::vector<ValueRef>& refs, const TensorOf& tensor_of, bool optional) {
  if (!optional) {
    c10::List<at::Tensor> list;
    for (const ValueRef& ref : refs) list.push_back(tensor_of(ref.id));
    return list;
  }
  c10::List<std::optional<at::Tensor>> list;
  for (const ValueRef& ref : refs) {
    list.push_back(ref.id == kNoValue ? std::nullopt : std::optional(tensor_of(ref.id)));
  }
  return list;
}

IValue value_of(const Argument& argument, const c10::Type& type, const TensorOf& tensor_of,
                const std::vector<int64_t>& symbols) {
  if (const auto* ref = std::get_if<ValueRef>(&argument)) return tensor_of(ref->id);
  if (const auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
    return list_of(*refs, tensor_of, is_optional_tensor_list(type));
  }
  if (const auto* value = std::get_if<IValue>(&argument)) return number_as(type, *value);
  if (const auto* size = std::get_if<SizeExpr>(&argument)) {
    return number_as(type, size->evaluate(symbols));
  }
  if (const auto* sizes = std::get_if<std::vector<SizeExpr>>(&argument)) {
    std::vector<int64_t> all;
    for (const SizeExpr& size : *sizes) all.push_back(size.evaluate(symbols));
    return all;
  }
  if (const auto* ratio = std::get_if<SizeRatio>(&argument)) {
    return number_as(type, ratio->evaluate(symbols));
  }
  return type.kind() == c10::TypeKind::TensorType ? IValue(at::Tensor()) : IValue();
}

std::vector<std::vector<at::Tensor>> call(const c10::OperatorHandle& op,
                                          torch::jit::Stack arguments) {
  const c10::impl::ExcludeDispatchKeyGuard below(keys_above_kernels());
  op.callBoxed(arguments);
  std::vector<std::vector<at::Tensor>> results;
  for (const IValue& result : arguments) {
    if (result.isTensor()) {
      results.push_back({result.toTensor()});
    } else if (result.isTensorList()) {
      results.push_back(result.toTensorVector());
    } else {
      results.push_back({at::Tensor()});  // a number, which graphs do not hold
    }
  }
  return results;
}

torch::jit::Stack stack_of(const c10::OperatorHandle& op, const Node& node,
                           const TensorOf& tensor_of, const std::vector<int64_t>& symbols) {
  torch::jit::Stack stack;
  for (size_t i = 0; i < node.args.size(); ++i) {
    const c10::Type& type = *op.schema().arguments()[i].type();
    stack.push_back(value_of(node.args[i], type, tensor_of, symbols));
  }
  return stack;
}

c10::OperatorHandle operator_of(const Node& node) {
  const auto op = find_operator(node);
  if (!op.has_value()) {
    unsupported_error("compile", "a pass tried to run ", node.op,
                      ", which is control flow and no operator of libtorch.");
  }
  return *op;
}

// --- inference -----------------------------------------------------------------------------------

// Of arguments on which an operator may be run to see what it gives.
constexpr int64_t kFewNumbers = int64_t{1} << 17;

// Sizes of the dynamic dims to try. Multiples of 12, so that halves and quarters of them are sizes,
// and none below what the graph is right for.
constexpr size_t kPoints = 3;

std::vector<std::vector<int64_t>> points_of(const Graph& graph) {
  constexpr std::array<int64_t, 11> kPrimes = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31};
  if (graph.symbols.empty()) return {{}};
  std::vector<std::vector<int64_t>> points(kPoints);
  for (size_t p = 0; p < kPoints; ++p) {
    for (size_t s = 0; s < graph.symbols.size(); ++s) {
      const int64_t least = (graph.symbols[s].least + 11) / 12;
      points[p].push_back(12 * (least + kPrimes[(s * (p + 2) + p) % kPrimes.size()]));
    }
  }
  return points;
}

// The device of what the node gives.
c10::Device device_of(const Graph& graph, const Node& node) {
  if (const Argument* device = find_argument(node, "device")) {
    if (const auto* value = std::get_if<IValue>(device)) return value->toDevice();
  }
  c10::Device device = c10::kCPU;
  for (const ValueId id : arguments_of(node)) {
    if (!graph.type(id).device.is_cpu()) device = graph.type(id).device;
  }
  return device;
}

struct Sample {
  std::vector<std::vector<at::Tensor>> results;
  std::vector<std::pair<ValueId, at::Tensor>> arguments;
};

class Inference {
 public:
  Inference(const Graph& graph, const Node& node)
      : graph_(graph), node_(node), op_(operator_of(node)), points_(points_of(graph)) {}

  std::vector<std::vector<Inferred>> run() {
    for (const auto& point : points_) samples_.push_back(sample(point));
    collect_candidates();
    std::vector<std::vector<Inferred>> all(samples_[0].results.size());
    for (size_t i = 0; i < all.size(); ++i) {
      for (size_t k = 0; k < samples_[0].results[i].size(); ++k) {
        all[i].push_back(result(i, k));
      }
    }
    return all;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    unsupported_error("compile", "the shape of what ", node_.full_name(),
                      " gives could not be found without running the program: ", why);
  }

  at::Tensor make(ValueId id, const std::vector<int64_t>& point, bool meta) const {
    const TensorType& type = graph_.type(id);
    if (type.layout != c10::kStrided) fail("an argument is not strided.");
    at::Tensor t =
        at::empty_strided(type.concrete_sizes(point), type.concrete_strides(point),
                          at::TensorOptions(type.dtype).device(meta ? c10::kMeta : type.device));
    if (!meta) t.zero_();
    const Constant* constant = graph_.find_constant(id);
    if (constant != nullptr && constant->tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      t.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return t;
  }

  // By numbers where these are few, as a meta kernel may be a Python one, whose first call imports
  // torch's compiler (a second). Where zeros will not do (an index into nothing), meta may.
  Sample sample(const std::vector<int64_t>& point) const {
    if (is_small(point)) {
      try {
        return sample_on(point, /*meta=*/false);
      } catch (const std::exception&) {
      }
    }
    try {
      // Asked first, as an exception takes milliseconds.
      if (op_.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) {
        return sample_on(point, /*meta=*/true);
      }
    } catch (const c10::NotImplementedError&) {
    } catch (const std::exception& error) {
      fail(error.what());
    }
    // No meta kernel. Random operators have one, so that no numbers are drawn here.
    if (effects_of(node_).draws) fail("it draws random numbers, and has no meta kernel.");
    try {
      return sample_on(point, /*meta=*/false);
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

  bool is_small(const std::vector<int64_t>& point) const {
    if (effects_of(node_).draws) return false;
    int64_t numel = 0;
    for (const ValueId id : arguments_of(node_)) {
      const TensorType& type = graph_.type(id);
      if (!type.device.is_cpu() || type.layout != c10::kStrided) return false;
      numel += c10::multiply_integers(type.concrete_sizes(point));
    }
    return numel > 0 && numel <= kFewNumbers;
  }

  Sample sample_on(const std::vector<int64_t>& point, bool meta) const {
    const c10::impl::ExcludeDispatchKeyGuard below(keys_above_kernels());
    Sample sample;
    const TensorOf tensor_of = [&](ValueId id) {
      for (const auto& [known, tensor] : sample.arguments) {
        if (known == id) return tensor;
      }
      sample.arguments.emplace_back(id, make(id, point, meta));
      return sample.arguments.back().second;
    };
    torch::jit::Stack stack = stack_of(op_, node_, tensor_of, point);
    if (meta) put_on_meta(&stack, sample.arguments.empty());
    sample.results = call(op_, std::move(stack));
    return sample;
  }

  void put_on_meta(torch::jit::Stack* stack, bool factory) const {
    for (size_t i = 0; i < stack->size(); ++i) {
      const bool device = op_.schema().arguments()[i].name() == "device";
      if (device && (factory || !(*stack)[i].isNone())) (*stack)[i] = c10::Device(c10::kMeta);
    }
  }

  // --- sizes as expressions ---

  void add_candidate(const SizeExpr& size) {
    if (!size.is_constant()) candidates_.push_back(size);
  }

  void collect_candidates() {
    for (const ValueId id : arguments_of(node_)) {
      for (const SizeExpr& size : graph_.type(id).sizes) add_candidate(size);
      for (const SizeExpr& stride : graph_.type(id).strides) add_candidate(stride);
      SizeExpr numel = 1;
      for (const SizeExpr& size : graph_.type(id).sizes) numel = numel * size;
      add_candidate(numel);
    }
    for (const Argument& argument : node_.args) {
      if (const auto* size = std::get_if<SizeExpr>(&argument)) add_candidate(*size);
      if (const auto* sizes = std::get_if<std::vector<SizeExpr>>(&argument)) {
        for (const SizeExpr& size : *sizes) add_candidate(size);
      }
    }
  }

  template <class F>
  SizeExpr find(F&& number_at, const std::vector<SizeExpr>& more) const {
    std::vector<int64_t> numbers;
    for (size_t p = 0; p < points_.size(); ++p) numbers.push_back(number_at(p));
    if (std::all_of(numbers.begin(), numbers.end(), [&](int64_t n) { return n == numbers[0]; })) {
      return numbers[0];
    }
    const auto fits = [&](const SizeExpr& candidate) {
      for (size_t p = 0; p < points_.size(); ++p) {
        if (candidate.evaluate(points_[p]) != numbers[p]) return false;
      }
      return true;
    };
    for (const auto* list : {&candidates_, &more}) {
      const auto found = std::find_if(list->begin(), list->end(), fits);
      if (found != list->end()) return *found;
    }
    fail("it depends on a dynamic dim in a way that its arguments do not show.");
  }

  Inferred result(size_t i, size_t k) const {
    const at::Tensor& first = samples_[0].results[i][k];
    Inferred inferred;
    if (!first.defined()) return inferred;
    if (first.layout() != c10::kStrided) fail("it is not strided.");
    const auto at = [&](size_t p) -> const at::Tensor& {
      const auto& list = samples_[p].results[i];
      if (list.size() <= k || list[k].dim() != first.dim())
        fail("its rank is not always the same.");
      return list[k];
    };
    inferred.type = type(first, at);
    for (const auto& [id, tensor] : samples_[0].arguments) {
      if (tensor.is_alias_of(first)) inferred.shares = id;
    }
    if (inferred.shares != kNoValue) {
      const std::vector<SizeExpr> none;
      inferred.offset = find([&](size_t p) { return at(p).storage_offset(); }, none);
    }
    return inferred;
  }

  template <class At>
  TensorType type(const at::Tensor& first, const At& at) const {
    TensorType type;
    type.dtype = first.scalar_type();
    type.device = first.is_meta() ? device_of(graph_, node_) : first.device();
    const auto dims = static_cast<size_t>(first.dim());
    for (size_t d = 0; d < dims; ++d) {
      const auto dim = static_cast<int64_t>(d);
      type.sizes.push_back(find([&](size_t p) { return at(p).size(dim); }, {}));
    }
    // Of a contiguous tensor, or of a permuted one: products of sizes.
    std::vector<SizeExpr> products = {1};
    for (size_t d = dims; d-- > 0;) {
      const size_t count = products.size();
      for (size_t j = 0; j < count && products.size() < 256; ++j) {
        products.push_back(products[j] * type.sizes[d]);
      }
    }
    for (size_t d = 0; d < dims; ++d) {
      const auto dim = static_cast<int64_t>(d);
      type.strides.push_back(find([&](size_t p) { return at(p).stride(dim); }, products));
    }
    return type;
  }

  const Graph& graph_;
  const Node& node_;
  const c10::OperatorHandle op_;
  const std::vector<std::vector<int64_t>> points_;
  std::vector<Sample> samples_;
  std::vector<SizeExpr> candidates_;
};

}  // namespace

std::vector<std::vector<at::Tensor>> evaluate(const Node& node, const TensorOf& tensor_of,
                                              const std::vector<int64_t>& symbols) {
  const c10::OperatorHandle op = operator_of(node);
  return call(op, stack_of(op, node, tensor_of, symbols));
}

std::vector<std::vector<Inferred>> infer(const Graph& graph, const Node& node) {
  return Inference(graph, node).run();
}

Node make_node(const std::string& op, const std::string& overload,
               std::vector<std::pair<std::string, Argument>> arguments) {
  Node node{
      .op = op, .overload = overload, .args = {}, .results = {}, .subgraphs = {}, .source = ""};
  const c10::OperatorHandle handle = operator_of(node);
  for (const c10::Argument& argument : handle.schema().arguments()) {
    const auto given = std::find_if(arguments.begin(), arguments.end(), [&](const auto& each) {
      return each.first == argument.name();
    });
    if (given != arguments.end()) {
      node.args.push_back(std::move(given->second));
      arguments.erase(given);
    } else if (argument.default_value().has_value() && !argument.default_value()->isNone()) {
      node.args.emplace_back(*argument.default_value());
    } else {
      node.args.emplace_back(std::monostate{});
    }
  }
  if (!arguments.empty()) {
    unsupported_error("compile", node.full_name(), " has no argument ", arguments[0].first, ".");
  }
  return node;
}

ValueId append(Graph& graph, std::vector<Node>* nodes, Node node, const std::string& name) {
  ValueId first = kNoValue;
  const auto& returns = operator_of(node).schema().returns();
  const auto inferred = infer(graph, node);
  for (size_t i = 0; i < inferred.size(); ++i) {
    Result result;
    result.is_list = returns[i].type()->kind() == c10::TypeKind::ListType;
    for (const Inferred& each : inferred[i]) {
      result.ids.push_back(each.type.has_value() ? graph.add_value(*each.type, name) : kNoValue);
      if (first == kNoValue) first = result.ids.back();
    }
    node.results.push_back(std::move(result));
  }
  nodes->push_back(std::move(node));
  return first;
}

const Argument* find_argument(const Node& node, const std::string& name) {
  const auto op = find_operator(node);
  if (!op.has_value()) return nullptr;
  for (size_t i = 0; i < node.args.size() && i < op->schema().arguments().size(); ++i) {
    if (op->schema().arguments()[i].name() == name) return &node.args[i];
  }
  return nullptr;
}

}  // namespace torchlift::compile
