"""Small classifier of the 8x8 digits, whose features judge samples of the bundled model.

    python benchmarks/digit_classifier.py    # trains it again, writes digit_classifier.safetensors

Frechet distances on its 64 features compare students of the bundled digits with each other and with nothing
else. It is trained on four fifths of the digits, shifted by up to one pixel and noised a little.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "digit_classifier.safetensors"
DIGITS = HERE.parent / "bidm_cli" / "demo" / "digits.npz"
STEPS, BATCH = 3000, 128


class DigitClassifier(nn.Module):
    """Images [N, 1, 8, 8] in [-1, 1] to logits [N, 10]; ``features`` gives the 64 numbers before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.third = nn.Linear(64 * 16, 64)
        self.last = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Features [N, 64]."""
        x = F.relu(self.first(x))
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return F.relu(self.third(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))

    @classmethod
    def load(cls) -> DigitClassifier:
        """The trained classifier that lies beside this file."""
        network = cls()
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
        return network.eval().requires_grad_(False)


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images [N, 1, 8, 8] in [-1, 1], and labels [N]."""
    with np.load(DIGITS) as file:
        images, labels = file["images"], file["labels"]
    pixels = torch.from_numpy(images).float().reshape(len(images), 1, 8, 8)
    return pixels / 127.5 - 1, torch.from_numpy(labels).long()


def train(seed: int = 0) -> tuple[DigitClassifier, float]:
    """A classifier and its accuracy on the fifth of the digits that it was not trained on."""
    torch.manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(images))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    network = DigitClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = rest[torch.randint(len(rest), (BATCH,))]
        padded = F.pad(images[rows], (1, 1, 1, 1), value=-1.0)
        top, left = torch.randint(3, (2,)).tolist()
        x = padded[:, :, top : top + 8, left : left + 8]
        x = x + 0.1 * torch.rand(()) * torch.randn_like(x)
        loss = F.cross_entropy(network(x), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        accuracy = (network(images[held]).argmax(1) == labels[held]).float().mean()
    return network, float(accuracy)


def main() -> None:
    """Train, print the accuracy, write the weights."""
    network, accuracy = train()
    save_file({name: tensor.half() for name, tensor in network.state_dict().items()}, WEIGHTS)
    print(f"{WEIGHTS}: {accuracy:.2%} of the held-out digits")


if __name__ == "__main__":
    main()
