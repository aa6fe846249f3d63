# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST for the small teachers: images, labels, and the captions that turn it into a text-to-image set.

Images are padded from 28 to 32 pixels so that they can be halved three times, and scaled to [-1, 1]. Thousands of
images share each caption, so the distribution behind a caption is a real one and its sampling ODE is worth solving
well; a caption that fits one image would make any schedule look perfect.
"""

import gzip
from pathlib import Path

import torch


# Where the Debian package `dataset-fashion-mnist` puts the four original files.
DATA_DIR = "/usr/share/datasets/fashion-mnist"
IMAGE_SIZE = 32

# Class names in label order, each with the nouns that captions use for it. No noun serves two classes, so that a
# caption always says which class is meant.
CLASSES = {
    "t-shirt": ["t-shirt", "tee", "short sleeve top"],
    "trousers": ["trousers", "pair of trousers", "pair of pants"],
    "pullover": ["pullover", "sweater", "jumper"],
    "dress": ["dress", "gown", "frock"],
    "coat": ["coat", "jacket", "overcoat"],
    "sandal": ["sandal", "strappy sandal", "open shoe"],
    "shirt": ["shirt", "button-up shirt", "blouse"],
    "sneaker": ["sneaker", "running shoe", "trainer"],
    "bag": ["bag", "handbag", "purse"],
    "ankle boot": ["ankle boot", "boot", "high shoe"],
}
PLURAL_NOUNS = ("trousers",)

# Teachers learn from all wordings; the split is for learning a schedule on some wordings and judging it on others.
TEMPLATES = {
    "train": [
        "a photo of {a}",
        "a picture of {a}",
        "{noun}, product photo",
        "{one} on black",
        "{noun}",
        "an image of {a} on a black background",
        "a grayscale photo of {a}",
        "{noun} from an online shop",
    ],
    "held_out": [
        "a small photo of {a}",
        "{one} for sale",
        "catalogue picture of {a}",
        "{noun} on a dark background",
    ],
}


def captions_of(class_name, split=None):
    """All captions of a class, or those of one split (`"train"` or `"held_out"`)."""
    templates = TEMPLATES["train"] + TEMPLATES["held_out"] if split is None else TEMPLATES[split]
    captions = []
    for template in templates:
        for noun in CLASSES[class_name]:
            plural = noun in PLURAL_NOUNS
            a = noun if plural else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
            captions.append(template.format(noun=noun, a=a, one=noun if plural else f"one {noun}"))
    return captions


def _read_idx(path, header):
    if not path.is_file():
        raise ValueError(
            f"{path.name} is not in '{path.parent}': install the Debian package dataset-fashion-mnist, or put the four "
            ".gz files of github.com/zalandoresearch/fashion-mnist (data/fashion) into a folder and name it with "
            "--data_dir."
        )
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]


def load_fashion_mnist(data_dir=DATA_DIR, train=True):
    """Return images `(n, 1, 32, 32)` as float32 in [-1, 1] and labels `(n,)` as int64, in the order of the files.

    Raises:
        ValueError: a file is missing; the message says where to get it.
    """
    prefix = Path(data_dir) / ("train" if train else "t10k")
    images = _read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"), header=16).view(-1, 1, 28, 28)
    labels = _read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), header=8).long()
    images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return images.float() / 127.5 - 1, labels
