#include "compile/passes/testing.h"

#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/signbit.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <random>
#include <set>

namespace torchlift::compile {
namespace {

std::pair<std::string, std::string> split_name(const std::string& name) {
  const size_t dot = name.rfind('.');
  if (dot == std::string::npos) return {name, ""};
  return {name.substr(0, dot), name.substr(dot + 1)};
}

// The stride of a dim of one element says nothing, nor do those of an empty tensor.
bool same_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  }
  return true;
}

// The argument that result i of the operator is, by the schema.
ValueId written_argument(const Node& node, const c10::OperatorHandle& op, size_t i) {
  const auto* alias = op.schema().returns()[i].alias_info();
  if (alias == nullptr || !alias->isWrite()) return kNoValue;
  for (size_t k = 0; k < node.args.size(); ++k) {
    const auto* other = op.schema().arguments()[k].alias_info();
    if (other == nullptr || !other->isWrite() || other->beforeSets() != alias->beforeSets()) {
      continue;
    }
    if (const auto* value = std::get_if<ValueRef>(&node.args[k])) return value->id;
  }
  return kNoValue;
}

}  // namespace

// --- building ------------------------------------------------------------------------------------

ValueId GraphBuilder::define(TensorType type, const at::Tensor& example, const std::string& name) {
  const ValueId id = graph_.add_value(std::move(type), name);
  examples_.resize(static_cast<size_t>(id) + 1);
  examples_.back() = example;
  return id;
}

ValueId GraphBuilder::input(const at::Tensor& example) {
  graph_.inputs.push_back(define(type_of(example), example, "x"));
  return graph_.inputs.back();
}

ValueId GraphBuilder::constant(const at::Tensor& tensor) {
  const ValueId id = define(type_of(tensor), tensor, "c");
  graph_.constants.push_back({id, tensor});
  return id;
}

void GraphBuilder::dynamic(int32_t dim, const std::string& name) {
  TensorType& type = graph_.value(graph_.inputs.back()).type;
  const auto d = static_cast<size_t>(dim);
  symbols_.push_back(*type.sizes[d].constant());
  const auto symbol = static_cast<int32_t>(graph_.symbols.size());
  graph_.symbols.push_back(
      {.name = name, .input = static_cast<int32_t>(graph_.inputs.size()) - 1, .dim = dim});
  type.sizes[d] = SizeExpr::symbol(symbol);
  SizeExpr stride = 1;
  for (size_t k = type.sizes.size(); k-- > 0;) {
    type.strides[k] = stride;
    stride = stride * type.sizes[k];
  }
}

ValueId GraphBuilder::call(const std::string& name, Named arguments) {
  return call_all(name, std::move(arguments)).at(0);
}

std::vector<ValueId> GraphBuilder::call_all(const std::string& name, Named arguments) {
  const auto [op_name, overload] = split_name(name);
  Node node = make_node(op_name, overload, std::move(arguments));
  const auto op = *find_operator(node);
  // The name of the value: "mul" for aten::mul.Tensor.
  const std::string value_name = op_name.substr(op_name.find("::") + 2);
  std::vector<std::vector<Inferred>> inferred;
  if (!graph_.symbols.empty() && !effects_of(node).writes) inferred = infer(graph_, node);
  const auto results = evaluate(
      node, [&](ValueId id) { return example(id); }, symbols_);
  std::vector<ValueId> ids;
  for (size_t i = 0; i < results.size(); ++i) {
    Result result;
    result.is_list = op.schema().returns()[i].type()->kind() == c10::TypeKind::ListType;
    for (size_t k = 0; k < results[i].size(); ++k) {
      ValueId id = written_argument(node, op, i);
      if (id == kNoValue) {
        TensorType type = inferred.empty() ? type_of(results[i][k]) : *inferred[i][k].type;
        id = define(std::move(type), results[i][k], value_name);
      }
      result.ids.push_back(id);
      ids.push_back(id);
    }
    node.results.push_back(std::move(result));
  }
  graph_.nodes.push_back(std::move(node));
  return ids;
}

Graph GraphBuilder::finish(std::vector<ValueId> outputs) {
  graph_.outputs = std::move(outputs);
  verify(graph_);
  return graph_;
}

// --- running -------------------------------------------------------------------------------------

