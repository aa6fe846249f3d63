# SPDX-License-Identifier: Apache-2.0
"""The problem of a run: its pairs, and the teacher's pipeline as the student's."""

import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from .learner import Problem
from .learning_pairs import Part
from .objectives import Objective, decoded, l2
from .processes import is_sharded, shard
from .rollout import PipelineRollout
from .schedule_folder import check_same_model, existing
from .teacher import load_teacher


@contextmanager
def learning_problem(
    args: Namespace,
    training: Part,
    validation: Part,
    accelerator,
    *,
    distance: Objective = l2,
    loss_space: str = "latent",
    gradient_checkpointing: bool = False,
    checkpointing: bool = True,
) -> Iterator[Problem]:
    """Load the teacher, check that it made the pairs and fits the output folder, and give it back as it came.

    Raises:
        ValueError: if it did not, or does not.
    """
    pipe = load_teacher(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        mixed_precision=args.mixed_precision,
        device=None if is_sharded(accelerator) else accelerator.device,
        text_encoders=training.whole.needs_text_encoders or validation.whole.needs_text_encoders,
    )
    for pairs in (training, validation):
        pairs.whole.check(pipe, guidance_scale=args.guidance_scale)
    shard(pipe, accelerator)
    options = {
        "checkpointing": checkpointing,
        "gradient_checkpointing": gradient_checkpointing,
        **training.whole.call_settings,
    }
    with PipelineRollout(pipe, **options) as rollout:
        check_same_model(existing(args.output_dir), rollout.scheduler.config)
        warn_of_another_end(args.final_sigmas_type, training, rollout)
        objective = decoded(distance, rollout.decode) if loss_space == "pixel" else distance
        yield Problem(rollout, training, validation, rollout.path, objective, accelerator)


def warn_of_another_end(asked: str | None, training: Part, rollout: PipelineRollout) -> None:
    """Warns if schedules that end in clean data are to imitate end points that have some noise left, or the reverse."""
    made = training.whole.provenance.get("final_sigmas_type") or rollout.scheduler.config.final_sigmas_type
    if asked is not None and made != asked:
        warnings.warn(
            f"the teacher set ends as final_sigmas_type={made}, these schedules as {asked}; make a set with "
            f"--final_sigmas_type {asked}, unless that difference is wanted",
            stacklevel=2,
        )
