# SPDX-License-Identifier: Apache-2.0
"""Convert a public checkpoint to a Diffusers folder.

    python -m pipelines.convert edm edm-cifar10-32x32-uncond-vp.pkl --output_dir cifar10
    python -m pipelines.convert adm 256x256_diffusion.pt --classifier 256x256_classifier.pt --output_dir imagenet-256
    python -m pipelines.convert consistency edm_bedroom256_ema.pt --output_dir lsun-bedroom
    python -m pipelines.convert ldm cin256-v2.ckpt --output_dir imagenet-256-ldm

Nothing in a checkpoint is executed. With `--download` a file that is not there yet is fetched first, by its public
name or from an address; a fetch that was stopped continues when started again. `conversion.json` in the folder says
what it was made from. The folder is a `--teacher` of the programs here, and loads anywhere by
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, which runs the pipeline's file that lies in it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMDPMSolverMultistepScheduler

from .adm import ADMPipeline
from .conversion.adm import adm_classifier, adm_unet, consistency_unet
from .conversion.download import PUBLIC, address, download, file_name
from .conversion.edm import edm_pipeline
from .conversion.files import UNBUILDABLE, Unfit, identify, read_state_dict
from .conversion.ldm import ldm_pipeline
from .edm import PRECONDITIONINGS, SIGMA_DATA, EDMPipeline
from .repository import new_folder, save_repository


CONSISTENCY_TIMESTEP_SCALE = 1000.0
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "convert", description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    families = p.add_subparsers(dest="family", required=True, metavar="{" + ",".join(FAMILIES) + "}")
    edm = families.add_parser("edm", help="NVlabs/edm: a network .pkl")
    adm = families.add_parser("adm", help="openai/guided-diffusion: a U-Net .pt, perhaps with a classifier")
    consistency = families.add_parser("consistency", help="openai/consistency_models: the .pt of an EDM teacher")
    ldm = families.add_parser("ldm", help="CompVis/latent-diffusion: a .ckpt, unconditional or of classes")
    for family in (edm, adm, consistency, ldm):
        family.add_argument(
            "checkpoint", nargs="?", help="file; with --download, where it is put (default: the name that is fetched)"
        )
        family.add_argument(
            "--output_dir", required=True, help="a new or empty folder, which appears when it is complete"
        )
        family.add_argument(
            "--download",
            nargs="?",
            const="",
            metavar="NAME_OR_URL",
            help=f"fetch the checkpoint if it is not there; default: by the file's name. Public names: {', '.join(PUBLIC)}",
        )
        family.add_argument("--size", type=int, help="bytes that the checkpoint must have")
        family.add_argument("--sha256", help="hash that the checkpoint must have, hexadecimal")
        family.add_argument(
            "--dtype", choices=sorted(DTYPES), default="fp32", help="of the saved weights (default: %(default)s)"
        )
    adm.add_argument(
        "--classifier", help="its noisy classifier's .pt, for guidance; with --download fetched by its name"
    )
    adm.add_argument(
        "--use_new_attention_order", action="store_true", help="as the checkpoint was trained; the 64-pixel ones were"
    )
    adm.add_argument("--num_heads", type=int, help="heads of each attention, instead of their width")
    adm.add_argument(
        "--noise_schedule",
        choices=["linear", "cosine"],
        default="linear",
        help="the 1000 betas that the checkpoint was trained with, as its own flags call them (default: %(default)s)",
    )
    adm.add_argument(
        "--noise_path",
        choices=["vp_discrete", "vp_linear"],
        default="vp_discrete",
        help="of the schedules learned for it: the model's 1000 betas (default), or AMED's continuous path",
    )
    for family in (adm, consistency):
        family.add_argument("--num_head_channels", type=int, default=64, help="(default: %(default)s)")
        family.add_argument("--image_size", type=int, help="pixels; default: as the coarsest level is 8 x 8")
    ldm.add_argument("--image_size", type=int, default=256, help="pixels (default: %(default)s)")
    ldm.add_argument("--num_heads", type=int, help="heads of each attention; default: as published")
    ldm.add_argument("--num_head_channels", type=int, help="width of a head instead; default: as published")
    ldm.add_argument("--ema", action="store_true", help="take the averaged weights, where the file has them")
    return p


# ---------------------------------------------------------------------- the families


def make_edm(args: argparse.Namespace) -> DiffusionPipeline:
    return edm_pipeline(args.checkpoint)


def network_of(file: str, make: Callable, **options):
    """What `make` makes of the tensors in a file.

    Raises:
        ValueError: if the file is refused, or makes no such network.
    """
    state_dict = read_state_dict(file)
    try:
        return make(state_dict, **options)
    except Unfit:
        raise
    except UNBUILDABLE as error:
        raise ValueError(f"{file!r} makes no such network: {error!s:.1000}") from error


def make_adm(args: argparse.Namespace) -> DiffusionPipeline:
    heads = {"image_size": args.image_size, "num_head_channels": args.num_head_channels}
    order = {"use_new_attention_order": args.use_new_attention_order}
    unet = network_of(args.checkpoint, adm_unet, num_heads=args.num_heads, **heads, **order)
    classifier = None
    if args.classifier is not None:
        classifier = network_of(args.classifier, adm_classifier, **heads)
    # clip_sample: the reference clamps its denoised images, and classifier guidance relies on it
    linear = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    betas = linear if args.noise_schedule == "linear" else {"beta_schedule": "squaredcos_cap_v2"}
    scheduler = DDIMScheduler(**betas, clip_sample=True)
    if args.noise_path == "vp_linear":
        if args.noise_schedule != "linear":
            raise ValueError("--noise_path vp_linear is that of linear betas; drop it, or --noise_schedule cosine")
        # stock schedulers pass these on unread, LD3Scheduler follows them; Diffusers has no grid of its own there
        scheduler.register_to_config(noise_path="vp_linear", discretization="time_uniform")
    return ADMPipeline(unet, scheduler, classifier)


def make_consistency(args: argparse.Namespace) -> DiffusionPipeline:
    heads = {"image_size": args.image_size, "num_head_channels": args.num_head_channels}
    unet = network_of(args.checkpoint, consistency_unet, **heads)
    sigma_min, sigma_max = PRECONDITIONINGS["edm"]
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=SIGMA_DATA)
    return EDMPipeline(unet, scheduler, timestep_scale=CONSISTENCY_TIMESTEP_SCALE)


def make_ldm(args: argparse.Namespace) -> DiffusionPipeline:
    if args.num_heads is not None and args.num_head_channels is not None:
        raise ValueError("--num_heads and --num_head_channels exclude each other; give one")
    return ldm_pipeline(
        args.checkpoint,
        ema=args.ema,
        image_size=args.image_size,
        num_heads=args.num_heads,
        num_head_channels=args.num_head_channels,
    )


FAMILIES: dict[str, tuple[str, Callable[[argparse.Namespace], DiffusionPipeline]]] = {
    "edm": ("NVlabs/edm", make_edm),
    "adm": ("openai/guided-diffusion", make_adm),
    "consistency": ("openai/consistency_models", make_consistency),
    "ldm": ("CompVis/latent-diffusion", make_ldm),
}


# ---------------------------------------------------------------------- the program


def main(argv=None) -> None:
    command_line = parser()
    args = command_line.parse_args(argv)
    try:
        convert(args)
    except (ValueError, OSError) as error:
        command_line.error(" ".join(str(error).split()))


def convert(args: argparse.Namespace) -> None:
    """Fetch what is to be fetched, convert it, and write the folder.

    Raises:
        ValueError: if the checkpoint is refused, or the folder holds something; nothing is left behind but what was
        fetched.
    """
    args = named(args)
    check(args)
    project, make = FAMILIES[args.family]
    files = [args.checkpoint] + ([args.classifier] if getattr(args, "classifier", None) else [])
    origins = addresses(args, files)
    for file in files if args.download is not None else ():
        known = {"size": args.size, "sha256": args.sha256} if file == args.checkpoint else {}
        download(origins.get(file, ""), file, **known)
    sources = [identify(file) for file in files]
    _check_identity(args, sources[0])
    for source in sources:
        print(f"{source.name}: {source.size} bytes, SHA-256 {source.sha256}", file=sys.stderr)
    pipe = made(make, args, origins)
    cast(pipe, DTYPES[args.dtype])
    facts = {
        "project": project,
        "family": args.family,
        "sources": [source._asdict() for source in sources],
        "arguments": arguments(args),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    save_repository(pipe, args.output_dir, {"conversion.json": facts})
    print(f"{args.output_dir}: {type(pipe).__name__}, {sum(map(parameters, pipe.components.values()))} parameters")


def named(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with a checkpoint: `--download NAME` before it, or without it, names the file, too.

    Raises:
        ValueError: if neither names one.
    """
    if args.checkpoint is not None:
        return args
    if not args.download:
        raise ValueError("name a checkpoint, or fetch one with --download NAME_OR_URL")
    name = file_name(args.download)
    return argparse.Namespace(
        **{**vars(args), "checkpoint": name, "download": "" if name == args.download else args.download}
    )


