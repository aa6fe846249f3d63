# SPDX-License-Identifier: Apache-2.0
"""Measuring learned schedules beside every stock scheduler: the teacher's pairs, the distances, the pictures.

To certify schedules and to verify a certificate is the same work. What is done is kept in a work folder, so that an interrupted run
continues.
"""

import hashlib
import json
import math
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.schedulers.learned import check_model

from .arguments import parse
from .call_settings import call_settings
from .certificate import entry_hash, how_made
from .comparison import Comparison, Contender, best_by_name
from .contenders import copy_of, setting_of, stock_contenders
from .make_teacher_set import encode_and_sample, parser, request, teacher_scheduler
from .processes import on_main
from .report import pick_columns, save_grid, save_schedules
from .teacher import load_teacher, teacher_digest
from .teacher_set import TeacherSet, TeacherSetWriter
from .whole_files import write_whole


MIXED_PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # by the dtype in a schedule's provenance
SHOWN = 8  # samples in the picture
Measured = dict[str, tuple[Contender, list[Contender]]]  # by number of evaluations: learned, stock


def pair_arguments(
    teacher: str, facts: dict[str, Any], seeds: tuple[int, int], batch_size: int, revision=None, variant=None
) -> Namespace:
    """Arguments of make_teacher_set for pairs made as those that the schedules were learned on, but for their seeds and prompts."""
    if facts["dtype"] not in MIXED_PRECISION:
        raise ValueError(
            f"the schedules were learned in {facts['dtype']}; this program certifies {', '.join(MIXED_PRECISION)}"
        )
    given = {
        "pretrained_model_name_or_path": teacher,
        "output_dir": "unused",
        "revision": revision,
        "variant": variant,
        "mixed_precision": MIXED_PRECISION[facts["dtype"]],
        "num_inference_steps": facts["teacher_steps"],
        "solver": facts["teacher_solver"],
        "solver_order": facts["teacher_solver_order"],
        "solver_type": facts["teacher_solver_type"],
        "discretization": facts["teacher_discretization"],
        "final_sigmas_type": facts["teacher_final_sigmas_type"],
        "seed": seeds[0],
        "num_samples": seeds[1] - seeds[0] + 1,
        "train_batch_size": batch_size,
        "split": "certification",
        **call_settings(facts),
    }
    return parse(parser(), [f"--{name}={value}" for name, value in given.items() if value is not None])


@contextmanager
def opened(asked: Namespace, facts: dict[str, Any], accelerator) -> Iterator[tuple[Comparison, Any]]:
    """The teacher, ready for its long schedule and for others, and the config of the scheduler that it came with.

    Raises:
        ValueError: if it cannot be loaded, or is not the one that the schedules were learned for.
    """
    pipe = load_teacher(
        asked.pretrained_model_name_or_path,
        revision=asked.revision,
        variant=asked.variant,
        mixed_precision=asked.mixed_precision,
        device=None,  # text encoders and the denoiser may not fit together
    )
    if teacher_digest(pipe) != facts["teacher_digest"]:
        raise ValueError(
            f"{asked.pretrained_model_name_or_path!r} is another teacher than the one that the schedules were learned for (digest "
            f"{teacher_digest(pipe)}, learned for {facts['teacher_digest']}); give that one with --teacher, --revision and, where it "
            "has several kinds of weight files, --variant"
        )
    stock = pipe.scheduler.config
    pipe.scheduler = teacher_scheduler(asked, stock)
    # CUDA's convolutions round float32 to 10 bits by default, which others could not measure again.
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with Comparison(pipe, **call_settings(facts)) as comparison:
            yield comparison, stock
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def pairs_for(
    comparison: Comparison, asked: Namespace, prompts: list[str] | None, work: Path, accelerator
) -> TeacherSet:
    """The teacher's pairs, made, continued or found in the work folder."""
    made = request(asked, prompts, comparison)
    asked.output_dir = str(work / f"pairs-{_digest(made)}")
    writer = TeacherSetWriter(asked.output_dir, made)
    if not writer.finished:
        encode_and_sample(asked, prompts, comparison, writer, accelerator)
    accelerator.wait_for_everyone()
    comparison.pipe.to(accelerator.device)
    return TeacherSet.load(asked.output_dir)


