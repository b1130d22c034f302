#ifndef TORCHLIFT_CORE_TREE_FIELDS_H_
#define TORCHLIFT_CORE_TREE_FIELDS_H_

// File: core/tree/fields.h
//
// TORCHLIFT_PYTREE(Type, fields...): makes a struct a tree (core/tree.h).
//
//   namespace app {
//   struct Params { at::Tensor w, b; };
//   TORCHLIFT_PYTREE(Params, w, b);
//
//   template <class T>
//   struct Layer { T weight; int stride; };
//   template <class T> TORCHLIFT_PYTREE(Layer<T>, weight, stride);
//   }  // namespace app
//
// It belongs right after the struct, in the same namespace: transforms find the function it defines
// by argument-dependent lookup. Up to 340 fields; fields that are left out are copied along, never
// transformed. A class derived from Type is not a tree by that alone.

#include <tuple>
#include <type_traits>

namespace torchlift::tree_internal {

template <class Pointer>
struct Field {
  const char* name;
  Pointer pointer;
};

template <class Pointer>
constexpr Field<Pointer> field(const char* name, Pointer pointer) {
  return {name, pointer};
}

// A tag rather than a pointer, because a pointer to a derived class would convert.
template <class T>
concept HasFields = requires {
  torchlift_pytree_fields(std::type_identity<T>());
};

template <class T>
constexpr auto fields_of() {
  return torchlift_pytree_fields(std::type_identity<T>());
}

}  // namespace torchlift::tree_internal

// The static_assert lets a semicolon follow.
#define TORCHLIFT_PYTREE(Type, ...)                                                            \
  [[maybe_unused]] constexpr inline auto torchlift_pytree_fields(::std::type_identity<Type>) { \
    return ::std::make_tuple(                                                                  \
        TORCHLIFT_INTERNAL_EXPAND(TORCHLIFT_INTERNAL_FIELDS(Type, __VA_ARGS__)));              \
  }                                                                                            \
  static_assert(true)

// A macro cannot name itself, but the name can be put together again by a later scan of the
// expansion; every EXPAND adds scans.
#define TORCHLIFT_INTERNAL_PARENS ()
#define TORCHLIFT_INTERNAL_FIELDS(Type, name, ...)      \
  ::torchlift::tree_internal::field(#name, &Type::name) \
      __VA_OPT__(, TORCHLIFT_INTERNAL_MORE TORCHLIFT_INTERNAL_PARENS(Type, __VA_ARGS__))
#define TORCHLIFT_INTERNAL_MORE() TORCHLIFT_INTERNAL_FIELDS
#define TORCHLIFT_INTERNAL_EXPAND(...)                   \
  TORCHLIFT_INTERNAL_EXPAND4(TORCHLIFT_INTERNAL_EXPAND4( \
      TORCHLIFT_INTERNAL_EXPAND4(TORCHLIFT_INTERNAL_EXPAND4(__VA_ARGS__))))
#define TORCHLIFT_INTERNAL_EXPAND4(...)                  \
  TORCHLIFT_INTERNAL_EXPAND3(TORCHLIFT_INTERNAL_EXPAND3( \
      TORCHLIFT_INTERNAL_EXPAND3(TORCHLIFT_INTERNAL_EXPAND3(__VA_ARGS__))))
#define TORCHLIFT_INTERNAL_EXPAND3(...)                  \
  TORCHLIFT_INTERNAL_EXPAND2(TORCHLIFT_INTERNAL_EXPAND2( \
      TORCHLIFT_INTERNAL_EXPAND2(TORCHLIFT_INTERNAL_EXPAND2(__VA_ARGS__))))
#define TORCHLIFT_INTERNAL_EXPAND2(...)                  \
  TORCHLIFT_INTERNAL_EXPAND1(TORCHLIFT_INTERNAL_EXPAND1( \
      TORCHLIFT_INTERNAL_EXPAND1(TORCHLIFT_INTERNAL_EXPAND1(__VA_ARGS__))))
#define TORCHLIFT_INTERNAL_EXPAND1(...) __VA_ARGS__

#endif  // TORCHLIFT_CORE_TREE_FIELDS_H_
