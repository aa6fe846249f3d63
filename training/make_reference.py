# SPDX-License-Identifier: Apache-2.0
"""Make a reference: the mean and covariance of real images' features, for FID and other metrics of sets.

    accelerate launch -m training.make_reference --images coco-val2014.zip --resolution 512 --output coco.npz \\
        --save_features 10000

Memory does not grow with the images. A run that was stopped continues when it is started again with the same arguments, on
any number of processes, and ends in the same numbers. The file says which feature network made it and is refused for any other.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from .arguments import check_writable, parse, usage_errors
from .features import FeatureNetwork, load_feature_network
from .frechet import Scatter, check_count
from .image_files import ImageFiles, open_dataset, open_images
from .processes import COLLECTIVE_TIMEOUT, lost_process_message, num_processes, on_main, share
from .references import Reference, load_reference
from .whole_files import write_whole


PART = 1024  # images that one process computes before features are put together
SECONDS_BETWEEN_CHECKPOINTS = 60.0
SAVED_SEED = 0  # decides which images' features are saved


def parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "make_reference",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--images", help="folder (searched at any depth) or zip file of images")
    p.add_argument("--dataset_name", help="instead: Hub id or folder of a data set with images; '' is none")
    p.add_argument("--dataset_config_name", help="of the data set; default: its only or default one")
    p.add_argument("--dataset_split", default="train", help="of the data set (default: %(default)s)")
    p.add_argument("--image_column", default="image", help="of the data set (default: %(default)s)")
    p.add_argument(
        "--feature_network",
        default="inception",
        help="inception, inception_ldm, transformers:<Hub id or folder>, <file.py>:<name> or <package.module>:<name> "
        "(default: %(default)s)",
    )
    p.add_argument("--inception_weights", help="file of torch-fidelity's Inception weights; default: fetched once")
    p.add_argument("--output", required=True, help="the .npz file; `<output>.partial` while it is made")
    p.add_argument(
        "--save_features",
        type=int,
        default=0,
        help="store features of so many images, for kid and cmmd (default: none)",
    )
    p.add_argument("--resolution", type=int, help="resize a centred square of every image to this side, in pixels")
    p.add_argument(
        "--skip_unreadable", action="store_true", help="leave out images that cannot be read, and count them"
    )
    p.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")
    return p


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded.

    Raises:
        ValueError: for an impossible argument.
    """
    if bool(args.images) == bool(args.dataset_name):
        raise ValueError("give either --images or --dataset_name: the real images")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.save_features < 0:
        raise ValueError(f"--save_features must not be negative, got {args.save_features}")
    if not args.output.endswith(".npz"):
        raise ValueError(f"--output must be the name of an .npz file, got {args.output!r}")
    if not Path(args.output).exists():
        check_writable(str(Path(args.output).parent))


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    with usage_errors(command_line), lost_process_message(Path(args.output).parent):
        check(args)
        make(args)


def make(args: argparse.Namespace) -> None:
    accelerator = Accelerator(kwargs_handlers=[COLLECTIVE_TIMEOUT])
    images = images_of(args, accelerator.is_local_main_process)
    with accelerator.local_main_process_first():  # the others find what it fetched
        network = load_feature_network(
            args.feature_network, accelerator.device, inception_weights=args.inception_weights
        )
    try:
        check_count(len(images), network.dim)
    except ValueError as error:
        raise ValueError(f"{images.place} is too small a reference: {error}") from error
    source = {
        "images": Path(args.images).name if args.images else f"{args.dataset_name} {args.dataset_split}",
        "digest": images.digest,
        "size": list(images.size),
        "resolution": args.resolution,
    }
    request = {"network": network.record, "source": source, "save_features": min(args.save_features, len(images))}
    if on_main(lambda: is_finished(Path(args.output), request), accelerator):
        accelerator.print(f"{args.output} is finished already")
        return
    partial = Path(f"{args.output}.partial")
    progress = on_main(lambda: Progress.read(partial, request), accelerator)
    gather(images, network, args.batch_size, progress, partial, request, accelerator)

    def finish() -> int:
        moments = progress.scatter.moments()
        check_count(moments.count, network.dim)
        skipped = {"skipped": len(progress.skipped)} if progress.skipped else {}
        saved = torch.cat(progress.saved) if progress.saved else None
        Reference(moments, network.record, moments.count, source | skipped, saved).save(args.output)
        partial.unlink(missing_ok=True)
        return moments.count

    count = on_main(finish, accelerator)
    names = ", ".join(sorted(progress.skipped)[:3])
    skipped = f", {len(progress.skipped)} left out as unreadable ({names})" if progress.skipped else ""
    accelerator.print(f"{args.output}: {count} images{skipped}, {network.dim} features of {network.name}")


