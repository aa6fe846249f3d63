# SPDX-License-Identifier: Apache-2.0
"""Measure how good the samples of a small teacher are.

    PYTHONPATH=. python examples/teachers/check_teacher.py --pipeline_dir examples/teachers/fashion-sd --output_dir work/check

Samples every class through the pipeline, asks the classifier in `reference/` what it sees, compares its accuracy with the
one on real test images, measures the Frechet distance of its features to those of the real training images, and draws
a grid (one row a class). `--record` writes grid and numbers (`quality.json`) into the pipeline folder.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from fashion_classifier import FashionClassifier, FeaturesOfImages
from PIL import Image

from training.frechet import Moments, frechet_distance
from training.references import load_reference
from training.teacher import load_teacher


REFERENCE_DIR = Path(__file__).parent / "reference"
CALL_SETTINGS = ("guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length", "height", "width")
SCHEDULERS = {"ddim": DDIMScheduler, "dpmpp": DPMSolverMultistepScheduler, "stored": None}


def call_settings(args):
    return {name: getattr(args, name) for name in CALL_SETTINGS if getattr(args, name) is not None}


@torch.no_grad()
def sample(pipeline, prompts, args):
    """RGB images `(n, 3, 32, 32)` in [0, 1] of prompts or class labels, the i-th from its own seed, so that batch size changes no image."""
    name = "class_labels" if isinstance(prompts[0], int) else "prompt"
    images = []
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))]
        images.append(
            pipeline(
                **{name: batch},
                num_inference_steps=args.num_inference_steps,
                generator=generators,
                output_type="pt",
                **call_settings(args),
            ).images
        )
        print(f"{start + len(batch)}/{len(prompts)} images", flush=True)
    return torch.cat(images).float().expand(-1, 3, -1, -1)


def grid(images, classes, columns, scale=2):
    """A PIL image of `columns` samples a row, one row a class, enlarged by a whole factor."""
    per_class = len(images) // classes
    columns = min(columns, per_class)
    tiles = images.unflatten(0, (classes, per_class))[:, :columns]
    canvas = tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    picture = Image.fromarray((canvas * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def prompts_by_class(folder, split, classes, images_per_class):
    """Prompts, or without `prompts.json` the labels themselves, and the class of each."""
    labels = [label for label in range(len(classes)) for _ in range(images_per_class)]
    if not (folder / "prompts.json").is_file():
        if split is not None:
            raise ValueError(f"'{folder}' has no prompts.json: leave out --split, which chooses among prompts.")
        return labels, labels
    wordings = json.loads((folder / "prompts.json").read_text())
    prompts = []
    for name in classes:
        captions = [caption for part in ([split] if split else wordings) for caption in wordings[part][name]]
        # All wordings in turn, so that a class is judged by how it is asked for on average.
        prompts += [captions[i % len(captions)] for i in range(images_per_class)]
    return prompts, labels


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline_dir", required=True)
    parser.add_argument("--reference_dir", default=str(REFERENCE_DIR), help="made by fashion_classifier.py")
    parser.add_argument("--output_dir", default=None, help="where to write samples.png and result.json")
    parser.add_argument("--images_per_class", type=int, default=50)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="these: default as recorded in quality.json")
    parser.add_argument("--true_cfg_scale", type=float)
    parser.add_argument("--negative_prompt")
    parser.add_argument("--max_sequence_length", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="stored")
    parser.add_argument("--split", choices=("train", "held_out"), default=None, help="which wordings; default all")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None)
    parser.add_argument("--record", action="store_true", help="write grid and numbers into the pipeline folder")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    folder = Path(args.pipeline_dir)
    reference_dir = Path(args.reference_dir)
    for path in (folder / "model_index.json", reference_dir / "reference.json"):
        if not path.is_file():
            raise ValueError(
                f"'{path}' is missing: make the pipeline with its train_*.py and the reference folder with "
                "fashion_classifier.py, both beside this program."
            )
    reference = json.loads((reference_dir / "reference.json").read_text())
    recorded = folder / "quality.json"
    for name, value in (json.loads(recorded.read_text()) if recorded.is_file() else {}).items():
        if name in CALL_SETTINGS and getattr(args, name) is None:
            setattr(args, name, value)

    pipeline = load_teacher(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    if SCHEDULERS[args.scheduler] is not None:
        pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)

    prompts, labels = prompts_by_class(folder, args.split, reference["classes"], args.images_per_class)
    labels = torch.tensor(labels)

    since = time.time()
    images = sample(pipeline, prompts, args)
    seconds = time.time() - since
    network = FeaturesOfImages(FashionClassifier.from_pretrained(reference_dir)).eval()
    with torch.no_grad():
        features = torch.cat(
            [network.classifier.features(batch) for batch in network.prepare(images * 255).split(500)]
        )
        predicted = network.classifier.head(features).argmax(1)
    statistics = load_reference(reference_dir / "statistics.npz")
    distance = frechet_distance(Moments.of([features]), statistics.moments)
    right = predicted == labels

    per_class = {}
    for label, name in enumerate(reference["classes"]):
        mine = labels == label
        per_class[name] = right[mine].double().mean().item()
        seen = predicted[mine].bincount(minlength=len(reference["classes"]))
        others = [
            f"{reference['classes'][i]} {seen[i]}" for i in seen.argsort(descending=True) if i != label and seen[i]
        ]
        real = reference["test_accuracy_per_class"][name]
        print(f"{name:>12}  {per_class[name]:6.1%}  (real {real:6.1%})  taken for: {', '.join(others) or '-'}")
    accuracy = right.double().mean().item()
    result = {
        **call_settings(args),
        "num_inference_steps": args.num_inference_steps,
        "scheduler": args.scheduler,
        "seed": args.seed,
        **({"wordings": args.split or "all"} if (folder / "prompts.json").is_file() else {}),
        "images": len(labels),
        "accuracy": accuracy,
        "accuracy_per_class": per_class,
        "frechet_distance": distance,
    }
    print(f"accuracy {accuracy:.1%} on {len(labels)} samples, {reference['test_accuracy']:.1%} on real test images")
    print(f"Frechet distance {distance:.3f} ({reference['frechet_distance_of_test_images']:.3f} for real test images)")
    print(f"{call_settings(args)}, {args.num_inference_steps} steps of {args.scheduler}, {seconds:.0f} s")

    picture = grid(images, len(reference["classes"]), columns=12)
    if args.output_dir:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        picture.save(output / "samples.png")
        (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.record:
        picture.save(folder / "samples.png", optimize=True)
        recorded.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
