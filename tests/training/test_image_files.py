# SPDX-License-Identifier: Apache-2.0
"""Images from folders, zip files and data sets: order, sizes, and files that cannot be read."""

import zipfile
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from PIL import Image

from training.image_files import open_dataset, open_images


def pixels(seed: int, height: int = 4, width: int = 6) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)


def save(path, seed: int, **size) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, **size)).save(path)


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("b/2.png", "a/10.PNG", "a/9.png", ".hidden/0.png", "__MACOSX/0.png")):
        save(tmp_path / "images" / name, seed)
    (tmp_path / "images" / "dataset.json").write_text("{}")
    return tmp_path / "images"


def tensor(seed: int, **size) -> torch.Tensor:
    return torch.from_numpy(pixels(seed, **size)).permute(2, 0, 1)


def test_folder_and_zip_give_the_same_images_in_order(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    for source in (folder, tmp_path / "images.zip"):
        images = open_images(source)
        assert images.names == ["a/10.PNG", "a/9.png", "b/2.png"]
        assert images.size == (4, 6)
        batch, kept = images.batch([2, 0, 1])
        assert kept == [2, 0, 1]
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, torch.stack([tensor(0), tensor(1), tensor(2)]))


def test_gray_palette_and_transparent_images_become_rgb(tmp_path):
    grey = pixels(0)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(numpy.dstack([pixels(1), grey])).save(tmp_path / "rgba.png")
    Image.fromarray(pixels(2)).quantize(200).save(tmp_path / "z.png")
    batch, _ = open_images(tmp_path).batch(range(3))
    assert torch.equal(batch[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(batch[1], tensor(1))
    assert torch.equal(batch[2], tensor(2))  # 24 colours fit into a palette


def test_two_sizes_are_refused_or_resized(folder):
    save(folder / "c.png", 9, height=8, width=8)
    with pytest.raises(ValueError, match="a/10.PNG is 6 x 4 and c.png 8 x 8; give --resolution"):
        open_images(folder)
    images = open_images(folder, resolution=4)
    batch, _ = images.batch([0])
    assert images.size == (4, 4)
    assert torch.equal(batch[0], tensor(1)[:, :, 1:5])  # the centred square needs no resampling
    assert images.batch([3])[0].shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="--resolution must be at least 1"):
        open_images(folder, resolution=0)


def test_unreadable_files_are_named_counted_and_left_out_only_if_asked(folder):
    (folder / "a" / "empty.png").write_bytes(b"")
    Image.fromarray(pixels(0)[..., 0].astype(numpy.uint16) * 257).save(folder / "deep.png")
    with pytest.raises(
        ValueError, match=r"^2 of the images .* cannot be read: a/empty.png \(.*deep.png \(it has more"
    ):
        open_images(folder)
    images = open_images(folder, skip_unreadable=True)
    assert list(images.unreadable) == ["a/empty.png", "deep.png"]
    assert len(images) == 3


def test_truncated_pixels_come_to_light_when_read(folder):
    content = (folder / "a" / "9.png").read_bytes()
    (folder / "a" / "9.png").write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"^1 of the images .*a/9.png .*--skip_unreadable"):
        open_images(folder).batch(range(3))
    images = open_images(folder, skip_unreadable=True)
    batch, kept = images.batch(range(3))
    assert kept == [0, 2]
    assert torch.equal(batch, torch.stack([tensor(1), tensor(0)]))
    assert list(images.unreadable) == ["a/9.png"]


def test_what_is_no_source_of_images_is_refused(folder, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "text.zip").write_text("no zip")
    for path, sentence in (
        (tmp_path / "none", "no images"),
        (tmp_path / "text.zip", "no zip file"),
        ("gone", "there is no"),
    ):
        with pytest.raises(ValueError, match=sentence):
            open_images(path)
    (tmp_path / "none" / "x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 images"):
        open_images(tmp_path / "none", skip_unreadable=True)


def test_digest_changes_with_the_files(folder):
    before = open_images(folder).digest
    assert open_images(folder).digest == before
    save(folder / "new.png", 8)
    assert open_images(folder).digest != before


def test_digests_of_uncompressed_pictures_of_one_size_differ(tmp_path):
    for seed in range(2):
        save(tmp_path / str(seed) / "picture.bmp", seed)
    assert len({(tmp_path / str(seed) / "picture.bmp").stat().st_size for seed in range(2)}) == 1
    assert len({open_images(tmp_path / str(seed)).digest for seed in range(2)}) == 2


def test_a_file_that_may_not_be_read_is_named_like_any_unreadable_one(folder, monkeypatch):
    opened = Path.open

    def forbidden(self, *args, **options):
        if self.name == "9.png":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    (folder / "a" / "9.png").write_bytes(b"")
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ValueError, match="9.png"):
        open_images(folder)


def test_data_set_gives_its_images_in_its_order(tmp_path):
    for name, seed in (("b.png", 3), ("a.png", 4)):
        save(tmp_path / "set" / "train" / name, seed)
    rows = datasets.Dataset.from_dict(
        {"picture": [str(tmp_path / "set" / "train" / name) for name in ("b.png", "a.png")], "n": [0, 1]}
    ).cast_column("picture", datasets.Image())
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    images = open_dataset(str(tmp_path / "parquet"), column="picture")
    assert torch.equal(images.batch([0, 1])[0], torch.stack([tensor(3), tensor(4)]))
    with pytest.raises(ValueError, match="give --image_column: picture"):
        open_dataset(str(tmp_path / "parquet"))
    with pytest.raises(ValueError, match="cannot read the split 'test'"):
        open_dataset(str(tmp_path / "parquet"), split="test")