def addresses(args: argparse.Namespace, files: list[str]) -> dict[str, str]:
    """Where each file is fetched from, or was; those that are there already need not have an address.

    Raises:
        ValueError: if one is to be fetched, but has no known address.
    """
    found = {}
    for file in files if args.download is not None else ():
        name = args.download if file == args.checkpoint and args.download else Path(file).name
        try:
            found[file] = address(name)
        except ValueError:
            if not Path(file).exists():
                raise
    return found


def made(make: Callable, args: argparse.Namespace, origins: dict[str, str]) -> DiffusionPipeline:
    """The pipeline; who refuses a file that was fetched is told from where, for it may be a wrong answer.

    Raises:
        ValueError: if a file is refused, or an option does not go with it.
    """
    try:
        return make(args)
    except Unfit:
        raise
    except ValueError as error:
        refused = next((file for file in origins if repr(file) in str(error)), None)
        if refused is None:
            raise
        raise ValueError(f"{error}; it was fetched from {origins[refused]}: delete it to fetch again") from error


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is read.

    Raises:
        ValueError: for an impossible argument.
    """
    new_folder(args.output_dir)
    for name in ("image_size", "num_heads", "num_head_channels", "size"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def _check_identity(args: argparse.Namespace, source) -> None:
    for name, found in (("size", source.size), ("sha256", source.sha256)):
        wanted = getattr(args, name)
        if wanted is not None and str(wanted).lower() != str(found):
            raise ValueError(
                f"{args.checkpoint!r} has the {name} {found}, and --{name} is {wanted}; it is another file"
            )


def arguments(args: argparse.Namespace) -> dict:
    """What decides the conversion, beside the files: nothing of this machine."""
    elsewhere = ("family", "checkpoint", "classifier", "output_dir", "download", "size", "sha256")
    return {name: value for name, value in vars(args).items() if name not in elsewhere}


def parameters(part) -> int:
    return sum(p.numel() for p in part.parameters()) if isinstance(part, torch.nn.Module) else 0


def cast(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Networks' parameters in `dtype`; buffers, among them random frequencies, stay in float32."""
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.to(dtype)


if __name__ == "__main__":
    main()
