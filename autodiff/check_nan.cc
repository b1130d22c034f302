#include "autodiff/check_nan.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "autodiff/nan_search.h"
#include "core/open_transforms.h"

// NOTE [watching operators]
// libtorch's dispatcher calls RecordFunction callbacks around each operator that is called (not
// those that a kernel redispatches), and around each node of a backward pass. Ours are local to the
// thread; libtorch hands them on to the threads of its engine. A callback is a plain function, so
// it finds the session it works for by the handle of the entry, which is handed on, too.
//
// - An operator on a LiftedTensor calls operators on its value, a composite one those it is made
//   of. The outermost one is what the user knows, and its result has all levels in it. So the
//   others are only counted.
// - Arguments may not be kept (promotion counts references, core/promotion.h), and are read only
//   where a result has NaNs: they are held weakly. An operator that writes into an argument has
//   them looked at before.
// - In a node of a backward pass, operators are those of libtorch's formulas, and some make NaNs
//   only to replace them. What a formula leaves behind when it has ended is its result; so there a
//   finding waits, until the node has ended, for a tensor with NaNs that is still alive.
// - An error of a callback is caught and logged by libtorch, so that a finding is kept.

namespace torchlift::check_nan_internal {
namespace {

using at::Tensor;
using nan_search::Part;
using nan_search::Place;
using nan_search::Rows;
using nan_search::Wanted;
using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

// While it lives, operators work on plain values, unseen by anybody: no autograd, no modes.
class Aside {
 public:
  Aside()
      : guard_(c10::DispatchKeySet(c10::DispatchKey::BackendSelect),
               c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset) {
  }

 private:
  c10::impl::ForceDispatchKeyGuard guard_;
};

// --- operators -----------------------------------------------------------------------------------

// What an operator leaves uninitialized, or makes of other memory than its arguments'.
bool reads_memory(std::string_view name) {
  static constexpr std::array<std::string_view, 12> kNames = {
      "aten::empty",     "aten::empty_like",        "aten::empty_strided",  "aten::empty_permuted",
      "aten::new_empty", "aten::new_empty_strided", "aten::resize_",        "aten::resize_as_",
      "aten::resize",    "aten::_resize_output_",   "aten::_resize_output", "aten::set_"};
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

// Shows what an argument holds, and has no numbers of its own.
bool is_view(const c10::FunctionSchema& schema) {
  if (schema.name() == "aten::to") return false;  // may convert
  return std::any_of(schema.returns().begin(), schema.returns().end(), [](const auto& result) {
    return result.alias_info() != nullptr && !result.alias_info()->isWrite();
  });
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// The tensors of an argument or a result.
template <class Visit>
void each_tensor(const c10::IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& element : value.toListRef()) each_tensor(element, visit);
  }
}

// Whether a number is NaN, or one of a list.
bool is_hit(const c10::IValue& value, Wanted wanted) {
  const auto hit = [&](double number) {
    return std::isnan(number) || (wanted.inf && std::isinf(number));
  };
  if (value.isDouble()) return hit(value.toDouble());
  if (value.isComplexDouble()) {
    const auto number = value.toComplexDouble();
    return hit(number.real()) || hit(number.imag());
  }
  if (value.isDoubleList()) {
    const auto list = value.toDoubleVector();
    return std::any_of(list.begin(), list.end(), hit);
  }
  return false;
}

// The examples in which t has NaNs, part by part.
void add_rows(const Tensor& t, Wanted wanted, std::vector<Rows>& found) {
  for (const Part& part : nan_search::parts_of(t)) {
    const Aside aside;
    if (nan_search::may_contain(part)) found.push_back(nan_search::rows_of(part, wanted));
  }
}

// The arguments of an operator at work.
class Arguments {
 public:
  Arguments(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> all, Wanted wanted)
      : wanted_(wanted) {
    const std::vector<c10::Argument>& declared = schema.arguments();
    const auto values = all.slice(all.size() - std::min(all.size(), declared.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      // What out= had before does not matter.
      const bool out = declared[i].kwarg_only() && is_written(declared[i]);
      if (!out) add(values[i]);
      written_ = written_ || is_written(declared[i]);
    }
    if (written_) rows_ = look();
  }

  // Where they have, or had, NaNs.
  std::vector<Rows> rows() const { return written_ ? rows_ : look(); }

  std::string describe() const {
    std::string text;
    for (const WeakTensor& weak : tensors_) {
      const Tensor t = alive(weak);
      if (t.defined()) text += c10::str(text.empty() ? "" : ", ", t.scalar_type(), " ", t.sizes());
    }
    return text.empty() ? "no tensors" : text;
  }

  static Tensor alive(const WeakTensor& weak) {
    auto strong = weak.lock();
    return strong.defined() ? Tensor(std::move(strong)) : Tensor();
  }

 private:
  void add(const c10::IValue& value) {
    each_tensor(value, [&](const Tensor& t) { tensors_.emplace_back(t.getIntrusivePtr()); });
    constant_ = constant_ || is_hit(value, wanted_);
  }

  std::vector<Rows> look() const {
    std::vector<Rows> found;
    if (constant_) {
      const Aside aside;
      found.push_back(nan_search::everywhere());
    }
    for (const WeakTensor& weak : tensors_) {
      const Tensor t = alive(weak);
      if (t.defined()) add_rows(t, wanted_, found);
    }
    return found;
  }

  const Wanted wanted_;
  std::vector<WeakTensor> tensors_;
  std::vector<Rows> rows_;
  bool constant_ = false;  // a number that is NaN
  bool written_ = false;   // whether the operator writes into one
};

// --- where the code is ---------------------------------------------------------------------------

// Which line made which nodes of the graph, by their sequence numbers on one thread.
class SourceLines {
 public:
  void add(uint64_t first, uint64_t end, std::string line) {
    if (line.empty()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_back({first, end, &*lines_.insert(std::move(line)).first});
  }

  std::string find(uint64_t number) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto after = std::upper_bound(entries_.begin(), entries_.end(), number,
                                  [](uint64_t n, const Entry& entry) { return n < entry.first; });
    if (after == entries_.begin()) return {};
    const Entry& entry = *--after;
    return number < entry.end ? *entry.line : std::string();
  }

