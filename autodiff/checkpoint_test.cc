#include "autodiff/checkpoint.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_det.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>
#include <thread>

#include "autodiff/curvature.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/memory_meter.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// Two layers, of a weight that is closed over and one that is an argument; tanh saves its result,
// sin its argument.
struct Model {
  Tensor w = randn({4, 4}), v = randn({4, 4});
  bool checkpointed = true;
  mutable int calls = 0;

  Tensor layer(const Tensor& h, const Tensor& u) const {
    ++calls;
    return (h.matmul(w).tanh().matmul(u) + h).sin() * 2;
  }
  Tensor operator()(Tensor h) const {
    for (int i = 0; i < 3; ++i) {
      const auto f = [this](const Tensor& x, const Tensor& u) { return layer(x, u); };
      h = checkpointed ? checkpoint(f, h, v) : f(h, v);
    }
    return h;
  }
  Tensor loss(const Tensor& x) const { return (*this)(x).square().sum(); }
  Model plain() const {
    Model model = *this;
    model.checkpointed = false;
    return model;
  }
};

class CheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(3); }
  void TearDown() override { EXPECT_TRUE(level_stack().empty()); }

  // transform(f) is the same with and without checkpoints, and a checkpointed one runs again.
  template <class Transform>
  void compare(const Transform& transform, bool runs_again = true) {
    const Model model;
    const auto of = [&](const Model& m) {
      return transform([&m](const Tensor& x) { return m.loss(x); },
                       [&m](const Tensor& x) { return m(x); });
    };
    const Tensor expected = of(model.plain());
    const Tensor got = of(model);
    EXPECT_CLOSE(got, expected);
    EXPECT_GT(expected.abs().max().item<double>(), 1e-3);
    EXPECT_EQ(model.calls > 3, runs_again) << model.calls;
  }
};

TEST_F(CheckpointTest, Backward) {
  Model model;
  std::vector<std::vector<Tensor>> grads;
  for (const bool checkpointed : {false, true}) {
    model.checkpointed = checkpointed;
    Tensor x = at::ones_like(randn({2, 4})).set_requires_grad(true);
    model.w = model.w.detach().set_requires_grad(true);
    model.v = model.v.detach().set_requires_grad(true);
    torch::autograd::backward({model.loss(x)}, {});
    grads.push_back({x.grad(), model.w.grad(), model.v.grad()});
  }
  for (int i = 0; i < 3; ++i) EXPECT_CLOSE(grads[0][i], grads[1][i]);
}

TEST_F(CheckpointTest, Compositions) {
  const Tensor x = randn({4}), xs = randn({3, 4}), xss = randn({2, 3, 4}), t = randn({4});
  compare([&](auto loss, auto) { return grad(loss)(x); });
  compare([&](auto, auto f) { return std::get<1>(vjp(f, x))(t); });
  compare([&](auto, auto f) { return jvp(f, std::tuple(x), std::tuple(t)).second; }, false);
  compare([&](auto, auto f) { return jacrev(f)(x); });
  compare([&](auto, auto f) { return jacfwd(f)(x); }, false);
  compare([&](auto loss, auto) { return hessian(loss)(x); });
  compare([&](auto loss, auto) { return jacrev(grad(loss))(x); });
  compare([&](auto loss, auto) {
    return grad([&](const Tensor& y) { return (grad(loss)(y) * t).sum(); })(x);
  });
  compare([&](auto loss, auto) {
    return grad([&](const Tensor& y) {
      return (grad([&](const Tensor& z) { return (grad(loss)(z) * t).sum(); })(y) * t).sum();
    })(x);
  });
  compare([&](auto, auto f) { return vmap(f)(xs); }, false);
  compare([&](auto loss, auto) { return vmap(grad(loss))(xs); });
  compare([&](auto loss, auto) { return vmap(hessian(loss))(xs); });
  compare([&](auto loss, auto) { return vmap(jacrev(grad(loss)))(xs); });
  compare([&](auto, auto f) {
    return grad([&](const Tensor& y) { return (vmap(f)(y) * t).sum(); })(xs);
  });
  compare([&](auto, auto f) { return jacrev(vmap(f))(xs); });
  compare([&](auto loss, auto) {
    return grad([&](const Tensor& y) { return (vmap(grad(loss))(y) * t).sum(); })(xs);
  });
  compare([&](auto loss, auto) {
    return jacrev([&](const Tensor& y) { return vmap(grad(loss))(y); })(xs);
  });
  compare([&](auto, auto f) {
    return grad([&](const Tensor& y) {
      return (vmap([&](const Tensor& row) { return vmap(f)(row); })(y) * t).sum();
    })(xss);
  });
  compare([&](auto loss, auto) {
    return jvp([&](const Tensor& y) { return vmap(grad(loss))(y); }, std::tuple(xs),
               std::tuple(xs.cos()))
        .second;
  });
  compare([&](auto loss, auto) {
    return vmap(
        [&](const Tensor& y) { return jvp(grad(loss), std::tuple(y), std::tuple(t)).second; })(xs);
  });
}