def images_of(args: argparse.Namespace, progress: bool) -> ImageFiles:
    options = {"resolution": args.resolution, "skip_unreadable": args.skip_unreadable, "progress": progress}
    if args.images:
        return open_images(args.images, **options)
    return open_dataset(
        args.dataset_name,
        config_name=args.dataset_config_name,
        split=args.dataset_split,
        column=args.image_column,
        **options,
    )


def is_finished(output: Path, request: dict) -> bool:
    """Whether `output` holds what is asked for; a `ValueError` if it holds something else."""
    if not output.exists():
        return False
    found = load_reference(output)
    source = {key: value for key, value in found.source.items() if key != "skipped"}
    saved = 0 if found.features is None else len(found.features) + found.source.get("skipped", 0)
    if (found.network, source) != (request["network"], request["source"]) or saved < request["save_features"]:
        raise ValueError(f"{output} exists and was made otherwise; remove it, or choose another --output")
    return True


@dataclass
class Progress:
    """What has been gathered: of the first `done` images their scatter, the saved features and the names that were skipped."""

    done: int = 0
    scatter: Scatter | None = None
    saved: list[Tensor] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, request: dict) -> "Progress":
        """From a file, or a fresh start without one; a `ValueError` if it is of another run."""
        if not path.exists():
            return cls()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a foreign file makes torch raise
            raise ValueError(f"{path} is no unfinished reference; remove it, or choose another --output") from error
        if state["request"] != json.dumps(request):
            raise ValueError(f"{path} is of a run with other images or arguments; remove it to start anew")
        scatter = Scatter(state["count"], state["mean"], state["scatter"])
        return cls(state["done"], scatter, list(state["saved"]), list(state["skipped"]))

    def write(self, path: Path, request: dict) -> None:
        state = {
            "request": json.dumps(request),
            "done": self.done,
            "count": self.scatter.count,
            "mean": self.scatter.mean,
            "scatter": self.scatter.scatter,
            "saved": self.saved,
            "skipped": self.skipped,
        }
        write_whole(path, lambda file: torch.save(state, file))


def gather(
    images: ImageFiles,
    network: FeatureNetwork,
    batch_size: int,
    progress: Progress,
    partial: Path,
    request: dict,
    accelerator: Accelerator,
) -> None:
    """Bring `progress` to its end. Parts are merged in the order of the images, whatever the number of processes."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SAVED_SEED))
    chosen = set(chosen[: request["save_features"]].tolist())

    def compute(part: range) -> tuple[Tensor, list[int], list[str]]:
        features, kept = [], []
        for start in range(part.start, part.stop, batch_size):
            pixels, found = images.batch(range(start, min(start + batch_size, part.stop)))
            if found:
                features.append(network(pixels))
                kept += found
        skipped = [images.names[index] for index in sorted(set(part) - set(kept))]
        return torch.cat(features) if features else torch.empty(0, network.dim), kept, skipped

    if progress.done == 0:
        progress.skipped = list(images.unreadable)
    parts = [range(k, min(k + PART, len(images))) for k in range(progress.done, len(images), PART)]
    bar = tqdm(
        initial=progress.done,
        total=len(images),
        desc="features",
        unit="image",
        disable=not accelerator.is_local_main_process,
    )
    processes, written = num_processes(accelerator), time.monotonic()
    for k in range(0, len(parts), processes):
        together = parts[k : k + processes]
        for part, (features, kept, skipped) in zip(together, share(together, compute, accelerator)):
            if kept:
                scatter = Scatter.of(features)
                progress.scatter = scatter if progress.scatter is None else progress.scatter.merged(scatter)
            wanted = [row for row, index in enumerate(kept) if index in chosen]
            if wanted:
                progress.saved.append(features[wanted])
            progress.skipped += skipped
            progress.done = part.stop
            bar.update(len(part))
        overdue = time.monotonic() - written >= SECONDS_BETWEEN_CHECKPOINTS
        if overdue and progress.scatter is not None and accelerator.is_main_process:
            progress.write(partial, request)
            written = time.monotonic()
    bar.close()
    if progress.scatter is None:
        raise ValueError(f"none of the images in {images.place} can be read; check that they are image files")


if __name__ == "__main__":
    main()
