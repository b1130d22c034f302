#include "compile/recording.h"

#include <c10/core/ScalarType.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "batching/rules/numbers.h"
#include "compile/own_copy.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift::compile {

const Frame::Capture* Frame::find_capture(ValueId outer) const {
  const auto found = std::find_if(captures.begin(), captures.end(),
                                  [&](const Capture& each) { return each.outer == outer; });
  return found == captures.end() ? nullptr : &*found;
}

Recording::Recording(std::string transform, std::function<std::string()> source, bool by_shapes)
    : transform_(std::move(transform)),
      source_(std::move(source)),
      by_shapes_(by_shapes),
      frames_{&root_} {
  root_.graph.layouts_assumed = by_shapes;
}

ValueId Recording::add_value(const at::Tensor& real, const std::string& name) {
  return graph().add_value(type_of(real), name);
}

void Recording::know_in(Frame& frame, const at::Tensor& inner, ValueId id) {
  const KnownTensor known{decltype(KnownTensor::tensor)(inner.getIntrusivePtr()), id};
  frame.known.insert_or_assign(inner.unsafeGetTensorImpl(), known);
  if (!inner.has_storage()) return;
  const c10::StorageImpl* storage = inner.storage().unsafeGetStorageImpl();
  const auto found = frame.owners.find(storage);
  const bool spread = found != frame.owners.end() && frame.spread.count(found->second.id) > 0;
  if (found == frame.owners.end() || (!spread && found->second.tensor.expired())) {
    frame.owners.insert_or_assign(
        storage,
        MemoryOwner{
            .tensor = known.tensor, .memory = inner.storage().getWeakStorageImpl(), .id = id});
  }
}

ValueId Recording::find_in(size_t depth, const at::Tensor& inner) {
  Frame& frame = *frames_[depth];
  const auto found = frame.known.find(inner.unsafeGetTensorImpl());
  if (found != frame.known.end() && !found->second.tensor.expired()) return found->second.id;
  const ValueId alias = alias_of_known(frame, inner);
  if (alias != kNoValue) return alias;
  const ValueId view = view_of_owner(frame, inner);
  if (view != kNoValue) return view;
  if (depth == 0) {
    unsupported_error(transform_, "met a tensor of shape ", inner.sizes().slice(1),
                      " that depends on the inputs, but was computed past the operators: by a "
                      "rule that takes tensors apart by itself, in a callback, or in a branch or a "
                      "loop body that kept it. It cannot be traced.");
  }
  const ValueId id = capture_in(depth, find_in(depth - 1, inner), inner.squeeze(0));
  know_in(frame, inner, id);
  return id;
}

namespace {

// As Tensor::is_alias_of, which reads the storages to see whether another process shares them.
bool share_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.has_storage() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

}  // namespace

ValueId Recording::alias_of_known(const Frame& frame, const at::Tensor& inner) {
  if (!inner.has_storage()) return kNoValue;
  for (const auto& [impl, known] : frame.known) {
    const at::Tensor t(known.tensor.lock());
    if (t.defined() && share_storage(t, inner) && t.sizes() == inner.sizes() &&
        t.strides() == inner.strides() && t.storage_offset() == inner.storage_offset() &&
        t.scalar_type() == inner.scalar_type() && t.is_conj() == inner.is_conj() &&
        t.is_neg() == inner.is_neg()) {
      return known.id;
    }
  }
  return kNoValue;
}

ValueId Recording::constant(const at::Tensor& t) {
  if (replacement_) {
    const at::Tensor own = replaced(t);
    if (const LiftedTensorImpl* impl = as_lifted(own)) return find(impl->value());
  }
  return constant_in(frames_.size() - 1, t);
}

void Recording::know_constant(const at::Tensor& t, const at::Tensor& inner) {
  know_in(root_, inner, constant_in(0, t));
}

ValueId Recording::constant_in(size_t depth, const at::Tensor& t) {
  if (depth > 0) return capture_in(depth, constant_in(depth - 1, t), t);
  const auto [found, added] = constants_.try_emplace(t.unsafeGetTensorImpl(), kNoValue);
  if (added) {
    if (t.has_storage()) {
      constants_in_[t.storage().unsafeGetStorageImpl()].push_back(root_.graph.constants.size());
    }
    found->second = root_.graph.add_constant(t);
  }
  return found->second;
}

void Recording::keep_constants(const c10::StorageImpl* memory) {
  const auto found = constants_in_.find(memory);
  if (found == constants_in_.end()) return;
  const UnrecordedScope unrecorded;
  for (const size_t place : found->second) {
    at::Tensor& constant = root_.graph.constants[place].tensor;
    constants_.erase(constant.unsafeGetTensorImpl());
    constant = own_copy(constant.detach());
  }
  constants_in_.erase(found);
}

ValueId Recording::capture_in(size_t depth, ValueId outer, const at::Tensor& real) {
  Frame& frame = *frames_[depth];
  if (const Frame::Capture* found = frame.find_capture(outer)) return found->id;
  const Value& value = frames_[depth - 1]->graph.value(outer);
  const ValueId id = frame.graph.add_input(value.type, value.name);
  frame.captures.push_back({outer, id, real});
  if (real.has_storage()) frame.outside.insert(real.storage().unsafeGetStorageImpl());
  return id;
}

namespace {

// Written into a frame one after the other: each a view of the one before.
class Views {
 public:
  Views(Graph& graph, ValueId id, std::string source)
      : graph_(graph), id_(id), source_(std::move(source)) {}

  ValueId id() const { return id_; }
  const TensorType& type() const { return graph_.value(id_).type; }

