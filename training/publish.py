# SPDX-License-Identifier: Apache-2.0
"""Certify learned or searched schedules and publish them; or verify what somebody published.

    accelerate launch -m training.publish --schedules outputs/my-schedule --teacher examples/teachers/fashion-sd \\
        --prompts_file held_out.txt --push_to_hub --hub_model_id user/schedules
    accelerate launch -m training.publish --verify user/schedules

Certifying compares the schedules in the output folder of train_ld3, train_amed or a search with every stock scheduler of Diffusers, from
noises and prompts that learning never saw. A folder in which some count does not win against all of them, beyond the 95 % interval, is
not published. What is published is the scheduler config, with the predictors of schedules that have some, a certificate with all
distances, and a card written from it; without --push_to_hub the repository is a folder. Verifying measures a published certificate
again. An interrupted run continues when it is started again.
"""

import argparse
import platform
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi

import ld3_diffusers
from ld3_diffusers import LD3Scheduler

from . import certificate as certificates
from . import published as repositories
from .arguments import check_writable, parse, usage_errors
from .certification import MIXED_PRECISION, Measured, draw, measure, opened, pair_arguments, pairs_for
from .comparison import best_by_name, unbeaten
from .contenders import copy_of, predictors_of
from .model_card import model_card
from .processes import COLLECTIVE_TIMEOUT, is_sharded, lost_process_message, on_main
from .prompts import add_prompt_arguments, prompts_of
from .published import Variant
from .report import table
from .schedule_folder import existing
from .teacher import check_teacher_name
from .teacher_set import prompt_hash
from .verification import verify


FIRST_SEED = 1_000_000_000  # far from those that anybody learns on
FEWEST_SAMPLES = 16  # a bootstrap interval of fewer means little
LICENSE = "apache-2.0"
WORK = "certification"  # folder inside that of the schedules


def parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "publish", description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--schedules", help="output folder of train_ld3, train_amed or of a search, to certify and publish")
    p.add_argument(
        "--verify", metavar="REPOSITORY", help="or: Hub id or folder of published schedules, to measure again"
    )
    p.add_argument(
        "--pretrained_model_name_or_path", "--teacher", help="pipeline folder or Hub id; default: as learned"
    )
    p.add_argument("--revision", help="of the teacher; with --verify, of the repository")
    p.add_argument("--variant", help="variant of the teacher's weight files, such as fp16")
    p.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="must be that of learning, the default")
    p.add_argument("--nfe", type=int, nargs="+", help="publish only these numbers of evaluations (default: all)")
    p.add_argument("--num_samples", type=int, help="default: 128; with --verify all, or only the first so many")
    p.add_argument(
        "--seed", type=int, help=f"of the first sample (default: {FIRST_SEED}, or behind those of learning)"
    )
    p.add_argument("--train_batch_size", "--batch_size", type=int, default=16, help="samples at once (default: 16)")
    add_prompt_arguments(p.add_argument_group("prompts, of which those that learning saw are left out"))
    p.add_argument("--output_dir", help="repository as a folder (default: <schedules>/published)")
    p.add_argument("--push_to_hub", action="store_true", help="upload it, too")
    p.add_argument("--hub_model_id", help="owner/name of the repository on the Hub")
    p.add_argument("--hub_token", help="default: that of `hf auth login`")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument(
        "--license", help=f"of the schedules, for the card (default: that of a card there is, else {LICENSE})"
    )
    p.add_argument("--base_model", help="Hub id of the teacher, for the card of one that was loaded from a folder")
    p.add_argument("--subfolder", default="", help="with --verify: variant in the repository")
    p.add_argument("--tolerance", type=float, help="with --verify: of distances, in units of their mean")
    return p


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    diffusers_logging.set_verbosity_error()  # stock schedulers warn of each other's options
    with usage_errors(command_line):
        check(args)
        accelerator = Accelerator(kwargs_handlers=[COLLECTIVE_TIMEOUT])
        if is_sharded(accelerator):
            raise ValueError("publish needs the whole teacher on each device; launch it without FSDP")
        # Schedules lie beside the checkpoints of learning, which this program does not continue from.
        with lost_process_message(args.verify or Path(args.schedules, WORK)):
            succeeded = verify(args, accelerator) if args.verify else publish(args, accelerator)
    if not succeeded:
        sys.exit(1)


