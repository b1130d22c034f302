"""Two things that people do with per-sample gradients."""

import dataclasses

import torch
import torch.nn.functional as F

import torchlift


# --- finding mislabelled data ---------------------------------------------------------------------------


def precision_at_top(norms, mislabelled):
    """Of the k digits with the largest gradients, the share that is mislabelled; k is how many there are."""
    count = int(mislabelled.sum())
    return mislabelled[norms.topk(count).indices].float().mean().item()


# --- differentially private SGD -----------------------------------------------------------------------


@dataclasses.dataclass
class PrivateStep:
    params: dict  # after the step
    clip_norm: float
    clipped_share: float  # of the digits, those whose gradient was longer than clip_norm
    noise_std: float  # of each entry of the mean gradient
    signal_norm: float  # of the mean clipped gradient, without noise
    noise_norm: float


def private_sgd_step(params, gradients, norms, clip_norm, noise_multiplier, learning_rate):
    """Clips every digit's gradient to clip_norm, averages, adds Gaussian noise, and takes a step.

    No digit can move the sum of the gradients by more than clip_norm. The noise on the sum has the
    standard deviation noise_multiplier * clip_norm: what epsilon that means for a whole training run is
    for a privacy accountant to say.
    """
    count = len(norms)
    shrink = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1)
    noise_std = noise_multiplier * clip_norm / count
    generator = torch.Generator().manual_seed(3)

    new_params, signal, noise = {}, [], []
    for name, value in params.items():
        mean = torch.tensordot(shrink, gradients[name], 1) / count
        disturbance = noise_std * torch.randn(mean.shape, generator=generator)
        new_params[name] = value - learning_rate * (mean + disturbance)
        signal.append(mean.flatten())
        noise.append(disturbance.flatten())
    return PrivateStep(
        params=new_params,
        clip_norm=clip_norm,
        clipped_share=(norms > clip_norm).float().mean().item(),
        noise_std=noise_std,
        signal_norm=torch.cat(signal).norm().item(),
        noise_norm=torch.cat(noise).norm().item(),
    )


def mean_loss(model, params, images, labels):
    with torch.no_grad():
        return F.cross_entropy(torchlift.functional_call(model, params, (images,)), labels).item()