  void add(const std::string& name, const std::string& overload, std::vector<Argument> args,
           TensorType type) {
    Node node{.op = "aten::" + name,
              .overload = overload,
              .args = {ValueRef{id_}},
              .results = {},
              .subgraphs = {},
              .source = source_};
    node.args.insert(node.args.end(), args.begin(), args.end());
    id_ = graph_.add_value(std::move(type), name);
    node.results.push_back({.ids = {id_}});
    graph_.nodes.push_back(std::move(node));
  }

  void add_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   int64_t offset) {
    add("as_strided", "", {c10::IValue(sizes), c10::IValue(strides), c10::IValue(offset)},
        type_with(type().dtype, sizes, strides));
  }

  // The elements of contiguous memory, in a row, as those of another type. By view_as_real and
  // view_as_complex where they will do, as view(dtype) has no derivative.
  void add_elements(at::ScalarType dtype) {
    const at::ScalarType from = type().dtype;
    const int64_t numel = c10::multiply_integers(type().concrete_sizes());
    if (c10::isComplexType(from) && c10::toRealValueType(from) == dtype) {
      add_strided({numel}, {1}, 0);
      add("view_as_real", "", {}, type_with(dtype, {numel, 2}, {2, 1}));
    } else if (c10::isComplexType(dtype) && c10::toRealValueType(dtype) == from) {
      add_strided({numel / 2, 2}, {2, 1}, 0);
      add("view_as_complex", "", {}, type_with(dtype, {numel / 2}, {1}));
    } else {
      const auto count = numel * static_cast<int64_t>(c10::elementSize(from)) /
                         static_cast<int64_t>(c10::elementSize(dtype));
      add_strided({numel}, {1}, 0);
      add("view", "dtype", {c10::IValue(dtype)}, type_with(dtype, {count}, {1}));
    }
  }

 private:
  TensorType type_with(at::ScalarType dtype, const std::vector<int64_t>& sizes,
                       const std::vector<int64_t>& strides) const {
    return {.dtype = dtype,
            .device = type().device,
            .layout = type().layout,
            .sizes = {sizes.begin(), sizes.end()},
            .strides = {strides.begin(), strides.end()}};
  }

  Graph& graph_;
  ValueId id_;
  const std::string source_;
};

}  // namespace

// What promotion makes of the views of a tensor that gets memory of its own (core/promotion.h) are
// views of that memory, whose value is known. As there, the memory is first made what the view
// makes of it lazily: its strides and offset count elements of its own type.
ValueId Recording::view_of_owner(Frame& frame, const at::Tensor& inner) {
  if (!inner.has_storage()) return kNoValue;
  const auto owner = frame.owners.find(inner.storage().unsafeGetStorageImpl());
  if (owner == frame.owners.end() || frame.spread.count(owner->second.id) == 0) return kNoValue;
  const at::Tensor real = inner.squeeze(0);
  Views views(frame.graph, owner->second.id, source());
  if (views.type().dtype != real.scalar_type()) views.add_elements(real.scalar_type());
  if (real.is_conj()) views.add("_conj", "", {}, views.type());
  if (real.is_neg()) views.add("_neg_view", "", {}, views.type());
  views.add_strided(real.sizes().vec(), real.strides().vec(), real.storage_offset());
  know_in(frame, inner, views.id());
  return views.id();
}

void Recording::note_copy_for_view(const char* op, const at::Tensor& base, const at::Tensor& copy) {
  CopyForView noted{.op = op,
                    .source = source(),
                    .memory = innermost(copy).storage().getWeakStorageImpl(),
                    .memory_of_base = innermost(base).storage().getWeakStorageImpl(),
                    .versions = {}};
  for (const at::Tensor& t : {base, copy}) {
    for (at::Tensor part = t;; part = at::Tensor(as_lifted(part)->value())) {
      if (part.is_inference()) {
        unsupported_error(
            transform_, op,
            ": in a graph it copies, as its place is computed from the inputs, and in "
            "inference mode nothing tells whether the tensor is written to later. Use "
            "torch.no_grad(), or index_select.");
      }
      const c10::VariableVersion& counter = part.unsafeGetTensorImpl()->version_counter();
      noted.versions.emplace_back(counter, counter.current_version());
      if (!is_lifted(part)) break;
    }
  }
  copies_.push_back(std::move(noted));
}

bool Recording::CopyForView::written() const {
  return written_silently || std::any_of(versions.begin(), versions.end(), [](const auto& each) {
           return each.first.current_version() != each.second;
         });
}

void Recording::forget_dead_copies() {
  std::erase_if(copies_,
                [](const CopyForView& each) { return each.memory.expired() && !each.written(); });
}

void Recording::note_silent_write(const at::Tensor& t) {
  forget_dead_copies();
  const c10::StorageImpl* written = innermost(t).storage().unsafeGetStorageImpl();
  for (CopyForView& each : copies_) {
    for (const auto& memory : {each.memory, each.memory_of_base}) {
      if (memory.lock().get() == written) each.written_silently = true;
    }
  }
}

void Recording::check_copies() const {
  for (const CopyForView& each : copies_) {
    if (!each.written()) continue;
    unsupported_error(transform_, each.op,
                      ": its place is computed from the inputs, so the graph copies where it would "
                      "give a view; but its argument, or its result, was written to in place "
                      "afterwards, which a view would show. Write out of place, or by index_copy "
                      "and index_add, or into x.clone().",
                      each.source.empty() ? "" : " (" + each.source + ")");
  }
}

}  // namespace torchlift::compile
