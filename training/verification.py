# SPDX-License-Identifier: Apache-2.0
"""Measuring again what a published certificate says."""

import argparse
import math
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import HfApi

from ld3_diffusers import load_scheduler
from ld3_diffusers.hub import CERTIFICATE_NAME, CLIENT_ERRORS

from . import certificate as certificates
from . import certificate_form
from .certification import measure, opened, pair_arguments, pairs_for
from .comparison import Contender, best_by_name, paired_interval, unbeaten
from .processes import on_main
from .published import HELD, PICTURES
from .schedule_folder import CONFIG


# What may lie between a sample's distance and the one that was certified on another machine, in units of the mean distance.
# Rounding alone, in batches of another size on one machine, moves them by up to 3e-4 in float32. Whether the learned schedule wins
# is judged by what was measured again, so that a wide tolerance hides no loss.
TOLERANCE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}


def verify(args: argparse.Namespace, accelerator: Accelerator) -> bool:
    """Whether everything that the certificate says was found again."""
    folder = Path(on_main(lambda: str(fetched(args)), accelerator))
    try:
        certificate = certificate_form.read(folder / CERTIFICATE_NAME)
        scheduler = load_scheduler(folder)
        if scheduler.config.curve is not None or scheduler.config.interpolate:
            raise ValueError(
                "the config serves counts, by a curve or interpolated, of which the certificate says nothing"
            )
        certificates.check(certificate, scheduler.config.schedules or {})
    except ValueError as error:
        accelerator.print(f"NOT verified: {error}")
        return False
    facts = certificates.shared_facts(scheduler.config.schedules)
    teacher = args.pretrained_model_name_or_path or named_teacher(certificate)
    revision = certificate["teacher"]["revision"] if teacher == certificate["teacher"]["hub_id"] else None
    tolerance = TOLERANCE.get(facts["dtype"], 0.0) if args.tolerance is None else args.tolerance
    if args.pretrained_model_name_or_path is None:
        at = f" at revision {revision}" if revision else ""
        accelerator.print(f"the certificate names the teacher {teacher}{at}: it is downloaded from the Hub")
    accelerator.print(f"{args.verify}: teacher {teacher}, tolerance {tolerance:g} of the mean distance")
    failures = []
    with ExitStack() as stack:
        work = Path(on_main(lambda: stack.enter_context(tempfile.TemporaryDirectory()), accelerator))
        for label, run in certificate["runs"].items():
            records = {nfe: record for nfe, record in certificate["counts"].items() if record["run"] == label}
            first, last = run["seeds"]
            last = min(last, first + args.num_samples - 1) if args.num_samples else last
            asked = pair_arguments(teacher, facts, (first, last), run["batch_size"], revision, args.variant)
            with opened(asked, facts, accelerator) as (comparison, stock):
                pairs = pairs_for(comparison, asked, run["prompts"] or None, work, accelerator)
                measured = measure(comparison, pairs, scheduler, list(records), stock, work, accelerator)
            for nfe, record in records.items():
                line, failure = compared(nfe, record, *measured[nfe], first, tolerance)
                accelerator.print(line)
                failures += failure
    accelerator.print(f"NOT verified: {failures[0]}" if failures else "verified")
    return not failures


def named_teacher(certificate: dict[str, Any]) -> str:
    """The Hub id of the teacher. A certificate may be anybody's, so it cannot name a folder of this machine.

    Raises:
        ValueError: if the certificate names none.
    """
    name = certificate["teacher"]["hub_id"] or certificate["base_model"]
    if name is None:
        raise ValueError(
            f"the teacher {certificate['teacher']['name']!r} is on no Hub that the certificate knows; give it with --teacher"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"the certificate's teacher {name!r} is no Hub id of the form owner/name; give it with --teacher"
        )
    if Path(name).exists():
        raise ValueError(
            f"the certificate means {name!r} on the Hub, and a folder here has that name; start elsewhere, or give --teacher"
        )
    return name


def fetched(args: argparse.Namespace) -> Path:
    """The folder with config, certificate and predictors, downloaded if it is on the Hub.

    Raises:
        ValueError: if there is none.
    """
    if Path(args.verify).is_dir():
        folder = Path(args.verify, args.subfolder)
    else:
        prefix = f"{args.subfolder.strip('/')}/" if args.subfolder else ""
        api = HfApi(token=args.hub_token)
        try:
            commit = api.model_info(args.verify, revision=args.revision).sha  # all files of one commit
            wanted = [prefix + name for name in HELD if name not in PICTURES]
            folder = Path(api.snapshot_download(args.verify, revision=commit, allow_patterns=wanted), prefix)
        except (*CLIENT_ERRORS, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot read {args.verify!r}, neither a folder nor a repository: {reason}") from error
    for name in (CONFIG, CERTIFICATE_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{args.verify!r} has no {name} in {args.subfolder or 'its root'}; see --subfolder")
    return folder


def compared(
    nfe: str, record: dict, learned: Contender, stock: list[Contender], first: int, tolerance: float
) -> tuple[str, list[str]]:
    """A line of the report, and what was not found again."""
    own, others = certificates.contenders(record)
    stated = {(c.name, c.setting): c for c in others}
    failures, largest = [], 0.0
    for contender in (learned, *stock):
        other = own if contender is learned else stated.pop((contender.name, contender.setting), None)
        if other is None:
            failures.append(f"at {nfe} evaluations the certificate leaves out {contender.label}")
            continue
        before = other.distances[: len(contender.distances)]
        if contender.evaluations != other.evaluations or contender.num_inference_steps != other.num_inference_steps:
            failures.append(f"at {nfe} evaluations {contender.label} makes {contender.evaluations} evaluations")
        if contender.mean == other.mean == math.inf:
            continue
        deviation = (contender.distances - before).abs() / other.mean
        worst = int(deviation.argmax())
        if not float(deviation[worst]) <= tolerance:
            failures.append(
                f"at {nfe} evaluations {contender.label} has the distance {float(contender.distances[worst]):.6g} at seed "
                f"{first + worst}, the certificate says {float(before[worst]):.6g}"
            )
        largest = max(largest, float(deviation[worst]))
    failures += [
        f"at {nfe} evaluations the certificate names {c.label}, which does not take part" for c in stated.values()
    ]
    best = best_by_name(stock)[0]
    line = f"{nfe} evaluations: {learned.name} {1e3 * learned.mean:.3f}, {best.label} {1e3 * best.mean:.3f} (x 1e-3)"
    if len(learned.distances) > 1:
        mean, low, high = paired_interval(best.distances, learned.distances)
        line += f", difference {1e3 * mean:+.3f} [{1e3 * low:+.3f}, {1e3 * high:+.3f}]"
    if len(learned.distances) == len(own.distances) and unbeaten(learned, best_by_name(stock)):
        failures.append(f"at {nfe} evaluations the {learned.name} schedule does not win")
    return f"{line}, {len(learned.distances)} samples, largest deviation {largest:.2g}", failures
