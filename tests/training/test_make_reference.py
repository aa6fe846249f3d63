# SPDX-License-Identifier: Apache-2.0
"""The program that makes references: the moments of all images, resumable to the bit, and its manners."""

import numpy
import pytest
import torch
from PIL import Image

from tests.training.test_processes import on_two_processes
from training import make_reference
from training.features import load_feature_network
from training.references import load_reference


COUNT = 23


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "means.py"
    path.write_text("def means(images):\n    return images.float().mean((2, 3))\n")
    return f"{path}:means"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(COUNT):
        pixels = numpy.random.default_rng(k).integers(0, 256, (4, 5, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k:02}.png")
    return tmp_path / "images"


def command(folder, network, output, *more) -> list[str]:
    return [f"--images={folder}", f"--feature_network={network}", f"--output={output}", "--batch_size=3", *more]


def features_of(folder, skip=()) -> torch.Tensor:
    pixels = [numpy.array(Image.open(file)) for file in sorted(folder.iterdir()) if file.name not in skip]
    return torch.from_numpy(numpy.stack(pixels)).double().mean((1, 2))


def refuse(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        make_reference.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_moments_are_those_of_all_images(folder, network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_reference, "PART", 5)
    output = tmp_path / "deep" / "means.npz"
    output.parent.mkdir()
    make_reference.main(command(folder, network, output, "--save_features=7"))
    found, expected = load_reference(output), features_of(folder)
    assert torch.allclose(found.moments.mean, expected.mean(0), rtol=1e-6)
    assert torch.allclose(found.moments.covariance, torch.cov(expected.T), rtol=1e-4)
    assert found.images == COUNT
    assert found.source["size"] == [4, 5]
    found.check(load_feature_network(network))
    nearest = torch.cdist(found.stored_features().double(), expected).min(1)
    assert float(nearest.values.max()) < 1e-3
    assert len(set(nearest.indices.tolist())) == 7
    assert [path.name for path in output.parent.iterdir()] == ["means.npz"]

    written = output.read_bytes()
    make_reference.main(command(folder, network, output, "--save_features=7"))
    assert "is finished already" in capsys.readouterr().out
    assert output.read_bytes() == written
    assert "was made otherwise" in refuse(command(folder, network, output, "--resolution=4"), capsys)


def test_killed_run_continues_to_the_same_bytes(folder, network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_reference, "PART", 5)
    monkeypatch.setattr(make_reference, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole, output = tmp_path / "whole.npz", tmp_path / "means.npz"
    make_reference.main(command(folder, network, whole, "--save_features=7"))

    class Killed(BaseException):
        pass

    read, seen = make_reference.ImageFiles.batch, []

    def killing(images, indices):
        indices = list(indices)
        if len(seen) == 8:
            raise Killed
        seen.extend(indices[:1])
        return read(images, indices)

    monkeypatch.setattr(make_reference.ImageFiles, "batch", killing)
    with pytest.raises(Killed):
        make_reference.main(command(folder, network, output, "--save_features=7"))
    partial = tmp_path / "means.npz.partial"
    assert partial.exists() and not output.exists()
    assert "other images or arguments" in refuse(command(folder, network, output, "--save_features=6"), capsys)

    again = []

    def counting(images, indices):
        indices = list(indices)
        again.extend(indices)
        return read(images, indices)

    monkeypatch.setattr(make_reference.ImageFiles, "batch", counting)
    make_reference.main(command(folder, network, output, "--save_features=7"))
    assert again == list(range(20, COUNT))  # four parts of 5 were done
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()

    partial.write_bytes(b"foreign")
    output.unlink()
    assert "no unfinished reference" in refuse(command(folder, network, output), capsys)


def _both_processes(argv):
    make_reference.PART = 4
    make_reference.main(argv)


@pytest.mark.slow
def test_two_processes_make_the_same_file(folder, network, tmp_path, monkeypatch):
    monkeypatch.setattr(make_reference, "PART", 4)
    make_reference.main(command(folder, network, tmp_path / "one.npz", "--save_features=7"))
    on_two_processes(_both_processes, command(folder, network, tmp_path / "two.npz", "--save_features=7"))
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_unreadable_images_are_left_out_and_counted_only_if_asked(folder, network, tmp_path, capsys):
    (folder / "03.png").write_bytes(b"")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:-40])
    output = tmp_path / "means.npz"
    assert "1 of the images" in refuse(command(folder, network, output), capsys)
    make_reference.main(command(folder, network, output, "--skip_unreadable"))
    found = load_reference(output)
    assert (found.images, found.source["skipped"]) == (COUNT - 2, 2)
    assert torch.allclose(found.moments.mean, features_of(folder, ("03.png", "05.png")).mean(0), rtol=1e-6)
    assert "2 left out as unreadable (03.png, 05.png)" in capsys.readouterr().out


def test_impossible_requests_are_one_sentence(folder, network, tmp_path, capsys):
    output = tmp_path / "means.npz"
    for file in sorted(folder.iterdir())[3:]:
        file.unlink()
    cases = {
        "undefined with fewer samples than features: 3 <= 3": command(folder, network, output),
        "either --images or --dataset_name": [f"--output={output}"],
        "must be the name of an .npz file": command(folder, network, tmp_path / "means.pt"),
        "--batch_size must be at least 1": command(folder, network, output, "--batch_size=0"),
        "there is no folder or zip file": command(tmp_path / "gone", network, output),
        "unknown feature network 'vgg'": command(folder, "vgg", output),
        "cannot read the split 'train' of the data set": [f"--dataset_name={tmp_path}/gone", f"--output={output}"],
    }
    for sentence, argv in cases.items():
        said = refuse(argv, capsys)
        assert sentence in said
        assert said.startswith("make_reference: error: ")
    assert not output.exists()


def test_recipe_fills_in_arguments(folder, network, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"make_reference:\n  images: {folder}\n  feature_network: {network}\n  save_features: 2\n")
    output = tmp_path / "means.npz"
    make_reference.main([f"--config={recipe}", f"--output={output}"])
    assert len(load_reference(output).stored_features()) == 2
