#include "batching/vmap.h"

#include <ATen/ops/_nested_tensor_from_tensor_list.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/nested_to_padded_tensor.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/quantize_per_tensor.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>
#include <map>
#include <stdexcept>
#include <thread>

#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Params {
  at::Tensor w, b;
  double scale = 2.0;
};
TORCHLIFT_PYTREE(Params, w, b, scale);

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// What vmap is measured against: a loop over the examples, and a stack.
template <class F>
at::Tensor loop(const F& f, int64_t size) {
  std::vector<at::Tensor> results;
  for (int64_t i = 0; i < size; ++i) results.push_back(f(i));
  return at::stack(results);
}

at::Tensor affine(const Params& p, const at::Tensor& x) { return (p.w * x).sum() * p.scale + p.b; }
at::Tensor product(const at::Tensor& x, const at::Tensor& y) { return (x * y).sin(); }

class VmapTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(current_level(), nullptr); }
};

TEST_F(VmapTest, MatchesTheLoop) {
  const at::Tensor x = randn({7, 5}), y = randn({7, 5});
  EXPECT_CLOSE(vmap(product)(x, y), loop([&](int64_t i) { return product(x[i], y[i]); }, 7));
}

TEST_F(VmapTest, InDims) {
  const at::Tensor x = randn({5, 7}), y = randn({5}), z = randn({3, 7, 5});
  const auto f = [](const at::Tensor& a, const at::Tensor& b) { return a * b; };
  EXPECT_CLOSE(vmap(f, {.in_dims = in(1, kNone)})(x, y),
               loop([&](int64_t i) { return f(x.select(1, i), y); }, 7));
  EXPECT_CLOSE(vmap(f, {.in_dims = in(kNone, -2)})(y, z),
               loop([&](int64_t i) { return f(y, z.select(1, i)); }, 7));
  EXPECT_CLOSE(vmap(f, {.in_dims = -1})(x, z.transpose(1, 2)),
               loop([&](int64_t i) { return f(x.select(1, i), z.select(1, i)); }, 7));
}

TEST_F(VmapTest, StructsAndNumbersAreCarriedAlong) {
  const Params shared{randn({5}), randn({})};
  const Params batched{randn({5, 7}), randn({7})};
  const at::Tensor x = randn({7, 5});
  EXPECT_CLOSE(vmap(affine, {.in_dims = in(kNone, 0)})(shared, x),
               loop([&](int64_t i) { return affine(shared, x[i]); }, 7));
  const at::Tensor expected = loop(
      [&](int64_t i) {
        return affine({batched.w.select(1, i), batched.b[i]}, x[i]);
      },
      7);
  const Dims by_name = named({{"w", 1}, {"b", 0}, {"scale", kNone}});
  EXPECT_CLOSE(vmap(affine, {.in_dims = in(by_name, 0)})(batched, x), expected);
  EXPECT_CLOSE(vmap(affine, {.in_dims = in(in(1, 0, kNone), 0)})(batched, x), expected);
  // By default too, numbers are no obstacle.
  EXPECT_CLOSE(vmap([](const at::Tensor& a, double b) { return a * b; })(x, 3.0), x * 3.0);
  EXPECT_CLOSE(vmap([](const at::Tensor& a, const std::optional<at::Tensor>& b) {
                 return b ? a * *b : a;
               })(x, std::optional<at::Tensor>()),
               x);
  EXPECT_CLOSE(vmap([](const at::Tensor& a, const at::Tensor& b) {
                 return b.defined() ? a * b : a;
               })(x, at::Tensor()),
               x);
}

TEST_F(VmapTest, OutDims) {
  const at::Tensor x = randn({7, 2, 3});
  const auto f = [](const at::Tensor& a) { return a.sin(); };
  for (int64_t dim = -3; dim < 3; ++dim) {
    EXPECT_CLOSE(vmap(f, {.out_dims = dim})(x), x.sin().movedim(0, dim));
  }
  const auto many = [](const at::Tensor& a) {
    return std::pair(a.sin(), std::map<std::string, at::Tensor>{{"p", a * 2}, {"q", a.sum()}});
  };
  const auto [s, rest] = vmap(many, {.out_dims = out(1, named({{"p", -1}, {"q", 0}}))})(x);
  EXPECT_CLOSE(s, x.sin().movedim(0, 1));
  EXPECT_CLOSE(rest.at("p"), (x * 2).movedim(0, -1));
  EXPECT_CLOSE(rest.at("q"), x.sum({1, 2}));
}

