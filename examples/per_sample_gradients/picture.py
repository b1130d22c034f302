"""The demo's picture: the digits with the largest gradients, and how large all gradients are."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

WRONG, RIGHT = "tab:red", "tab:blue"


def draw(path, digits, norms, model_name):
    figure = plt.figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1])
    draw_largest(left, digits, norms)
    draw_histogram(right, digits, norms)
    figure.suptitle(f"Per-sample gradients of the {model_name} on {len(norms):,} digits")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_largest(figure, digits, norms):
    figure.suptitle("the longest gradients: label and length (red: label changed on purpose)", fontsize=10)
    axes = figure.subplots(5, 5).flat
    for axis, i in zip(axes, norms.topk(min(25, len(norms))).indices.tolist()):
        color = WRONG if digits.mislabelled[i] else RIGHT
        axis.imshow(digits.images[i, 0], cmap="gray_r")
        axis.set_title(f"“{digits.labels[i]}”  |g| {norms[i]:.1f}", fontsize=8, color=color, pad=3)
    for axis in figure.axes:
        axis.set_axis_off()


def draw_histogram(figure, digits, norms):
    axis = figure.subplots()
    bins = np.geomspace(max(norms.min().item(), 1e-4), norms.max().item(), 50)
    shown = norms.clamp(min=bins[0]).numpy()
    wrong = digits.mislabelled.numpy()
    axis.hist(shown[~wrong], bins, color=RIGHT, alpha=0.7, label=f"label as given ({(~wrong).sum():,})")
    axis.hist(shown[wrong], bins, color=WRONG, alpha=0.7, label=f"label changed ({wrong.sum()})")
    axis.set(xscale="log", xlabel="norm of the gradient of one digit's loss", ylabel="digits")
    axis.legend()
