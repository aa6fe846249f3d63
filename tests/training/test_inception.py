# SPDX-License-Identifier: Apache-2.0
"""Inception features, in the environment that has torch-fidelity (`make test-lpips`).

The weights are random, because the real ones are downloaded.
"""

import pytest
import torch
from torch.nn import functional as F

from training.features import load_feature_network


inception = pytest.importorskip(
    "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is installed by `make test-lpips` only"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights whose features keep the scale of the input, so that a wrong preprocessing shows."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception.FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_and_logits_are_those_of_torch_fidelity(weights):
    network = load_feature_network("inception", inception_weights=weights)
    theirs = inception.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    features, logits = theirs(images())
    assert network.dim == 2048
    assert features.std() > 1e-3
    assert torch.equal(network(images()), features)
    assert torch.equal(network.logits(images()), logits)
    one_by_one = torch.cat([network(image[None]) for image in images()])
    assert torch.allclose(one_by_one, features, rtol=1e-4, atol=1e-5 * float(features.abs().max()))


def test_latent_diffusion_has_the_same_weights_and_its_own_preprocessing(weights):
    usual, latent = (load_feature_network(name, inception_weights=weights) for name in ("inception", "inception_ldm"))
    assert {key for key in usual.record if usual.record[key] != latent.record[key]} == {"preprocessing"}
    assert not torch.allclose(usual(images()), latent(images()), rtol=1e-2)
    # At 299 pixels neither resizes, and they differ by the scale of the pixels: x / 127.5 - 1 against (x - 128) / 128.
    theirs = inception.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=weights)
    pixels = F.interpolate(images().float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "interpolate_bilinear_2d_like_tensorflow1x", lambda *_, **__: 128 * pixels + 128)
        (expected,) = theirs(images())
    assert torch.allclose(latent(images()), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_digest_follows_the_weights(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["fc.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    first, second = (load_feature_network("inception", inception_weights=w) for w in (weights, tmp_path / "other.pth"))
    assert first.record["digest"] != second.record["digest"]


def test_weights_that_are_none_are_refused(weights, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the Inception weights"):
        load_feature_network("inception", inception_weights=tmp_path / "other.pth")
    torch.save({"run": print}, tmp_path / "hostile.pth")
    for name in ("hostile.pth", "gone.pth"):
        with pytest.raises(ValueError, match="cannot read the Inception weights"):
            load_feature_network("inception", inception_weights=tmp_path / name)


def test_without_a_connection_the_file_is_asked_for(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", refuse)
    with pytest.raises(ValueError, match="no route to host.*--inception_weights"):
        load_feature_network("inception")
