"""The neural tangent kernel of finite networks: how it settles as they get wider, and what it predicts.

K(x, x') is the product of the gradients of f(x) and of f(x') by all parameters. For infinite width it is known in
closed form and stays as it is while the network is trained, so that training is regression with that kernel (Jacot,
Gabriel and Hongler 2018, arXiv:1806.07572). For points on a circle:

- the kernels of many networks of each width (one vmap over the networks), against the closed form
- a network trained to the end, against regression with its kernel at the start

    python examples/ntk/ntk.py [--quick] [--widths 16 64 256 512] [--out out/ntk.png]
"""

import argparse
import math
import pathlib

import torch

from torchlift import empirical_ntk, grad, optim, vmap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DTYPE = torch.float64

# --- the network: two hidden layers, in the parametrisation of Jacot et al. ---------------------------------


def make_params(width, generator):
    normal = lambda *shape: torch.randn(*shape, dtype=DTYPE, generator=generator)  # noqa: E731
    return {"w1": normal(width, 2), "w2": normal(width, width), "w3": normal(1, width)}


def network(params, x):
    """[2] -> [1], or [N, 2] -> [N, 1]. The factors keep all layers of size 1 at any width."""
    width = params["w1"].shape[0]
    x = math.sqrt(2) * torch.relu(x @ params["w1"].T)
    x = math.sqrt(2 / width) * torch.relu(x @ params["w2"].T)
    return math.sqrt(1 / width) * (x @ params["w3"].T)


def closed_form(x1, x2):
    """The kernel at infinite width, [N1, N2], for points of length 1: the recursion of Jacot et al. (theorem 1), with
    the expectations over a ReLU of Cho and Saul 2009."""
    cosine = (x1 @ x2.T).clamp(-1, 1)
    kernel = cosine
    for _ in range(2):  # hidden layers
        angle = cosine.acos()
        derivative = 1 - angle / math.pi
        cosine = (angle.sin() / math.pi + cosine * derivative).clamp(-1, 1)
        kernel = cosine + kernel * derivative
    return kernel


def on_circle(angles):
    return torch.stack([angles.cos(), angles.sin()], -1)


# --- how the kernel settles --------------------------------------------------------------------------------


def make_networks(width, count, seed=0):
    """The parameters of many networks, stacked."""
    generator = torch.Generator().manual_seed(seed)
    many = [make_params(width, generator) for _ in range(count)]
    return {name: torch.stack([params[name] for params in many]) for name in many[0]}


