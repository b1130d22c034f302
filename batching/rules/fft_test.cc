#include <ATen/core/Tensor.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/fft_fft.h>
#include <ATen/ops/fft_fftn.h>
#include <ATen/ops/fft_hfft.h>
#include <ATen/ops/fft_ifft.h>
#include <ATen/ops/fft_ihfft.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_irfft2.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/fft_rfft2.h>
#include <ATen/ops/hann_window.h>
#include <ATen/ops/istft.h>
#include <ATen/ops/stft.h>
#include <ATen/ops/view_as_real.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

using Function = std::function<at::Tensor(const at::Tensor&)>;

// Of real numbers, as real numbers.
void check_real(const char* name, const Function& f, std::vector<int64_t> shape) {
  check_rule({.name = name,
              .f =
                  [f](const Tensors& in) {
                    const at::Tensor out = f(in[0]);
                    return Tensors{out.is_complex() ? at::view_as_real(out.resolve_conj()) : out};
                  },
              .make = [shape](int64_t) { return Tensors{randn(shape)}; },
              .second_order = true});
}

void check_complex(const char* name, const Function& f, std::vector<int64_t> shape) {
  check_rule({.name = name,
              .f =
                  [f](const Tensors& in) {
                    const at::Tensor out = f(at::complex(in[0], in[1]));
                    return Tensors{out.is_complex() ? at::view_as_real(out.resolve_conj()) : out};
                  },
              .make =
                  [shape](int64_t) {
                    return Tensors{randn(shape), randn(shape)};
                  }});
}

TEST(FftRules, Real) {
  check_real("rfft", [](const at::Tensor& x) { return at::fft_rfft(x); }, {5});
  check_real("rfft of dim 0", [](const at::Tensor& x) { return at::fft_rfft(x, 6, 0); }, {5, 2});
  check_real("rfft2", [](const at::Tensor& x) { return at::fft_rfft2(x); }, {2, 3, 4});
  check_real("fft of real", [](const at::Tensor& x) { return at::fft_fft(x); }, {2, 5});
  check_real("ihfft", [](const at::Tensor& x) { return at::fft_ihfft(x); }, {5});
}

TEST(FftRules, Complex) {
  check_complex("fft", [](const at::Tensor& x) { return at::fft_fft(x, 3, 0, "ortho"); }, {4, 2});
  check_complex("ifft", [](const at::Tensor& x) { return at::fft_ifft(x); }, {5});
  check_complex("fftn",
                [](const at::Tensor& x) {
                  return at::fft_fftn(x, {}, at::IntArrayRef({0, -1}));
                },
                {3, 2, 4});
  check_complex("irfft", [](const at::Tensor& x) { return at::fft_irfft(x, 7); }, {4});
  check_complex("irfft2", [](const at::Tensor& x) { return at::fft_irfft2(x); }, {3, 4});
  check_complex("hfft", [](const at::Tensor& x) { return at::fft_hfft(x); }, {4});
}

TEST(FftRules, ShortTime) {
  const at::Tensor window = at::hann_window(8, at::kDouble);
  check_real("stft",
             [&](const at::Tensor& x) {
               return at::stft(x, 8, 3, 8, window, /*normalized=*/false, /*onesided=*/true,
                               /*return_complex=*/true);
             },
             {20});
  check_complex("istft",
                [&](const at::Tensor& x) {
                  return at::istft(x, 8, 3, 8, window, /*center=*/true, /*normalized=*/false,
                                   /*onesided=*/true, /*length=*/12);
                },
                {5, 6});
}

}  // namespace
}  // namespace torchlift::testing