TEST_F(VmapTest, OutputsThatDoNotDependOnTheExample) {
  const at::Tensor x = randn({7, 2}), c = randn({3, 4});
  const auto f = [&](const at::Tensor& a) { return std::tuple(a * 2, c, c * 2, 5); };
  const auto [a, b, d, number] = vmap(f, {.out_dims = out(0, 1, kNone, kNone)})(x);
  EXPECT_CLOSE(b, c.unsqueeze(1).expand({3, 7, 4}));
  EXPECT_EQ(b.stride(1), 0);
  EXPECT_CLOSE(d, c * 2);
  EXPECT_EQ(number, 5);
  EXPECT_CLOSE(a, x * 2);
}

TEST_F(VmapTest, ThreeDeep) {
  const at::Tensor x = randn({3, 5}), y = randn({4, 5}), z = randn({2, 5});
  const auto f = [](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
    return (a * b + c.sin()).sum() * b;
  };
  // [4, 2, 3, 5]: y outermost, then z, then x.
  const auto mapped =
      vmap(vmap(vmap(f, {.in_dims = in(0, kNone, kNone)}), {.in_dims = in(kNone, kNone, 0)}),
           {.in_dims = in(kNone, 0, kNone)});
  const at::Tensor expected = loop(
      [&](int64_t j) {
        return loop(
            [&](int64_t k) { return loop([&](int64_t i) { return f(x[i], y[j], z[k]); }, 3); }, 2);
      },
      4);
  EXPECT_CLOSE(mapped(x, y, z), expected);
}

TEST_F(VmapTest, NestedWithinAFunction) {
  // An outer product by two closures, with dims at both ends.
  const at::Tensor x = randn({5, 3}), y = randn({4, 5});
  const auto outer = [&](const at::Tensor& a) {
    return vmap([&](const at::Tensor& b) { return (a * b).sum(); }, {.out_dims = -1})(y);
  };
  EXPECT_CLOSE(vmap(outer, {.in_dims = 1, .out_dims = 1})(x), y.matmul(x));
}

TEST_F(VmapTest, SizesZeroAndOne) {
  for (const int64_t size : {0, 1}) {
    const at::Tensor x = randn({size, 5}), y = randn({5, size});
    EXPECT_CLOSE(vmap(product, {.in_dims = in(0, 1)})(x, y), (x * y.t()).sin());
    EXPECT_CLOSE(vmap(product, {.in_dims = in(0, 1), .chunk_size = 2})(x, y), (x * y.t()).sin());
    EXPECT_CLOSE(vmap([](const at::Tensor&) { return at::ones({2}); })(x), at::ones({size, 2}));
    const auto nested = vmap(vmap([](const at::Tensor& a) { return a * 2; }));
    EXPECT_CLOSE(nested(x), x * 2);
    EXPECT_CLOSE(nested(y), y * 2);
  }
}

TEST_F(VmapTest, AxisSize) {
  const at::Tensor c = randn({3});
  const auto f = [&] { return c * 2; };
  EXPECT_CLOSE(vmap(f, {.axis_size = 4})(), (c * 2).expand({4, 3}));
  const at::Tensor x = randn({4, 3});
  const auto g = [](const at::Tensor& a) { return a * 2; };
  EXPECT_CLOSE(vmap(g, {.axis_size = 4})(x), x * 2);
  EXPECT_CLOSE(vmap(g, {.in_dims = kNone, .axis_size = 2})(x), (x * 2).expand({2, 4, 3}));
}

