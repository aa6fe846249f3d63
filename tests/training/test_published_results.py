# SPDX-License-Identifier: Apache-2.0
"""Published FIDs: the numbers that their abstracts give, what is said of two measurements that differ, and where it is printed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from tests.training.evaluations import scored
from training import evaluate, evaluation_report
from training.features import load_feature_network
from training.frechet import Moments
from training.published_results import (
    check_published,
    data_sets,
    differences,
    published_lines,
    published_results,
    published_section,
    record,
)
from training.references import Reference


FASHION = f"{Path(__file__).parents[2]}/examples/teachers/fashion_classifier.py:features_of_images"
EDM_FILE = Reference(Moments(None, torch.zeros(2), torch.eye(2)), None, None, path="refs/cifar10-32x32.npz")


def fid_of(network="inception", reference=EDM_FILE):
    return SimpleNamespace(name="fid", network=SimpleNamespace(name=network), reference=reference)


def results(rows, data_set="cifar10", metric=None, **facts):
    """Results of an evaluation of FID alone: {name: {nfe: FID}}."""
    fid = {"label": "FID", "higher_is_better": False, "scale": 1.0, "per_sample": False}
    facts = {"samples": 50000, **facts}
    entries = [
        {"name": name, "setting": "", "nfe": nfe, "evaluations": nfe, "values": {"fid": scored(value)}}
        for name, values in rows.items()
        for nfe, value in values.items()
    ]
    return {
        "facts": facts,
        "metrics": {"fid": fid},
        "subject": next(iter(rows)),
        "warnings": [],
        "absent": [],
        "rows": [{**entry, "schedule": None, "local_errors": None} for entry in entries],
        "published": record(published_results(data_set), metric or fid_of(), facts),
    }


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    "data_set, paper, nfe, value",
    [
        # LD3's abstracts: CIFAR-10 and AFHQv2 at 10 evaluations, ImageNet-256 at 5
        ("cifar10", "LD3", 10, 2.38),
        ("afhqv2-64", "LD3", 10, 2.27),
        ("imagenet-256-ldm", "LD3", 5, 5.03),
        # AMED's abstract, at 5: CIFAR-10 (the plugin), ImageNet-64, LSUN bedroom
        ("cifar10", "AMED", 5, 6.61),
        ("imagenet-64", "AMED", 5, 10.74),
        ("lsun-bedroom-256", "AMED", 5, 13.20),
    ],
)
def test_tables_have_the_numbers_of_the_abstracts(data_set, paper, nfe, value):
    methods = {
        method: values[nfe]
        for table in published_results(data_set).tables
        if table.source.startswith(f"{paper} ")
        for method, values in table.methods.items()
        if paper in method and nfe in values
    }
    assert min(methods.values()) == value


def test_tables_are_plausible_and_say_whence_they_are():
    for name, found in data_sets().items():
        assert name == found.data_set and found.samples in (30000, 50000)
        assert found.feature_network in ("inception", "inception_ldm")
        for table in found.tables:
            # no page of LD3's paper was at hand
            assert table.second_hand == table.source.startswith("LD3 (arXiv:2405.15506)")
            for values in table.methods.values():
                assert all(type(nfe) is int and 3 <= nfe <= 10 and 1.5 < fid < 400 for nfe, fid in values.items())
                assert found.teacher is None or min(values.values()) > found.teacher


def test_learned_times_are_better_than_the_bare_solver_of_the_same_table():
    # LD3's claim, row by row: a slip of a digit or of a row would break it.
    for found in data_sets().values():
        methods = found.tables[0].methods
        pairs = [(name, name.removesuffix(" + LD3")) for name in methods if name.endswith(" + LD3")]
        for learned, bare in pairs:
            shared = set(methods[learned]) & set(methods[bare])
            worse = {nfe for nfe in shared if methods[learned][nfe] > methods[bare][nfe]}
            assert shared and worse <= ({10} if learned.startswith("DPM-Solver++") else set()), (
                found.data_set,
                learned,
            )


@pytest.mark.parametrize("name", ["cifar", "sd14", "imagenet-256-adm", ""])
def test_unknown_data_sets_are_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"no published results are known for '{name}'.*cifar10, ffhq-64"):
        published_results(name)


def test_they_need_a_fid():
    check_published(None, ["mse"])
    check_published("cifar10", ["mse", "fid"])
    with pytest.raises(ValueError, match="add fid to --metrics"):
        check_published("cifar10", ["mse", "kid"])


# ---------------------------------------------------------------------- how measurements differ


def test_what_differs_is_said():
    cifar, ldm = published_results("cifar10"), published_results("imagenet-256-ldm")
    moments = Moments(10, torch.zeros(2), torch.eye(2))

    def found(published, metric, **facts):
        return differences(published, metric, {"samples": 50000, **facts})

    # EDM's own file: nothing differs, but that nobody can look into it
    (word,) = found(cifar, fid_of(), guidance_scale=None)
    assert word == (
        "the reference cifar10-32x32.npz records neither its network nor its images: that it fits is --reference_network's word"
    )
    assert found(cifar, fid_of(), samples=512)[0] == "512 samples here, 50000 there: a FID of fewer samples is larger"
    assert found(cifar, fid_of(), samples=60000)[0] == "60000 samples here, 50000 there"
    assert "features of inception_ldm here, of inception there" in found(cifar, fid_of("inception_ldm"))[0]
    other = Reference(moments, None, None, path="train.npz")
    assert found(cifar, fid_of(reference=other))[1] == "the reference train.npz here, cifar10-32x32.npz there"
    own = Reference(moments, {"network": "Inception"}, 60000, path="mine.npz")
    (made,) = found(cifar, fid_of(reference=own))
    assert made == "a reference of 60000 images (mine.npz) here, cifar10-32x32.npz there"
    for published, scale, sentence in (
        (ldm, 2.0, None),
        (ldm, 1.5, "guidance scale 1.5 here, 2 there"),
        (cifar, 1.0, None),
        (cifar, 4.0, "guidance scale 4 here, 1 there"),
    ):
        assert found(published, fid_of(), guidance_scale=scale)[-1:] == (
            [sentence] if sentence else found(published, fid_of())[-1:]
        )


# ---------------------------------------------------------------------- what is printed


def cells_of(lines):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_ours_stand_above_the_published_ones_in_the_same_columns():
    measured = results({"LD3": {4: 9.4, 5: 7.123}, "iPNDM": {5: None}})
    header, rows = cells_of(published_section(measured))
    assert header == ["", "4 NFE", "5 NFE", "source"]
    assert list(rows)[:2] == ["**LD3**", "**iPNDM**"]
    assert rows["**LD3**"] == ["**9.400**", "**7.123**", "here"]
    assert rows["**iPNDM**"] == ["-", "**not finite**", "here"]
    assert rows["iPNDM (3M) + LD3"] == ["9.31\\*", "-", "LD3 (arXiv:2405.15506), the paper"]
    assert rows["iPNDM + GITS"][:2] == ["-", "8.38"] and rows["AMED-Plugin (iPNDM)"][:2] == ["10.43", "6.61"]
    text = "\n".join(published_section(measured))
    assert "\\* second-hand: the paper's table as others quote it." in text and "published: 2.08" in text
    assert "Not like for like: the reference cifar10-32x32.npz records neither" in text
    # JSON turns the counts into texts
    assert published_section(json.loads(json.dumps(measured))) == published_section(measured)


def test_the_terminal_names_the_best_published_one_of_each_count():
    assert published_lines(results({"LD3": {4: 9.4, 5: 7.1, 2: 50.0}})) == [
        "published: 9.31 at 4 NFE (iPNDM (3M) + LD3; LD3 (arXiv:2405.15506), the paper, second-hand)",
        "published: 6.61 at 5 NFE (AMED-Plugin (iPNDM); AMED (arXiv:2312.00094), the authors' repository)",
        "Not like for like: the reference cifar10-32x32.npz records neither its network nor its images: that it fits is "
        "--reference_network's word.",
    ]
    assert published_lines(results({"LD3": {2: 50.0}}))[0] == "published: nothing for cifar10 at these NFE"
    alike = results({"LD3": {4: 9.4}}, metric=fid_of(reference=None))
    assert published_lines(alike)[-1].startswith("Samples, features and reference are as published")
    assert published_lines({**alike, "published": None}) == published_section({**alike, "published": None}) == []


def test_pictures_have_no_count():
    header, rows = cells_of(published_section(results({"mine": {None: 3.0}}, data_set="afhqv2-64")))
    assert header[1:-1] == ["4 NFE", "6 NFE", "8 NFE", "10 NFE"]
    assert rows["**mine**"] == ["-"] * 4 + ["here: **3.000**, at an unknown NFE"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = torch.randint(0, 256, (100, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image.numpy()).convert("RGB").save(folder / f"{k}.png")
    network = load_feature_network(FASHION)
    moments = Moments.of([network(pixels[:, None].expand(-1, 3, -1, -1).contiguous())])
    # EDM's form: mu and sigma, and nothing else
    numpy.savez(tmp_path / "edm.npz", mu=moments.mean.numpy() + 0.1, sigma=moments.covariance.numpy())
    return folder


def test_evaluate_prints_them_beside_its_own(pictures, tmp_path, capsys):
    given = ["--images", str(pictures), "--metrics=fid", f"--feature_network={FASHION}", "--blocks=0"]
    given += [f"--reference={tmp_path / 'edm.npz'}", f"--output_dir={tmp_path / 'out'}", "--published_results=cifar10"]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(given)
    assert stopped.value.code == 2 and "does not say which feature network made it" in capsys.readouterr().err

    evaluate.main([*given, f"--reference_network={FASHION}"])
    shown = capsys.readouterr().out
    assert "published: 2.38 at 10 NFE (iPNDM (3M) + LD3;" in shown
    assert "Not like for like: 100 samples here, 50000 there" in shown and "features of " in shown
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    # equal covariances: the squared distance of the means, 96 features apart by 0.1
    (row,) = saved["rows"]
    assert row["values"]["fid"]["value"] == pytest.approx(96 * 0.01, rel=1e-3)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "## Published FIDs of cifar10 beside these" in table and "here: **0.9600**, at an unknown NFE" in table
    evaluation_report.main([str(tmp_path / "out")])
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert "published: 2.38 at 10 NFE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (["--published_results=cifar", "--metrics=fid"], "no published results are known for 'cifar'"),
        (["--published_results=cifar10", "--metrics=psnr"], "add fid to --metrics"),
    ],
)
def test_what_cannot_be_printed_is_a_usage_error(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*given, "--images=somewhere", f"--output_dir={tmp_path / 'out'}"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
