"""The data and the models of the demo: scikit-learn's handwritten digits, an MLP and a CNN."""

import dataclasses
from collections import OrderedDict

import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Digits:
    images: torch.Tensor  # [count, 1, 8, 8], from 0 to 1
    labels: torch.Tensor  # [count], some of them wrong
    true_labels: torch.Tensor

    @property
    def mislabelled(self):
        return self.labels != self.true_labels


def load_digits(count, wrong_share):
    """The first `count` of the 1,797 digits that come with scikit-learn, some labels changed on purpose."""
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images[:count] / 16, dtype=torch.float32).unsqueeze(1)
    true_labels = torch.tensor(data.target[:count])
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(len(images), generator=generator)[: round(wrong_share * len(images))]
    labels = true_labels.clone()
    labels[chosen] = (labels[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
    return Digits(images, labels, true_labels)


# The parameters' names are the paths of the C++ structs' fields: hidden1.weight, hidden1.bias...


def make_mlp():
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden1=nn.Linear(64, 64),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(64, 32),
            relu2=nn.ReLU(),
            output=nn.Linear(32, 10),
        )
    )


def make_cnn():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            output=nn.Linear(32 * 2 * 2, 10),
        )
    )


def train(model, digits, epochs):
    """Ordinary training, nothing of torchlift in it. Returns the share of digits it then gets right."""
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model(digits.images).argmax(1) == digits.true_labels
    return right.float().mean().item()
