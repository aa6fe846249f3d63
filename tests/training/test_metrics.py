# SPDX-License-Identifier: Apache-2.0
"""Metrics against torchmetrics and their formulas; references that belong to a network; what is undefined is refused."""

import json
import math
from pathlib import Path

import numpy
import pytest
import scipy.linalg
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from training.features import StoredFeatures, load_feature_network
from training.frechet import Moments
from training.inception_score import inception_score, inception_score_influence
from training.kernel_distance import (
    cmmd,
    cmmd_kernel,
    discrepancy_influence,
    kernel_inception_distances,
    kid_kernel,
)
from training.metrics import METRICS, Samples, count_warnings, make_metrics
from training.objectives import make_distance
from training.references import Reference, load_reference


ROOT = Path(__file__).parents[2]
FASHION = f"{ROOT}/examples/teachers/fashion_classifier.py:features_of_images"
STATISTICS = ROOT / "examples" / "teachers" / "reference" / "statistics.npz"
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def rows(count: int, dim: int = 8, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def images(count: int = 6, side: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


class Identity(torch.nn.Module):
    num_features = 8

    def forward(self, features):
        return features


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**LAYERS, "vocab_size": 8, "max_position_embeddings": 6, "eos_token_id": 1},
        vision_config={**LAYERS, "image_size": 16, "patch_size": 8},
        projection_dim=5,
    )
    CLIPModel(config).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(path)
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<end>", "a", "red", "fox", "coat", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "words.json"))
    PreTrainedTokenizerFast(
        tokenizer_file=str(path / "words.json"), pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


# ---------------------------------------------------------------------- sample by sample


def test_distances_to_the_teacher_by_their_formulas():
    own, teacher = (Samples(rows(6, 12, k).reshape(6, 3, 2, 2), images(seed=k)) for k in (0, 1))
    mse, psnr, stlpips = make_metrics(["mse", "psnr", "stlpips"])
    difference = own.ends.double() - teacher.ends.double()
    assert torch.allclose(mse.measure(own, teacher), difference.square().mean((1, 2, 3)), rtol=1e-6)
    squared = (own.images.double() - teacher.images.double()).square().mean((1, 2, 3))
    assert torch.allclose(psnr.measure(own, teacher), 10 * (255**2 / squared).log10())
    distance = make_distance("stlpips", "pixel")
    expected = distance(own.images / 127.5 - 1, teacher.images / 127.5 - 1)
    assert torch.allclose(stlpips.measure(own, teacher), expected.double(), rtol=1e-5)
    assert mse.measure(own, own).tolist() == [0.0] * 6
    # Equal pictures: as if one of all values differed by one.
    assert psnr.measure(own, own).tolist() == pytest.approx([10 * math.log10(255**2 * 3 * 32 * 32)] * 6)
    assert psnr.higher_is_better and not mse.higher_is_better
    for metric in (mse, psnr, stlpips):
        assert metric.measure(own, teacher).dtype == torch.float64
        with pytest.raises(ValueError, match="give a teacher"):
            metric.measure(own)
        with pytest.raises(ValueError, match="same number and size"):
            metric.measure(own, Samples(None, images(5)))
    with pytest.raises(ValueError, match="use psnr"):
        mse.measure(Samples(None, own.images), teacher)


def test_clip_score_is_the_cosine_of_each_pair(clip):
    (metric,) = make_metrics(["clip_score"], clip_model=str(clip))
    prompts = [["a red fox", "coat", "a a a red red fox fox coat fox"][k % 3] for k in range(40)]
    batch = images(40, side=16)
    found = metric.measure(Samples(None, batch, prompts))

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    with torch.no_grad():
        for k in (0, 1, 2, 39):
            pixels = (batch[k : k + 1] / 255 - mean) / std  # of the network's size already
            visual = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            tokens = tokenizer(prompts[k], truncation=True, max_length=6, return_tensors="pt")
            text = model.text_projection(model.text_model(tokens["input_ids"]).pooler_output)[0]
            cosine = float(visual @ text / visual.norm() / text.norm())
            assert float(found[k]) == pytest.approx(100 * max(cosine, 0), abs=1e-4)
    assert 0 < float((found > 0).double().mean()) < 1  # both branches of the maximum were seen
    with pytest.raises(ValueError, match="needs the samples' prompts"):
        metric.measure(Samples(None, batch))
    with pytest.raises(ValueError, match="40 images and 39 prompts"):
        metric.measure(Samples(None, batch, prompts[1:]))


# ---------------------------------------------------------------------- sets


def test_kid_is_that_of_torchmetrics_on_the_same_subsets():
    real, fake = rows(60), rows(50, seed=1, shift=0.4)
    metric = KernelInceptionDistance(feature=Identity(), subsets=20, subset_size=30).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    torch.manual_seed(3)
    mean, std = metric.compute()
    found = kernel_inception_distances(StoredFeatures(fake), real, subsets=20, subset_size=30, seed=3)
    assert float(found.mean()) == pytest.approx(float(mean), rel=1e-6)
    assert float(found.std(correction=0)) == pytest.approx(float(std), rel=1e-6)


def test_kid_is_unbiased_and_takes_few_samples():
    real = rows(400)
    values = torch.cat(
        [kernel_inception_distances(StoredFeatures(rows(5, seed=k)), real, subsets=5, seed=k) for k in range(1, 301)]
    )
    per_set = values.reshape(300, 5).mean(1)
    assert abs(float(per_set.mean())) < 4 * float(per_set.std()) / 300**0.5
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_inception_distances(StoredFeatures(rows(1)), real)


@pytest.mark.parametrize("count", [10, 57, 105])
def test_inception_score_is_that_of_torchmetrics(count):
    logits = 2 * rows(count)
    metric = InceptionScore(feature=Identity(), splits=10).set_dtype(torch.float64)
    metric.update(logits.double())
    torch.manual_seed(0)
    assert inception_score(StoredFeatures(logits, chunk_size=8)) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_inception_score_of_known_sets():
    certain = 100 * torch.eye(4).repeat(10, 1)
    assert inception_score(StoredFeatures(certain), splits=1) == pytest.approx(4)
    assert inception_score(StoredFeatures(torch.zeros(40, 4))) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(StoredFeatures(torch.zeros(9, 4)))


def test_cmmd_is_its_formula():
    x, y = rows(13), rows(9, seed=1, shift=1.0)
    a, b = ([[value / math.hypot(*row) for value in row] for row in z.tolist()] for z in (x, y))

    def mean(p, q):
        return sum(math.exp(-(math.dist(u, v) ** 2) / 200) for u in p for v in q) / len(p) / len(q)

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(StoredFeatures(x, chunk_size=4), y) == pytest.approx(expected, rel=1e-8)
    assert cmmd(StoredFeatures(x), x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kernel", [cmmd_kernel, kid_kernel])
def test_influence_on_a_discrepancy_is_the_derivative_in_the_samples_weights(kernel):
    """Of the estimate with all pairs; the unbiased one differs by 1 / n."""
    x, y = rows(200, shift=0.7), rows(300, seed=1)
    weights = torch.full((200,), 1 / 200, dtype=torch.float64, requires_grad=True)
    shares = weights / weights.sum()
    discrepancy = shares @ kernel(x, x) @ shares + kernel(y, y).mean() - 2 * shares @ kernel(x, y).mean(1)
    (gradient,) = torch.autograd.grad(discrepancy, weights)
    found = discrepancy_influence(StoredFeatures(x, chunk_size=70), y, kernel)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [57, 105])
def test_influence_on_the_inception_score_is_the_derivative_in_the_samples_weights(count):
    logits = 2 * rows(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    weights = torch.full((count,), 1 / count, dtype=torch.float64, requires_grad=True)
    scores = []
    for members in order.split(-(-count // 10)):
        shares = weights[members] / weights[members].sum()
        mean = shares @ p[members]
        scores.append((shares @ (p[members] * (p[members] / mean).log()).sum(1)).exp())
    score = torch.stack(scores).mean()
    assert inception_score(StoredFeatures(logits)) == pytest.approx(float(score.detach()), rel=1e-9)
    (gradient,) = torch.autograd.grad(score, weights)
    found = inception_score_influence(StoredFeatures(logits, chunk_size=8))
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- by name


def test_metrics_of_the_shipped_classifier():
    fid, kid, score = make_metrics(["fid", "kid", "is", "fid"], feature_network=FASHION, reference=STATISTICS)
    assert fid.network is kid.network is score.network
    assert fid.label == "Frechet distance (fashion_classifier.py:features_of_images)"
    assert (fid.minimum, fid.advised, kid.minimum) == (97, 480, 2)
    assert (fid.outputs, score.outputs) == ("features", "logits")
    stored = fid.reference.stored_features()
    features = StoredFeatures(stored)
    assert len(stored) == 2000
    with numpy.load(STATISTICS) as file:
        root = scipy.linalg.sqrtm(file["sigma"] @ numpy.cov(stored.double().numpy().T)).real
        shift = file["mu"] - stored.double().mean(0).numpy()
        direct = shift @ shift + numpy.trace(file["sigma"] + numpy.cov(stored.double().numpy().T) - 2 * root)
    assert fid.score(features) == pytest.approx(direct, rel=1e-6)
    # Real images are far nearer to the 60,000 than the teachers' samples, which are at 0.7 and 0.9.
    assert fid.score(features) < 0.1
    assert abs(1e3 * kid.score(StoredFeatures(stored[:300]))) < 10
    for metric, outputs in ((fid, features), (kid, features), (score, StoredFeatures(rows(40, 10)))):
        influence = metric.influence(outputs)
        assert influence.shape == (len(outputs),) and abs(float(influence.mean())) < 1e-9


def test_few_samples_warn_and_too_few_are_refused():
    metrics = make_metrics(["mse", "fid", "kid"], feature_network=FASHION, reference=STATISTICS)
    warnings = count_warnings(metrics, 400)
    assert [warning.partition(" (")[0] for warning in warnings] == ["Frechet distance", "Kernel distance"]
    assert "400 samples is rough; trust it from about 480 on" in warnings[0]
    assert count_warnings(metrics, 1000) == []
    for act in (
        lambda: count_warnings(metrics, 96),
        lambda: metrics[1].score(StoredFeatures(rows(96, 96))),
        lambda: metrics[1].influence(StoredFeatures(rows(96, 96))),
    ):
        with pytest.raises(
            ValueError, match="undefined for 96 samples, it needs at least 97; sample more, or use kid"
        ):
            act()
    with pytest.raises(ValueError, match="at least 2"):
        count_warnings(metrics[2:], 1)


def test_cmmd_and_dinov2_find_their_references(clip, tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path / "dinov2"
    )
    real, files = images(40, 28, seed=3), []
    for folder in (clip, tmp_path / "dinov2"):
        network = load_feature_network(f"transformers:{folder}")
        features = network(real)
        files.append(tmp_path / f"{folder.name}.npz")
        Reference(Moments.of([features]), network.record, 40, features=features).save(files[-1])
    options = {"clip_model": str(clip), "dinov2_model": str(tmp_path / "dinov2")}
    by_clip, by_dinov2 = make_metrics(["cmmd", "fd_dinov2"], reference=files[::-1], **options)
    assert (by_clip.reference.path, by_dinov2.reference.path) == (str(files[0]), str(files[1]))
    assert by_clip.label == f"CMMD ({clip.name})"
    assert by_clip.score(StoredFeatures(by_clip.network(real))) == pytest.approx(0, abs=1e-6)
    assert by_dinov2.score(StoredFeatures(by_dinov2.network(real))) == pytest.approx(0, abs=1e-6)
    assert by_clip.score(StoredFeatures(by_clip.network(255 - real // 2))) > 1e-3
    features = by_clip.network(255 - real // 2)
    expected = 1000 * discrepancy_influence(StoredFeatures(features), by_clip.reference.features, cmmd_kernel)
    assert torch.equal(by_clip.influence(StoredFeatures(features)), expected)
    with pytest.raises(ValueError, match=r"cmmd: the reference .*dinov2.npz' was made by Dinov2Model"):
        make_metrics(["cmmd"], reference=[files[1], STATISTICS], **options)
    with pytest.raises(ValueError, match="are all of the feature network"):
        make_metrics(["cmmd"], reference=[files[0], files[0]], **options)


def test_impossible_metrics_are_refused(clip, tmp_path):
    with pytest.raises(ValueError, match=f"unknown metrics fidd; use some of {', '.join(METRICS)}"):
        make_metrics(["fidd"])
    for name in ("fid", "kid", "cmmd", "fd_dinov2"):
        with pytest.raises(ValueError, match=f"^{name} compares with real images: give --reference"):
            make_metrics([name])
    with pytest.raises(ValueError, match="has none; use inception or a classifier"):
        make_metrics(["is"], feature_network=f"transformers:{clip}")
    with pytest.raises(ValueError, match="cannot load '/no/clip'"):
        make_metrics(["clip_score"], clip_model="/no/clip")
    with pytest.raises(ValueError, match=r"statistics.npz' was made by classifier .*and 'transformers.* is CLIPModel"):
        make_metrics(["fid"], feature_network=f"transformers:{clip}", reference=STATISTICS)


# ---------------------------------------------------------------------- references


def test_reference_comes_back_as_saved(tmp_path):
    network = load_feature_network(FASHION)
    reference = Reference(Moments.of([rows(200, 96)]), network.record, 200, {"images": "noise"}, rows(5, 96))
    reference.save(tmp_path / "noise.npz")
    found = load_reference(tmp_path / "noise.npz")
    found.check(network)
    assert torch.equal(found.moments.mean, reference.moments.mean)
    assert torch.equal(found.moments.covariance, reference.moments.covariance)
    assert torch.equal(found.stored_features(), rows(5, 96))
    assert (found.moments.count, found.source) == (200, {"images": "noise"})
    with numpy.load(tmp_path / "noise.npz") as file:  # EDM's form
        assert file["mu"].dtype == file["sigma"].dtype == numpy.float64
        assert file["sigma"].shape == (96, 96)


@pytest.mark.parametrize("key", ["network", "preprocessing", "digest"])
def test_reference_of_another_network_is_refused_by_both_names(key, tmp_path):
    network = load_feature_network(FASHION)
    record = {**network.record, key: "other"}
    Reference(Moments.of([rows(200, 96)]), record, 200).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"other.npz' was made by .*other.*features_of_images' is classifier of"):
        make_metrics(["fid"], feature_network=FASHION, reference=tmp_path / "other.npz")


def test_files_of_others_need_to_be_told_their_network(tmp_path):
    moments = Moments.of([rows(200, 96)])
    numpy.savez(tmp_path / "edm.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    options = {"feature_network": FASHION, "reference": tmp_path / "edm.npz"}
    with pytest.raises(ValueError, match="does not say which feature network made it.*give --reference_network"):
        make_metrics(["fid"], **options)
    with pytest.raises(ValueError, match="is told to be of 'inception'"):
        make_metrics(["fid"], reference_network="inception", **options)
    (fid,) = make_metrics(["fid"], reference_network=FASHION, **options)
    assert fid.score(StoredFeatures(rows(200, 96))) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="stores no features.*--save_features"):
        make_metrics(["kid"], reference_network=FASHION, **options)
    numpy.savez(tmp_path / "small.npz", mu=numpy.zeros(3), sigma=numpy.eye(3))
    with pytest.raises(ValueError, match="has 3 features, .* has 96"):
        make_metrics(["fid"], feature_network=FASHION, reference_network=FASHION, reference=tmp_path / "small.npz")


def test_hostile_and_damaged_references_are_refused(tmp_path):
    eye, zeros = numpy.eye(3), numpy.zeros(3)
    record = json.dumps({"network": {}, "images": 1})
    cases = {
        "cannot read": {"mu": numpy.array([print], dtype=object), "sigma": eye},
        "no mu and sigma": {"m": zeros},
        "shapes": {"mu": eye, "sigma": eye},
        "not finite": {"mu": zeros, "sigma": eye * numpy.nan},
        "not symmetric": {"mu": zeros, "sigma": numpy.triu(numpy.ones((3, 3)))},
        "record of the reference .* cannot be read": {"mu": zeros, "sigma": eye, "record": record},
        "features of the reference .* do not fit": {"mu": zeros, "sigma": eye, "features": eye[:2, :2]},
    }
    for sentence, arrays in cases.items():
        numpy.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=sentence):
            load_reference(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    for path in (tmp_path / "bad.npz", tmp_path / "gone.npz"):
        with pytest.raises(ValueError, match="cannot read the reference"):
            load_reference(path)