TEST_F(VmapTest, ChunksGiveTheSameResult) {
  const Params p{randn({5}), randn({})};
  const at::Tensor x = randn({5, 7}), c = randn({2});
  const auto f = [&](const Params& q, const at::Tensor& a) {
    return std::tuple(affine(q, a), a * 2, c, c * 3, 1);
  };
  const VmapOptions options{.in_dims = in(kNone, 1), .out_dims = out(0, -1, 1, kNone, kNone)};
  const auto expected = vmap(f, options)(p, x);
  for (const int64_t chunk : {1, 2, 3, 6, 7, 100}) {
    VmapOptions chunked = options;
    chunked.chunk_size = chunk;
    const auto got = vmap(f, chunked)(p, x);
    EXPECT_TRUE(at::equal(std::get<0>(got), std::get<0>(expected)));
    EXPECT_TRUE(at::equal(std::get<1>(got), std::get<1>(expected)));
    EXPECT_TRUE(at::equal(std::get<2>(got), std::get<2>(expected)));
    EXPECT_TRUE(at::equal(std::get<3>(got), std::get<3>(expected)));
    EXPECT_EQ(std::get<4>(got), 1);
  }
}

TEST_F(VmapTest, ChunksRunOnThatManyExamples) {
  std::vector<int64_t> sizes;
  vmap(
      [&](const at::Tensor& a) {
        sizes.push_back(current_level()->size());
        return a;
      },
      {.chunk_size = 3})(randn({7}));
  EXPECT_THAT(sizes, ElementsAre(3, 3, 1));
}

TEST_F(VmapTest, ChunksWithinAnotherVmapAndUnderAutograd) {
  const at::Tensor x = randn({3, 7, 5});
  const auto f = [](const at::Tensor& a) { return a.sin().sum(); };
  EXPECT_CLOSE(vmap(vmap(f, {.chunk_size = 2}))(x), x.sin().sum(-1));
  EXPECT_CLOSE(vmap(vmap(f, {.chunk_size = 2}), {.chunk_size = 2})(x), x.sin().sum(-1));
  const at::Tensor leaf = randn({7, 5}).requires_grad_();
  const at::Tensor y = vmap(f, {.chunk_size = 3})(leaf);
  const at::Tensor g = torch::autograd::grad({y.sum()}, {leaf})[0];
  EXPECT_CLOSE(g, leaf.detach().cos());
}

TEST_F(VmapTest, GradientsFlowThroughFromOutside) {
  const at::Tensor w = randn({5}).requires_grad_(), x = randn({7, 5}).requires_grad_();
  const at::Tensor y = vmap([&](const at::Tensor& a) { return (a * w).sin().sum(); })(x);
  const auto grads = torch::autograd::grad({y.sum()}, {w, x});
  const auto expected = torch::autograd::grad({(x * w).sin().sum()}, {w, x});
  EXPECT_CLOSE(grads[0], expected[0]);
  EXPECT_CLOSE(grads[1], expected[1]);
}

TEST_F(VmapTest, Randomness) {
  const at::Tensor x = at::zeros({7, 5}, at::kDouble);
  const auto f = [](const at::Tensor& a) { return a + at::randn({5}, at::kDouble); };
  EXPECT_THAT(error_of([&] { vmap(f)(x); }), HasSubstr("random"));
  const at::Tensor same = vmap(f, {.randomness = Randomness::kSame})(x);
  EXPECT_CLOSE(same, same[0].expand({7, 5}));
  const at::Tensor different = vmap(f, {.randomness = Randomness::kDifferent})(x);
  EXPECT_FALSE(at::allclose(different[0], different[1]));
}

TEST_F(VmapTest, ChunksDrawTheSameNumbers) {
  const at::Tensor x = at::zeros({7, 5}, at::kDouble);
  const auto f = [](const at::Tensor& a) { return a + at::randn({5}, at::kDouble); };
  const at::Tensor same = vmap(f, {.randomness = Randomness::kSame, .chunk_size = 3})(x);
  EXPECT_CLOSE(same, same[0].expand({7, 5}));
  const at::Tensor next = at::randn({5}, at::kDouble);
  EXPECT_FALSE(at::allclose(next, same[0])) << "the generator must go on";
}

