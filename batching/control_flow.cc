#include "batching/control_flow.h"

#include <ATen/ops/stack.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "batching/row_set.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/recorder.h"

namespace torchlift::control_flow_internal {
namespace {

using at::Tensor;

void check_pred(const char* transform, const Tensor& pred) {
  if (pred.defined() && pred.dim() == 0 && pred.scalar_type() == at::kBool) return;
  const std::string got = pred.defined() ? c10::str("a tensor of shape ", pred.sizes(),
                                                    " and dtype ", pred.scalar_type())
                                         : std::string("an undefined tensor");
  transform_error(transform, "the condition must be a bool tensor without dims, got ", got,
                  ". Compare (x > 0), and reduce it by .all() or .any(); for a choice element by "
                  "element use torch.where.");
}

// The recording level that a condition has a batch dim of, if there is one.
LevelPtr recording_level(const Tensor& pred) {
  for (const LiftedTensorImpl* impl = as_lifted(pred); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (impl->bdim() && recorder_of(impl->level()) != nullptr) return impl->level_ptr();
  }
  return {};
}

// Levels whose batch dims hold no examples, but parts of one value.
void check_examples(const char* transform, const Tensor& pred) {
  for (const LiftedTensorImpl* impl = as_lifted(pred); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (!impl->bdim() || impl->level().interpreter() == nullptr) continue;
    unsupported_error(impl->level().transform(), "the condition of ", transform,
                      " depends on the inputs, and which branch is taken is not known here. Choose "
                      "by torch.where, which has both.");
  }
}

Leaves moved(const Leaves& leaves, const RowMover& mover) {
  Leaves result;
  for (const Tensor& leaf : leaves) result.push_back(mover({leaf}));
  return result;
}

// Leaves of a set of rows.
struct Piece {
  RowSet set;
  Leaves leaves;
};

// The leaves of all rows, each of which is in one of the pieces.
Leaves merged(const std::deque<Piece>& pieces, const RowSet& all) {
  std::vector<const RowSet*> sets;
  for (const Piece& piece : pieces) sets.push_back(&piece.set);
  const RowMover mover(sets, all);
  Leaves result;
  for (const auto i : c10::irange(pieces.front().leaves.size())) {
    Leaves sources;
    for (const Piece& piece : pieces) sources.push_back(piece.leaves[i]);
    result.push_back(mover(std::move(sources)));
  }
  return result;
}

Piece run_rows(const char* transform, const RowSet& all, const std::vector<bool>& rows,
               const Step& f, const Leaves& operands) {
  RowSet set = all.where(rows);
  const Leaves chosen = moved(operands, RowMover({&all}, set));
  const RowScope scope(set);
  Leaves result = f(chosen);
  scope.check_writes(transform);
  return {std::move(set), std::move(result)};
}

bool subset(const std::vector<LevelPtr>& levels, const std::vector<LevelPtr>& of) {
  return std::all_of(levels.begin(), levels.end(), [&](const LevelPtr& level) {
    return std::find(of.begin(), of.end(), level) != of.end();
  });
}

// A loop whose condition differs from row to row. What has finished is set aside, and the others go
// on by themselves.
class RowLoop {
 public:
  RowLoop(const char* transform, const Test& test, const Step& body, Leaves carry,
          const Tensor& pred)
      : transform_(transform),
        test_(test),
        body_(body),
        all_(levels_of(batched_levels(pred)), pred.device()),
        current_(all_),
        carry_(std::move(carry)),
        pred_(pred) {}

  // Whether it has come to its end; if not, the condition depends on a level that it did not depend
  // on before, and the loop must be begun anew with what is there.
  bool run() {
    while (true) {
      split();
      if (!any_active_) return true;
      carry_ = body_(carry_);
      pred_ = test_(carry_);
      check_pred(transform_, pred_);
      if (scope_.has_value()) scope_->check_writes(transform_);
      if (!subset(batched_levels(pred_), current_.levels())) return false;
    }
  }

  Leaves result() && {
    scope_.reset();
    if (done_.empty()) return std::move(carry_);
    done_.push_back({std::move(current_), std::move(carry_)});
    return merged(done_, all_);
  }

