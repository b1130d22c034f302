"""Forces, Hessians and normal modes of molecules, from nothing but their energy.

The gradient of the energy gives the forces that lead to a minimum, the Hessian there gives the vibrations: the
eigenvalues of the mass-weighted Hessian are the squares of the angular frequencies (Wilson, Decius and Cross,
"Molecular Vibrations", 1955). vmap does this for many start geometries at once.

- two Lennard-Jones atoms: one vibration, of the frequency sqrt(k / mu)
- a water molecule in the SPC/Fw force field (Wu, Tepper and Voth 2006): three vibrations, for which Herzberg gives
  formulas
- seven Lennard-Jones atoms from many random starts: the cluster has four minima, of known energies

    python examples/normal_modes/normal_modes.py [--quick] [--starts 200] [--out out/normal_modes.png]
"""

import argparse
import math
import pathlib

import torch

from torchlift import grad, hessian, optim, vmap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# --- energies: of one geometry x, [atoms, 3] -------------------------------------------------------------


def lennard_jones(x):
    """In units of the well's depth, with distances in units of sigma."""
    i, j = torch.triu_indices(len(x), len(x), 1)
    inverse6 = (x[i] - x[j]).square().sum(-1) ** -3
    return 4 * (inverse6.square() - inverse6).sum()


BOND, BOND_LENGTH = 1059.162, 1.012  # kcal/mol/A^2, A
ANGLE, ANGLE_AT_REST = 75.90, math.radians(113.24)  # kcal/mol/rad^2
WATER_MASSES = torch.tensor([15.9994, 1.008, 1.008], dtype=torch.float64)  # O, H, H, in u


def water(x):
    """In kcal/mol, with x in A: oxygen, hydrogen, hydrogen."""
    a, b = x[1] - x[0], x[2] - x[0]
    angle = torch.atan2(torch.linalg.cross(a, b).norm(), a.dot(b))
    stretches = (a.norm() - BOND_LENGTH) ** 2 + (b.norm() - BOND_LENGTH) ** 2
    return BOND / 2 * stretches + ANGLE / 2 * (angle - ANGLE_AT_REST) ** 2


# From the square root of kcal/mol/A^2/u to wave numbers, 1/cm: 1 kcal/mol is 418.4 u A^2/ps^2.
WAVE_NUMBER = math.sqrt(418.4) / (2 * math.pi * 0.0299792458)

# --- minima and vibrations ----------------------------------------------------------------------------


def minimize(energy, starts, steps=400, newton_steps=12):
    """The minima below many start geometries, [starts, atoms, 3], all at once.

    Descends with Adam, then takes Newton steps: along each eigenvector of the Hessian, by the gradient over the
    size of the curvature. Moving or turning the whole molecule has no curvature, and is left out.
    """
    adam = optim.adam(0.02)
    forces = grad(energy)

    def descend(x, state):
        return adam.update(forces(x), state, x)

    def newton(x):
        values, vectors = torch.linalg.eigh(hessian(energy)(x).reshape(x.numel(), x.numel()))
        along = forces(x).flatten() @ vectors
        step = torch.where(values.abs() > 1e-6 * values.abs().max(), -along / values.abs(), 0.0)
        shrink = (0.2 / step.abs().max().clamp_min(1e-300)).clamp_max(1)
        return x + (vectors @ (shrink * step)).reshape(x.shape)

    x, state = starts, vmap(adam.init)(starts)
    for _ in range(steps):
        x, state = vmap(descend)(x, state)
    for _ in range(newton_steps):
        x = vmap(newton)(x)
    return x


def normal_modes(energy, masses, x):
    """(squares of the angular frequencies, ascending [3 * atoms]; displacements [3 * atoms, atoms, 3])."""
    weight = masses.rsqrt().repeat_interleave(3)
    curvature = hessian(energy)(x).reshape(x.numel(), x.numel())
    squares, modes = torch.linalg.eigh(weight[:, None] * curvature * weight)
    return squares, (weight[:, None] * modes).T.reshape(-1, *x.shape)


def frequencies(squares):
    """Angular frequencies; negative for an imaginary one, as is the custom."""
    return squares.sign() * squares.abs().sqrt()


# --- the three molecules --------------------------------------------------------------------------------


def exact_dimer_frequency():
    """sqrt(k / mu): the well's curvature at 2^(1/6) is 72 / 2^(1/3), the reduced mass 1/2."""
    return math.sqrt(72 / 2 ** (1 / 3) / 0.5)


def exact_water_frequencies():
    """Bend, symmetric and antisymmetric stretch, 1/cm (Herzberg, "Infrared and Raman Spectra", 1945, II.4)."""
    m_o, m_h = WATER_MASSES[0].item(), WATER_MASSES[1].item()
    k, bend = BOND / m_h, ANGLE / BOND_LENGTH**2 / m_h
    sine2, cosine2 = math.sin(ANGLE_AT_REST / 2) ** 2, math.cos(ANGLE_AT_REST / 2) ** 2
    total = (1 + 2 * m_h / m_o * cosine2) * k + 2 * (1 + 2 * m_h / m_o * sine2) * bend
    product = 2 * (1 + 2 * m_h / m_o) * k * bend
    root = math.sqrt(total**2 / 4 - product)
    squares = [total / 2 - root, total / 2 + root, (1 + 2 * m_h / m_o * sine2) * k]
    return [WAVE_NUMBER * math.sqrt(s) for s in squares]


# Of the four minima of seven Lennard-Jones atoms (Hoare and McInnes 1976; Cambridge Cluster Database for the first).
SEVEN_ATOMS = [-16.505384, -15.935043, -15.593211, -15.533060]