std::vector<at::Tensor> run_reference(const Graph& graph, const std::vector<at::Tensor>& inputs,
                                      const std::vector<int64_t>& symbols, bool check_types) {
  std::vector<at::Tensor> values(graph.values.size());
  const auto set = [&](ValueId id, const at::Tensor& t) {
    if (id == kNoValue) return;
    values[static_cast<size_t>(id)] = t;
    if (!check_types) return;
    const TensorType& type = graph.type(id);
    EXPECT_EQ(t.scalar_type(), type.dtype) << graph.value(id).name << " of\n" << graph.str();
    EXPECT_EQ(t.sizes(), at::IntArrayRef(type.concrete_sizes(symbols)))
        << graph.value(id).name << " of\n"
        << graph.str();
    EXPECT_TRUE(same_strides(t.sizes(), t.strides(), type.concrete_strides(symbols)))
        << graph.value(id).name << " has strides " << t.strides() << " in\n"
        << graph.str();
  };
  for (size_t i = 0; i < inputs.size(); ++i) set(graph.inputs[i], inputs[i]);
  for (const Constant& constant : graph.constants) set(constant.id, constant.tensor);
  for (const Node& node : graph.nodes) {
    const auto results = evaluate(
        node, [&](ValueId id) { return values[static_cast<size_t>(id)]; }, symbols);
    for (size_t i = 0; i < results.size(); ++i) {
      for (size_t k = 0; k < results[i].size(); ++k) set(node.results[i].ids.at(k), results[i][k]);
    }
  }
  std::vector<at::Tensor> outputs;
  for (const ValueId id : graph.outputs) {
    outputs.push_back(id == kNoValue ? at::Tensor() : values[static_cast<size_t>(id)]);
  }
  return outputs;
}

std::vector<at::Tensor> random_inputs(const Graph& graph, const std::vector<int64_t>& symbols) {
  std::vector<at::Tensor> inputs;
  for (const ValueId id : graph.inputs) {
    const TensorType& type = graph.type(id);
    const std::vector<int64_t> sizes = type.concrete_sizes(symbols);
    at::Tensor t =
        at::empty_strided(sizes, type.concrete_strides(symbols), at::TensorOptions(type.dtype));
    if (at::isFloatingType(type.dtype) || at::isComplexType(type.dtype)) {
      t.copy_(at::randn(sizes, at::TensorOptions(type.dtype)));
    } else {
      t.copy_(at::randint(0, type.dtype == at::kBool ? 2 : 5, sizes));
    }
    inputs.push_back(t);
  }
  return inputs;
}

bool identical(const at::Tensor& a, const at::Tensor& b) {
  if (a.defined() != b.defined()) return false;
  if (!a.defined()) return true;
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  if (!a.is_floating_point()) return at::equal(a, b);
  if (!at::equal(at::isnan(a), at::isnan(b))) return false;
  const at::Tensor known = at::isnan(a).logical_not();
  const at::Tensor zero = at::ones({}, a.options());
  const at::Tensor x = at::where(known, a, zero), y = at::where(known, b, zero);
  return at::equal(x, y) && at::equal(at::signbit(x), at::signbit(y));
}

void expect_same(const Graph& before, const Graph& after, const std::vector<int64_t>& symbols,
                 double tolerance) {
  verify(before);
  verify(after);
  ASSERT_EQ(before.outputs.size(), after.outputs.size());
  for (int round = 0; round < 2; ++round) {
    const std::vector<at::Tensor> inputs = random_inputs(before, symbols);
    const auto expected = run_reference(before, inputs, symbols);
    const auto got = run_reference(after, inputs, symbols);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_TRUE(same_strides(expected[i].sizes(), expected[i].strides(), got[i].strides()))
          << "output " << i;
      const bool same = tolerance == 0
                            ? identical(expected[i], got[i])
                            : at::allclose(expected[i], got[i], tolerance, tolerance, true);
      EXPECT_TRUE(same) << "output " << i << " of\n"
                        << before.str() << "\nis not that of\n"
                        << after.str();
    }
  }
}

int64_t count(const Graph& graph, const std::string& op) {
  return std::count_if(graph.nodes.begin(), graph.nodes.end(),
                       [&](const Node& node) { return node.op == op; });
}

// --- random programs -----------------------------------------------------------------------------

namespace {

class RandomProgram {
 public:
  RandomProgram(uint64_t seed, const RandomGraphOptions& options)
      : random_(seed), options_(options) {}

  Graph run() {
    const std::vector<std::vector<int64_t>> shapes = {{4, 6}, {4, 6}, {6, 4}, {24}};
    for (const std::vector<int64_t>& sizes : shapes) {
      add(b_.input(at::randn(sizes, at::kDouble)));
    }
    add(b_.constant(at::ones({4, 6}, at::kDouble)));
    fixed_.insert(values_.back());
    for (int i = 0; i < options_.nodes; ++i) step();
    std::vector<ValueId> outputs;
    for (int i = 0; i < 4; ++i) outputs.push_back(pick());
    outputs.push_back(values_.back());
    std::sort(outputs.begin(), outputs.end());
    outputs.erase(std::unique(outputs.begin(), outputs.end()), outputs.end());
    return b_.finish(outputs);
  }

 private:
  int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  ValueId pick() { return values_[static_cast<size_t>(below(static_cast<int>(values_.size())))]; }
  ValueId add(ValueId id) {
    values_.push_back(id);
    return id;
  }
  const at::Tensor& t(ValueId id) const { return b_.example(id); }

  // Another value of the same sizes: perhaps the same one.
  ValueId like(ValueId id) {
    std::vector<ValueId> all;
    for (const ValueId other : values_) {
      if (t(other).sizes() == t(id).sizes()) all.push_back(other);
    }
    return all[static_cast<size_t>(below(static_cast<int>(all.size())))];
  }

  void step() {
    const int kind = below(options_.writes ? 14 : 8);
    if (kind < 2) return unary();
    if (kind < 5) return binary();
    if (kind < 8) return view();
    write();
  }

