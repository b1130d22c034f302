"""Per-sample gradients of real models on real data, and two things to do with them.

Trains an MLP and a CNN on scikit-learn's handwritten digits, some of them labelled wrongly on purpose. Then
computes the gradient of each digit's own loss by torchlift in C++ and in Python, by torch.func and by a
loop over plain autograd, checks that all agree and tells how long each took. Then uses the gradients: the
longest ones point at wrong labels, and clipped and noised they make a differentially private SGD step.

Run it as tools/demo: that builds what it needs.
"""

import argparse
import ctypes
import os
import pathlib
import statistics
import sys
import time

import torch

import digits as data
import picture
import uses
import ways

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WRONG_SHARE = 0.05
TOLERANCE = 1e-4  # of the largest gradient: float32, and sums in another order
MODELS = {"mlp": data.make_mlp, "cnn": data.make_cnn}
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:5.1f} s] {text}", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=1797, help="how many of the digits (default: all)")
    parser.add_argument("--epochs", type=int, default=8, help="of training (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds (default: 5)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "per_sample_gradients.png", help="the picture")
    parser.add_argument(
        "--binary", default=os.environ.get("TORCHLIFT_DEMO_BINARY"), help="the C++ program (default: what tools/demo built)"
    )
    options = parser.parse_args()
    if not options.binary:
        parser.error("no C++ program: run tools/demo, or give --binary")
    return options


def keep_freed_memory():
    """Stops glibc from giving freed memory back to the kernel, which would have to clear it for every round.

    A long-running program gets there by itself. The C++ program does the same.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


# --- the steps ------------------------------------------------------------------------------------------


def train_models(digits, epochs):
    models = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        models[name] = make()
        accuracy = data.train(models[name], digits, epochs)
        count = sum(p.numel() for p in models[name].parameters())
        say(f"{name}: {count:,} parameters, {epochs} epochs, {accuracy:.1%} of the digits right")
    return models


PYTHON_WAYS = {
    "torchlift, Python": ways.with_torchlift,
    "torch.func": ways.with_torch_func,
    "loop": ways.with_a_loop,
}


def compute_in_python(model, digits, rounds):
    """{way: gradients} and {way: seconds of each round}. The ways take turns, so that noise hits all."""
    params = {name: value.detach() for name, value in model.named_parameters()}
    gradients, seconds = {}, {way: [] for way in PYTHON_WAYS}
    for _ in range(rounds):
        for way, compute in PYTHON_WAYS.items():
            gradients.pop(way, None)
            start = time.perf_counter()
            gradients[way] = compute(model, params, digits.images, digits.labels)
            seconds[way].append(time.perf_counter() - start)
    return gradients, seconds


def compute_all(models, digits, options):
    """{model: {way: gradients}} and {model: {way: median seconds}}."""
    gradients, medians = {}, {}
    for name, model in models.items():
        say(f"{name}: gradients of {len(digits.images):,} digits in Python, {options.rounds} rounds")
        gradients[name], seconds = compute_in_python(model, digits, options.rounds)
        medians[name] = {way: statistics.median(s) for way, s in seconds.items()}
    say("the same in C++")
    cpp_gradients, cpp_seconds = ways.with_cpp(options.binary, models, digits, options.rounds)
    for name in models:
        gradients[name] = {"torchlift, C++": cpp_gradients[name]} | gradients[name]
        medians[name] = {"torchlift, C++": statistics.median(cpp_seconds[name])} | medians[name]
    return gradients, medians


def report(gradients, medians, count):
    """The table. Returns whether all ways agree with the loop."""
    agree = True
    print(f"\n{'model':<7}{'way':<20}{'ms':>9}{'us a digit':>12}{'x loop':>9}{'max difference':>16}")
    for model, by_way in gradients.items():
        reference, loop_seconds = by_way["loop"], medians[model]["loop"]
        largest = max(g.abs().max().item() for g in reference.values())
        for way, found in by_way.items():
            seconds, difference = medians[model][way], ways.max_difference(found, reference)
            agree = agree and difference <= TOLERANCE * largest
            print(
                f"{model:<7}{way:<20}{seconds * 1e3:>9.1f}{seconds / count * 1e6:>12.1f}"
                f"{loop_seconds / seconds:>9.1f}{difference:>16.1e}"
            )
        print(f"{'':<7}largest entry of a gradient: {largest:.2f}; differences allowed up to {TOLERANCE * largest:.0e}")
    print(f"Medians; one thread; at most {ways.CHUNK} digits at a time. Difference: absolute, from the loop.\n")
    return agree


def find_wrong_labels(gradients, digits):
    say(f"{int(digits.mislabelled.sum())} labels were changed before training; the longest gradients find them:")
    for name, by_way in gradients.items():
        precision = uses.precision_at_top(ways.norms(by_way["torchlift, Python"]), digits.mislabelled)
        print(f"    {name}: {precision:.1%} of the top {int(digits.mislabelled.sum())} are wrong labels")
    print(f"    (picked blindly: {digits.mislabelled.float().mean():.1%})")


def take_private_step(model, gradients, digits):
    params = {name: value.detach() for name, value in model.named_parameters()}
    norms = ways.norms(gradients)
    step = uses.private_sgd_step(
        params, gradients, norms, clip_norm=norms.median().item(), noise_multiplier=1.0, learning_rate=0.5
    )
    before = uses.mean_loss(model, params, digits.images, digits.labels)
    after = uses.mean_loss(model, step.params, digits.images, digits.labels)
    say("one differentially private SGD step of the cnn, all digits as its batch:")
    print(f"    clipped to {step.clip_norm:.3g} (the median norm): {step.clipped_share:.1%} of the gradients")
    print(f"    noise of standard deviation {step.noise_std:.2e} an entry (noise multiplier 1.0)")
    print(f"    length of the mean gradient {step.signal_norm:.3g}, of the noise {step.noise_norm:.3g}")
    print(f"    loss {before:.4f} -> {after:.4f}")


def main():
    options = parse_arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    digits = data.load_digits(options.digits, WRONG_SHARE)
    say(f"{len(digits.images):,} digits of 8 x 8, {WRONG_SHARE:.0%} of them labelled wrongly on purpose")
    models = train_models(digits, options.epochs)

    gradients, medians = compute_all(models, digits, options)
    agree = report(gradients, medians, len(digits.images))

    find_wrong_labels(gradients, digits)
    take_private_step(models["cnn"], gradients["cnn"]["torchlift, Python"], digits)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.draw(options.out, digits, ways.norms(gradients["cnn"]["torchlift, C++"]), "CNN")
    say(f"picture: {options.out}")
    if not agree:
        sys.exit("FAILED: some gradients differ from the loop's")
    say("all gradients agree with the loop")


if __name__ == "__main__":
    main()