TEST_F(CheckpointTest, PullbackInsideVmap) {
  const Model model;
  const Tensor x = randn({4}), cotangents = randn({5, 4});
  const auto pull = std::get<1>(vjp([&](const Tensor& y) { return model(y); }, x));
  const auto plain = std::get<1>(vjp([m = model.plain()](const Tensor& y) { return m(y); }, x));
  EXPECT_CLOSE(vmap([&](const Tensor& c) { return pull(c); })(cotangents),
               vmap([&](const Tensor& c) { return plain(c); })(cotangents));
}

TEST_F(CheckpointTest, BatchSizes) {
  const Model model;
  const Tensor all = randn({3, 4});
  for (const int64_t size : {0, 1, 3}) {
    const Tensor xs = all.narrow(0, 0, size);
    const auto of = [&](const Model& m) {
      return grad([&](const Tensor& y) {
        return vmap([&](const Tensor& row) { return m.loss(row); })(y).sum();
      })(xs);
    };
    EXPECT_CLOSE(of(model), of(model.plain()));
  }
}

struct Pair {
  Tensor a, b;
  std::map<std::string, Tensor> more;
};
TORCHLIFT_PYTREE(Pair, a, b, more);

TEST_F(CheckpointTest, Trees) {
  const auto f = [](const Pair& p, double scale, const Tensor& none) {
    EXPECT_FALSE(none.defined());
    return std::pair(Pair{p.a * p.b, p.a, {{"c", p.b.sin() * scale}}}, p.a.gt(0));
  };
  const auto loss = [&](bool checkpointed) {
    return [&, checkpointed](const Tensor& x) {
      const Pair p{x, x.cos(), {}};
      const auto [q, positive] =
          checkpointed ? checkpoint(f, p, 3.0, Tensor()) : f(p, 3.0, Tensor());
      EXPECT_EQ(positive.scalar_type(), at::kBool);
      return (q.a + q.b * q.more.at("c")).sum();
    };
  };
  const Tensor x = randn({5});
  EXPECT_CLOSE(grad(loss(true))(x), grad(loss(false))(x));
  EXPECT_CLOSE(hessian(loss(true))(x), hessian(loss(false))(x));
}

TEST_F(CheckpointTest, ResultsThatAreTheArgumentsOrViews) {
  const auto loss = [](bool checkpointed) {
    return [=](const Tensor& x) {
      const auto f = [](const Tensor& y) { return std::tuple(y, y.view({2, 2}), y * y, y); };
      auto [a, b, c, d] = checkpointed ? checkpoint(f, x) : f(x);
      Tensor written = b.clone().mul_(2);
      return (a.view({2, 2}) * written).sum() + (c * d).sum() * 3;
    };
  };
  const Tensor x = randn({4}), xs = randn({3, 4});
  EXPECT_CLOSE(grad(loss(true))(x), grad(loss(false))(x));
  EXPECT_CLOSE(vmap(grad(loss(true)))(xs), vmap(grad(loss(false)))(xs));
}

