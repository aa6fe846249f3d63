# SPDX-License-Identifier: Apache-2.0
"""The problem of a run: its pairs, and the teacher's pipeline as the student's."""

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
        objective = decoded(distance, rollout.decode) if loss_space == "pixel" else distance
        yield Problem(rollout, training, validation, rollout.path, objective, accelerator)
