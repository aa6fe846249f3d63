# SPDX-License-Identifier: Apache-2.0
"""A small classifier of Fashion-MNIST, the judge of the teachers' samples, and the program that trains it.

    python examples/teachers/fashion_classifier.py --output_dir examples/teachers/reference

It never sees a generated image. Besides the class it gives the features (the last layer but one) between which
`frechet_distance` is measured; the mean and covariance of the real training images' features are stored with it.
"""

import argparse
import json
from pathlib import Path

import torch
from fashion_mnist import CLASSES, DATA_DIR, load_fashion_mnist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm


FEATURES = 96


class FashionClassifier(nn.Module):
    """Images `(n, 1, 32, 32)` in [-1, 1] to logits `(n, 10)`; `features` gives the `(n, 96)` before the last layer."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width, stride in ((24, 1), (32, 2), (48, 1), (64, 2), (80, 1), (FEATURES, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def features(self, images):
        return self.trunk(images).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(F.dropout(self.features(images), 0.2, self.training))

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        weights = load_file(Path(folder) / "classifier.safetensors")
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        return model.eval()


@torch.no_grad()
def classify(model, images, batch_size=500):
    """Predicted labels `(n,)` and features `(n, 96)` of gray images `(n, 1, 32, 32)` in [-1, 1]."""
    features = torch.cat([model.features(batch) for batch in images.split(batch_size)])
    return model.head(features).argmax(1), features


def mean_and_covariance(features):
    """Mean `(d,)` and covariance `(d, d)` in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017 (arXiv 1706.08500).

    The trace of the root is taken from the symmetric product C1^(1/2) C2 C1^(1/2), which has the same eigenvalues as
    C1 C2 and none that are negative but by rounding.
    """
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root).item()


def train(images, labels, args):
    torch.manual_seed(args.seed)
    model = FashionClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.num_train_epochs * (len(images) // args.train_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    progress = tqdm(total=steps, mininterval=10)
    for _ in range(args.num_train_epochs):
        order = torch.randperm(len(images)).split(args.train_batch_size)
        for index in order[: len(images) // args.train_batch_size]:
            # One shift and one flip for the whole batch: cheap, and enough to slow down memorising.
            dx, dy = torch.randint(-2, 3, (2,)).tolist()
            batch = images[index].roll((dx, dy), dims=(2, 3))
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default=DATA_DIR)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_epochs", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, labels = load_fashion_mnist(args.data_dir, train=True)
    test_images, test_labels = load_fashion_mnist(args.data_dir, train=False)
    model = train(images, labels, args)

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(weights, folder / "classifier.safetensors")
    # Everything below is measured with the rounded weights, since these are the ones that will be used.
    model = FashionClassifier.from_pretrained(folder)
    predicted, test_features = classify(model, test_images)
    mean, cov = mean_and_covariance(classify(model, images)[1])
    save_file({"mean": mean, "covariance": cov}, folder / "statistics.safetensors")
    right = predicted == test_labels
    record = {
        "data_set": "Fashion-MNIST, padded to 32x32, gray, [-1, 1]",
        "classes": list(CLASSES),
        "test_accuracy": right.double().mean().item(),
        "test_accuracy_per_class": {
            name: right[test_labels == i].double().mean().item() for i, name in enumerate(CLASSES)
        },
        "test_images": len(test_images),
        "feature_layer": "mean over pixels of the last convolution, after its ReLU",
        "feature_dim": FEATURES,
        "statistics_images": len(images),
        "frechet_distance_of_test_images": frechet_distance(mean, cov, *mean_and_covariance(test_features)),
    }
    (folder / "reference.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
