"""An ensemble of ten digit classifiers, trained as one module, and what their disagreement is good for.

All members take each step together: one vmap for the forward pass, one backward pass. Where they disagree the
answer is uncertain, so the digits they disagree about most hold most of the errors; and noise, on which a single
network is often sure of itself, makes them disagree, as do digits that are turned or mixed with noise. (Deep ensembles:
Lakshminarayanan et al. 2017, arXiv:1612.01474. Not all is found so: see docs/examples/ensemble.md.)

    python examples/ensemble/ensemble.py [--quick] [--members 10] [--digits 1797] [--epochs 20] [--out out/ensemble.png]
                                         [--cpp PROGRAM]

--cpp PROGRAM also runs the C++ version, ensemble.cc, on the same digits.
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
ANGLES = range(0, 61, 10)  # degrees
NOISE = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]  # its share of an image


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


def load(count):
    """(train images, train labels, test images, test labels)"""
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images[:count] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[:count])
    half = len(images) // 2
    return images[:half], labels[:half], images[half:], labels[half:]


def train(ensemble, images, labels, epochs):
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            losses = ensemble.train_step(optimizer, F.cross_entropy, images[batch], labels[batch])
    return losses


def predict(ensemble, images):
    """(mean probabilities [images, 10], uncertainty [images])

    The uncertainty is what the members disagree about: the entropy of the mean less the mean entropy.
    """
    ensemble.eval()
    with torch.no_grad():
        probabilities = ensemble(images).softmax(-1)
    entropy = lambda p: -(p * p.clamp_min(1e-12).log()).sum(-1)  # noqa: E731
    mean = probabilities.mean(0)
    return mean, entropy(mean) - entropy(probabilities).mean(0)


def turned(images, degrees):
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(turn, images.shape, align_corners=False), align_corners=False)


def when_changed(ensemble, change, amounts, images, labels):
    """For each amount: (the amount, accuracy of all members together, mean disagreement)."""
    rows = []
    for amount in amounts:
        mean, uncertainty = predict(ensemble, change(images, amount))
        rows.append((amount, accuracy(mean, labels), uncertainty.mean().item()))
    return rows


def mixed(images, share):
    return (1 - share) * images + share * torch.rand_like(images)


def accuracy(probabilities, labels):
    return (probabilities.argmax(-1) == labels).float().mean().item()


def run(members=10, count=1797, epochs=20):
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load(count)
    ensemble = torchlift.Ensemble.create(make_model, members, init="vmap")
    train(ensemble, images, labels, epochs)
    mean, uncertainty = predict(ensemble, test_images)
    with torch.no_grad():
        singles = [accuracy(out, test_labels) for out in ensemble(test_images)]
    _, of_noise = predict(ensemble, torch.rand_like(test_images))
    wrong = mean.argmax(-1) != test_labels
    return {
        "images": test_images,
        "labels": test_labels,
        "mean": mean,
        "uncertainty": uncertainty,
        "of_noise": of_noise,
        "wrong": wrong,
        "turned": when_changed(ensemble, turned, ANGLES, test_images, test_labels),
        "mixed": when_changed(ensemble, mixed, NOISE, test_images, test_labels),
        "accuracy": accuracy(mean, test_labels),
        "mean_accuracy_of_members": sum(singles) / len(singles),
    }


def run_cpp(program, members, count, epochs):
    """{what: number} as the C++ program prints it: accuracies, and disagreement on digits and noise."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "digits.pt"
        names = ("train_images", "train_labels", "test_images", "test_labels")
        torch.save(dict(zip(names, load(count))), path)
        command = [program, path, str(members), str(epochs)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {name: float(number) for name, number in map(str.split, done.stdout.splitlines())}


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.3])
    left.suptitle("the most uncertain digits: answer (red: wrong)", fontsize=10)
    order = found["uncertainty"].topk(min(25, len(found["labels"]))).indices.tolist()
    for axis, i in zip(left.subplots(5, 5).flat, order):
        axis.imshow(found["images"][i, 0], cmap="gray_r")
        color = "tab:red" if found["wrong"][i] else "tab:blue"
        axis.set_title(f"{found['mean'][i].argmax()}", fontsize=8, color=color, pad=3)
    for axis in left.axes:
        axis.set_axis_off()
    above, below = right.subfigures(2, 1)
    axis = above.subplots()
    turning, mixing = below.subplots(1, 2)
    groups = {
        "digits, right": found["uncertainty"][~found["wrong"]],
        "digits, wrong": found["uncertainty"][found["wrong"]],
        "noise": found["of_noise"],
    }
    axis.hist([g.numpy() for g in groups.values()], bins=30, density=True, label=list(groups))
    axis.set(xlabel="disagreement of the members (nats)", ylabel="density", yscale="log")
    axis.legend()
    draw_changed(turning, found["turned"], "test digits turned by (degrees)")
    draw_changed(mixing, found["mixed"], "share of noise mixed into test digits")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_changed(axis, rows, name):
    amounts, right, disagreement = zip(*rows)
    axis.plot(amounts, right, "o-", color="tab:blue")
    axis.set(xlabel=name, ylim=(0, 1))
    axis.set_ylabel("accuracy", color="tab:blue")
    other = axis.twinx()
    other.plot(amounts, disagreement, "s-", color="tab:red")
    other.set_ylabel("mean disagreement (nats)", color="tab:red")
    other.set_ylim(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--digits", type=int, default=1797)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "ensemble.png")
    parser.add_argument("--quick", action="store_true", help="fewer members, digits and epochs")
    parser.add_argument("--cpp", type=pathlib.Path, help="the C++ program, to run as well")
    options = parser.parse_args()
    sizes = (3, 600, 30) if options.quick else (options.members, options.digits, options.epochs)
    found = run(*sizes)
    print(f"accuracy of a member, on average: {found['mean_accuracy_of_members']:.3f}, of all: {found['accuracy']:.3f}")
    certain, wrong = found["uncertainty"][~found["wrong"]].mean(), found["uncertainty"][found["wrong"]].mean()
    print(f"disagreement on digits answered right: {certain:.3f}, wrong: {wrong:.3f}, noise: {found['of_noise'].mean():.3f}")
    if options.cpp:
        cpp = run_cpp(options.cpp, *sizes)
        print(f"C++: accuracy of a member {cpp['accuracy_of_members']:.3f}, of all: {cpp['accuracy']:.3f}; ", end="")
        print(f"disagreement on right {cpp['right']:.3f}, wrong: {cpp['wrong']:.3f}, noise: {cpp['noise']:.3f}")
    for name, unit in (("turned", " degrees"), ("mixed", " of noise")):
        for amount, share, disagreement in found[name]:
            print(f"{name:<7}{amount:>5g}{unit}: accuracy {share:.3f}, disagreement {disagreement:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, found)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
