# SPDX-License-Identifier: Apache-2.0
"""An evaluation of schedulers on a pipeline: who takes part, what is measured, and the results."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ld3_diffusers import LD3Scheduler

from .call_settings import CALL_SETTINGS, call_settings
from .comparison import Comparison, Contender
from .contenders import NamedScheduler, NoSchedule, is_stochastic, solver_of
from .evaluation import (
    EVALUATIONS,
    FINITE,
    IMAGES,
    LEVELS,
    TEACHER,
    TOLD,
    Entrant,
    Measurement,
    RunningMeans,
    check_names,
    metric_facts,
)
from .evaluation_plots import image_folder
from .evaluation_report import short_table
from .evaluation_results import Entry, Scoring, result_rows, small_blocks
from .evaluation_store import Store
from .make_teacher_set import teacher_scheduler
from .metrics import Metric, SetMetric, count_warnings
from .processes import on_main, share
from .rendering import rendered, write_png
from .request_file import begin
from .sampling_arguments import load_pipeline, sampling_request
from .scheduler_specs import SchedulerSpec
from .seeded_samples import SeededSamples
from .teacher import scheduler_digest


LOCAL_ERROR_SAMPLES = 16
NOT_TOLD = ("batch_size", "teacher_schedule", "scheduler_digest", "encoders_digest")  # of a request, among the facts


def evaluate_pipeline(
    args: argparse.Namespace,
    seeds: list[int],
    prompts: list[str] | None,
    specs: Sequence[SchedulerSpec],
    metrics: Sequence[Metric],
    accelerator,
) -> dict[str, Any]:
    """Measures what is missing in `<output_dir>/work`; the results, without facts about the program's run."""
    warnings = count_warnings(metrics, len(seeds))
    folder = Path(args.output_dir)
    pipe = load_pipeline(args, accelerator)
    with Comparison(pipe, **call_settings(args)) as comparison:
        config = comparison.stock_scheduler.config
        entrants, absent = entrants_of(specs, config, args.nfe)
        subject = args.subject or entrants[0].contender.name
        check_subject(subject, entrants)
        teacher = teacher_of(args, config)
        request = {
            **sampling_request(args, comparison, seeds, prompts),
            "batch_size": args.batch_size,
            "teacher_schedule": teacher_facts(teacher),
            "scheduler_digest": scheduler_digest(teacher.scheduler.config),
        }
        samples = SeededSamples(comparison, seeds, prompts, args.batch_size)
        # Prompts that the pipeline cannot have, or has to have, are refused before the folder is theirs.
        shape = comparison.state_shape(samples.conditioning(samples.positions(0), comparison.device))
        on_main(lambda: begin(folder, request), accelerator)
        measurement = Measurement(
            comparison,
            teacher,
            samples,
            metrics,
            models_of(args),
            Store(folder / "work", len(seeds), args.batch_size),
            shape,
            min(args.save_images, len(seeds)),
            args.decode_batch_size,
        )
        if (reason := unshowable(measurement)) is not None:
            measurement = replace(measurement, shown=0)
            warnings.append(f"no pictures are kept: {reason}")
        entrants, failed = try_out(measurement, entrants, accelerator)
        absent += failed
        check_subject(subject, entrants)
        measure(measurement, entrants, subject, accelerator)
        errors = local_errors_of(measurement, entrants, accelerator) if args.local_errors else {}
        entries = [entry_of(measurement, each, errors) for each in entrants]
        scoring = Scoring(metrics, measurement.models, args.blocks)
        scores_teacher = measurement.needs_teacher and any(isinstance(metric, SetMetric) for metric in metrics)
        own = Entry(TEACHER, None, TEACHER, measurement.store, {}) if scores_teacher else None
        rows, of_teacher = result_rows(entries, subject, scoring, accelerator, own)
        if accelerator.is_main_process:
            write_images(folder, measurement, entrants)
        path = comparison.path.kind
    shown = samples.positions(0).start, measurement.shown
    facts = {
        **{key: value for key, value in request.items() if key not in NOT_TOLD},
        "samples": len(seeds),
        "prompts": 0 if prompts is None else len(set(samples.prompts_of(range(len(seeds))))),
        "teacher_steps": args.teacher_steps,
        "teacher_schedule": request["teacher_schedule"],
        "path": path,
        "shown": [
            {"seed": seeds[k], "prompt": None if prompts is None else prompts[k % len(prompts)]} for k in range(*shown)
        ],
        "teacher_values": of_teacher,
    }
    facts = {key: value for key, value in facts.items() if key not in CALL_SETTINGS or value is not None}
    return {
        "facts": facts,
        "metrics": metric_facts(metrics),
        "subject": subject,
        "warnings": warnings + small_blocks(entries, scoring) + notes(measurement, entrants),
        "absent": absent,
        "rows": rows,
    }