def kernels(width, networks, x):
    """The kernels of `networks` random networks at once, [networks, N, N]."""
    chunk = max(1, 2**22 // (width**2 * len(x)))  # of networks, to bound the memory of the Jacobians
    one = lambda params: empirical_ntk(network, params, x, compute="trace")  # noqa: E731
    return vmap(one, chunk_size=chunk)(make_networks(width, networks))


def relative_distance(kernel, limit):
    return (kernel - limit).norm(dim=(-2, -1)) / limit.norm()


# --- training, and regression with the kernel --------------------------------------------------------------

TRAIN_ANGLES = torch.tensor([-2.4, -1.4, -0.3, 0.9, 1.5, 2.6], dtype=DTYPE)


def targets(angles):
    return torch.sin(2 * angles) + 0.5 * torch.cos(angles)


def train(params, x, y, steps):
    """Gradient descent with momentum on the sum of squares, to the end, where nothing moves any more."""
    largest = torch.linalg.eigvalsh(empirical_ntk(network, params, x, compute="trace"))[-1]
    loss = lambda p: (network(p, x)[:, 0] - y).square().sum() / (2 * largest)  # noqa: E731
    sgd = optim.sgd(lr=1.0, momentum=0.9)
    state = sgd.init(params)
    for _ in range(steps):
        params, state = sgd.update(grad(loss)(params), state, params)
    return params


def regression(params, x, y, at):
    """What the network would be after training, were it linear in its parameters: f0(at) + K(at, x) K(x, x)^-1 (y -
    f0(x))."""
    kernel = lambda a, b: empirical_ntk(network, params, a, b, compute="trace")  # noqa: E731
    rest = y - network(params, x)[:, 0]
    return network(params, at)[:, 0] + kernel(at, x) @ torch.linalg.solve(kernel(x, x), rest)


def predict(width, networks, steps):
    """What trained networks and their kernels say around the circle: all networks are trained at once."""
    angles = torch.linspace(-math.pi, math.pi, 121, dtype=DTYPE)
    x, y, at = on_circle(TRAIN_ANGLES), targets(TRAIN_ANGLES), on_circle(angles)

    def one(params):
        trained = train(params, x, y, steps)
        fit = (network(trained, x)[:, 0] - y).abs().max()
        return network(params, at)[:, 0], network(trained, at)[:, 0], regression(params, x, y, at), fit

    before, trained, by_kernel, fit = vmap(one)(make_networks(width, networks, seed=1))
    return {
        "width": width,
        "angles": angles,
        "before": before,
        "trained": trained,
        "kernel": by_kernel,
        "fit": fit.max().item(),
        "difference": (trained - by_kernel).square().mean().sqrt().item(),
    }


def run(widths=(16, 64, 256, 512), networks=10, trained=4, steps=300):
    angles = torch.linspace(-math.pi, math.pi, 25, dtype=DTYPE)
    points, one = on_circle(angles), on_circle(torch.zeros(1, dtype=DTYPE))
    limit = closed_form(points, points)
    distances, slices = {}, {}
    for width in widths:
        found = kernels(width, networks, points)
        distances[width] = relative_distance(found, limit)
        slices[width] = found[:, len(angles) // 2]  # the row of the angle 0
    return {
        "angles": angles,
        "distances": distances,
        "slices": slices,
        "limit": closed_form(one, points)[0],
        "predictions": [predict(width, trained, steps) for width in widths],
    }


def report(found):
    print("root mean squares; of the kernels relative")
    print(f"{'width':>6}{'kernel, from the closed form':>30}{'trained networks, from their kernels':>38}")
    for prediction in found["predictions"]:
        width = prediction["width"]
        print(f"{width:>6}{found['distances'][width].mean():>30.3f}{prediction['difference']:>38.4f}")


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    widths = list(found["slices"])
    for width, color in ((widths[0], "tab:orange"), (widths[-1], "tab:blue")):
        for i, row in enumerate(found["slices"][width]):
            left.plot(found["angles"], row, color=color, lw=0.8, label=None if i else f"networks of width {width}")
    left.plot(found["angles"], found["limit"], "k--", label="infinite width")
    left.set(xlabel="angle of x (rad)", ylabel="K(x, x') for x' at angle 0", title="the kernels of random networks")
    left.legend(loc="upper right", fontsize=8)
    means = [found["distances"][w].mean().item() for w in widths]
    middle.loglog(widths, means, "o-", label="kernel, from the closed form (relative)")
    differences = [p["difference"] for p in found["predictions"]]
    middle.loglog(widths, differences, "s-", label="trained networks, from their kernels")
    middle.loglog(widths, [means[0] * (widths[0] / w) ** 0.5 for w in widths], "k:", label=r"$\propto$ width$^{-1/2}$")
    middle.set(xlabel="width", ylabel="difference (root mean square)", title="both differences vanish with the width")
    middle.set_xticks(widths, [str(width) for width in widths])
    middle.tick_params(axis="x", which="minor", labelbottom=False)
    middle.legend(fontsize=8)
    last = found["predictions"][-1]
    right.plot(last["angles"], last["before"][0], color="0.7", label="before training")
    right.plot(last["angles"], last["trained"][0], label="after training")
    right.plot(last["angles"], last["kernel"][0], "--", label="regression with its kernel")
    right.plot(TRAIN_ANGLES, targets(TRAIN_ANGLES), "k^", label="the points to learn")
    right.set(xlabel="angle of x (rad)", ylabel="f(x)", title=f"a network of width {last['width']}")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "ntk.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    found = run([16, 64, 128]) if options.quick else run(options.widths)
    report(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, found)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
