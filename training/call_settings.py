# SPDX-License-Identifier: Apache-2.0
"""The arguments of a pipeline's call that decide what it samples: alike for a teacher, its students and those they are compared with."""

import argparse
from typing import Any


CALL_SETTINGS = ("guidance_scale", "true_cfg_scale", "max_sequence_length", "height", "width", "negative_prompt")


def add_call_arguments(parser) -> None:
    """`--guidance_scale` and the others; an argument that is not given is the pipeline's default."""
    parser.add_argument(
        "--guidance_scale", type=float, help="default: the pipeline's; of Flux-dev it is the network's"
    )
    parser.add_argument("--true_cfg_scale", type=float, help="classifier-free guidance of Flux and Qwen-Image")
    parser.add_argument("--max_sequence_length", type=int, help="tokens of the T5 or other language model's prompt")
    parser.add_argument("--negative_prompt", help="for all prompts; default: the pipeline's")
    parser.add_argument("--resolution", type=int, help="height and width in pixels")
    parser.add_argument("--height", type=int, help="pixels; default: the pipeline's")
    parser.add_argument("--width", type=int, help="pixels; default: the pipeline's")


def check_call_arguments(args: argparse.Namespace) -> None:
    """Fills in height and width from `--resolution`.

    Raises:
        ValueError: for an impossible or contradictory argument.
    """
    for name in ("resolution", "height", "width", "max_sequence_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.resolution is not None:
        if args.height is not None or args.width is not None:
            raise ValueError("--resolution gives both height and width; drop it, or --height and --width")
        args.height = args.width = args.resolution
    if args.true_cfg_scale is not None and args.true_cfg_scale > 1 and args.negative_prompt is None:
        raise ValueError(
            "--true_cfg_scale guides away from a negative prompt; give one, --negative_prompt='' for the empty one"
        )


def call_settings(source: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, those that were given, from parsed arguments or a teacher set's provenance."""
    values = source if isinstance(source, dict) else vars(source)
    return {name: values[name] for name in CALL_SETTINGS if values.get(name) is not None}
