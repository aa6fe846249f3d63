# SPDX-License-Identifier: Apache-2.0
"""Feature networks: values against direct computations, identity, and what is refused."""

import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from training.features import StoredFeatures, load_feature_network


ROOT = Path(__file__).parents[2]
FASHION = f"{ROOT}/examples/teachers/fashion_classifier.py:features_of_images"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def images(count: int = 3, height: int = 24, width: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def resized(batch: torch.Tensor, side: int, mean, std) -> torch.Tensor:
    """By Pillow's bicubic filter, the whole image."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.BICUBIC) for image in batch]
    pixels = torch.from_numpy(numpy.stack([numpy.array(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**LAYERS, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**LAYERS, "image_size": 16, "patch_size": 8},
        projection_dim=5,
    )
    CLIPModel(config).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    ).save_pretrained(path)
    # As the published one: it enlarges more than it keeps.
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def test_clip_gives_projected_embeddings_of_the_whole_image(clip):
    network = load_feature_network(f"transformers:{clip}")
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(resized(images(), 16, MEAN, STD)).pooler_output
        expected = model.visual_projection(pooled)
    assert network.dim == 5
    assert torch.allclose(network(images()), expected, atol=1e-5)


def test_dinov2_gives_the_class_token_of_the_whole_image(dinov2):
    network = load_feature_network(f"transformers:{dinov2}")
    model = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        tokens = model(resized(images(), 28, MEAN, STD)).last_hidden_state
    assert network.dim == 16
    assert torch.allclose(network(images()), tokens[:, 0], atol=1e-5)
    assert "size 28 x 28, do_center_crop False" in network.record["preprocessing"]


def test_features_do_not_depend_on_the_batch(clip):
    network = load_feature_network(f"transformers:{clip}")
    one_by_one = torch.cat([network(image[None]) for image in images(5)])
    assert torch.allclose(network(images(5)), one_by_one, atol=1e-6)


def test_record_tells_weights_and_preprocessing_apart(clip, tmp_path):
    record = load_feature_network(f"transformers:{clip}").record
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_feature_network(f"transformers:{tmp_path}").record == record  # wherever it lies

    processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path)
    other = load_feature_network(f"transformers:{tmp_path}").record
    assert {key for key in record if record[key] != other[key]} == {"preprocessing"}

    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    assert load_feature_network(f"transformers:{tmp_path}").record["digest"] != record["digest"]


def test_shipped_classifier_is_a_feature_network():
    network = load_feature_network(FASHION)
    assert network.dim == 96
    grey = images(4, 32, 32)[:, :1].expand(-1, 3, -1, -1).contiguous()
    sys.path.insert(0, str(ROOT / "examples" / "teachers"))
    try:
        from fashion_classifier import FashionClassifier
    finally:
        sys.path.pop(0)
    classifier = FashionClassifier.from_pretrained(ROOT / "examples" / "teachers" / "reference")
    with torch.no_grad():
        pixels = grey[:, :1].float() / 127.5 - 1
        assert torch.allclose(network(grey), classifier.features(pixels), atol=1e-6)
        assert torch.allclose(network.logits(grey), classifier(pixels), atol=1e-5)
    double = grey.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(network(double), network(grey), atol=1e-6)  # the mean over an area undoes a repetition


def test_functions_factories_and_modules_are_networks(tmp_path):
    (tmp_path / "neighbour.py").write_text("SCALE = 2.0\n")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from neighbour import SCALE\n"
        "def means(images):\n    return SCALE * images.float().mean((2, 3))\n"
        "def factory():\n    return means\n"
        "class Layer(torch.nn.Module):\n"
        "    dim, record = 3, {'network': 'mine', 'preprocessing': 'none'}\n"
        "    def forward(self, images):\n        return images.float().mean((2, 3)).requires_grad_()\n"
        "def wrong(images):\n    return images.float().mean()[None, None]\n"
        "NUMBER = 3\n"
    )
    expected = images().float().mean((2, 3))
    for name, scale in (("means", 2), ("factory", 2), ("Layer", 1)):
        network = load_feature_network(f"{tmp_path}/mine.py:{name}")
        features = network(images())
        assert torch.equal(features, scale * expected)
        assert network.dim == 3
        assert not features.requires_grad
    assert network.record["network"] == "mine"
    digest = load_feature_network(f"{tmp_path}/mine.py:means").record["digest"]
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# changed\n")
    assert load_feature_network(f"{tmp_path}/mine.py:means").record["digest"] != digest
    with pytest.raises(ValueError, match="no class outputs"):
        network.logits(images())
    with pytest.raises(ValueError, match="one vector an image"):
        load_feature_network(f"{tmp_path}/mine.py:wrong")(images())
    with pytest.raises(ValueError, match="is no function"):
        load_feature_network(f"{tmp_path}/mine.py:NUMBER")
    with pytest.raises(ValueError, match="has no 'other'"):
        load_feature_network(f"{tmp_path}/mine.py:other")


def test_package_names_are_networks(monkeypatch):
    module = types.ModuleType("my_features")
    module.FirstPixel = type("FirstPixel", (torch.nn.Module,), {"forward": lambda self, x: x[:, :, 0, 0].float()})
    monkeypatch.setitem(sys.modules, "my_features", module)
    network = load_feature_network("my_features:FirstPixel")
    assert torch.equal(network(images()), images()[:, :, 0, 0].float())
    assert network.record["network"] == "my_features:FirstPixel"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vgg", "unknown feature network 'vgg'; use inception"),
        ("gone.py:f", "there is no file 'gone.py'"),
        ("no_such_package:f", "cannot import 'no_such_package'"),
        ("transformers:/no/such/folder", "cannot load '/no/such/folder'"),
    ],
)
def test_unknown_networks_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_feature_network(name)


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_feature_network("inception")


@pytest.mark.parametrize("wrong", [images().float(), images()[0], images()[:, :1]])
def test_only_8_bit_rgb_images_are_taken(wrong, clip):
    with pytest.raises(ValueError, match="uint8 images"):
        load_feature_network(f"transformers:{clip}")(wrong)


def test_stored_features_are_read_in_order():
    rows = torch.arange(10.0).reshape(5, 2)
    stored = StoredFeatures(rows, chunk_size=2)
    assert len(stored) == 5
    assert [len(chunk) for chunk in stored.chunks()] == [2, 2, 1]
    assert torch.equal(torch.cat(list(stored.chunks())), rows)
    assert torch.equal(stored.select([4, 0]), rows[[4, 0]])
