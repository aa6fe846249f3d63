# SPDX-License-Identifier: Apache-2.0
"""Fetching public checkpoints: resumable, checked, and under their name only when complete.

No address in `PUBLIC` was ever fetched by those who wrote this, and no hash of the files is published: give `size` and
`sha256` where you know them. What was found is recorded by the conversion.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get

from .files import identify


EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
OPENAI = "https://openaipublic.blob.core.windows.net/"
COMPVIS = "https://ommer-lab.com/files/latent-diffusion/"
PUBLIC = {  # file -> address, none of them tried
    **{
        f"edm-{data}-{conditioning}-{kind}.pkl": f"{EDM}edm-{data}-{conditioning}-{kind}.pkl"
        for data, conditioning, kinds in (
            ("cifar10-32x32", "uncond", ("vp", "ve")),
            ("cifar10-32x32", "cond", ("vp", "ve")),
            ("ffhq-64x64", "uncond", ("vp", "ve")),
            ("afhqv2-64x64", "uncond", ("vp", "ve")),
            ("imagenet-64x64", "cond", ("adm",)),
        )
        for kind in kinds
    },
    **{
        f"baseline-{name}.pkl": f"{EDM}baseline/baseline-{name}.pkl"
        for name in ("cifar10-32x32-uncond-vp", "cifar10-32x32-uncond-ve", "imagenet-64x64-cond-adm")
    },
    **{
        f"{name}.pt": f"{OPENAI}diffusion/jul-2021/{name}.pt"
        for name in ("256x256_diffusion", "256x256_diffusion_uncond", "256x256_classifier")
    },
    **{
        f"{name}.pt": f"{OPENAI}consistency/{name}.pt"
        for name in ("edm_bedroom256_ema", "edm_cat256_ema", "edm_imagenet64_ema")
    },
    "cin256-v2.ckpt": f"{COMPVIS}nitro/cin/model.ckpt",
    # archives with a model.ckpt, which is to be unpacked
    **{f"{name}.zip": f"{COMPVIS}{name}.zip" for name in ("ffhq", "celeba", "lsun_bedrooms", "lsun_churches")},
}
RANGE_NOT_SATISFIABLE = 416


def address(name_or_url: str) -> str:
    """The URL itself, or that of a public file of this name.

    Raises:
        ValueError: for neither.
    """
    if name_or_url in PUBLIC:
        return PUBLIC[name_or_url]
    url = urlsplit(name_or_url)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ValueError(
            f"{name_or_url!r} is neither an http(s) address nor the name of a public file; the names are "
            + ", ".join(PUBLIC)
        )
    return name_or_url


def file_name(name_or_url: str) -> str:
    """What a file is called that is fetched: the last part of an address, else the name itself.

    Raises:
        ValueError: if an address ends without a name.
    """
    url = urlsplit(name_or_url)
    name = Path(url.path).name if url.scheme else name_or_url
    if not name:
        raise ValueError(f"{name_or_url!r} names no file; say where it is to be put")
    return name


def download(name_or_url: str, file: str | Path, *, size: int | None = None, sha256: str | None = None) -> None:
    """Fetch a file, unless it is there already. Until it is complete it is `<file>.part`, from whose end a next call
    continues. A server that then sends another range than it was asked for is found out by `sha256` alone.

    Args:
        name_or_url: need not be known where the file is there.
        size: in bytes, sha256: hexadecimal; what the file must have, where known.

    Raises:
        ValueError: if it cannot be fetched, is empty, or is another file: of what is on disk already, nothing is overwritten.
    """
    path = Path(file)
    if path.exists():
        _check(path, size, sha256, "; it was there already, move it away to fetch another")
        return
    url = address(name_or_url)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, part, size, path.name)
    except (HTTPError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot fetch {url}: {reason}; start again to continue") from error
    try:
        _check(part, size, sha256, f"; {url} is another file, or damaged")
    except ValueError:
        part.unlink()  # more of the same would not mend it
        raise
    os.replace(part, path)


def _fetch(url: str, part: Path, size: int | None, name: str) -> None:
    for attempt in ("continued", "afresh"):
        with open(part, "ab") as stream:
            try:
                return http_get(url, stream, resume_size=stream.tell(), expected_size=size, displayed_filename=name)
            except HfHubHTTPError as error:
                # There is nothing after what is here: of another file, or of the whole one.
                beyond = error.response is not None and error.response.status_code == RANGE_NOT_SATISFIABLE
                if not beyond or attempt == "afresh":
                    raise
                stream.truncate(0)


def _check(path: Path, size: int | None, sha256: str | None, otherwise: str) -> None:
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty{otherwise}")
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes, and --size is {size}{otherwise}")
    if sha256 is not None:
        found = identify(path).sha256
        if found != sha256.lower():
            raise ValueError(f"{str(path)!r} has the SHA-256 {found}, and --sha256 is {sha256.lower()}{otherwise}")