 private:
  // Sets aside the rows that have just finished.
  void split() {
    const std::vector<bool> active = current_.read(pred_);
    std::vector<bool> finished_rows(all_.rows(), false), active_rows(all_.rows(), false);
    bool any_finished = false;
    any_active_ = false;
    for (const auto slot : c10::irange(active.size())) {
      (active[slot] ? active_rows : finished_rows)[current_.slots()[slot]] = true;
      (active[slot] ? any_active_ : any_finished) = true;
    }
    if (!any_active_ || !any_finished) return;
    scope_.reset();
    RowSet finished = all_.where(finished_rows);
    RowSet left = all_.where(active_rows);
    Leaves results = moved(carry_, RowMover({&current_}, finished));
    done_.push_back({std::move(finished), std::move(results)});
    carry_ = moved(carry_, RowMover({&current_}, left));
    current_ = std::move(left);
    scope_.emplace(current_);
  }

  const char* transform_;
  const Test& test_;
  const Step& body_;
  const RowSet all_;
  RowSet current_;
  std::optional<RowScope> scope_;  // of current_, where that is not all of them
  Leaves carry_;
  Tensor pred_;
  bool any_active_ = false;
  std::deque<Piece> done_;
};

// --- scan ----------------------------------------------------------------------------------------

// By unbind, whose derivative puts the slices' together at once.
std::vector<Leaves> scan_slices(const Leaves& xs, int64_t length) {
  std::vector<Leaves> slices(length);
  for (const Tensor& x : xs) {
    if (!x.defined()) {
      for (Leaves& slice : slices) slice.emplace_back();
      continue;
    }
    const Leaves parts = x.unbind(0);
    for (const auto i : c10::irange(length)) slices[i].push_back(parts[i]);
  }
  return slices;
}

Tensor stacked(const Leaves& ys, bool reverse) {
  if (!ys.front().defined()) return {};
  return at::stack(reverse ? Leaves(ys.rbegin(), ys.rend()) : ys);
}

// The innermost level that records and that one of the leaves has a batch dim of.
LevelPtr recording_level(const Leaves& leaves) {
  LevelPtr found;
  for (const Tensor& leaf : leaves) {
    const LevelPtr level = leaf.defined() ? recording_level(leaf) : LevelPtr();
    if (level && (!found || found->depth() < level->depth())) found = level;
  }
  return found;
}

std::optional<Scanned> recorded_scan(const Step& step, const Leaves& carry, const Leaves& xs,
                                     bool reverse) {
  Leaves all = carry;
  all.insert(all.end(), xs.begin(), xs.end());
  const LevelPtr level = recording_level(all);
  if (!level) return std::nullopt;
  auto recorded = recorder_of(*level)->scan(level, step, carry, xs, reverse);
  if (!recorded.has_value()) return std::nullopt;
  return Scanned{std::move(recorded->at(0)), std::move(recorded->at(1))};
}

}  // namespace

Leaves cond_leaves(const char* transform, const Tensor& pred, const Step& true_fn,
                   const Step& false_fn, const Leaves& operands) {
  check_pred(transform, pred);
  if (const LevelPtr level = recording_level(pred)) {
    return recorder_of(*level)->cond(level, pred, true_fn, false_fn, operands);
  }
  check_examples(transform, pred);
  const std::vector<LevelPtr> levels = batched_levels(pred);
  if (levels.empty()) return read_shared(pred) ? true_fn(operands) : false_fn(operands);
  const RowSet all(levels_of(levels), pred.device());
  const std::vector<bool> rows = all.read(pred);
  std::vector<bool> others = rows;
  others.flip();
  // Without any examples, too, a result of the right shape is wanted.
  if (std::find(rows.begin(), rows.end(), false) == rows.end()) return true_fn(operands);
  if (std::find(rows.begin(), rows.end(), true) == rows.end()) return false_fn(operands);
  std::deque<Piece> pieces;
  pieces.push_back(run_rows(transform, all, rows, true_fn, operands));
  pieces.push_back(run_rows(transform, all, others, false_fn, operands));
  return merged(pieces, all);
}

Leaves while_leaves(const char* transform, const Test& test, const Step& body, Leaves carry) {
  while (true) {
    const Tensor pred = test(carry);
    check_pred(transform, pred);
    if (const LevelPtr level = recording_level(pred)) {
      const Test checked = [&](const Leaves& leaves) {
        Tensor found = test(leaves);
        check_pred(transform, found);
        return found;
      };
      return recorder_of(*level)->while_loop(level, transform, checked, body, std::move(carry));
    }
    check_examples(transform, pred);
    if (batched_levels(pred).empty()) {
      if (!read_shared(pred)) return carry;
      carry = body(carry);
      continue;
    }
    RowLoop loop(transform, test, body, std::move(carry), pred);
    const bool finished = loop.run();
    carry = std::move(loop).result();
    if (finished) return carry;
  }
}

int64_t scan_length(const Leaves& xs, const std::vector<std::string>& names,
                    std::optional<int64_t> length) {
  if (length.has_value() && *length < 0) {
    transform_error("scan", "length is ", *length, ", but it is the number of steps.");
  }
  bool differ = false;
  std::optional<int64_t> found = length;
  std::string report = length.has_value() ? c10::str("\n  length: ", *length) : std::string();
  for (const auto i : c10::irange(xs.size())) {
    if (!xs[i].defined()) continue;
    const std::string name = "xs" + names[i];
    if (xs[i].dim() == 0) {
      transform_error("scan", name,
                      " has no dims, but scan goes along dim 0 of every tensor in "
                      "xs. Let the function close over what all steps share.");
    }
    if (!found.has_value()) found = xs[i].size(0);
    differ = differ || *found != xs[i].size(0);
    report += c10::str("\n  ", name, ": size ", xs[i].size(0), " (shape ", xs[i].sizes(), ")");
  }
  if (differ) {
    transform_error("scan",
                    "the tensors in xs must all have the same size along dim 0, which is "
                    "the number of steps (and length, if given), but got:",
                    report);
  }
  if (!found.has_value()) {
    transform_error("scan",
                    "xs has no tensors, so that the number of steps is not known. Give "
                    "length.");
  }
  return *found;
}

Scanned scan_leaves(const Step& step, Leaves carry, const Leaves& xs, int64_t length,
                    bool reverse) {
  if (auto recorded = recorded_scan(step, carry, xs, reverse)) return *std::move(recorded);
  const std::vector<Leaves> slices = scan_slices(xs, length);
  const auto count = static_cast<int64_t>(carry.size());
  std::vector<Leaves> ys;
  for (const auto at : c10::irange(length)) {
    Leaves leaves = std::move(carry);
    const Leaves& slice = slices[reverse ? length - 1 - at : at];
    leaves.insert(leaves.end(), slice.begin(), slice.end());
    const Leaves next = step(leaves);
    carry.assign(next.begin(), next.begin() + count);
    ys.resize(next.size() - carry.size());
    for (const auto leaf : c10::irange(ys.size())) ys[leaf].push_back(next[carry.size() + leaf]);
  }
  Leaves results;
  for (const Leaves& steps : ys) results.push_back(stacked(steps, reverse));
  return {std::move(carry), std::move(results)};
}

Leaves empty_slice(const Leaves& xs) {
  Leaves slice;
  for (const Tensor& x : xs) {
    slice.push_back(x.defined() ? x.new_zeros(x.sizes().slice(1)) : Tensor());
  }
  return slice;
}

Tensor stacked_none(const Tensor& like) {
  return like.defined() ? like.detach().unsqueeze(0).narrow(0, 0, 0) : Tensor();
}

void check_bound(const char* name, const Tensor& bound) {
  if (bound.defined() && bound.dim() == 0 &&
      at::isIntegralType(bound.scalar_type(), /*includeBool=*/false)) {
    return;
  }
  transform_error("fori_loop", name, " must be an integer, or an integer tensor without dims, got ",
                  bound.defined() ? c10::str("a tensor of shape ", bound.sizes(), " and dtype ",
                                             bound.scalar_type())
                                  : std::string("an undefined tensor"),
                  ".");
}

void throw_structure(const char* transform, const char* what, const std::string& mismatch) {
  transform_error(transform, what, " another structure: ", mismatch,
                  ". It must stay the same, with the same shapes and dtypes.");
}

void check_leaf(const char* transform, const char* what, const Path& path, const Tensor& expected,
                const Tensor& got) {
  const std::string at = path.str().empty() ? std::string() : " (at " + path.str() + ")";
  if (expected.defined() != got.defined()) {
    transform_error(transform, what, got.defined() ? " a tensor" : " an undefined tensor", at,
                    " where the other is ", expected.defined() ? "one" : "undefined", ".");
  }
  if (!expected.defined() ||
      (expected.sizes() == got.sizes() && expected.scalar_type() == got.scalar_type() &&
       expected.device() == got.device())) {
    return;
  }
  transform_error(transform, what, " a tensor of shape ", got.sizes(), ", dtype ",
                  got.scalar_type(), " on ", got.device(), at, ", but expected was shape ",
                  expected.sizes(), ", dtype ", expected.scalar_type(), " on ", expected.device(),
                  ". Shapes and dtypes must stay the same: expand or convert (.to()) one of the "
                  "two.");
}

void throw_constant(const char* transform, const char* what, const Path& path) {
  transform_error(transform, what, " another value that is no tensor, at ", path.str(),
                  ". Only tensors can change: make it one.");
}

}  // namespace torchlift::control_flow_internal
