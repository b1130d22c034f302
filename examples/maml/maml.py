"""MAML on sinusoids: initial parameters from which a few gradient steps on ten points learn a new curve.

Every step of training adapts to a batch of tasks at once: vmap over the tasks, each with an inner loop of
gradient steps, and one gradient through all of it (Finn et al. 2017, section 5.1).

    python examples/maml/maml.py [--quick] [--iterations 2000] [--out out/maml.png]
"""

import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift import grad_and_value, optim, vmap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SUPPORT = QUERY = 10
LR = 0.01


def make_model():
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def draw_tasks(count):
    """(support, query) of sinusoids of random amplitude and phase, each (x, y) of shape [count, 10, 1]."""
    amplitude = torch.rand(count, 1, 1) * 4.9 + 0.1
    phase = torch.rand(count, 1, 1) * math.pi
    x = torch.rand(count, SUPPORT + QUERY, 1) * 10 - 5
    y = amplitude * torch.sin(x + phase)
    return (x[:, :SUPPORT], y[:, :SUPPORT]), (x[:, SUPPORT:], y[:, SUPPORT:])


def run(iterations=2000, tasks=25, steps=1, first_order=False, seed=0):
    torch.manual_seed(seed)
    model = make_model()
    params, _ = torchlift.extract_state(model)

    def loss(params, x, y):
        return F.mse_loss(torchlift.functional_call(model, params, x), y)

    meta = torchlift.maml(loss, steps=steps, lr=LR, first_order=first_order)

    def mean_loss(params, support, query):
        return vmap(meta, in_dims=(None, 0, 0))(params, support, query).mean()

    step = grad_and_value(mean_loss)
    adam = optim.adam(1e-3)
    state, losses = adam.init(params), []
    for _ in range(iterations):
        grads, value = step(params, *draw_tasks(tasks))
        params, state = adam.update(grads, state, params)
        losses.append(value.item())
    return loss, params, losses, model


def draw(path, loss, params, losses, model):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.plot(losses)
    left.set(xlabel="iteration", ylabel="loss on the query points after adapting", yscale="log")
    torch.manual_seed(7)
    (x, y), (xq, yq) = ((a[0], b[0]) for a, b in draw_tasks(1))
    axis = torch.linspace(-5, 5, 200).unsqueeze(1)
    for steps in (0, 1, 10):
        adapted = torchlift.adapt(loss, params, x, y, steps=steps, lr=LR)
        curve = torchlift.functional_call(model, adapted, axis)
        right.plot(axis[:, 0], curve[:, 0].detach(), label=f"after {steps} steps")
    right.plot(x[:, 0], y[:, 0], "k^", label="the ten points it sees")
    right.plot(xq[:, 0], yq[:, 0], "k.", alpha=0.4, label="points of the same curve")
    right.set(xlabel="x", ylabel="y")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "maml.png")
    parser.add_argument("--quick", action="store_true", help="few iterations")
    options = parser.parse_args()
    loss, params, losses, model = run(200 if options.quick else options.iterations)
    print(f"loss after adapting, first 10 iterations: {sum(losses[:10]) / 10:.3f}, last 10: {sum(losses[-10:]) / 10:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, loss, params, losses, model)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