  void unary() {
    const char* const ops[] = {"aten::sin",        "aten::neg",  "aten::clone", "aten::tanh",
                               "aten::zeros_like", "aten::relu", "aten::neg"};
    add(b_.call(ops[below(7)], {{"self", ref(pick())}}));
  }

  void binary() {
    const ValueId a = pick();
    const int kind = below(6);
    if (kind == 0) {
      add(b_.call("aten::mul.Scalar",
                  {{"self", ref(a)}, {"other", number(static_cast<double>(below(3)))}}));
    } else if (kind == 1) {
      add(b_.call("aten::add.Scalar",
                  {{"self", ref(a)}, {"other", number(static_cast<double>(below(2)))}}));
    } else if (kind == 2 && t(a).dim() == 2) {
      add(b_.call(
          "aten::sum.dim_IntList",
          {{"self", ref(a)}, {"dim", ints({below(2)})}, {"keepdim", number(below(2) == 1)}}));
    } else {
      const char* const ops[] = {"aten::mul.Tensor", "aten::add.Tensor", "aten::sub.Tensor"};
      add(b_.call(ops[below(3)], {{"self", ref(a)}, {"other", ref(like(a))}}));
    }
  }

  void view() {
    const ValueId a = pick();
    const int64_t dims = t(a).dim();
    const int kind = below(7);
    if (kind == 6 && dims == 1) {
      add(b_.call("aten::expand", {{"self", ref(a)}, {"size", ints({4, t(a).size(0)})}}));
      fixed_.insert(values_.back());  // overlaps itself: not to be written into
    } else if (kind == 0 && dims == 2) {
      add(b_.call("aten::t", {{"self", ref(a)}}));
    } else if (kind == 1 && dims >= 1 && t(a).size(0) > 2) {
      add(b_.call("aten::slice.Tensor", {{"self", ref(a)},
                                         {"dim", number(0)},
                                         {"start", number(below(2))},
                                         {"end", number(t(a).size(0))},
                                         {"step", number(1 + below(2))}}));
    } else if (kind == 2 && dims >= 1) {
      add(b_.call("aten::select.int",
                  {{"self", ref(a)}, {"dim", number(dims - 1)}, {"index", number(0)}}));
    } else if (kind == 3 && dims <= 2) {
      add(b_.call("aten::unsqueeze", {{"self", ref(a)}, {"dim", number(below(2) == 0 ? 0 : -1)}}));
    } else if (kind == 4 && t(a).is_contiguous() && dims >= 1) {
      add(b_.call("aten::view", {{"self", ref(a)}, {"size", ints({-1})}}));
    } else if (kind == 5 && dims >= 1 && t(a).size(0) >= 2) {
      for (const ValueId part :
           b_.call_all("aten::split.Tensor",
                       {{"self", ref(a)}, {"split_size", number((t(a).size(0) + 1) / 2)}})) {
        add(part);
      }
    } else {
      add(b_.call("aten::alias", {{"self", ref(a)}}));
    }
  }

  // Writing into memory of a constant is an error, and so is writing into a tensor that overlaps
  // itself or is read at the same time in another place.
  bool writable(ValueId id) const {
    for (const ValueId fixed : fixed_) {
      if (t(id).is_alias_of(t(fixed))) return false;
    }
    return true;
  }

  void write() {
    const ValueId a = pick();
    if (!writable(a)) return;
    const ValueId other = like(a);
    const bool apart = other == a || !t(other).is_alias_of(t(a));
    switch (below(7)) {
      case 0:
        b_.call("aten::mul_.Scalar", {{"self", ref(a)}, {"other", number(0.5)}});
        return;
      case 1:
        if (apart) b_.call("aten::add_.Tensor", {{"self", ref(a)}, {"other", ref(other)}});
        return;
      case 2:
        if (apart) b_.call("aten::copy_", {{"self", ref(a)}, {"src", ref(other)}});
        return;
      case 3:
        b_.call("aten::fill_.Scalar", {{"self", ref(a)}, {"value", number(1.5)}});
        return;
      case 4:
        if (apart) {
          b_.call("aten::mul.out",
                  {{"self", ref(other)}, {"other", number_tensor()}, {"out", ref(a)}});
        }
        return;
      case 5:
        b_.call("aten::sin_", {{"self", ref(a)}});
        return;
      default:
        if (t(a).dim() == 2 && !is_input(a)) b_.call("aten::t_", {{"self", ref(a)}});
    }
  }

  bool is_input(ValueId id) const { return id < 4; }
  Argument number_tensor() {
    if (half_ == kNoValue) half_ = b_.constant(at::full({}, 0.5, at::kDouble));
    return ref(half_);
  }

  std::mt19937_64 random_;
  RandomGraphOptions options_;
  GraphBuilder b_;
  std::vector<ValueId> values_;
  std::set<ValueId> fixed_;
  ValueId half_ = kNoValue;
};

}  // namespace

Graph random_graph(uint64_t seed, const RandomGraphOptions& options) {
  return RandomProgram(seed, options).run();
}

}  // namespace torchlift::compile