// Each is another kind of program inside of the function.
TEST_F(CheckpointTest, ProgramsInside) {
  const Tensor w = randn({4});
  const std::vector<std::function<Tensor(const Tensor&)>> programs = {
      [&](const Tensor& x) {
        return grad([&](const Tensor& y) { return (y.sin() * w * x).sum(); })(x);
      },
      [&](const Tensor& x) {
        return vmap([&](const Tensor& y) { return (x * y).cos().sum(); })(w);
      },
      [&](const Tensor& x) {
        return jvp([&](const Tensor& y) { return y.sin() * w; }, std::tuple(x), std::tuple(x))
            .second;
      },
      [&](const Tensor& x) {
        return while_loop([](const Tensor& c) { return c.square().sum().lt(50.); },
                          [](const Tensor& c) { return c * 1.5; }, x * w);
      },
      [&](const Tensor& x) {
        const auto outer = [&w](const Tensor& y, const Tensor& u) {
          return checkpoint([&w](const Tensor& z) { return z.sin() * w; }, y).cos() * u;
        };
        return checkpoint(outer, x, x);
      },
      [&](const Tensor& x) {
        Tensor buffer = at::zeros_like(x);
        buffer.narrow(0, 0, 2).copy_(x.narrow(0, 2, 2) * w.narrow(0, 0, 2));
        return buffer.sin() + x.cos();
      },
      [&](const Tensor& x) {
        return x * at::linalg_det(x.view({2, 2}).matmul(w.view({2, 2})));
      },
  };
  const Tensor x = randn({4}), xs = randn({3, 4});
  for (size_t i = 0; i < programs.size(); ++i) {
    SCOPED_TRACE(i);
    const auto& f = programs[i];
    const auto checkpointed = [&](const Tensor& y) { return checkpoint(f, y); };
    EXPECT_CLOSE(jacrev(checkpointed)(x), jacrev(f)(x));
    const auto loss = [&](const Tensor& y) { return (checkpoint(f, y) * w).sum(); };
    const auto plain = [&](const Tensor& y) { return (f(y) * w).sum(); };
    EXPECT_CLOSE(vmap(grad(loss))(xs), vmap(grad(plain))(xs));
    EXPECT_CLOSE(hessian(loss)(x), hessian(plain)(x));
    EXPECT_CLOSE(jacrev(grad(loss))(x), jacrev(grad(plain))(x));
    EXPECT_CLOSE(grad([&](const Tensor& y) { return vmap(loss)(y).square().sum(); })(xs),
                 grad([&](const Tensor& y) { return vmap(plain)(y).square().sum(); })(xs));
    EXPECT_CLOSE(grad([&](const Tensor& y) { return vmap(grad(loss))(y).square().sum(); })(xs),
                 grad([&](const Tensor& y) { return vmap(grad(plain))(y).square().sum(); })(xs));
  }
}

TEST_F(CheckpointTest, InBranches) {
  const auto f = [](const Tensor& y) { return y.sin() * y; };
  const auto loss = [&](bool checkpointed) {
    return [&, checkpointed](const Tensor& x) {
      return cond(
                 x.sum().gt(0),
                 [&](const Tensor& y) { return checkpointed ? checkpoint(f, y) : f(y); },
                 [&](const Tensor& y) { return y.cos(); }, x)
          .sum();
    };
  };
  const Tensor xs = randn({6, 4});
  EXPECT_CLOSE(vmap(grad(loss(true)))(xs), vmap(grad(loss(false)))(xs));
  EXPECT_CLOSE(grad([&](const Tensor& y) { return vmap(loss(true))(y).sum(); })(xs),
               grad([&](const Tensor& y) { return vmap(loss(false))(y).sum(); })(xs));
}

TEST_F(CheckpointTest, RandomNumbers) {
  const auto f = [](const Tensor& x) {
    return at::dropout(x.sin(), 0.5, /*train=*/true) * at::rand_like(x);
  };
  const auto loss = [&](bool checkpointed) {
    return [&, checkpointed](const Tensor& x) {
      const Tensor y = checkpointed ? checkpoint(f, x) : f(x);
      return (y * at::rand_like(x)).sum();
    };
  };
  const auto expect_same = [&](const auto& transform) {
    at::manual_seed(5);
    const Tensor expected = transform(loss(false));
    const Tensor next = at::randn({3});
    at::manual_seed(5);
    EXPECT_CLOSE(transform(loss(true)), expected);
    EXPECT_TRUE(at::equal(at::randn({3}), next));  // as if it had run once
  };
  const Tensor x = randn({40}), xs = randn({3, 40});
  expect_same([&](auto l) { return grad(l)(x); });
  expect_same([&](auto l) { return vmap(grad(l), {.randomness = Randomness::kDifferent})(xs); });
  expect_same([&](auto l) { return vmap(grad(l), {.randomness = Randomness::kSame})(xs); });
  expect_same([&](auto l) {
    return grad([&](const Tensor& y) {
      return vmap(l, {.randomness = Randomness::kDifferent})(y).sum();
    })(xs);
  });
  expect_same([&](auto l) { return jacrev(grad(l))(x); });
}

