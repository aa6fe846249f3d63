# SPDX-License-Identifier: Apache-2.0
"""Evaluate schedulers at several numbers of evaluations: how far from the teacher, from prompts and from real images they sample.

    accelerate launch -m training.evaluate --teacher examples/teachers/fashion-sd --schedulers my-schedules stock \\
        --nfe 4 5 8 --seeds 0-511 --prompts_file prompts.txt --guidance_scale 3 --metrics mse psnr --output_dir evaluation
    python -m training.evaluate --images samples/images --metrics fid --reference real.npz --output_dir evaluation

All start from the same noises and prompts: sample k of `--seeds` has prompt k modulo the number of prompts. A run that was stopped
continues when it is started again, on any number of processes; more schedulers, numbers of evaluations and metrics can be added
later and reuse what is measured. The results are in results.json, table.md and pictures.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging

from ld3_diffusers.discretization import DISCRETIZATIONS
from ld3_diffusers.solvers import SOLVERS

from .arguments import check_writable, parse, usage_errors
from .evaluation_of_images import evaluate_images
from .evaluation_of_pipeline import evaluate_pipeline
from .evaluation_report import short_table, write_report
from .metrics import CLIP_MODEL, DINOV2_MODEL, METRICS, make_metrics
from .processes import COLLECTIVE_TIMEOUT, lost_process_message
from .published_results import METRIC, check_published, published_lines, published_results, record
from .sampling_arguments import add_sampling_arguments, check_sampling, versions
from .scheduler_specs import SchedulerSpec, parse_scheduler
from .whole_files import write_whole


OF_TEACHERS = ("mse", "psnr", "lpips", "stlpips")  # metrics that pictures from files cannot have


def parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "evaluate", description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--schedulers",
        nargs="+",
        default=[],
        metavar="NAME[:option=value,...]",
        help="stock, a scheduler class of Diffusers, LD3Scheduler, a folder or Hub id of learned schedules; see "
        "training/scheduler_specs.py",
    )
    p.add_argument("--nfe", type=int, nargs="+", default=[5], help="network evaluations (default: 5)")
    p.add_argument(
        "--solver",
        nargs="+",
        choices=sorted(SOLVERS),
        default=[],
        help="take learned schedules and LD3Scheduler with each of these; default: with their own",
    )
    p.add_argument("--subject", help="name of the one that the others are compared with; default: the first")
    p.add_argument("--images", nargs="+", default=[], help="in place of a pipeline: folders or zip files of pictures")
    p.add_argument("--skip_unreadable", action="store_true", help="leave pictures out that cannot be read")
    p.add_argument("--output_dir", required=True)
    add_sampling_arguments(p, seeds="0-511", teacher_required=False)
    add_teacher_schedule_arguments(p)
    add_metric_arguments(p)
    return p


def add_teacher_schedule_arguments(parser) -> None:
    teacher = parser.add_argument_group("the teacher's long schedule")
    teacher.add_argument("--teacher_steps", type=int, default=50, help="network evaluations (default: %(default)s)")
    teacher.add_argument("--teacher_solver", choices=sorted(SOLVERS), default="unipc", help="default: %(default)s")
    teacher.add_argument("--teacher_solver_order", type=int, help="default: the solver's own")
    teacher.add_argument(
        "--teacher_discretization",
        choices=sorted(DISCRETIZATIONS),
        help="default: logsnr, for flow models the pipeline's own",
    )


def add_metric_arguments(parser) -> None:
    metrics = parser.add_argument_group("metrics", "see training/metrics.py")
    metrics.add_argument("--metrics", nargs="+", default=["mse"], metavar="METRIC", help=", ".join(METRICS))
    metrics.add_argument("--feature_network", default="inception", help="of fid, kid and is; see training/features.py")
    metrics.add_argument("--reference", nargs="+", default=[], help="files made by training.make_reference")
    metrics.add_argument("--reference_network", help="that made files which do not say so")
    metrics.add_argument(
        "--published_results",
        metavar="DATA_SET",
        help="print the FIDs that papers report for this data set beside these; see training/published_results.yaml",
    )
    metrics.add_argument("--inception_weights", help="file, in place of fetching it")
    metrics.add_argument("--clip_model", default=CLIP_MODEL, help="default: %(default)s")
    metrics.add_argument("--dinov2_model", default=DINOV2_MODEL, help="default: %(default)s")
    metrics.add_argument("--lpips_net", choices=["vgg", "alex"], default="vgg", help="default: %(default)s")
    metrics.add_argument(
        "--blocks", type=int, default=5, help="of seeds, for the spread between them; 0: none (default: %(default)s)"
    )
    metrics.add_argument(
        "--local_errors",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="of each step of our own schedulers",
    )
    metrics.add_argument(
        "--save_images", type=int, default=8, help="keep pictures of the first so many samples (default: %(default)s)"
    )


def check(args: argparse.Namespace) -> tuple[list[int], list[str] | None, list[SchedulerSpec]]:
    """What can be refused before anything is loaded; returns the seeds, the prompts and the schedulers.

    Raises:
        ValueError: for an impossible argument.
    """
    unknown = [name for name in args.metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; use some of {', '.join(METRICS)}")
    if len(set(args.metrics)) < len(args.metrics):
        raise ValueError(f"--metrics names one twice: {' '.join(args.metrics)}; give each once")
    if min(args.nfe) < 1 or len(set(args.nfe)) < len(args.nfe):
        raise ValueError(f"--nfe must name different counts of at least 1, got {' '.join(map(str, args.nfe))}")
    for name, least in (("teacher_steps", 1), ("blocks", 0), ("save_images", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.blocks == 1:
        raise ValueError("--blocks are for a spread, which one alone has not; give 0 or at least 2")
    check_published(args.published_results, args.metrics)
    check_writable(args.output_dir)
    if args.images:
        check_images(args)
        return [], None, []
    if args.pretrained_model_name_or_path is None:
        raise ValueError("give --teacher and --schedulers, or --images")
    if not args.schedulers:
        raise ValueError("give --schedulers, e.g. --schedulers stock; see --help")
    specs = [parse_scheduler(text) for text in args.schedulers]
    specs = [each for spec in specs for each in spec.with_solvers(args.solver)]
    if args.solver and not any("solver" in spec.options for spec in specs):
        raise ValueError("--solver is for learned schedules and LD3Scheduler, and none is among --schedulers; drop it")
    compared = [name for name in args.metrics if name in OF_TEACHERS]
    if compared and max(args.nfe) > args.teacher_steps:
        raise ValueError(
            f"--nfe {max(args.nfe)} is more than the teacher's --teacher_steps {args.teacher_steps}, and {compared[0]} is the distance "
            "to it; raise --teacher_steps"
        )
    seeds, prompts = check_sampling(args)
    if "clip_score" in args.metrics and (prompts is None or all(prompt.isdecimal() for prompt in prompts)):
        raise ValueError(
            "clip_score compares pictures with prompts, and there are none, or class labels; drop clip_score"
        )
    return seeds, prompts, specs


def check_images(args: argparse.Namespace) -> None:
    """Raises a `ValueError` for arguments that pictures from files cannot have."""
    if args.pretrained_model_name_or_path or args.schedulers:
        raise ValueError("--images are in place of --teacher and --schedulers; drop one or the other")
    for name in args.metrics:
        if name in OF_TEACHERS:
            raise ValueError(f"{name} compares with a teacher's samples, which --images have not; drop {name}")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}")
    for path in args.images:
        if not Path(path).exists():
            raise ValueError(f"there is no folder or zip file {path!r}; check --images")


def main(argv: Sequence[str] | None = None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    diffusers_logging.set_verbosity_error()  # each scheduler would list the options of the pipeline's that it does not know
    command = shlex.join(["python", "-m", "training.evaluate", *(sys.argv[1:] if argv is None else argv)])
    with usage_errors(command_line), lost_process_message(args.output_dir):
        evaluate(args, *check(args), command)


def evaluate(
    args: argparse.Namespace, seeds: list[int], prompts: list[str] | None, specs: list[SchedulerSpec], command: str
) -> None:
    accelerator = Accelerator(kwargs_handlers=[COLLECTIVE_TIMEOUT])
    metrics = make_metrics(
        args.metrics,
        feature_network=args.feature_network,
        reference=args.reference,
        reference_network=args.reference_network,
        clip_model=args.clip_model,
        dinov2_model=args.dinov2_model,
        lpips_net=args.lpips_net,
        inception_weights=args.inception_weights,
        device=accelerator.device,
    )
    if args.images:
        results = evaluate_images(args, metrics, accelerator)
    else:
        results = evaluate_pipeline(args, seeds, prompts, specs, metrics, accelerator)
    results["facts"] |= {"versions": versions(), "command": command}
    if args.published_results:
        fid = next(metric for metric in metrics if metric.name == METRIC)
        results["published"] = record(published_results(args.published_results), fid, results["facts"])
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        save_results(folder / "results.json", results)
        write_report(folder, results)
        print("\n".join([short_table(results), *published_lines(results)]))
        print(f"\nwrote {folder}/results.json, table.md and pictures")
        for warning in results["warnings"]:
            print(f"note: {warning}")
    accelerator.wait_for_everyone()


def save_results(file: Path, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
