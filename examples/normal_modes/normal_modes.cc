// Forces, Hessians and normal modes in C++, from nothing but an energy: two Lennard-Jones atoms, a
// water molecule (SPC/Fw: Wu, Tepper and Voth 2006), and the minima of seven Lennard-Jones atoms
// from many random starts, all at once. See normal_modes.py, which draws them.
//
//   normal_modes [starts]

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/atan2.h>
#include <ATen/ops/linalg_cross.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/triu_indices.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numbers>
#include <tuple>
#include <vector>

#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

// --- energies: of one geometry x, [atoms, 3] ---------------------------------------------------

// In units of the well's depth, with distances in units of sigma.
at::Tensor lennard_jones(const at::Tensor& x) {
  const at::Tensor pairs = at::triu_indices(x.size(0), x.size(0), 1);
  const at::Tensor apart = x.index_select(0, pairs[0]) - x.index_select(0, pairs[1]);
  const at::Tensor inverse6 = apart.square().sum(-1).pow(-3);
  return 4 * (inverse6.square() - inverse6).sum();
}

constexpr double kBond = 1059.162, kBondLength = 1.012;                           // kcal/mol/A^2, A
constexpr double kAngle = 75.90, kAngleAtRest = 113.24 * std::numbers::pi / 180;  // .../rad^2
constexpr double kOxygen = 15.9994, kHydrogen = 1.008;                            // u

// In kcal/mol, with x in A: oxygen, hydrogen, hydrogen.
at::Tensor water(const at::Tensor& x) {
  const at::Tensor a = x[1] - x[0], b = x[2] - x[0];
  const at::Tensor angle = at::atan2(at::linalg_cross(a, b).norm(), a.dot(b));
  const at::Tensor stretches =
      (a.norm() - kBondLength).square() + (b.norm() - kBondLength).square();
  return kBond / 2 * stretches + kAngle / 2 * (angle - kAngleAtRest).square();
}

// --- minima and vibrations ---------------------------------------------------------------------

template <class Energy>
at::Tensor flat_hessian(const Energy& energy, const at::Tensor& x) {
  return tl::hessian(energy)(x).reshape({x.numel(), x.numel()});
}

// A step along each eigenvector of the Hessian, by the gradient over the size of the curvature.
// Moving or turning the whole molecule has no curvature, and is left out.
template <class Energy>
at::Tensor newton_step(const Energy& energy, const at::Tensor& x) {
  const auto [values, vectors] = at::linalg_eigh(flat_hessian(energy, x));
  const at::Tensor sizes = values.abs();
  const at::Tensor along = tl::grad(energy)(x).flatten().matmul(vectors);
  const at::Tensor step =
      at::where(sizes > 1e-6 * sizes.max(), -along / sizes, at::zeros_like(along));
  const at::Tensor shrink = (0.2 / step.abs().max().clamp_min(1e-300)).clamp_max(1);
  return x + vectors.matmul(shrink * step).reshape(x.sizes());
}

// The minima below many start geometries, [starts, atoms, 3]: descends with Adam, then by Newton.
template <class Energy>
at::Tensor minimize(const Energy& energy, at::Tensor x) {
  const tl::optim::Adam adam({.lr = 0.02});
  const auto descend = tl::vmap([&](const at::Tensor& one, const tl::optim::State& state) {
    return adam.update(tl::grad(energy)(one), state, one);
  });
  const auto newton = tl::vmap([&](const at::Tensor& one) { return newton_step(energy, one); });
  tl::optim::State state = tl::vmap([&](const at::Tensor& one) { return adam.init(one); })(x);
  for (int i = 0; i < 400; ++i) std::tie(x, state) = descend(x, state);
  for (int i = 0; i < 12; ++i) x = newton(x);
  return x;
}

// The squares of the angular frequencies, ascending: [3 * atoms].
template <class Energy>
at::Tensor squared_frequencies(const Energy& energy, const at::Tensor& masses,
                               const at::Tensor& x) {
  const at::Tensor weight = masses.rsqrt().repeat_interleave(3);
  return std::get<0>(at::linalg_eigh(weight.unsqueeze(1) * flat_hessian(energy, x) * weight));
}

// --- the three molecules -----------------------------------------------------------------------

bool failed = false;

void report(const char* name, double computed, double exact, double tolerance) {
  std::printf("%-24s %18.9f %18.9f\n", name, computed, exact);
  // Written so that a NaN fails.
  if (!(std::abs(computed - exact) <= tolerance)) failed = true;
}

