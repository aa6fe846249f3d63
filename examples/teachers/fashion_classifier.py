# SPDX-License-Identifier: Apache-2.0
"""A small classifier of Fashion-MNIST, the judge of the teachers' samples, and the program that trains it.

    PYTHONPATH=. python examples/teachers/fashion_classifier.py --output_dir examples/teachers/reference

It never sees a generated image. Besides the class it gives the features (the last layer but one) between which the Frechet
distance is measured; the mean and covariance of the real training images' features, and some of these, are stored with it as
`statistics.npz`. Programs use it as the feature network `examples/teachers/fashion_classifier.py:features_of_images`.
"""

import argparse
import json
from pathlib import Path

import torch
from fashion_mnist import CLASSES, DATA_DIR, IMAGE_SIZE, load_fashion_mnist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm


FEATURES = 96
REFERENCE_DIR = Path(__file__).parent / "reference"
STORED_FEATURES = 2000  # of training images, for metrics that compare samples and not moments


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


class FeaturesOfImages(nn.Module):
    """uint8 RGB images `(n, 3, height, width)` to features `(n, 96)`; `logits` gives the class outputs `(n, 10)`."""

    dim = FEATURES

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier
        self.record = {
            "network": "classifier of Fashion-MNIST, 96 features",
            "preprocessing": f"grey as mean of the channels, area resize to {IMAGE_SIZE} x {IMAGE_SIZE}, x / 127.5 - 1",
        }

    @staticmethod
    def prepare(images):
        """Grey images `(n, 1, 32, 32)` in [-1, 1], rounded to 8 bits as the real ones are."""
        grey = images.float().mean(1, keepdim=True).round()
        if grey.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            grey = F.interpolate(grey, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        return grey / 127.5 - 1

    def forward(self, images):
        return self.classifier.features(self.prepare(images))

    def logits(self, images):
        return self.classifier(self.prepare(images))


def features_of_images():
    """The shipped classifier as a feature network of `training`."""
    return FeaturesOfImages(FashionClassifier.from_pretrained(REFERENCE_DIR)).eval()


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


def reference_of(model, images):
    """What `statistics.npz` holds: a reference for `training.evaluate`."""
    from training.features import weights_digest
    from training.frechet import Moments
    from training.references import Reference

    features = classify(model, images)[1]
    network = FeaturesOfImages(model)
    record = {**network.record, "digest": weights_digest(network), "dim": FEATURES}
    # Evenly spread over the images, which come in no order of classes.
    some = features[:: len(features) // STORED_FEATURES][:STORED_FEATURES]
    source = {"images": "Fashion-MNIST, training images padded to 32 x 32"}
    return Reference(Moments.of([features]), record, len(images), source, some)


def main():
    # Here, because as a feature network this file is imported without it.
    from training.frechet import Moments, frechet_distance

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
    statistics = reference_of(model, images)
    statistics.save(folder / "statistics.npz")
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
        "frechet_distance_of_test_images": frechet_distance(Moments.of([test_features]), statistics.moments),
    }
    (folder / "reference.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