def dimer():
    x = minimize(lennard_jones, torch.tensor([[[0.0, 0, 0], [1.3, 0.1, 0.2]]], dtype=torch.float64))[0]
    squares, _ = normal_modes(lennard_jones, torch.ones(2, dtype=torch.float64), x)
    return frequencies(squares)


def water_molecule():
    """(geometry [3, 3], frequencies in 1/cm [9], displacements [9, 3, 3])"""
    start = torch.tensor([[[0, 0, 0], [0.9, 0.3, 0.1], [-0.5, 0.8, 0]]], dtype=torch.float64)
    x = minimize(water, start)[0]
    squares, modes = normal_modes(water, WATER_MASSES, x)
    return x, WAVE_NUMBER * frequencies(squares), modes


def cluster(starts, atoms=7, seed=0):
    """(energies [minima], largest force of each, frequencies [minima, 3 * atoms]) of the minima from random starts."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.2 * torch.randn(starts, atoms, 3, dtype=torch.float64, generator=generator)
    x = minimize(lennard_jones, x)
    masses = torch.ones(atoms, dtype=torch.float64)
    squares = vmap(lambda one: normal_modes(lennard_jones, masses, one)[0])(x)
    forces = vmap(grad(lennard_jones))(x).abs().amax((1, 2))
    # A start may lose an atom, or end on a saddle.
    is_minimum = (forces < 1e-8) & (squares[:, 0] > -1e-6) & (squares[:, 6] > 1e-3)
    return vmap(lennard_jones)(x)[is_minimum], forces[is_minimum], frequencies(squares)[is_minimum]


def run(starts=200):
    geometry, water_frequencies, modes = water_molecule()
    energies, forces, cluster_frequencies = cluster(starts)
    return {
        "dimer": dimer(),
        "geometry": geometry,
        "water": water_frequencies,
        "modes": modes,
        "starts": starts,
        "energies": energies,
        "forces": forces,
        "cluster": cluster_frequencies,
    }


# --- report ---------------------------------------------------------------------------------------------


def report(found):
    print(f"{'frequency':<34}{'computed':>14}{'exact':>14}")
    print(f"{'Lennard-Jones dimer':<34}{found['dimer'][-1]:>14.8f}{exact_dimer_frequency():>14.8f}")
    names = ["water, bend, 1/cm", "water, symmetric stretch, 1/cm", "water, antisymmetric stretch, 1/cm"]
    for name, computed, exact in zip(names, found["water"][6:], exact_water_frequencies()):
        print(f"{name:<34}{computed:>14.5f}{exact:>14.5f}")
    print(f"largest of the six that are zero: water {found['water'][:6].abs().max():.1e} 1/cm")
    print(f"\nseven Lennard-Jones atoms: {len(found['energies'])} minima from {found['starts']} starts")
    print(f"{'energy':>12}{'known':>12}{'times':>8}{'lowest frequency':>19}{'highest':>10}")
    for known in SEVEN_ATOMS:
        here = (found["energies"] - known).abs() < 1e-4
        if here.any():
            energy, modes = found["energies"][here][0], found["cluster"][here][0]
            print(f"{energy:>12.6f}{known:>12.6f}{int(here.sum()):>8}{modes[6]:>19.4f}{modes[-1]:>10.4f}")


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.4])
    top.suptitle("the vibrations of a water molecule (arrows: displacements of the atoms)")
    draw_water(top, found)
    axis, spectra = bottom.subplots(1, 2)
    axis.hist(found["energies"], bins=80, range=(-16.6, -15.4), color="tab:blue")
    for known in SEVEN_ATOMS:
        axis.axvline(known, color="tab:red", lw=0.8, ls=":", label="known" if known == SEVEN_ATOMS[0] else None)
    axis.set(xlabel="energy of the minimum (depths of the well)", ylabel=f"starts, of {found['starts']}")
    axis.set_title("seven Lennard-Jones atoms: minima from random starts", fontsize=10)
    axis.legend()
    labels = []
    for row, known in enumerate(SEVEN_ATOMS):
        here = (found["energies"] - known).abs() < 1e-4
        labels.append(f"{known:.3f}")
        if here.any():
            spectra.vlines(found["cluster"][here][0][6:], row - 0.35, row + 0.35, color=f"C{row}")
    spectra.set(xlabel=r"angular frequency ($\sqrt{\epsilon / m \sigma^2}$)", ylabel="energy of the minimum")
    spectra.set_yticks(range(len(labels)), labels)
    spectra.set_xlim(0)
    spectra.set_title("their spectra: 15 vibrations each", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_water(figure, found):
    # In the molecule's plane, turned so that the oxygen is above.
    x = found["geometry"]
    up = torch.nn.functional.normalize(2 * x[0] - x[1] - x[2], dim=0)
    right = torch.nn.functional.normalize(x[1] - x[2], dim=0)
    plane = torch.stack([right, up], 1)
    at = (x - x.mean(0)) @ plane
    names = ["bend", "symmetric stretch", "antisymmetric stretch"]
    for axis, name, frequency, mode in zip(figure.subplots(1, 3), names, found["water"][6:], found["modes"][6:]):
        arrows = mode @ plane * 0.5
        axis.plot(*at[[1, 0, 2]].T, color="0.6", lw=3, zorder=1)
        axis.scatter(*at.T, s=[900, 350, 350], c=["tab:red", "0.9", "0.9"], edgecolors="0.3", zorder=2)
        axis.quiver(*at.T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.012, zorder=3)
        axis.set_title(f"{name}, {frequency:.0f} cm$^{{-1}}$", fontsize=10)
        axis.set(xlim=(-1.6, 1.6), ylim=(-0.75, 0.75), aspect="equal")
        axis.set_axis_off()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few starts")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "normal_modes.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    found = run(20 if options.quick else options.starts)
    report(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, found)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