def measure(
    comparison: Comparison, pairs: TeacherSet, scheduler: LD3Scheduler, nfes: list[str], stock, work: Path, accelerator
) -> Measured:
    """Distances of the learned schedules and of all stock schedulers, for each number of evaluations.

    Args:
        scheduler: with the learned schedules.
        stock: config of the pipeline's own scheduler.
    """
    check_model(scheduler.config, comparison.scheduler.config)  # the digest is of the weights alone
    result, entries = {}, scheduler.config.schedules
    for nfe in nfes:
        schedule = scheduler.learned_schedules[int(nfe)]
        setting = setting_of(schedule.spec, schedule)
        subject = Contender(how_made({nfe: entries[nfe]}), copy_of(scheduler), int(nfe), setting)
        result[nfe] = subject, list(stock_contenders(stock, int(nfe)))
    batch_size = pairs.provenance["shard_size"]
    jobs = [(nfe, contender) for nfe, (learned, others) in result.items() for contender in (learned, *others)]
    batches = -(-len(pairs) // batch_size)
    progress = tqdm(
        total=len(jobs) * batches, desc="comparing", unit="batch", disable=not accelerator.is_local_main_process
    )
    for done, (nfe, contender) in enumerate(jobs, 1):
        identity = [
            pairs.provenance,
            nfe,
            contender.name,
            contender.setting,
            contender.num_inference_steps,
            dict(stock),
        ]
        if contender is result[nfe][0]:
            identity.append(entry_hash(entries[nfe]))
        file = work / "distances" / f"{_digest(identity)}.json"
        progress.set_postfix_str(f"{nfe} evaluations, {contender.label}", refresh=False)
        found = on_main(lambda file=file: _stored(file, len(pairs)), accelerator)
        if found is None:
            comparison.measure(
                contender, pairs, batch_size=batch_size, accelerator=accelerator, on_batch=progress.update
            )
            found = {"evaluations": contender.evaluations, "distances": contender.distances.tolist()}
            if accelerator.is_main_process:
                write_whole(file, lambda path, found=found: path.write_text(json.dumps(found)))
        contender.evaluations = found["evaluations"]
        contender.distances = torch.tensor(found["distances"], dtype=torch.float64)
        if contender is result[nfe][0] and contender.mean == math.inf:
            raise ValueError(
                f"at {nfe} evaluations samples of the {contender.name} schedule are not finite; make another one"
            )
        progress.update(done * batches - progress.n)  # of several processes each sees only its own batches
    progress.close()
    return result


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stored(file: Path, samples: int) -> dict[str, Any] | None:
    """What an earlier run measured; None if it did not, or its file is damaged."""
    try:
        found = json.loads(file.read_text())
        return found if len(found["distances"]) == samples and found["evaluations"] > 0 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def draw(comparison: Comparison, pairs: TeacherSet, learned: Contender, stock: list[Contender], folder: Path) -> None:
    """`samples.png` (teacher, best stock, the schedule itself; not of videos) and `schedules.png`.

    One that cannot be drawn, for lack of memory or of a decoder, is left out: what was measured is worth more than its pictures.
    """
    rivals = best_by_name(stock)
    for name, draw_one in (("samples.png", _draw_samples), ("schedules.png", _draw_schedules)):
        try:
            draw_one(comparison, pairs, learned, rivals, folder / name)
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{name} is left out, it cannot be drawn: {reason}")


def _draw_samples(
    comparison: Comparison, pairs: TeacherSet, learned: Contender, rivals: list[Contender], file: Path
) -> None:
    prompts = pairs.pairs.with_format(None)["prompt_index"]
    shown = pick_columns(list(prompts), SHOWN)
    if len(shown) < SHOWN:  # one prompt, or none: the first samples
        shown = list(range(min(SHOWN, len(pairs))))

    # One sample at a time: a decoder may need more memory than all that was measured.
    @torch.no_grad()
    def decoded(ends: Iterator[Tensor]) -> Tensor:
        return torch.cat([comparison.decode(end.to(comparison.device)).float().cpu() for end in ends])

    rows = {
        f"teacher\n{pairs.provenance['num_inference_steps']} evaluations": decoded(pairs.batch([i])[1] for i in shown)
    }
    for contender in (rivals[0], learned):
        name = f"{contender.name}\n{contender.evaluations} evaluations"
        rows[name] = decoded(comparison.ends(contender, pairs, [i]) for i in shown)
    captions = [textwrap.fill(pairs.prompts[prompts[i]], 16) if pairs.prompts else "" for i in shown]
    if all(images.ndim == 4 for images in rows.values()):
        save_grid(file, {name: images.expand(-1, 3, -1, -1) for name, images in rows.items()}, captions)


def _draw_schedules(
    comparison: Comparison, pairs: TeacherSet, learned: Contender, rivals: list[Contender], file: Path
) -> None:
    drawn = [learned, *(rival for rival in rivals if "Heun" not in rival.name)]
    for contender in drawn:
        comparison.ends(contender, pairs, [0])
    save_schedules(file, drawn)
