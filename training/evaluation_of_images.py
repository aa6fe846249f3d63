# SPDX-License-Identifier: Apache-2.0
"""An evaluation of pictures in folders or zip files, by metrics that need no teacher.

A `metadata.jsonl` beside them, as training.sample and Hugging Face's imagefolder have it, says which prompt each was sampled
from (`prompt` or `text`); CLIP scores need one.
"""

import argparse
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .evaluation import column_of, measured_columns, metric_facts
from .evaluation_of_pipeline import models_of
from .evaluation_results import Entry, Scoring, result_rows, small_blocks
from .evaluation_store import Store
from .image_files import ImageFiles, open_images
from .metrics import Metric, Samples, count_warnings
from .processes import turns
from .request_file import digest


METADATA = "metadata.jsonl"
CAPTIONS = ("prompt", "text")


def evaluate_images(args: argparse.Namespace, metrics: Sequence[Metric], accelerator) -> dict[str, Any]:
    """Measures what is missing in `<output_dir>/work`; the results, without facts about the program's run.

    Raises:
        ValueError: for pictures that cannot be read, too few of them, or missing prompts.
    """
    names = [Path(path).resolve().name for path in args.images]
    # Folders are often called alike; then by their whole paths.
    names = names if len(set(names)) == len(names) else list(args.images)
    if len(set(names)) < len(names):
        raise ValueError("--images names one folder twice; name it once")
    subject = args.subject or names[0]
    if subject not in names:
        raise ValueError(f"the subject {subject!r} is none of the --images; use one of {', '.join(names)}")
    models, warnings = models_of(args), []
    scoring = Scoring(metrics, models, args.blocks)
    entries = []
    for name, path in zip(names, args.images):
        files = open_images(
            path,
            resolution=args.resolution,
            skip_unreadable=args.skip_unreadable,
            progress=accelerator.is_local_main_process,
        )
        if files.unreadable:
            shown = ", ".join(list(files.unreadable)[:3])
            warnings.append(f"{len(files.unreadable)} pictures of {name} cannot be read and are left out: {shown}")
        warnings += [f"{name}: {sentence}" for sentence in count_warnings(metrics, len(files))]
        prompts = prompts_of(path, files) if any(metric.needs_prompts for metric in metrics) else None
        # Parts of another size are others.
        key = digest([files.digest, args.resolution, sorted(files.unreadable), prompts, args.batch_size])
        store = Store(Path(args.output_dir) / "work", len(files), args.batch_size)
        measure(store, key, name, files, prompts, metrics, models, accelerator)
        facts = {
            "setting": "",
            "spec": str(path),
            "solver": None,
            "evaluations": None,
            "schedule": None,
            "local_errors": None,
            "samples": len(files),
        }
        entries.append(Entry(name, None, key, store, facts, digest([Path(file).stem for file in files.names])))
    rows, _ = result_rows(entries, subject, scoring, accelerator)
    return {
        "facts": {"images": len(args.images), "samples": min(len(entry.store) for entry in entries)},
        "metrics": metric_facts(metrics),
        "subject": subject,
        "warnings": warnings + small_blocks(entries, scoring),
        "absent": [],
        "rows": rows,
    }


def measure(
    store: Store,
    key: str,
    name: str,
    files: ImageFiles,
    prompts: list[str] | None,
    metrics: Sequence[Metric],
    models: dict[str, str],
    accelerator,
) -> None:
    wanted = {column_of(metric, models) for metric in metrics}
    missing = [part for part in range(store.num_parts) if wanted - store.columns(key, part)]
    accelerator.wait_for_everyone()  # nobody writes before all have seen what is missing
    shown = accelerator.is_local_main_process
    for part, own in tqdm(turns(missing, accelerator), desc=name, unit="batch", disable=not shown):
        positions = store.positions(part)
        images, kept = files.batch(positions)
        if len(kept) < len(positions):
            damaged = [files.names[k] for k in positions if k not in kept]
            raise ValueError(
                f"{len(damaged)} pictures of {name} have a header and damaged pixels: {', '.join(damaged[:3])}; mend or remove them"
            )
        if own:
            texts = None if prompts is None else [prompts[k] for k in positions]
            own_samples = Samples(torch.empty(len(images), 0), images, texts)
            store.write(key, part, measured_columns(metrics, models, own_samples, None, wanted))
    accelerator.wait_for_everyone()


def prompts_of(path: str | Path, files: ImageFiles) -> list[str]:
    """The prompt of each picture, by `metadata.jsonl`.

    Raises:
        ValueError: if there is none, or it does not name the prompt of every picture.
    """
    try:
        if Path(path).is_dir():
            text = (Path(path) / METADATA).read_text(encoding="utf-8")
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(METADATA).decode("utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = {line["file_name"]: next(line[key] for key in CAPTIONS if key in line) for line in lines}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{str(path)!r} has no {METADATA} with the file_name and prompt of each picture ({error}); add one, or drop the metrics that "
            "need prompts"
        ) from error
    lacking = [name for name in files.names if name not in found]
    if lacking:
        raise ValueError(
            f"{METADATA} of {str(path)!r} has no prompt for {len(lacking)} pictures, e.g. {lacking[0]}; add them"
        )
    return [found[name] for name in files.names]