# ---------------------------------------------------------------------- who takes part


def entrants_of(
    specs: Sequence[SchedulerSpec], config, nfes: Sequence[int]
) -> tuple[list[Entrant], list[dict[str, Any]]]:
    """Everyone at every number of evaluations, and who has no schedule for which.

    Raises:
        ValueError: if a scheduler cannot be made, has no schedule for any of the numbers, or two are called alike.
    """
    entrants, absent = [], []
    for spec in specs:
        try:
            named = NamedScheduler(spec, config)
        except ValueError as error:
            if not spec.solver_is_tried:
                raise
            absent += [{"name": spec.name, "nfe": nfe, "reason": str(error)} for nfe in nfes]
            continue
        reasons = []
        for nfe in nfes:
            try:
                entrants += [Entrant.of(contender, nfe) for contender in named.contenders(nfe)]
            except NoSchedule as error:
                reasons.append({"name": named.name, "nfe": nfe, "reason": str(error)})
        if len(reasons) == len(nfes):
            raise ValueError(f"{spec.text!r} has no schedule for any --nfe: {reasons[0]['reason']}")
        absent += reasons
    if not entrants:
        raise ValueError(f"nobody can take any solver of --solver: {absent[0]['reason']}")
    check_names(entrants)
    return entrants, absent


def check_subject(subject: str, entrants: Sequence[Entrant]) -> None:
    """Raises a `ValueError` unless the subject takes part."""
    names = list(dict.fromkeys(each.contender.name for each in entrants))
    if subject not in names:
        raise ValueError(f"the subject {subject!r} does not take part; --subject names one of {', '.join(names)}")


def teacher_of(args: argparse.Namespace, config) -> Contender:
    """The teacher on its long schedule, as make_teacher_set makes it."""
    asked = argparse.Namespace(
        solver=args.teacher_solver, solver_order=args.teacher_solver_order, discretization=args.teacher_discretization
    )
    return Contender(TEACHER, teacher_scheduler(asked, config), args.teacher_steps)


def teacher_facts(teacher: Contender) -> dict[str, Any]:
    config = teacher.scheduler.config
    facts = {key: config[key] for key in ("solver", "solver_order", "solver_type", "discretization")}
    return {"num_inference_steps": teacher.num_inference_steps, **facts}


def models_of(args: argparse.Namespace) -> dict[str, str]:
    """Models of metrics that are not told apart by a record of their own."""
    return {"clip_score": args.clip_model, "lpips": args.lpips_net, "stlpips": args.lpips_net}


def unshowable(measurement: Measurement) -> str | None:
    """Why end states cannot be made pictures; None if they can, or none are asked for.

    Raises:
        ValueError: if a metric needs pictures, of a pipeline that samples videos or whose end states cannot be decoded.
    """
    if not measurement.needs_pictures and not measurement.shown:
        return None
    try:
        rendered(measurement.comparison, torch.zeros(1, *measurement.shape), 1)
    except ValueError as error:
        if measurement.needs_pictures:
            raise
        return str(error)
    return None


def try_out(measurement: Measurement, entrants: Sequence[Entrant], accelerator) -> tuple[list[Entrant], list[dict]]:
    """Those that sample, and those that the pipeline cannot run, with the reason: one sample each, of those not seen before."""
    samples, comparison = measurement.samples, measurement.comparison
    conditioning = samples.conditioning(range(1), comparison.device)
    noise = samples.noise(range(1), measurement.shape)

    def failure(each: Entrant) -> str | None:
        if EVALUATIONS in measurement.store.columns(each.key, 0):
            return None
        try:
            generators = samples.generators(range(1), measurement.shape)
            comparison.follow(each.contender, noise, conditioning, generators)
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            AttributeError,
            NotImplementedError,
            AssertionError,
        ) as error:
            return f"it cannot run here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return None

    reasons = share(list(entrants), failure, accelerator)
    accelerator.wait_for_everyone()
    kept = [each for each, reason in zip(entrants, reasons) if reason is None]
    if not kept:
        raise ValueError(f"no scheduler can run with this pipeline; the first: {reasons[0]}")
    failed = [
        {"name": each.contender.name, "nfe": each.nfe, "reason": reason}
        for each, reason in zip(entrants, reasons)
        if reason is not None
    ]
    return kept, failed


# ---------------------------------------------------------------------- measuring


