# SPDX-License-Identifier: Apache-2.0
"""The arguments that sample and evaluate share: which pipeline, called how, from which seeds, conditioned on what."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import ld3_diffusers

from .call_settings import CALL_SETTINGS, add_call_arguments, check_call_arguments
from .processes import is_sharded, shard
from .prompts import add_prompt_arguments, prompts_of
from .rollout import PipelineRollout
from .seeds import parse_seeds, written
from .teacher import check_teacher_name, encoders_digest, load_teacher, teacher_digest


def add_sampling_arguments(parser, *, seeds: str, teacher_required: bool = True) -> None:
    """`--teacher`, `--seeds`, `--prompts_file` and the others; `seeds` is the default."""
    parser.add_argument(
        "--pretrained_model_name_or_path", "--teacher", required=teacher_required, help="pipeline folder or Hub id"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")
    parser.add_argument(
        "--seeds", default=seeds, help="of the samples, one each: numbers and ranges, 0-9,20 (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="samples at once (default: %(default)s)")
    parser.add_argument(
        "--decode_batch_size", type=int, default=8, help="pictures decoded at once (default: %(default)s)"
    )
    add_call_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="dtype of the pipeline (default: float32)",
    )


def check_sampling(args: argparse.Namespace) -> tuple[list[int], list[str] | None]:
    """What can be refused before anything is loaded; returns the seeds and the prompts.

    Raises:
        ValueError: for an impossible argument.
    """
    for name in ("batch_size", "decode_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    check_call_arguments(args)
    check_teacher_name(args.pretrained_model_name_or_path)
    seeds = parse_seeds(args.seeds)
    return seeds, prompts_of(args, len(seeds))


def load_pipeline(args: argparse.Namespace, accelerator) -> DiffusionPipeline:
    """The pipeline on this process's device, or sharded over those of all."""
    pipe = load_teacher(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        mixed_precision=args.mixed_precision,
        device=None if is_sharded(accelerator) else accelerator.device,
    )
    shard(pipe, accelerator)
    return pipe


def teacher_name(args: argparse.Namespace) -> str:
    """A Hub id, or a folder's last part: where it lies decides nothing."""
    name = args.pretrained_model_name_or_path
    return Path(name).resolve().name if Path(name).is_dir() else name


def sampling_request(
    args: argparse.Namespace, rollout: PipelineRollout, seeds: list[int], prompts: list[str] | None
) -> dict[str, Any]:
    """Everything that decides the noises, the conditioning and the network."""
    return {
        "teacher": teacher_name(args),
        "pipeline": type(rollout.pipe).__name__,
        "teacher_digest": teacher_digest(rollout.pipe),
        "encoders_digest": encoders_digest(rollout.pipe),
        "dtype": args.mixed_precision if args.mixed_precision != "no" else "float32",
        **{name: getattr(args, name) for name in CALL_SETTINGS},
        "guidance_scale": rollout.guidance_scale,
        "seeds": written(seeds),
        "prompts_digest": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32],
    }


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ld3_diffusers": ld3_diffusers.__version__,
    }
