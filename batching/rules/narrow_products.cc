#include "batching/rules/narrow_products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include <utility>

#include "batching/rules/narrow_kernel.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

// Where NOTE [narrow results] was measured to hold.
bool has_slow_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool slow = at::hasMKL() && __builtin_cpu_is("intel") == 0;
  return slow;
#else
  return false;
#endif
}

// A vector of AVX-512.
constexpr int64_t kVectorBytes = 64;
// From how many rows, terms of a sum and multiplications on the copy is worth its while. Measured.
constexpr int64_t kManyRows = 16;
constexpr int64_t kManyTerms = 32;
constexpr int64_t kMuchWork = int64_t{1} << 17;
// From how many elements of a matrix of a batch on that is so of its product with a column.
constexpr int64_t kLargeForColumn = 512;

// Operators on values of another vmap come to the rules of its level, with the sizes that count. A
// graph has the product as it is: one that serves all sizes cannot depend on them, and who runs it
// decides then (compile/replay.cc).
bool is_decided_here(const at::Tensor& t) { return as_lifted(t) == nullptr; }

bool is_batch(const at::Tensor& a) { return a.dim() == 3; }

bool is_turned(const at::Tensor& a, const at::Tensor& b) {
  if (!has_slow_kernels()) return false;
  const at::ScalarType dtype = a.scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return false;
  const int64_t rows = a.size(-2), terms = a.size(-1), columns = b.size(-1);
  if (columns == 0 || columns * static_cast<int64_t>(a.element_size()) >= kVectorBytes)
    return false;
  if (columns == 1) {  // at::mm has a kernel for this
    if (!is_batch(a) || a.size(0) < 2 || rows * terms < kLargeForColumn) return false;
  } else if (rows < kManyRows || terms < kManyTerms || a.numel() * columns < kMuchWork) {
    return false;
  }
  return a.device().is_cpu() && a.layout() == c10::kStrided && b.layout() == c10::kStrided &&
         b.scalar_type() == dtype && is_decided_here(a) && is_decided_here(b);
}

// A product of transposes, whose rows are not narrow, in the layout that at::mm returns.
at::Tensor in_order(const at::Tensor& turned) { return turned.mT().contiguous(); }

}  // namespace

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  if (is_turned(a, b)) {
    if (auto result = narrow_product(a, b)) return *std::move(result);
    return in_order(product(b.mT(), a.mT()));
  }
  return is_batch(a) ? at::bmm(a, b) : at::mm(a, b);
}

at::Tensor product_added_to(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                            const at::Scalar& beta, const at::Scalar& alpha) {
  if (self.dim() > 0 && is_turned(a, b)) {
    if (beta.equal(1) && alpha.equal(1)) {
      if (auto result = narrow_product(a, b, self)) return *std::move(result);
    }
    const at::Tensor turned_self = self.dim() == 1 ? self.unsqueeze(1) : self.mT();
    return in_order(product_added_to(turned_self, b.mT(), a.mT(), beta, alpha));
  }
  return is_batch(a) ? at::baddbmm(self, a, b, beta, alpha) : at::addmm(self, a, b, beta, alpha);
}

}  // namespace torchlift