def check(args: argparse.Namespace) -> None:
    """Raises a `ValueError` for what can be refused at once."""
    if bool(args.schedules) == bool(args.verify):
        raise ValueError("give either --schedules, a folder to publish, or --verify, a repository to measure again")
    least = 1 if args.verify else FEWEST_SAMPLES
    if args.num_samples is not None and args.num_samples < least:
        raise ValueError(f"--num_samples must be at least {least}, got {args.num_samples}")
    if args.train_batch_size < 1 or (args.seed is not None and args.seed < 0):
        raise ValueError("--train_batch_size must be at least 1, and --seed not negative")
    if args.pretrained_model_name_or_path is not None:
        check_teacher_name(args.pretrained_model_name_or_path)


# ---------------------------------------------------------------------- publishing


def publish(args: argparse.Namespace, accelerator: Accelerator) -> bool:
    scheduler = chosen_schedules(args)
    entries = scheduler.config.schedules
    facts = certificates.shared_facts(entries)
    settings = certificates.settings(*teacher_names(args, entries, facts), facts)
    if args.mixed_precision not in (None, MIXED_PRECISION.get(facts["dtype"])):
        raise ValueError(
            f"the schedules were learned in {facts['dtype']}; drop --mixed_precision {args.mixed_precision}"
        )
    prompts = given_prompts(args, entries)
    seeds = unseen_seeds(args.seed, args.num_samples or 128, entries)
    output = Path(args.output_dir or Path(args.schedules, "published"))
    check_writable(str(output))
    api = HfApi(token=args.hub_token)

    def before() -> tuple[str | None, Variant | None]:
        """What makes certifying useless, or unnecessary."""
        repo_id = repositories.check_access(api, args.hub_model_id) if args.push_to_hub else None
        remote = {} if repo_id is None else repositories.read_hub(api, repo_id)[0]
        local = repositories.read(output)
        present = local.get(repositories.place(local, settings))
        for old in (present, remote.get(repositories.place(remote, settings))):
            if old is not None and not repositories.replaces(scheduler.config, old):
                repositories.check_extends(old, dict(scheduler.config), settings)
        return repo_id, certified_already(present, entries, settings, seeds, prompts, args.train_batch_size)

    repo_id, variant = on_main(before, accelerator)
    if variant is not None:
        accelerator.print(f"{output} holds a certificate of exactly these schedules, seeds and prompts; using it")
    else:
        work = Path(args.schedules, WORK)
        variant = certify(args, scheduler, facts, settings, seeds, prompts, work, accelerator)
    on_main(lambda: deliver(args, api, repo_id, settings, variant, output), accelerator)
    return True


def chosen_schedules(args: argparse.Namespace) -> LD3Scheduler:
    """The scheduler in the folder, with the schedules that were chosen."""
    folder = Path(args.schedules)
    scheduler = existing(folder)
    if scheduler is None or not scheduler.served_counts:
        raise ValueError(
            f"the folder {args.schedules!r} holds no schedules; give the --output_dir of train_ld3, train_amed or of a search"
        )
    known = scheduler.served_counts
    missing = sorted(set(args.nfe or []) - set(known))
    if missing:
        raise ValueError(
            f"--nfe {missing[0]}: there is no schedule for it; the folder has {', '.join(map(str, known))}"
        )
    # What is certified are schedules: a curve's are written out, one for each count.
    chosen = {
        str(nfe): (scheduler.config.schedules or {}).get(str(nfe))
        or scheduler.learned_schedule(nfe).to_dict(scheduler.path)
        for nfe in sorted(args.nfe or known)
    }
    return copy_of(scheduler, schedules=chosen, curve=None)