void dimer() {
  const at::Tensor start = at::tensor({0.0, 0.0, 0.0, 1.3, 0.1, 0.2}, at::kDouble).view({1, 2, 3});
  const at::Tensor x = minimize(lennard_jones, start)[0];
  const at::Tensor squares = squared_frequencies(lennard_jones, at::ones({2}, at::kDouble), x);
  // sqrt(k / mu): the well's curvature at 2^(1/6) is 72 / 2^(1/3), the reduced mass 1/2.
  report("dimer", squares[5].sqrt().item<double>(), std::sqrt(144 / std::cbrt(2.0)), 1e-9);
}

// Bend, symmetric and antisymmetric stretch (Herzberg, "Infrared and Raman Spectra", 1945, II.4).
std::vector<double> exact_water_squares() {
  const double k = kBond / kHydrogen, bend = kAngle / (kBondLength * kBondLength) / kHydrogen;
  const double ratio = 2 * kHydrogen / kOxygen;
  const double sine2 = std::pow(std::sin(kAngleAtRest / 2), 2), cosine2 = 1 - sine2;
  const double sum = (1 + ratio * cosine2) * k + 2 * (1 + ratio * sine2) * bend;
  const double product = 2 * (1 + ratio) * k * bend;
  const double root = std::sqrt(sum * sum / 4 - product);
  return {sum / 2 - root, sum / 2 + root, (1 + ratio * sine2) * k};
}

void water_molecule() {
  const at::Tensor start =
      at::tensor({0.0, 0.0, 0.0, 0.9, 0.3, 0.1, -0.5, 0.8, 0.0}, at::kDouble).view({1, 3, 3});
  const at::Tensor masses = at::tensor({kOxygen, kHydrogen, kHydrogen}, at::kDouble);
  const at::Tensor squares = squared_frequencies(water, masses, minimize(water, start)[0]);
  // From the square root of kcal/mol/A^2/u to 1/cm: 1 kcal/mol is 418.4 u A^2/ps^2.
  const double wave_number = std::sqrt(418.4) / (2 * std::numbers::pi * 0.0299792458);
  const std::vector<double> exact = exact_water_squares();
  const char* names[] = {"water_bend", "water_symmetric", "water_antisymmetric"};
  for (int i = 0; i < 3; ++i) {
    report(names[i], wave_number * std::sqrt(squares[6 + i].item<double>()),
           wave_number * std::sqrt(exact[i]), 1e-6);
  }
  report("water_largest_of_zeros", squares.slice(0, 0, 6).abs().max().item<double>(), 0.0, 1e-6);
}

// Seven Lennard-Jones atoms have four minima (Hoare and McInnes 1976).
void cluster(int64_t starts) {
  constexpr double kKnown[] = {-16.505384, -15.935043, -15.593211, -15.533060};
  const at::Tensor x = minimize(lennard_jones, 1.2 * at::randn({starts, 7, 3}, at::kDouble));
  const at::Tensor energies = tl::vmap(lennard_jones)(x);
  const at::Tensor forces = tl::vmap(tl::grad(lennard_jones))(x).abs().amax({1, 2});
  const at::Tensor masses = at::ones({7}, at::kDouble);
  const at::Tensor squares = tl::vmap(
      [&](const at::Tensor& one) { return squared_frequencies(lennard_jones, masses, one); })(x);
  // A start may lose an atom, or end on a saddle.
  const at::Tensor minima = (forces < 1e-8)
                                .logical_and(squares.select(1, 0) > -1e-6)
                                .logical_and(squares.select(1, 6) > 1e-3);
  int64_t of_known = 0;
  for (const double known : kKnown) {
    const at::Tensor here = minima.logical_and((energies - known).abs() < 1e-4);
    const int64_t count = here.sum().item<int64_t>();
    of_known += count;
    if (count == 0) continue;
    const double energy = at::where(here, energies, at::zeros_like(energies)).min().item<double>();
    report("cluster_energy", energy, known, 1e-5);
    std::printf("  from %ld of %ld starts\n", static_cast<long>(count), static_cast<long>(starts));
  }
  report("cluster_minima", static_cast<double>(of_known), minima.sum().item<double>(), 0.0);
  if (of_known * 2 < starts) failed = true;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t starts = argc > 1 ? std::atoi(argv[1]) : 200;
  at::set_num_threads(1);
  at::manual_seed(0);
  std::printf("%-24s %18s %18s\n", "", "computed", "exact");
  dimer();
  water_molecule();
  cluster(starts);
  return failed ? 1 : 0;
}