TEST_F(VmapTest, InPlaceOnAnArgumentReachesTheCaller) {
  const at::Tensor x = randn({7, 5}), before = x.clone();
  vmap([](const at::Tensor& a) { return a.mul_(2); })(x);
  EXPECT_CLOSE(x, before * 2);
}

struct Accumulate {
  at::Tensor weight;
  at::Tensor operator()(const at::Tensor& a) const { return a * weight; }
};

TEST_F(VmapTest, AnyCallableAndCopies) {
  const at::Tensor x = randn({7, 5}), w = randn({5});
  EXPECT_CLOSE(vmap(Accumulate{w})(x), x * w);
  const std::function<at::Tensor(const at::Tensor&)> erased = Accumulate{w};
  EXPECT_CLOSE(vmap(erased)(x), x * w);
  EXPECT_CLOSE(vmap([](at::Tensor by_value) { return by_value * 2; })(x), x * 2);
  const auto original = vmap(Accumulate{w});
  const auto copy = original;
  EXPECT_CLOSE(copy(x), original(x));
  const std::function<at::Tensor(const at::Tensor&)> stored = copy;
  EXPECT_CLOSE(stored(x), x * w);
}

TEST_F(VmapTest, SeveralThreads) {
  const auto f = vmap(vmap(product, {.in_dims = in(0, kNone)}), {.in_dims = in(kNone, 0)});
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const at::Tensor x = randn({3 + t, 5}), y = randn({2 + t, 5});
      for (int repeat = 0; repeat < 20; ++repeat) {
        right += at::allclose(f(x, y), (x.unsqueeze(0) * y.unsqueeze(1)).sin());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 80);
}

TEST_F(VmapTest, AnExceptionThreeDeepLeavesNothingBehind) {
  const auto thrower = vmap(vmap(vmap([](const at::Tensor& a) -> at::Tensor {
    EXPECT_EQ(current_level()->depth(), 3);
    if (a.dim() == 1) throw std::runtime_error("from f");
    return a;
  })));
  const at::Tensor x = randn({2, 3, 4, 5});
  EXPECT_THROW(thrower(x), std::runtime_error);
  EXPECT_EQ(current_level(), nullptr);
  EXPECT_CLOSE(vmap(product)(x, x), (x * x).sin());
}

TEST_F(VmapTest, EscapedTensorsSayWhichLevel) {
  at::Tensor escaped;
  vmap([&](const at::Tensor& a) { return escaped = a; })(randn({7, 5}));
  EXPECT_THAT(error_of([&] { escaped.sin(); }), HasSubstr("vmap level 1 (size 7)"));
}

// Errors.

at::Tensor identity(const at::Tensor& a) { return a; }
at::Tensor first(const at::Tensor& a, const at::Tensor&) { return a; }

TEST_F(VmapTest, InDimsOfTheWrongStructure) {
  const at::Tensor x = randn({7, 5});
  EXPECT_EQ(error_of([&] { vmap(first, {.in_dims = in(0)})(x, x); }),
            "[vmap] in_dims has 1 entry, (0), where the function was called with 2 arguments. Give "
            "one entry "
            "for each, or a single int or kNone for all.");
  EXPECT_EQ(error_of([&] { vmap(first, {.in_dims = in(0, in(0, 0))})(x, x); }),
            "[vmap] in_dims has 2 entries, (0, 0), for argument 1, which is a single leaf. Give "
            "one int or "
            "kNone for it.");
  EXPECT_THAT(error_of([&] {
                vmap(affine, {.in_dims = in(named({{"w", 0}}), 0)})(Params{x, x}, x);
              }),
              HasSubstr("in_dims has 1 entry, {w: 0}, where argument 0 has 3 fields"));
  EXPECT_THAT(
      error_of([&] {
        vmap(first, {.in_dims = named({{"a", 0}})})(x, x);
      }),
      HasSubstr(
          "gives names, {a: 0}, where the function was called with 2 arguments, which have no "
          "names"));
}

