"""Four ways to the gradient of every digit's own loss. Each returns {parameter: [count, *its shape]}."""

import json
import os
import subprocess
import tempfile

import torch
import torch.func
import torch.nn.functional as F

import torchlift

CHUNK = 256  # digits at a time: bounds memory


# --- torchlift, in Python ---------------------------------------------------------------------------


def with_torchlift(model, params, images, labels):
    def loss(params, image, label):
        logits = torchlift.functional_call(model, params, (image.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    per_sample = torchlift.vmap(torchlift.grad(loss), in_dims=(None, 0, 0), chunk_size=CHUNK)
    return per_sample(params, images, labels)


# --- the peer, and what one writes without either -----------------------------------------------------


def with_torch_func(model, params, images, labels):
    def loss(params, image, label):
        logits = torch.func.functional_call(model, params, (image.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=CHUNK)
    return per_sample(params, images, labels)


def with_a_loop(model, params, images, labels):
    """Plain autograd, a digit at a time: slow, and what the others are checked against."""
    weights = [model.get_parameter(name) for name in params]
    result = {name: value.new_empty(len(images), *value.shape) for name, value in params.items()}
    for i in range(len(images)):
        loss = F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1])
        for rows, gradient in zip(result.values(), torch.autograd.grad(loss, weights)):
            rows[i] = gradient
    return result


# --- torchlift, in C++ ------------------------------------------------------------------------------


def with_cpp(binary, models, digits, rounds):
    """Runs the C++ program on weights and data exported to it.

    Returns {model: gradients} and {model: seconds of each round}.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights, gradients, times = (os.path.join(folder, name) for name in ("in.pt", "out.pt", "times.json"))
        exported = {"images": digits.images, "labels": digits.labels}
        for name, model in models.items():
            exported |= {f"{name}.{key}": value.detach() for key, value in model.named_parameters()}
        torch.save(exported, weights)
        subprocess.run([binary, weights, gradients, times, str(CHUNK), str(rounds)], check=True)
        # weights_only knows no file of torch::pickle_save; this one was just written by our own program.
        found = torch.load(gradients, weights_only=False)
        with open(times) as file:
            seconds = json.load(file)
    per_model = {
        name: {key: found[f"{name}.{key}"] for key, _ in model.named_parameters()}
        for name, model in models.items()
    }
    return per_model, seconds


# --- comparing ----------------------------------------------------------------------------------------


def max_difference(gradients, reference):
    """The largest difference between two sets of gradients, absolute."""
    assert gradients.keys() == reference.keys()
    return max((gradients[name] - reference[name]).abs().max().item() for name in reference)


def norms(gradients):
    """The Euclidean norm of each digit's gradient, over all parameters: [count]."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
