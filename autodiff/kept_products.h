#ifndef TORCHLIFT_AUTODIFF_KEPT_PRODUCTS_H_
#define TORCHLIFT_AUTODIFF_KEPT_PRODUCTS_H_

// File: autodiff/kept_products.h
//
// The results of matrix products and convolutions that a checkpoint keeps, so that they need not be
// computed again. Not for users: CheckpointPolicy says which (autodiff/checkpoint.h).
//
// NOTE [kept products]
// The products are met below autograd and below every level, where the tensors are plain: the first
// run of a function writes down its products there, one after the other, and when it runs again the
// i-th product finds the i-th result. That is the same for a product under vmap, in a tangent, or
// in a gradient inside of the function.

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace torchlift {

class KeptProducts {
 public:
  enum class Which : uint8_t { kNone, kAll, kNamed };

  KeptProducts(Which which, std::set<std::string> names);

  // While it lives, products on this thread are written down (first), or found (not).
  class Scope {
   public:
    Scope(KeptProducts* products, bool first);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    friend class KeptProducts;
    KeptProducts* products_;
    bool first_;
    size_t next_ = 0;
    Scope* outer_;
  };

  // The product that is asked for now, from `compute` if it was not kept.
  static at::Tensor product(const char* op, c10::function_ref<at::Tensor()> compute);
  // Marks the value: if it is the result of a product, and the name one of those to keep, it is.
  static void name(const at::Tensor& value, const std::string& name);

 private:
  struct Entry {
    const char* op;
    at::Tensor result;  // undefined if it is not kept
    uint32_t version;
    bool named;
  };

  at::Tensor first(const char* op, c10::function_ref<at::Tensor()> compute);
  at::Tensor again(Entry& entry, const char* op, c10::function_ref<at::Tensor()> compute);

  const Which which_;
  const std::set<std::string> names_;
  std::vector<Entry> entries_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_KEPT_PRODUCTS_H_