 private:
  struct Entry {
    uint64_t first, end;
    const std::string* line;
  };
  mutable std::mutex mutex_;
  std::unordered_set<std::string> lines_;
  std::vector<Entry> entries_;
};

// A node of a backward pass at work.
struct NodeAtWork {
  std::string name;
  uint64_t number = 0;
  uint64_t thread = 0;                 // that made it
  std::optional<std::string> finding;  // of its first operator that made a NaN
  std::vector<WeakTensor> hits;        // results since then that have NaNs
};

}  // namespace

// --- the session ---------------------------------------------------------------------------------

class Session {
 public:
  Session(CheckNanOptions options, std::function<std::string()> source,
          std::shared_ptr<SourceLines> lines)
      : wanted_{options.inf},
        thread_(at::RecordFunction::currentThreadId()),
        source_(std::move(source)),
        lines_(std::move(lines)) {}

  Wanted wanted() const { return wanted_; }
  bool done() const { return done_.load(std::memory_order_relaxed); }
  const std::shared_ptr<SourceLines>& lines() const { return lines_; }

  void keep(std::string finding) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!finding_.has_value()) finding_ = std::move(finding);
    done_ = true;
  }

  std::optional<std::string> finding() {
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    return std::exchange(finding_, std::nullopt);
  }

  // The line that the code at work belongs to.
  std::string line(const NodeAtWork* node) const {
    if (!source_) return {};
    if (node == nullptr) return source_();
    return node->thread == thread_ ? lines_->find(node->number) : std::string();
  }

  // After an operator that was called when the next node's number was `first`.
  void note_nodes(uint64_t first, const NodeAtWork* node) {
    if (!source_ || at::RecordFunction::currentThreadId() != thread_) return;
    const uint64_t end = at::sequence_number::peek();
    if (end > first) lines_->add(first, end, line(node));
  }

 private:
  const Wanted wanted_;
  const uint64_t thread_;
  const std::function<std::string()> source_;
  const std::shared_ptr<SourceLines> lines_;
  std::atomic<bool> done_{false};
  std::mutex mutex_;
  std::optional<std::string> finding_;
};

namespace {

// --- the callbacks -------------------------------------------------------------------------------

// What this thread does for a session.
struct Worker {
  at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
  std::weak_ptr<Session> session;
  int64_t depth = 0;  // of the operator at work, in others
  std::vector<NodeAtWork*> nodes;