TEST_F(CheckpointTest, ModesOfTheFirstRun) {
  const Tensor w = at::randn({8, 8}).set_requires_grad(true);
  std::vector<at::ScalarType> dtypes;
  std::vector<bool> grad_modes;
  const auto f = [&](const Tensor& x) {
    const Tensor y = x.matmul(w);
    dtypes.push_back(y.scalar_type());
    grad_modes.push_back(c10::GradMode::is_enabled());
    return y.to(at::kFloat).sin();
  };
  const Tensor x = at::randn({3, 8});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::increment_nesting();
  const Tensor before = x.matmul(w);  // autocast keeps a copy of w
  const Tensor y = checkpoint(f, x);
  const Tensor expected = x.matmul(w).to(at::kFloat).sin();
  at::autocast::decrement_nesting();
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  const auto pull = [&](const Tensor& t) { return torch::autograd::grad({t.sum()}, {w})[0]; };
  EXPECT_TRUE(at::equal(pull(y), pull(expected)));
  EXPECT_EQ(dtypes, std::vector<at::ScalarType>({at::kBFloat16, at::kBFloat16}));
  EXPECT_EQ(grad_modes, std::vector<bool>({true, true}));
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST_F(CheckpointTest, BackwardOnAnotherThread) {
  const Model model;
  const Tensor x = randn({4});
  Tensor leaf = x.clone().set_requires_grad(true), got;
  const Tensor loss = model.loss(leaf);
  std::thread([&] { got = torch::autograd::grad({loss}, {leaf})[0]; }).join();
  EXPECT_CLOSE(got, grad([m = model.plain()](const Tensor& y) { return m.loss(y); })(x));
}

TEST_F(CheckpointTest, HooksRunOnce) {
  Tensor x = randn({4}).set_requires_grad(true), w = randn({4}).set_requires_grad(true);
  int calls = 0;
  const auto twice = [&](const Tensor& g) { return ++calls, g * 2; };
  x.register_hook(twice);
  w.register_hook(twice);
  Tensor h = x * 3;
  h.register_hook(twice);
  const Tensor y = checkpoint([&](const Tensor& t) { return (t * w).sin(); }, h).sum();
  const auto grads = torch::autograd::grad({y}, {x, w});
  EXPECT_EQ(calls, 3);
  EXPECT_CLOSE(grads[0], (x * 3 * w).cos() * w * 12);
  EXPECT_CLOSE(grads[1], (x * 3 * w).cos() * x * 6);
}

// --- policies ------------------------------------------------------------------------------------

TEST_F(CheckpointTest, PoliciesChangeNoResult) {
  const Tensor w = randn({4, 4}), image = randn({1, 2, 5, 5}), kernel = randn({3, 2, 3, 3});
  const auto f = [&](const Tensor& x) {
    const Tensor q = checkpoint_name(x.mm(w), "q");
    Tensor k = at::linear(q.sin(), w, x.select(0, 0));
    k.add_(1);  // so what was kept is not the product any more
    return q.unsqueeze(0).bmm(k.unsqueeze(0)).cos().squeeze(0).mv(x.select(0, 1)) +
           x.select(0, 2).dot(x.select(0, 3)) * w.select(0, 0);
  };
  const Tensor x = randn({4, 4}), xs = randn({3, 4, 4});
  const auto plain = [&](const Tensor& y) { return f(y).sum(); };
  for (const auto& policy : {CheckpointPolicy::products(), CheckpointPolicy::named({"q"}),
                             CheckpointPolicy::named({"other"})}) {
    const auto loss = [&](const Tensor& y) { return checkpoint(f, policy, y).sum(); };
    EXPECT_CLOSE(grad(loss)(x), grad(plain)(x));
    EXPECT_CLOSE(vmap(grad(loss))(xs), vmap(grad(plain))(xs));
    EXPECT_CLOSE(hessian(loss)(x), hessian(plain)(x));
    EXPECT_CLOSE(jacrev(grad(loss))(x), jacrev(grad(plain))(x));
    EXPECT_CLOSE(grad([&](const Tensor& y) { return vmap(loss)(y).square().sum(); })(xs),
                 grad([&](const Tensor& y) { return vmap(plain)(y).square().sum(); })(xs));
  }
}

// How many products the functions of a checkpoint compute: a hook below autograd would need a
// dispatch key, so it is told by memory: a product that is found allocates nothing.
int64_t bytes_in_second_run(const CheckpointPolicy& policy) {
  const Tensor w = randn({64, 64});
  Tensor x = randn({64, 64}).set_requires_grad(true);
  int run = 0;
  int64_t bytes = 0;
  const auto f = [&](const Tensor& y) {
    const MemoryMeter meter(c10::kCPU);
    Tensor q = checkpoint_name(y.mm(w), "q");
    Tensor k = checkpoint_name(y.mm(q), "k");
    if (++run == 2) bytes = meter.current();
    return q + k;
  };
  const Tensor y = checkpoint(f, policy, x).sum();
  torch::autograd::grad({y}, {x});
  return bytes;
}

TEST_F(CheckpointTest, PoliciesKeepProducts) {
  constexpr int64_t kProduct = 64 * 64 * 8;
  EXPECT_EQ(bytes_in_second_run(CheckpointPolicy::nothing()), 2 * kProduct);
  EXPECT_EQ(bytes_in_second_run(CheckpointPolicy::products()), 0);
  EXPECT_EQ(bytes_in_second_run(CheckpointPolicy::named({"k"})), kProduct);
  EXPECT_EQ(bytes_in_second_run(CheckpointPolicy::named({"q", "k"})), 0);
  EXPECT_EQ(bytes_in_second_run(CheckpointPolicy::named({"v"})), 2 * kProduct);
}

// --- memory --------------------------------------------------------------------------------------

int64_t peak_of_deep_mlp(bool checkpointed, bool under_vmap) {
  constexpr int kLayers = 32;
  const std::vector<Tensor> weights(kLayers, randn({64, 64}) / 8.);
  const auto loss = [&](const Tensor& x) {
    Tensor h = x;
    for (const Tensor& w : weights) {
      const auto layer = [&w](const Tensor& y) {
        Tensor z = y.matmul(w);
        for (int i = 0; i < 4; ++i) z = z.sin().cos();
        return z;
      };
      h = checkpointed ? checkpoint(layer, h) : layer(h);
    }
    return h.sum();
  };
  const Tensor x = randn({256, 64});
  const MemoryMeter meter(c10::kCPU);
  under_vmap ? vmap(grad(loss))(x) : grad(loss)(x);
  return meter.peak();
}

TEST_F(CheckpointTest, Memory) {
  constexpr int64_t kActivation = 256 * 64 * 8;
  for (const bool under_vmap : {false, true}) {
    const int64_t plain = peak_of_deep_mlp(false, under_vmap);
    const int64_t checkpointed = peak_of_deep_mlp(true, under_vmap);
    // Of each layer its argument, and of one layer everything.
    EXPECT_GE(plain, 32 * 8 * kActivation);
    EXPECT_LE(checkpointed, (32 + 16) * kActivation);
    RecordProperty(under_vmap ? "plain_vmap" : "plain", std::to_string(plain));
    RecordProperty(under_vmap ? "checkpointed_vmap" : "checkpointed", std::to_string(checkpointed));
  }
}

// --- errors --------------------------------------------------------------------------------------

TEST_F(CheckpointTest, Errors) {
  const Tensor x = randn({4});
  const auto writes = [](const Tensor& y) {
    Tensor target = y;
    return target.mul_(2);
  };
  EXPECT_THAT(error_of([&] { checkpoint(writes, x.clone()); }),
              HasSubstr("[checkpoint] the function writes into one of its arguments in place"));
  Tensor leaf = x.clone().set_requires_grad(true);
  Tensor h = leaf * 1;
  const Tensor y = checkpoint([](const Tensor& t) { return t.sin(); }, h).sum();
  h.detach().mul_(2);
  EXPECT_THAT(error_of([&] { torch::autograd::grad({y}, {leaf}); }),
              HasSubstr("was written into between the function and its backward pass"));
  Tensor w = x.clone().set_requires_grad(true);
  const Tensor z = checkpoint([&](const Tensor& t) { return t.sin() * w; }, leaf).sum();
  w.detach().mul_(2);
  EXPECT_THAT(error_of([&] { torch::autograd::grad({z}, {leaf}); }),
              HasSubstr("was written into between"));
}

TEST_F(CheckpointTest, FunctionsThatDiffer) {
  Tensor leaf = randn({4}).set_requires_grad(true), w = randn({4}).set_requires_grad(true);
  int calls = 0;
  const Tensor other =
      checkpoint([&](const Tensor& t) { return ++calls == 1 ? t.sin() : t * w; }, leaf).sum();
  EXPECT_THAT(error_of([&] { torch::autograd::grad({other}, {leaf}); }),
              HasSubstr("ran again for its gradient, and used a tensor that it had not used"));
  calls = 0;
  const Tensor constant =
      checkpoint([&](const Tensor& t) { return ++calls == 1 ? t.sin() : t.detach(); }, leaf).sum();
  EXPECT_THAT(error_of([&] { torch::autograd::grad({constant}, {leaf}); }),
              HasSubstr("its results had other derivatives"));
  const Tensor twice = checkpoint([&](const Tensor& t) { return t.sin(); }, leaf).sum();
  torch::autograd::grad({twice}, {leaf});
  EXPECT_THROW(torch::autograd::grad({twice}, {leaf}), c10::Error);
}

TEST_F(CheckpointTest, LevelsThatHaveEnded) {
  const Tensor xs = randn({3, 4});
  // What belongs to the vmap is closed over.
  const auto captures = [](const Tensor& x) {
    return checkpoint([&x, c = x.cos()](const Tensor& y) { return y * c; }, x).sum();
  };
  EXPECT_THAT(error_of([&] { grad([&](const Tensor& y) { return vmap(captures)(y).sum(); })(xs); }),
              HasSubstr("Pass it to checkpoint as an argument"));
  EXPECT_CLOSE(vmap(grad(captures))(xs), xs.cos() - xs * xs.sin());
  // A jvp that has ended.
  const auto slope = [](const Tensor& x) {
    return jvp(
               [](const Tensor& y) {
                 return checkpoint([](const Tensor& z) { return z.sin(); }, y);
               },
               std::tuple(x), std::tuple(at::ones_like(x)))
        .second.sum();
  };
  EXPECT_THAT(error_of([&] { grad(slope)(xs); }), HasSubstr("a jvp that has ended"));
}

TEST_F(CheckpointTest, ExceptionsLeaveNothingBehind) {
  int calls = 0;
  const auto f = [&](const Tensor& x) {
    if (++calls == 2) unsupported_error("test", "thrown");
    return x.sin();
  };
  const Tensor xs = randn({3, 4});
  EXPECT_THAT(error_of([&] {
                grad([&](const Tensor& y) {
                  return vmap([&](const Tensor& x) { return checkpoint(f, x); })(y).sum();
                })(xs);
              }),
              HasSubstr("thrown"));
  EXPECT_TRUE(level_stack().empty());
  EXPECT_CLOSE(vmap(grad([](const Tensor& x) { return x.sin().sum(); }))(xs), xs.cos());
}

TEST_F(CheckpointTest, NothingDifferentiated) {
  const Model model;
  const Tensor x = randn({4});
  const Tensor y = model(x);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_EQ(model.calls, 3);
  const c10::NoGradGuard no_grad;
  EXPECT_FALSE(model(x.clone().set_requires_grad(true)).requires_grad());
}

}  // namespace
}  // namespace torchlift