TEST_F(VmapTest, InDimsOutOfRange) {
  const at::Tensor x = randn({7, 5});
  EXPECT_EQ(error_of([&] { vmap(first, {.in_dims = in(0, 2)})(x, x); }),
            "[vmap] in_dims gives dim 2 for argument 1 of shape [7, 5], which needs -2 <= dim < 2. "
            "Name one "
            "of its dims, or kNone if all examples share it.");
  EXPECT_THAT(error_of([&] { vmap(identity, {.in_dims = -3})(x); }),
              HasSubstr("gives dim -3 for argument 0 of shape [7, 5]"));
  EXPECT_THAT(
      error_of([&] {
        vmap(affine)(Params{x, randn({})}, x);
      }),
      HasSubstr("gives dim 0 for argument 0.b of shape [], which has no dims. Give kNone for it."));
}

TEST_F(VmapTest, NothingBatched) {
  const at::Tensor x = randn({7, 5});
  EXPECT_EQ(
      error_of([&] { vmap(first, {.in_dims = in(kNone, kNone)})(x, x); }),
      "[vmap] nothing is batched: in_dims = (None, None) gives no dim for any tensor among the "
      "arguments. Give the dim of at least one, or the number of examples as axis_size.");
  EXPECT_THAT(error_of([&] { vmap([] { return at::ones({}); })(); }),
              HasSubstr("nothing is batched"));
}

TEST_F(VmapTest, InconsistentSizes) {
  const Params p{randn({5, 3}), randn({4})};
  EXPECT_EQ(error_of([&] {
              vmap(affine, {.in_dims = in(named({{"w", 1}, {"b", 0}, {"scale", kNone}}), 0)})(
                  p, randn({3, 5}));
            }),
            "[vmap] the batched dims of the arguments must all have the same size, but got:\n"
            "  argument 0.w: size 3 (dim 1 of shape [5, 3])\n"
            "  argument 0.b: size 4 (dim 0 of shape [4])\n"
            "  argument 1: size 3 (dim 0 of shape [3, 5])\n"
            "Make the sizes equal, or say in in_dims which dims are batched (kNone for an argument "
            "that all "
            "examples share).");
  EXPECT_THAT(error_of([&] {
                vmap(identity, {.axis_size = 6})(randn({7, 5}));
              }),
              HasSubstr("\n  argument 0: size 7 (dim 0 of shape [7, 5])\n  axis_size: 6\n"));
}

TEST_F(VmapTest, DimsOfNonTensors) {
  const auto f = [](const at::Tensor& a, double) { return std::pair(a, 1); };
  const at::Tensor x = randn({7, 5});
  EXPECT_THAT(
      error_of([&] { vmap(f, {.in_dims = in(0, 0)})(x, 1.0); }),
      HasSubstr("in_dims gives dim 0 for argument 1, which is not a tensor and has no dims"));
  EXPECT_THAT(error_of([&] { vmap(f, {.out_dims = out(0, 0)})(x, 1.0); }),
              HasSubstr("out_dims gives dim 0 for the result[1], which is not a tensor"));
}

TEST_F(VmapTest, OutDimsThatDoNotFit) {
  const at::Tensor x = randn({7, 5});
  EXPECT_EQ(
      error_of([&] { vmap(identity, {.out_dims = kNone})(x); }),
      "[vmap] out_dims gives kNone for the result (shape [5] for one example), but it differs from "
      "example to example. Give the dim that is to hold the examples, 0 for one, or return "
      "something "
      "that does not depend on a batched argument.");
  EXPECT_EQ(
      error_of([&] { vmap(identity, {.out_dims = 2})(x); }),
      "[vmap] out_dims gives dim 2 for the result, whose shape is [5] for one example, so that the "
      "batched result has 2 dims: it needs -2 <= dim < 2.");
  const auto two = [](const at::Tensor& a) { return std::pair(a, a); };
  EXPECT_THAT(error_of([&] { vmap(two, {.out_dims = out(0)})(x); }),
              HasSubstr("out_dims has 1 entry, (0), where the result has 2 elements"));
  EXPECT_THAT(error_of([&] { vmap(identity, {.out_dims = out(0, 1)})(x); }),
              HasSubstr("out_dims has 2 entries, (0, 1), for the result, which is a single leaf"));
}

