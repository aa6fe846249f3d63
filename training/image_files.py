# SPDX-License-Identifier: Apache-2.0
"""Images of a folder, a zip file or a data set as uint8 RGB tensors of one size; what cannot be read is named and counted."""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm


EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip them to 8 bits


class ImageFiles:
    """A sequence of images of one size.

    All headers are read when it is made, so that a damaged file or a second size stops a run before it has computed anything.
    Pixels are read when asked for; a file whose pixels are damaged comes to light only then.

    Args:
        names: of the images, in order.
        open_bytes: name to the file's content.
        place: for messages.
        digest: of the names and the files' sizes or checksums.
        resolution: side in pixels to which a centred square of every image is resized (Lanczos); None: images stay as they are.
        skip_unreadable: leave files out that cannot be read, in place of refusing them.
        progress: show a bar while headers are read.

    Attributes:
        names: without those whose header cannot be read.
        unreadable: names of what was left out so far, with the reason.
        size: (height, width) of all.

    Raises:
        ValueError: without images, for unreadable files, or for two sizes without `resolution`.
    """

    def __init__(
        self,
        names: Sequence[str],
        open_bytes: Callable[[str], Any],
        *,
        place: str,
        digest: str,
        resolution: int | None = None,
        skip_unreadable: bool = False,
        progress: bool = False,
    ):
        if resolution is not None and resolution < 1:
            raise ValueError(f"--resolution must be at least 1, got {resolution}")
        if not names:
            raise ValueError(f"there are no images in {place}; give a folder or zip file with image files")
        self.place, self.digest, self.resolution, self.skip_unreadable = place, digest, resolution, skip_unreadable
        self._open = open_bytes
        self.names: list[str] = []
        self.unreadable: dict[str, str] = {}
        first, size = None, None
        for name in tqdm(names, desc="headers", unit="image", disable=not progress):
            found = self._header(name)
            if found is None:
                continue
            if resolution is None and size is not None and found != size:
                raise ValueError(
                    f"{place} has images of several sizes: {first} is {size[1]} x {size[0]} and {name} {found[1]} x {found[0]}; "
                    "give --resolution to bring all to one"
                )
            first, size = (name, found) if size is None else (first, size)
            self.names.append(name)
        if self.unreadable and not skip_unreadable:
            raise ValueError(self._refusal())
        if not self.names:
            raise ValueError(
                f"none of the {len(names)} images in {place} can be read; check that they are image files"
            )
        self.size = size if resolution is None else (resolution, resolution)

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, list[int]]:
        """uint8 (k, 3, height, width) and the indices of those that could be read.

        Raises:
            ValueError: for an unreadable one, without `skip_unreadable`.
        """
        images, kept = [], []
        for index in indices:
            image = self._pixels(self.names[index])
            if image is not None:
                images.append(image)
                kept.append(index)
        return torch.stack(images) if images else torch.empty(0, 3, *self.size, dtype=torch.uint8), kept

    def _header(self, name: str) -> tuple[int, int] | None:
        try:
            with Image.open(self._open(name)) as image:
                if image.mode in DEEP_MODES:
                    raise ValueError("it has more than 8 bits a channel; save it with 8")
                return image.height, image.width
        except Exception as error:  # Pillow's decoders raise many kinds
            self.unreadable[name] = _reason(error)
            return None

    def _pixels(self, name: str) -> Tensor | None:
        try:
            with Image.open(self._open(name)) as image:
                pixels = image.convert("RGB")
        except Exception as error:
            self.unreadable[name] = _reason(error)
            if not self.skip_unreadable:
                raise ValueError(self._refusal()) from error
            return None
        if self.resolution is not None:
            pixels = centred_square(pixels, self.resolution)
        return torch.from_numpy(numpy.array(pixels)).permute(2, 0, 1)

    def _refusal(self) -> str:
        shown = [f"{name} ({reason})" for name, reason in list(self.unreadable.items())[:3]]
        more = f" and {len(self.unreadable) - 3} more" if len(self.unreadable) > 3 else ""
        return (
            f"{len(self.unreadable)} of the images in {self.place} cannot be read: {', '.join(shown)}{more}; mend or remove "
            "them, or give --skip_unreadable to leave them out"
        )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def centred_square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square, resized to `side` pixels with Pillow's Lanczos filter."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + edge, top + edge))


def open_images(path: str | Path, **options) -> ImageFiles:
    """The images of a folder, at any depth, or of a zip file, in the order of their names.

    Args:
        options: of [`ImageFiles`].

    Raises:
        ValueError: as [`ImageFiles`], or if there is no such folder or zip file.
    """
    path = Path(path)
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        names = _images_among(files)
        # As a zip file has them: uncompressed pictures of one size differ in their content alone.
        checksums = [(name, files[name].stat().st_size, _crc(files[name])) for name in names]
        return ImageFiles(names, lambda name: files[name], place=repr(str(path)), digest=_digest(checksums), **options)
    if path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{str(path)!r} is no zip file ({error}); give a folder or zip file of images") from error
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
        names = _images_among(entries)
        checksums = [(name, entries[name].file_size, entries[name].CRC) for name in names]

        def read(name: str) -> io.BytesIO:
            return io.BytesIO(archive.read(name))

        return ImageFiles(names, read, place=repr(str(path)), digest=_digest(checksums), **options)
    raise ValueError(f"there is no folder or zip file {str(path)!r}; check the path of the images")


def _crc(file: Path) -> int | None:
    """None if it cannot be read, which [`ImageFiles`] tells with its name."""
    crc = 0
    try:
        with file.open("rb") as content:
            while part := content.read(2**20):
                crc = zlib.crc32(part, crc)
    except OSError:
        return None
    return crc


def open_dataset(
    name: str, *, config_name: str | None = None, split: str = "train", column: str = "image", **options
) -> ImageFiles:
    """The images of a data set that `datasets.load_dataset` knows, in its order.

    Args:
        options: of [`ImageFiles`].

    Raises:
        ValueError: as [`ImageFiles`], or if the data set cannot be read or has no such column of images.
    """
    place = f"the split {split!r} of the data set {name!r}"
    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # its own kinds, pyarrow's, the Hub client's
        raise ValueError(
            f"cannot read {place}: {_reason(error)}; check --dataset_name, --dataset_config_name, --dataset_split and the "
            "connection"
        ) from error
    images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if column not in images:
        raise ValueError(
            f"{place} has no column {column!r} of images; give --image_column: {', '.join(images) or 'none'}"
        )
    cells = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))

    def read(row: str) -> Any:
        cell = cells[int(row)][column]
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]

    names = [str(row) for row in range(len(rows))]
    return ImageFiles(names, read, place=place, digest=_digest([rows._fingerprint]), **options)


def _images_among(names: Iterable[str]) -> list[str]:
    """Sorted, without hidden files and folders (`.DS_Store`) and what archivers of macOS add."""

    def is_image(name: str) -> bool:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        return path.suffix.lower() in EXTENSIONS and not hidden

    return sorted(filter(is_image, names))


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