def teacher_names(args: argparse.Namespace, entries: dict, facts: dict) -> tuple[dict[str, Any], str | None]:
    """The teacher as certificates name it, and the base model; fills in the default of `--teacher`."""
    made = next(iter(entries.values()))["provenance"]
    if args.pretrained_model_name_or_path is None:
        if made.get("teacher") is None:
            raise ValueError("these schedules were learned for a pipeline in a folder; give it with --teacher")
        args.pretrained_model_name_or_path = made["teacher"]
        args.revision = args.revision or made.get("revision")
    name = args.pretrained_model_name_or_path
    hub_id = None if Path(name).is_dir() else name
    teacher = {
        "name": hub_id or Path(name).resolve().name,
        "hub_id": hub_id,
        "revision": args.revision,
        "digest": facts["teacher_digest"],
    }
    return teacher, args.base_model or hub_id


def given_prompts(args: argparse.Namespace, entries: dict) -> list[str] | None:
    seen = certificates.prompts_learned_on(entries)
    prompts = prompts_of(args, (args.num_samples or 128) + len(seen))
    if prompts is None and seen:
        raise ValueError("these schedules were learned on prompts; give others with --prompts_file or --dataset_name")
    return prompts


def unseen_prompts(prompts: list[str] | None, entries: dict, labels: bool) -> list[str] | None:
    """Without those that learning saw. Of class labels all remain: only their noises can be new."""
    if prompts is None or labels:
        return prompts
    seen = certificates.prompts_learned_on(entries)
    left = [prompt for prompt in prompts if prompt_hash(prompt) not in seen]
    if not left:
        raise ValueError(f"learning saw all {len(prompts)} prompts; give others with --prompts_file or --dataset_name")
    return left


def unseen_seeds(asked: int | None, count: int, entries: dict) -> tuple[int, int]:
    """First and last seed."""
    first = FIRST_SEED if asked is None else asked
    for used_first, used_last in certificates.seeds_learned_on(entries):
        if first <= used_last and used_first <= first + count - 1:
            if asked is not None:
                raise ValueError(f"learning used the seeds {used_first} to {used_last}; give another --seed, or none")
            first = used_last + 1
    return first, first + count - 1


def certified_already(
    present: Variant | None, entries: dict, settings: dict, seeds: tuple[int, int], prompts, batch_size: int
) -> Variant | None:
    """The part of a published variant that certifying would make again; None if some count is missing or differs."""
    if present is None or not set(entries) <= set(present.certificate["counts"]):
        return None
    certificate = present.certificate
    certificates.check(certificate, present.config["schedules"])
    for nfe, entry in entries.items():
        run = certificate["runs"][certificate["counts"][nfe]["run"]]
        used = (unseen_prompts(prompts, entries, run["disjoint"] == ["seeds"]) or [])[: seeds[1] - seeds[0] + 1]
        same = certificate["counts"][nfe]["entry_sha256"] == certificates.entry_hash(entry)
        if not same or (run["seeds"], run["prompts"], run["batch_size"]) != (list(seeds), used, batch_size):
            return None
    found = repositories.restricted(present, list(entries))
    # The teacher is the same one; what it is called, and the base model, may have been given differently.
    return replace(found, certificate={**found.certificate, **settings})