def measure(measurement: Measurement, entrants: Sequence[Entrant], subject: str, accelerator) -> None:
    """With a bar over all that this process measures, and the means so far every few minutes."""
    means = RunningMeans(measurement.metrics, measurement.models)
    parts = measurement.missing(entrants, accelerator)
    own = list(parts)[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(parts[part]) for part in own)
    shown = accelerator.is_local_main_process
    with tqdm(total=total, desc="evaluating", unit="batch", disable=not shown) as progress:

        def on_measured(each: Entrant | None, columns: dict[str, Tensor]) -> None:
            means.add(each, columns)
            label = TEACHER if each is None else f"{each.contender.label} at {each.nfe}"
            progress.set_postfix_str(label, refresh=False)
            progress.update()
            if shown and means.due():
                progress.write(short_table(means.results(subject)))

        measurement.run(entrants, accelerator, on_measured)


def local_errors_of(
    measurement: Measurement, entrants: Sequence[Entrant], accelerator
) -> dict[str, list[float | None]]:
    """By key, the error of each step by itself of those with one schedule of ours for all samples; see [`local_errors`]."""
    from .local_error import local_errors

    comparison, samples, store = measurement.comparison, measurement.samples, measurement.store
    positions = range(min(LOCAL_ERROR_SAMPLES, len(samples)))
    name = f"local-errors-{len(positions)}"
    mine = [
        each
        for each in entrants
        if isinstance(each.contender.scheduler, LD3Scheduler) and each.contender.stages != "per sample"
    ]

    def errors_of(each: Entrant) -> list[float | None]:
        found = store.score(each.key, name)
        if found is None:
            noise = samples.noise(positions, measurement.shape)
            conditioning = samples.conditioning(positions, comparison.device)
            # As the pipeline runs it, with its shift.
            comparison.follow(each.contender, noise, conditioning)
            schedule = each.contender.scheduler.schedule
            errors = local_errors(comparison, schedule, noise, conditioning).tolist()
            found = [error if math.isfinite(error) else None for error in errors]  # JSON has no NaN
            store.write_score(each.key, name, found)
        return found

    return dict(zip((each.key for each in mine), share(mine, errors_of, accelerator)))


# ---------------------------------------------------------------------- results


def entry_of(measurement: Measurement, each: Entrant, errors: dict[str, list[float | None]]) -> Entry:
    store, contender = measurement.store, each.contender
    schedule = None
    if {LEVELS, TOLD} <= store.columns(each.key, 0):
        schedule = {name: store.read(each.key, 0, name).tolist() for name in (LEVELS, TOLD)}
    facts = {
        "setting": contender.setting,
        "spec": contender.spec,
        "solver": solver_of(contender),
        "evaluations": int(store.read(each.key, 0, EVALUATIONS)),
        "schedule": schedule,
        "local_errors": errors.get(each.key),
        "images": image_folder(contender.label, each.nfe),
    }
    return Entry(contender.name, each.nfe, each.key, store, facts)


def notes(measurement: Measurement, entrants: Sequence[Entrant]) -> list[str]:
    """What a reader of the results has to know of some contenders."""
    store, sentences = measurement.store, []
    for each in entrants:
        finite = store.column(each.key, FINITE)
        if not bool(finite.all()):
            sentences.append(
                f"{int((~finite).sum())} of {len(finite)} samples of {each.contender.label} at {each.nfe} evaluations are not finite; "
                "their pictures are black"
            )
    predicted = dict.fromkeys(each.contender.name for each in entrants if each.contender.stages == "per sample")
    if predicted:
        sentences.append(
            f"the stages of {', '.join(predicted)} are predicted for each sample: schedules are drawn with those of the bare solver, "
            "and there are no errors of single steps"
        )
    random = dict.fromkeys(each.contender.name for each in entrants if is_stochastic(each.contender.scheduler))
    if random:
        sentences.append(
            f"{', '.join(random)} {'adds' if len(random) == 1 else 'add'} noise at each step, so that the distance to the teacher says "
            "little about the quality"
        )
    if random and "generator" not in measurement.comparison.parameters:
        sentences.append(
            "the pipeline takes no generators, so that what stochastic schedulers sample cannot be repeated"
        )
    return sentences


def write_images(folder: Path, measurement: Measurement, entrants: Sequence[Entrant]) -> None:
    """Pictures of the first samples, as `images/<who>/<seed>.png`."""
    whose = {image_folder(TEACHER): TEACHER}
    whose |= {image_folder(each.contender.label, each.nfe): each.key for each in entrants}
    store, seeds = measurement.store, measurement.samples.seeds
    for place, key in whose.items():
        for part in range(store.num_parts):
            positions = store.positions(part)
            if positions.start >= measurement.shown:
                break
            for k, image in zip(positions, store.read(key, part, IMAGES)):
                if k < measurement.shown:
                    write_png(folder / place / f"{seeds[k]}.png", image)
