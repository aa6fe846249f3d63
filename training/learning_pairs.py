# SPDX-License-Identifier: Apache-2.0
"""The pairs of a run of learning: found or made, divided, and checked to be of one kind."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from . import make_teacher_set
from .arguments import parse
from .call_settings import CALL_SETTINGS
from .prompts import PROMPT_ARGUMENTS
from .teacher_set import TeacherSet, check_disjoint


PAIRS_MADE_HERE = 128  # without --teacher_set and counts
# what must be alike in the making of training and validation pairs
SAME_TARGET = (*CALL_SETTINGS, "solver", "solver_order", "num_inference_steps")
SAME_GRID = ("solver_type", "discretization", "final_sigmas_type", "scheduler_digest")  # too, where both record it
# arguments for pairs that are made here; with --teacher_set the set has decided them
OF_MAKING = (*PROMPT_ARGUMENTS, *(name for name in CALL_SETTINGS if name != "guidance_scale"), "resolution")


@dataclass(frozen=True)
class Part:
    """Some pairs of a teacher set."""

    whole: TeacherSet
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices, device):
        return self.whole.batch([self.first + i for i in indices], device)

    def used(self) -> dict[str, list]:
        """Seeds and prompts; see [`TeacherSet.used`]."""
        return self.whole.used(range(self.first, self.first + self.count))

    def identity(self) -> list:
        """What tells these pairs from others."""
        names = ("teacher_digest", "base_seed", "prompts_digest", *SAME_TARGET)
        made = self.whole.provenance
        recorded = [made[name] for name in ("scheduler_digest",) if name in made]
        return [self.first, self.count, *(made.get(name) for name in names), *recorded]


def learning_pairs(args: Namespace, accelerator) -> tuple[Part, Part]:
    """Training and validation pairs, which share no seed.

    Raises:
        ValueError: if there are too few, or the two kinds were not made alike.
    """
    whole = TeacherSet.load(args.teacher_set if args.teacher_set else _made_here(args, accelerator))
    held_out = None if args.validation_set is None else TeacherSet.load(args.validation_set)
    if held_out is not None:
        check_disjoint(whole, held_out)
        _check_same_target(whole.provenance, held_out.provenance)
        num_valid, left = args.num_valid or len(held_out), len(whole)
    else:
        num_valid = args.num_valid or max(1, len(whole) // 3)
        left = len(whole) - num_valid
    num_train = left if args.num_train is None else args.num_train
    available = len(whole) if held_out is None else len(held_out)
    if num_train < 1 or num_train > left or num_valid > available:
        raise ValueError(
            f"{num_train if args.num_train else 'some'} training and {num_valid} validation pairs are asked of "
            f"{len(whole)}{'' if held_out is None else f' and {len(held_out)}'}; make a larger teacher set, or lower --num_train "
            "or --num_valid"
        )
    valid = Part(whole, len(whole) - num_valid, num_valid) if held_out is None else Part(held_out, 0, num_valid)
    return Part(whole, 0, num_train), valid


def _made_here(args: Namespace, accelerator) -> Path:
    """Makes a teacher set in the output folder, or continues or finds it there."""
    folder = Path(args.output_dir, "teacher_set")
    count = PAIRS_MADE_HERE
    if args.num_train or args.num_valid:
        count = (args.num_train or args.num_valid) + (args.num_valid or args.num_train)
    given = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "output_dir": folder,
        "num_samples": count,
        "num_inference_steps": args.teacher_steps,
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
        # else the pipeline's own
        "final_sigmas_type": "sigma_min" if args.final_sigmas_type == "sigma_min" else None,
        **{name: getattr(args, name) for name in ("revision", "variant", "guidance_scale", *OF_MAKING)},
    }
    if args.resolution is not None:
        del given["height"], given["width"]
    command_line = [f"--{name}={value}" for name, value in given.items() if value is not None]
    asked = parse(make_teacher_set.parser(), command_line)
    make_teacher_set.make(asked, make_teacher_set.check(asked))
    accelerator.wait_for_everyone()
    return folder


def _check_same_target(made: dict, validated: dict) -> None:
    """Raises a `ValueError` if the validation pairs were not made as the training pairs were."""
    for name in (*SAME_TARGET, *(name for name in SAME_GRID if name in made and name in validated)):
        if made.get(name) != validated.get(name):
            raise ValueError(
                f"the validation set was made with {name}={validated.get(name)!r}, the teacher set with {made.get(name)!r}; "
                "make both with the same settings"
            )