def certify(
    args, scheduler: LD3Scheduler, facts, settings, seeds, prompts, work: Path, accelerator: Accelerator
) -> Variant:
    """Measure, and refuse what does not win. Nothing is written but the work folder.

    Raises:
        ValueError: naming the stock schedulers that are not beaten.
    """
    asked = pair_arguments(
        args.pretrained_model_name_or_path, facts, seeds, args.train_batch_size, args.revision, args.variant
    )
    entries = scheduler.config.schedules
    with opened(asked, facts, accelerator) as (comparison, stock):
        labels = "class_labels" in comparison.parameters
        unseen = unseen_prompts(prompts, entries, labels)
        left_out = len(prompts or []) - len(unseen or [])
        accelerator.print(
            f"seeds {seeds[0]} to {seeds[1]}; {left_out} of {len(prompts or [])} prompts left out as seen"
        )
        pairs = pairs_for(comparison, asked, unseen, work, accelerator)
        measured = measure(comparison, pairs, scheduler, list(entries), stock, work, accelerator)
        for learned, others in measured.values():
            accelerator.print("\n" + table(learned, best_by_name(others)) + "\n")
        refuse_losses(measured)
        run = {
            "seeds": list(seeds),
            "prompts": pairs.prompts,
            "disjoint": ["seeds"] if labels or unseen is None else ["seeds", "prompts"],
            "left_out": left_out,
            "batch_size": args.train_batch_size,
            "arguments": recorded(args),
            "versions": versions(),
            "device": device_name(accelerator.device),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        counts = {nfe: certificates.count_record(entries[nfe], *contenders) for nfe, contenders in measured.items()}
        certificate = certificates.build(settings, run, counts)
        variant = Variant(dict(scheduler.config), certificate, predictors=dict(predictors_of(scheduler)))
        if accelerator.is_main_process:
            with tempfile.TemporaryDirectory() as folder:
                draw(comparison, pairs, *measured[min(measured, key=int)], Path(folder))
                variant.pictures.update({file.name: file.read_bytes() for file in Path(folder).iterdir()})
    return variant


def refuse_losses(measured: Measured) -> None:
    lost = {nfe: unbeaten(learned, best_by_name(stock)) for nfe, (learned, stock) in measured.items()}
    said = []
    for nfe, others in lost.items():
        for other, (mean, low, high) in others[:1]:
            own = measured[nfe][0]
            said.append(
                f"at {nfe} evaluations {other.label} has {1e3 * other.mean:.4g}, {own.name} {1e3 * own.mean:.4g}, difference "
                f"{1e3 * mean:+.4g} [{1e3 * low:+.4g}, {1e3 * high:+.4g}] (x 1e-3)"
            )
    if said:
        winning = " ".join(nfe for nfe in lost if not lost[nfe])
        fix = f"publish only those that win, with --nfe {winning}" if winning else "make others, with more pairs"
        raise ValueError(
            f"not published: not ahead of every stock scheduler beyond the interval: {'; '.join(said)}; {fix}"
        )


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The command line, without tokens, and of paths only the last part."""
    private = ("hub_token", "push_to_hub", "hub_model_id", "private", "output_dir", "verify", "subfolder", "tolerance")
    given = {name: value for name, value in vars(args).items() if name not in private and value not in (None, "")}
    for name in ("schedules", "prompts_file", "config", "pretrained_model_name_or_path", "dataset_name"):
        is_hub_id = (
            name in ("pretrained_model_name_or_path", "dataset_name") and not Path(given.get(name, "")).is_dir()
        )
        if name in given and not is_hub_id:
            given[name] = Path(given[name]).resolve().name
    return given


def versions() -> dict[str, str]:
    modules = (torch, diffusers, transformers, ld3_diffusers)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def deliver(args, api: HfApi, repo_id: str | None, settings: dict, variant: Variant, output: Path) -> None:
    """Write the folder, and upload it."""
    remote, parent = ({}, None) if repo_id is None else repositories.read_hub(api, repo_id)
    local = repositories.read(output)
    published = repositories.union(local, remote)
    name = repositories.place(published, settings)
    published = repositories.extended(published, name, variant)
    license = args.license or repositories.present_license(api, repo_id, parent, output) or LICENSE
    card = model_card(published, repo_id or args.hub_model_id or str(args.output_dir or output.name), license)
    files = repositories.contents(published, card)
    repositories.write(files, output, repositories.outdated(local, files))
    counts = ", ".join(variant.certificate["counts"])
    print(
        f"{counts} evaluations: in {f'{name}/ of' if name else 'the root of'} {output}; variants there: {', '.join(filter(None, published)) or 'none'}"
    )
    if repo_id is not None:
        message = f"Certified schedules for {counts} evaluations ({name or 'root'})"
        gone = repositories.outdated(remote, files)
        print(repositories.upload(api, repo_id, files, parent, private=args.private, message=message, gone=gone))


if __name__ == "__main__":
    main()