TEST_F(VmapTest, BadSizes) {
  EXPECT_THAT(
      error_of([&] { vmap(identity, {.chunk_size = 0}); }),
      HasSubstr("[vmap] chunk_size is 0, but it is the number of examples to run at a time"));
  EXPECT_THAT(error_of([&] { vmap(identity, {.axis_size = -2}); }),
              HasSubstr("[vmap] axis_size is -2"));
}

// NOTE [nested and quantized tensors] in core/lifted_tensor.cc.
TEST_F(VmapTest, QuantizedTensors) {
  const auto identity = [](const at::Tensor& t) { return at::alias(t); };
  const at::Tensor xs = at::rand({3, 2});
  const at::Tensor q = at::quantize_per_tensor(xs, 0.1, 0, at::kQInt8);
  EXPECT_THAT(error_of([&] { vmap(identity)(q); }),
              HasSubstr("[vmap] argument 0 is a quantized tensor (QInt8), over which vmap cannot "
                        "map: operators on quantized tensors have no batching rules. Pass its "
                        "dequantize(), or give kNone if all examples share it."));
  const auto quantize = [](const at::Tensor& t) {
    return at::quantize_per_tensor(t, 0.1, 0, at::kQInt8);
  };
  EXPECT_THAT(error_of([&] { vmap(quantize)(xs); }),
              HasSubstr("quantize_per_tensor of a tensor of vmap level 1 (size 3) would give a "
                        "quantized tensor that differs between the examples"));
  const auto shared = [&](const at::Tensor& t) { return t + q.dequantize()[0]; };
  EXPECT_TRUE(at::equal(vmap(shared)(xs), xs + q.dequantize()[0]));
}

TEST_F(VmapTest, NestedTensors) {
  const at::Tensor xs = at::rand({2, 4});
  const at::Tensor n = at::_nested_tensor_from_tensor_list({at::ones({2, 4}), at::ones({3, 4})});
  const auto identity = [](const at::Tensor& t) { return at::alias(t); };
  EXPECT_THAT(error_of([&] { vmap(identity)(n); }),
              HasSubstr("[vmap] argument 0 is a nested tensor, over which vmap cannot map: its "
                        "examples differ in shape. Pass at::nested_to_padded_tensor of it, or "
                        "loop over its unbind()."));
  EXPECT_THAT(error_of([&] { vmap([&](const at::Tensor&) { return n; })(xs); }),
              HasSubstr("[vmap] the result is a nested tensor, which has no dim for the examples"));
  EXPECT_THAT(error_of([&] { vmap([&](const at::Tensor& t) { return n.mul(t); })(xs); }),
              HasSubstr("an operand is a nested tensor"));
  EXPECT_THAT(error_of([&] { vmap([&](const at::Tensor& t) { return n.matmul(t); })(xs); }),
              HasSubstr("matmul: one operand is a nested tensor"));
  const auto shared = [&](const at::Tensor& t) { return t + at::nested_to_padded_tensor(n, 0); };
  EXPECT_TRUE(at::equal(vmap(shared)(xs),
                        xs.unsqueeze(1).unsqueeze(1) + at::nested_to_padded_tensor(n, 0)));
}

TEST_F(VmapTest, ErrorsComeBeforeTheFunctionRuns) {
  bool ran = false;
  const auto f = [&](const at::Tensor& a, const at::Tensor&) {
    ran = true;
    return a;
  };
  const at::Tensor x = randn({7, 5}), y = randn({6, 5});
  error_of([&] { vmap(f)(x, y); });
  error_of([&] { vmap(f, {.in_dims = in(0)})(x, x); });
  error_of([&] { vmap(f, {.in_dims = 4})(x, x); });
  error_of([&] { vmap(f, {.in_dims = kNone})(x, x); });
  EXPECT_FALSE(ran);
}

TEST_F(VmapTest, ChunksOfDifferentShapes) {
  const auto f = [](const at::Tensor&) { return at::ones({current_level()->size()}); };
  EXPECT_THAT(error_of([&] {
                vmap(f, {.chunk_size = 3})(randn({7, 5}));
              }),
              HasSubstr("The function must return the same shapes for every chunk."));
}

}  // namespace
}  // namespace torchlift