  NodeAtWork* node() const { return nodes.empty() ? nullptr : nodes.back(); }
};

Worker& this_worker() {
  static thread_local Worker worker;
  return worker;
}

// The sessions that are open, by their callbacks.
class Sessions {
 public:
  void add(at::CallbackHandle handle, std::shared_ptr<Session> session) {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_.emplace(handle, std::move(session));
  }
  void remove(at::CallbackHandle handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_.erase(handle);
  }
  std::shared_ptr<Session> find(at::CallbackHandle handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = open_.find(handle);
    return found == open_.end() ? nullptr : found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<at::CallbackHandle, std::shared_ptr<Session>> open_;
};

Sessions& sessions() {
  static auto* all = new Sessions();
  return *all;
}

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& record);

// Our callback of this thread that is enabled.
at::CallbackHandle current_handle() {
  for (const at::RecordFunctionCallbacksEntry& entry :
       at::get_record_function_tls_().sorted_tls_callbacks_) {
    if (entry.enabled_ && entry.callback_.start() == &on_start) return entry.handle_;
  }
  return at::INVALID_CALLBACK_HANDLE;
}

struct Context : at::ObserverContext {
  virtual void end(const at::RecordFunction& record) = 0;
};

// The count of operators at work goes back to what it was.
class Nested : public Context {
 public:
  explicit Nested(Worker& worker) : worker_(worker), depth_(worker.depth) {}
  void end(const at::RecordFunction& /*record*/) override { worker_.depth = depth_; }

 protected:
  Worker& worker_;

 private:
  const int64_t depth_;
};

class NodeContext final : public Nested {
 public:
  NodeContext(Worker& worker, std::shared_ptr<Session> session, const at::RecordFunction& record)
      : Nested(worker), session_(std::move(session)) {
    node_.name = record.name();
    node_.number = static_cast<uint64_t>(record.seqNr());
    node_.thread = record.forwardThreadId();
    worker.depth = 0;
    worker.nodes.push_back(&node_);
  }

  void end(const at::RecordFunction& record) override {
    Nested::end(record);
    worker_.nodes.pop_back();
    if (!node_.finding.has_value() || session_->done()) return;
    const at::DisableRecordFunctionGuard unseen;
    const bool left = std::any_of(node_.hits.begin(), node_.hits.end(), [&](const auto& weak) {
      const Tensor t = Arguments::alive(weak);
      std::vector<Rows> rows;
      if (t.defined()) add_rows(t, session_->wanted(), rows);
      const Aside aside;
      return std::any_of(rows.begin(), rows.end(), nan_search::any);
    });
    if (left) session_->keep(*std::move(node_.finding));
  }

 private:
  const std::shared_ptr<Session> session_;
  NodeAtWork node_;
};

// The text of a finding.
std::string describe(const c10::OperatorName& op, const Arguments& arguments, const Tensor& result,
                     const Part& part, const Rows& fresh, const Session& session,
                     const NodeAtWork* node) {
  const Wanted wanted = session.wanted();
  const Place place = nan_search::first_place(part, fresh, wanted);
  const char* what = wanted.inf ? "NaN or infinity" : "NaN";
  std::string text = c10::str(op.name, part.tangent ? " (its derivative in forward mode)" : "",
                              " returned ", what, ", and no argument of it has any.");
  text += c10::str("\n  arguments: ", arguments.describe());
  text += c10::str("\n  result: ", result.scalar_type(), " ", result.sizes(), ", ", place.hits,
                   " of ", place.elements, place.elements == 1 ? " element" : " elements",
                   ", the first at [", c10::Join(", ", place.index), "]");
  const std::string rows = nan_search::describe_rows(fresh, place);
  if (!rows.empty()) text += c10::str("\n  where: ", rows);
  const std::string transforms = describe_open_transforms();
  text += c10::str("\n  transforms: ", transforms.empty() ? "none" : transforms);
  text += node == nullptr ? "\n  pass: forward"
                          : c10::str("\n  pass: backward, in the formula of ", node->name);
  const std::string line = session.line(node);
  if (!line.empty()) text += c10::str("\n  source: ", line);
  return text;
}

class OperatorContext final : public Nested {
 public:
  OperatorContext(Worker& worker, std::shared_ptr<Session> session,
                  const c10::FunctionSchema& schema, const at::RecordFunction& record)
      : Nested(worker),
        session_(std::move(session)),
        schema_(schema),
        arguments_(schema, record.inputs(), session_->wanted()),
        first_node_(at::sequence_number::peek()) {
    worker.depth = 1;
  }

  void end(const at::RecordFunction& record) override {
    Nested::end(record);
    if (session_->done()) return;
    const at::DisableRecordFunctionGuard unseen;
    session_->note_nodes(first_node_, worker_.node());
    const auto outputs = c10::ArrayRef<c10::IValue>(record.outputs());
    const size_t count = std::min(outputs.size(), schema_.returns().size());
    for (const c10::IValue& output : outputs.slice(outputs.size() - count)) {
      each_tensor(output, [&](const Tensor& t) { look_at(t); });
    }
  }

