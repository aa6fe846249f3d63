# SPDX-License-Identifier: Apache-2.0
"""Sample pictures with one scheduler, one picture a seed.

    accelerate launch -m training.sample --teacher examples/teachers/fashion-sd --scheduler UniPCMultistepScheduler --nfe 5 \\
        --seeds 0-63 --prompts_file prompts.txt --guidance_scale 3 --output_dir samples

The sample at position k of `--seeds` is conditioned on prompt k modulo the number of prompts. Its picture does not depend on the
other samples, on the batch size (up to rounding) or on the number of processes. A run that was stopped continues when it is
started again; pictures that are there are kept. `images/metadata.jsonl` names each picture's seed and prompt, as Hugging Face's
imagefolder wants it.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .arguments import check_writable, parse, usage_errors
from .call_settings import call_settings
from .comparison import Comparison, Contender
from .contenders import NamedScheduler, is_stochastic, sampler_key
from .processes import COLLECTIVE_TIMEOUT, lost_process_message, on_main, turns
from .rendering import read_png, rendered, save_sheet, write_png
from .request_file import begin
from .sampling_arguments import add_sampling_arguments, check_sampling, load_pipeline, sampling_request
from .scheduler_specs import STOCK, parse_scheduler
from .seeded_samples import SeededSamples
from .whole_files import write_whole


def parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "sample", description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--scheduler", required=True, help="NAME[:option=value,...], see training/scheduler_specs.py")
    p.add_argument("--nfe", type=int, required=True, help="network evaluations a sample, guidance's doubling apart")
    p.add_argument("--output_dir", required=True, help="pictures are images/<seed>.png in it")
    p.add_argument("--save_latents", action="store_true", help="also end states, latents/<seed>.safetensors")
    p.add_argument("--grid", type=int, default=0, help="show so many of the first pictures in grid.png")
    add_sampling_arguments(p, seeds="0-63")
    return p


def check(args: argparse.Namespace) -> tuple[list[int], list[str] | None]:
    """What can be refused before anything is loaded; returns the seeds and the prompts.

    Raises:
        ValueError: for an impossible argument.
    """
    if args.nfe < 1:
        raise ValueError(f"--nfe must be at least 1, got {args.nfe}")
    if args.grid < 0:
        raise ValueError(f"--grid must not be negative, got {args.grid}")
    if parse_scheduler(args.scheduler).source == STOCK:
        raise ValueError("stock names several schedulers; name one, e.g. --scheduler UniPCMultistepScheduler")
    seeds, prompts = check_sampling(args)
    check_writable(args.output_dir)
    return seeds, prompts


def main(argv=None) -> None:
    command_line = parser()
    args = parse(command_line, argv)
    diffusers_logging.set_verbosity_error()  # each scheduler would list the options of the pipeline's that it does not know
    with usage_errors(command_line), lost_process_message(args.output_dir):
        sample(args, *check(args))


def sample(args: argparse.Namespace, seeds: list[int], prompts: list[str] | None) -> None:
    accelerator = Accelerator(kwargs_handlers=[COLLECTIVE_TIMEOUT])
    folder = Path(args.output_dir)
    pipe = load_pipeline(args, accelerator)
    with Comparison(pipe, **call_settings(args)) as comparison:
        [contender] = NamedScheduler(parse_scheduler(args.scheduler), comparison.stock_scheduler.config).contenders(
            args.nfe
        )
        request = {
            **sampling_request(args, comparison, seeds, prompts),
            "scheduler": type(contender.scheduler).__name__,
            "scheduler_key": sampler_key(contender),
            "num_inference_steps": contender.num_inference_steps,
        }
        samples = SeededSamples(comparison, seeds, prompts, args.batch_size)
        # Prompts that the pipeline cannot have, or has to have, are refused before the folder is theirs.
        shape = comparison.state_shape(samples.conditioning(samples.positions(0), comparison.device))
        on_main(lambda: begin(folder, request), accelerator)
        failed = write_samples(args, comparison, contender, samples, shape, folder, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(args, samples, folder)
        print(f"{folder}: {len(seeds)} pictures, {contender.label}")
    if failed:
        print(f"{failed} samples are not finite, and black; use --mixed_precision no or bf16")


def picture(folder: Path, seed: int) -> Path:
    return folder / "images" / f"{seed:06d}.png"


def latents(folder: Path, seed: int) -> Path:
    return folder / "latents" / f"{seed:06d}.safetensors"


def write_samples(
    args: argparse.Namespace,
    comparison: Comparison,
    contender: Contender,
    samples: SeededSamples,
    shape: tuple[int, ...],
    folder: Path,
    accelerator: Accelerator,
) -> int:
    """Samples what is missing; the number of samples of this process that are not finite."""

    def is_missing(position: int) -> bool:
        seed = samples.seeds[position]
        return not picture(folder, seed).is_file() or (args.save_latents and not latents(folder, seed).is_file())

    missing = [batch for batch in range(samples.num_batches) if any(map(is_missing, samples.positions(batch)))]
    accelerator.wait_for_everyone()  # nobody writes before all have seen what is missing
    if missing:
        rendered(comparison, torch.zeros(1, *shape), 1)  # what cannot be shown is said before it is sampled
    failed = 0
    progress = tqdm(
        turns(missing, accelerator), desc="samples", unit="batch", disable=not accelerator.is_local_main_process
    )
    for batch, own in progress:
        positions = samples.positions(batch)
        conditioning = samples.conditioning(positions, comparison.device)
        generators = samples.generators(positions, shape) if is_stochastic(contender.scheduler) else None
        ends = comparison.follow(contender, samples.noise(positions, shape), conditioning, generators)
        if not own:
            continue
        failed += int((~torch.isfinite(ends.flatten(1)).all(1)).sum())
        for k, end, image in zip(positions, ends, rendered(comparison, ends, args.decode_batch_size)):
            if not is_missing(k):
                continue
            if args.save_latents:
                tensors = {"latents": end.contiguous().clone()}
                write_whole(latents(folder, samples.seeds[k]), lambda file, tensors=tensors: save_file(tensors, file))
            write_png(picture(folder, samples.seeds[k]), image)
    return failed


def finish(args: argparse.Namespace, samples: SeededSamples, folder: Path) -> None:
    """`images/metadata.jsonl`, and the grid."""
    prompts = samples.prompts_of(range(len(samples)))
    lines = [
        json.dumps(
            {
                "file_name": picture(folder, seed).name,
                "seed": seed,
                **({} if prompts is None else {"prompt": prompts[k]}),
            },
            ensure_ascii=False,
        )
        for k, seed in enumerate(samples.seeds)
    ]
    write_whole(
        folder / "images" / "metadata.jsonl", lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    )
    if args.grid:
        shown = samples.seeds[: args.grid]
        save_sheet(folder / "grid.png", [read_png(picture(folder, seed)) for seed in shown], list(map(str, shown)))


if __name__ == "__main__":
    main()
