"""Differentially private training on handwritten digits: how much accuracy the noise costs, for how much privacy.

Every step draws a random batch, cuts each digit's gradient to length 1, adds noise to the sum, and takes the mean
(DP-SGD: Abadi et al. 2016, arXiv:1607.00133). torchlift.dp_gradients does that without ever making the gradient of a
single digit: it needs only their lengths. The epsilon that a training run guarantees is computed from Renyi
divergences (Mironov, Talwar and Zhang 2019, arXiv:1908.10530).

    python examples/dp_sgd/dp_sgd.py [--quick] [--noise 0 0.5 1 2 4 8 16] [--steps 200] [--out out/dp_sgd.png]

--cpp PROGRAM also runs the C++ version of the training, dp_sgd.cc, on the same digits.
"""

import argparse
import math
import pathlib
import subprocess
import tempfile

import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import nn

import torchlift

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MAX_NORM, RATE, LR, DELTA = 1.0, 0.1, 0.5, 1e-4  # RATE: the share of the digits in a batch


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def load(count=1797):
    """(train images, train labels, test images, test labels)"""
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images[:count] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[:count])
    part = 2 * len(images) // 3
    return images[:part], labels[:part], images[part:], labels[part:]


# --- training -----------------------------------------------------------------------------------------------


def train(images, labels, noise, steps, seed=0):
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        # Each digit is in the batch by a coin of its own, as the accounting wants it.
        batch = torch.rand(len(images)) < RATE
        torchlift.dp_sgd_step(
            model,
            F.cross_entropy,
            optimizer,
            images[batch],
            labels[batch],
            max_norm=MAX_NORM,
            noise_multiplier=noise,
            expected_batch_size=RATE * len(images),
        )
    return model


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).float().mean().item()


# --- what it guarantees ---------------------------------------------------------------------------------------


def renyi_divergence(order, rate, noise):
    """Of one step with and without a digit, at most: the sampled Gaussian mechanism, for integer orders above 1."""

    def log_term(k):
        chosen = math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        return chosen + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * noise**2)

    terms = [log_term(k) for k in range(order + 1)]
    largest = max(terms)
    return (largest + math.log(sum(math.exp(t - largest) for t in terms))) / (order - 1)


def epsilon(noise, steps, rate=RATE, delta=DELTA):
    """The run is (epsilon, delta)-differentially private."""
    if noise == 0:
        return math.inf
    return min(
        steps * renyi_divergence(order, rate, noise) + math.log(1 / delta) / (order - 1) for order in range(2, 200)
    )


# --- the example ------------------------------------------------------------------------------------------------


def run(noises=(0, 0.5, 1, 2, 4, 8, 16), steps=200, seeds=3, count=1797):
    images, labels, test_images, test_labels = load(count)
    accuracies = []
    for noise in noises:
        models = [train(images, labels, noise, steps, seed) for seed in range(seeds)]
        accuracies.append([accuracy(model, test_images, test_labels) for model in models])
    start = make_model()
    return {
        "noises": list(noises),
        "steps": steps,
        "accuracies": torch.tensor(accuracies),  # [noises, seeds]
        "epsilons": [epsilon(noise, steps) for noise in noises],
        "norms_before": torchlift.per_sample_grad_norms(start, F.cross_entropy)(images, labels),
        "norms_after": torchlift.per_sample_grad_norms(models[0], F.cross_entropy)(images, labels),
    }


def run_cpp(program, noises, steps, count=1797):
    """{noise: accuracy} of the C++ program."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "digits.pt"
        names = ("train_images", "train_labels", "test_images", "test_labels")
        torch.save(dict(zip(names, load(count))), path)
        command = [program, path, str(steps), *[str(noise) for noise in noises]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    return {float(noise): float(right) for noise, right in rows}


def report(found):
    print(f"test accuracy after {found['steps']} steps, mean of {found['accuracies'].shape[1]} runs (delta = {DELTA:g})")
    cpp = found.get("cpp")
    print(f"{'noise':>6}{'epsilon':>10}{'accuracy':>10}{'C++' if cpp else '':>8}")
    for noise, bound, row in zip(found["noises"], found["epsilons"], found["accuracies"]):
        print(f"{noise:>6g}{bound:>10.3g}{row.mean():>10.3f}" + (f"{cpp[noise]:>8.3f}" if cpp else ""))


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    places = range(len(found["noises"]))
    rows = found["accuracies"]
    left.plot(places, rows.mean(1).numpy(), color="tab:blue", label="mean")
    left.plot(places, rows.numpy(), "o", color="tab:blue", alpha=0.4)
    left.plot([], [], "o", color="tab:blue", alpha=0.4, label="a training run")
    if "cpp" in found:
        left.plot(places, [found["cpp"][noise] for noise in found["noises"]], "kx", label="C++")
    left.axhline(0.1, color="0.5", ls=":", label="guessing")
    bounds = ["∞" if math.isinf(e) else f"{e:.2g}" for e in found["epsilons"]]
    left.set_xticks(places, [f"{noise:g}\n{bound}" for noise, bound in zip(found["noises"], bounds)])
    left.set(xlabel=f"noise multiplier, and epsilon below it (at delta = {DELTA:g})", ylabel="accuracy on test digits")
    left.set_ylim(0, 1)
    left.legend()
    largest = max(found["norms_before"].max().item(), found["norms_after"].max().item())
    for name, label in (("norms_before", "before training"), ("norms_after", f"after, noise {found['noises'][-1]:g}")):
        right.hist(found[name].numpy(), bins=50, range=(0, largest), alpha=0.6, label=label)
    right.axvline(MAX_NORM, color="k", ls="--", label="cut to")
    right.set(xlabel="length of the gradient of one digit's loss", ylabel="digits")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 0.5, 1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="one run each, of fewer steps")
    parser.add_argument("--cpp", type=pathlib.Path, help="the C++ program, to run as well")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "dp_sgd.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    steps, seeds = (60, 1) if options.quick else (options.steps, 3)
    found = run(options.noise, steps, seeds)
    if options.cpp:
        found["cpp"] = run_cpp(options.cpp, options.noise, steps)
    report(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, found)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