 private:
  void look_at(const Tensor& result) {
    for (const Part& part : nan_search::parts_of(result)) {
      if (session_->done()) return;
      {
        const Aside aside;
        if (!nan_search::may_contain(part)) continue;
      }
      look_closer(result, part);
    }
  }

  void look_closer(const Tensor& result, const Part& part) {
    NodeAtWork* node = worker_.node();
    const std::vector<Rows> before = arguments_.rows();
    const Aside aside;
    const Rows rows = nan_search::rows_of(part, session_->wanted());
    if (!nan_search::any(rows)) return;
    if (node != nullptr) node->hits.emplace_back(result.getIntrusivePtr());
    if (node != nullptr && node->finding.has_value()) return;
    const Rows fresh = nan_search::without(rows, before);
    if (!nan_search::any(fresh)) return;
    std::string text =
        describe(schema_.operator_name(), arguments_, result, part, fresh, *session_, node);
    if (node != nullptr) {
      node->finding = std::move(text);
    } else {
      session_->keep(std::move(text));
    }
  }

  const std::shared_ptr<Session> session_;
  const c10::FunctionSchema& schema_;
  const Arguments arguments_;
  const uint64_t first_node_;
};

std::unique_ptr<at::ObserverContext> start_operator(Worker& worker,
                                                    std::shared_ptr<Session> session,
                                                    const at::RecordFunction& record) {
  const at::DisableRecordFunctionGuard unseen;
  const auto name = record.operator_name();
  if (!name.has_value()) return nullptr;  // a name for a piece of code: an autograd Function
  const auto op = c10::Dispatcher::singleton().findOp(*name);
  if (!op.has_value()) return nullptr;
  if (reads_memory(name->name) || is_view(op->schema())) {
    auto context = std::make_unique<Nested>(worker);
    worker.depth = 1;
    return context;
  }
  return std::make_unique<OperatorContext>(worker, std::move(session), op->schema(), record);
}

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& record) {
  Worker& worker = this_worker();
  const at::CallbackHandle handle = current_handle();
  if (worker.handle != handle) worker = {handle, sessions().find(handle), 0, {}};
  std::shared_ptr<Session> session = worker.session.lock();
  if (session == nullptr || session->done()) return nullptr;
  if (record.scope() == at::RecordScope::BACKWARD_FUNCTION) {
    return std::make_unique<NodeContext>(worker, std::move(session), record);
  }
  if (worker.depth == 0) return start_operator(worker, std::move(session), record);
  auto context = std::make_unique<Nested>(worker);
  ++worker.depth;
  return context;
}

void on_end(const at::RecordFunction& record, at::ObserverContext* context) {
  if (context != nullptr) static_cast<Context*>(context)->end(record);
}

}  // namespace

// --- the watch -----------------------------------------------------------------------------------

// The watch around this one, which pauses.
struct Watch::Outer {
  at::CallbackHandle own = at::INVALID_CALLBACK_HANDLE;
  at::CallbackHandle around = at::INVALID_CALLBACK_HANDLE;
  Worker worker;  // as it was
};

Watch::Watch(CheckNanOptions options, std::function<std::string()> source)
    : outer_(std::make_unique<Outer>()) {
  outer_->around = current_handle();
  const std::shared_ptr<Session> around = sessions().find(outer_->around);
  if (around != nullptr) options.inf = options.inf || around->wanted().inf;
  session_ = std::make_shared<Session>(options, std::move(source),
                                       around ? around->lines() : std::make_shared<SourceLines>());
  if (around != nullptr) at::disableCallback(outer_->around);
  outer_->own = at::addThreadLocalCallback(
      at::RecordFunctionCallback(&on_start, &on_end)
          .needsInputs(true)
          .needsOutputs(true)
          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
  sessions().add(outer_->own, session_);
  outer_->worker = std::exchange(this_worker(), {outer_->own, session_, 0, {}});
}

Watch::~Watch() { close(); }

std::optional<std::string> Watch::close() {
  if (outer_ == nullptr) return std::nullopt;
  at::removeCallback(outer_->own);
  sessions().remove(outer_->own);
  if (outer_->around != at::INVALID_CALLBACK_HANDLE) at::reenableCallback(outer_->around);
  this_worker() = std::move(outer_->worker);
  outer_.reset();
  return session_->finding();
}

void report(const std::optional<std::string>& found, const char* error) {
  if (!found.has_value()) return;
  std::string text = c10::str("[check_nan] ", *found);
  if (error != nullptr) text += c10::str("\n  then the function threw: ", error);
  throw NanFound(text, /*backtrace=*/nullptr);
}

}  // namespace torchlift::check_nan_internal
