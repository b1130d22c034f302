"""A physics-informed network for the Monge-Ampere equation, whose residual needs the whole Hessian at every point.

    det D^2 u = f  on the unit square,  u given on its boundary

The solution is known: u = exp((x^2 + y^2) / 2), for f = (1 + x^2 + y^2) exp(x^2 + y^2) (Dean and Glowinski 2006).
The network corrects an interpolation of the boundary values, so that those always hold (Lagaris et al. 1998).

The Hessians at all points are one vmap(hessian(u)). The gradients of each point's residual by the parameters are
vmap(grad(residual)), with the Hessian inside: with them a Gauss-Newton step can be taken, damped as by Levenberg and
Marquardt, which gets to a precision that Adam does not see (Mueller and Zeinhofer 2023, arXiv:2302.13163, on why).

    python examples/pinn/pinn.py [--quick] [--steps 40] [--out out/pinn.png]
"""

import argparse
import math
import pathlib
import time

import torch
from torch import nn

import torchlift
from torchlift import grad, grad_and_value, hessian, optim, vmap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def exact(point):
    return (point.square().sum(-1) / 2).exp()


def right_side(point):
    square = point.square().sum(-1)
    return (1 + square) * square.exp()


def from_boundary(point):
    """The boundary values, interpolated into the square (a Coons patch)."""
    x, y = point[0], point[1]
    at_x, at_y = (x * x / 2).exp(), (y * y / 2).exp()  # the solution is their product
    corner = math.exp(0.5)
    from_x, from_y = 1 - x + corner * x, 1 - y + corner * y
    return from_x * at_y + from_y * at_x - from_x * from_y


class Problem:
    """The network, and what is made of it. Points are [2]; all functions are of one of them."""

    def __init__(self, width=24, seed=0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        ).double()
        self.params, _ = torchlift.extract_state(self.net)

    def u(self, params, point):
        x, y = point[0], point[1]
        inside = x * (1 - x) * y * (1 - y)
        return from_boundary(point) + inside * torchlift.functional_call(self.net, params, point)[0]

    def residual(self, params, point):
        (uxx, uxy), (_, uyy) = hessian(lambda p: self.u(params, p))(point)
        return uxx * uyy - uxy * uxy - right_side(point)

    def error(self, params, points):
        """The largest and the root of the mean squared difference from the solution."""
        difference = vmap(self.u, in_dims=(None, 0))(params, points) - exact(points)
        return difference.abs().max().item(), difference.square().mean().sqrt().item()


def grid(count):
    """[count * count, 2], the middles of the cells."""
    axis = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.cartesian_prod(axis, axis)


# --- two ways to train ------------------------------------------------------------------------------------
# Both return (parameters, [(seconds, mean squared residual, largest error)]).


def train_by_gauss_newton(problem, points, steps):
    """Levenberg-Marquardt: J is [points, parameters], and the step -J^T (J J^T + damping)^-1 residual."""
    params, damping = problem.params, 1e-2
    rows = vmap(grad_and_value(problem.residual), in_dims=(None, 0))
    residuals = vmap(problem.residual, in_dims=(None, 0))
    check, log, start = grid(20), [], time.perf_counter()
    for _ in range(steps):
        jacobian, residual = rows(params, points)
        flat = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
        gram, loss = flat @ flat.T, residual.square().mean()
        log.append((time.perf_counter() - start, loss.item(), problem.error(params, check)[0]))
        for _ in range(8):  # until the residual gets smaller
            shift = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            step = flat.T @ torch.cholesky_solve(residual[:, None], torch.linalg.cholesky(gram + shift))[:, 0]
            pieces = step.split([p.numel() for p in params.values()])
            tried = {name: p - s.view_as(p) for (name, p), s in zip(params.items(), pieces)}
            if residuals(tried, points).square().mean() < loss:
                params, damping = tried, max(damping / 3, 1e-13)
                break
            damping *= 4
    return params, log


def train_by_adam(problem, points, steps):
    def loss(params):
        return vmap(problem.residual, in_dims=(None, 0))(params, points).square().mean()

    adam, params = optim.adam(3e-3), problem.params
    state, check, log, start = adam.init(params), grid(20), [], time.perf_counter()
    for i in range(steps):
        grads, value = grad_and_value(loss)(params)
        if i % 10 == 0:
            log.append((time.perf_counter() - start, value.item(), problem.error(params, check)[0]))
        params, state = adam.update(grads, state, params)
    return params, log


def run(steps=40, adam_steps=400, per_side=14):
    problem, points = Problem(), grid(per_side)
    vmap(grad(problem.residual), in_dims=(None, 0))(problem.params, points)  # PyTorch imports some things on first use
    by_gauss_newton, log = train_by_gauss_newton(problem, points, steps)
    by_adam, adam_log = train_by_adam(problem, points, adam_steps)
    return {
        "problem": problem,
        "points": points,
        "params": by_gauss_newton,
        "log": log,
        "adam_params": by_adam,
        "adam_log": adam_log,
        "before": problem.error(problem.params, grid(33)),
        "error": problem.error(by_gauss_newton, grid(33)),
        "adam_error": problem.error(by_adam, grid(33)),
    }


def report(found):
    print(f"{'':<16}{'steps':>8}{'seconds':>10}{'mean squared residual':>24}{'largest error of u':>20}")
    print(f"{'before':<16}{'':>8}{'':>10}{found['log'][0][1]:>24.2e}{found['before'][0]:>20.2e}")
    for name, log, error, every in (
        ("Adam", found["adam_log"], found["adam_error"], 10),
        ("Gauss-Newton", found["log"], found["error"], 1),
    ):
        print(f"{name:<16}{len(log) * every:>8}{log[-1][0]:>10.1f}{log[-1][1]:>24.2e}{error[0]:>20.2e}")


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, log in (("Adam", found["adam_log"]), ("Gauss-Newton", found["log"])):
        seconds, residual, error = zip(*log)
        (line,) = left.plot(seconds, error, label=f"{name}: largest error of u")
        left.plot(seconds, residual, ls=":", color=line.get_color(), label=f"{name}: mean squared residual")
    left.set(xlabel="seconds of training", ylabel="error of u, squared residual", yscale="log")
    left.legend(fontsize=8)
    count = 60
    where = grid(count)
    u = vmap(found["problem"].u, in_dims=(None, 0))(found["params"], where)
    for axis, values, title in (
        (middle, u, "the network's u(x, y)"),
        (right, (u - exact(where)).abs(), "its error, |u - exact|"),
    ):
        image = axis.imshow(values.view(count, count).T.numpy(), origin="lower", extent=(0, 1, 0, 1))
        figure.colorbar(image, ax=axis)
        axis.set(xlabel="x", ylabel="y", title=title)
    right.plot(*found["points"].T.numpy(), "w.", ms=2)
    figure.suptitle(r"$\det D^2 u = (1 + x^2 + y^2)\, e^{x^2 + y^2}$ (dots: where the residual is made small)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of Gauss-Newton; Adam takes ten times as many")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "pinn.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    steps = 15 if options.quick else options.steps
    found = run(steps, 10 * steps)
    report(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, found)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
