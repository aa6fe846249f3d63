# SPDX-License-Identifier: Apache-2.0
"""Train a small class-conditional EDM on Fashion-MNIST's pixels, from nothing, on a CPU.

    PYTHONPATH=. python examples/teachers/train_fashion_edm.py --output_dir work/fashion-edm

The network is DDPM++ with EDM's preconditioning and loss (Karras et al., arXiv:2206.00364), narrower and shallower than for CIFAR-10, and
without augmentation or dropout. The result is a folder that `EDMPipeline.from_pretrained` loads, written to `--pipeline_dir`.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel
from fashion_mnist import CLASSES, DATA_DIR, IMAGE_SIZE, load_fashion_mnist
from tqdm.auto import tqdm
from train_fashion_sd import replace_pipeline

from pipelines.edm import EDMPipeline, EDMUNet2DModel


PIPELINE_DIR = Path(__file__).parent / "fashion-edm"
# Of ln(sigma) in training: EDM's, for all its data sets.
P_MEAN, P_STD = -1.2, 1.2


def new_unet():
    """Few channels at full size, where a convolution is dearest."""
    return EDMUNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        num_class_embeds=len(CLASSES),
        model_channels=32,
        channel_mult=(1, 1, 2),
        num_blocks=1,
        attn_resolutions=(8,),
        dropout=0.0,
    )


def export_pipeline(folder, unet, ema):
    """Write the averaged weights as a pipeline folder, whole or not at all; other files in the folder are kept."""
    averaged = new_unet()
    averaged.load_state_dict(unet.state_dict())
    ema.copy_to(averaged.parameters())
    pipeline = EDMPipeline(averaged.eval(), EDMDPMSolverMultistepScheduler())
    replace_pipeline(folder, pipeline.save_pretrained)


def spread_sigmas(n, generator):
    """(n,) noise levels, log-normal as EDM's; one uniform shift of evenly spread quantiles, so that a batch covers them all."""
    quantile = (torch.arange(n) + torch.rand((), generator=generator)) / n
    normal = math.sqrt(2) * torch.erfinv((2 * quantile - 1).clamp(-0.999, 0.999))
    return (P_MEAN + P_STD * normal).exp()


def train(images, labels, args):
    unet = new_unet().to(memory_format=torch.channels_last).train()
    parameters = list(unet.parameters())
    print(f"U-Net {unet.num_parameters() / 1e6:.2f} M")
    ema = EMAModel(parameters, decay=args.ema_decay)
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint, start, seconds = Path(args.output_dir) / "checkpoint.pt", 0, 0.0
    if args.resume_from_checkpoint is not None:
        path = checkpoint if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
        if not path.is_file():
            raise ValueError(f"There is no checkpoint '{path}' to resume from: leave out --resume_from_checkpoint.")
        state = torch.load(path, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, seconds = state["step"], state["seconds"]

    sigma_data = unet.config.sigma_data
    generator = torch.Generator().manual_seed(args.seed + start)
    average, since = None, time.time()
    progress = tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, mininterval=10)
    for step in progress:
        warm = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / args.max_train_steps))
        index = torch.randint(len(images), (args.train_batch_size,), generator=generator)
        sigma = spread_sigmas(len(index), generator)[:, None, None, None]
        noisy = images[index] + sigma * torch.randn(images[index].shape, generator=generator)
        denoised = unet.denoise(noisy.contiguous(memory_format=torch.channels_last), sigma.flatten(), labels[index])
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        loss = (weight * (denoised - images[index]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)

        done = step + 1
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            state = {
                "unet": unet.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": done,
                "seconds": seconds + time.time() - since,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
            export_pipeline(Path(args.pipeline_dir), unet, ema)
    print(f"{args.max_train_steps} steps in {(seconds + time.time() - since) / 60:.1f} min, loss {average}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default=DATA_DIR, help="folder of the four Fashion-MNIST .gz files")
    parser.add_argument("--output_dir", required=True, help="work folder: the checkpoint")
    parser.add_argument("--pipeline_dir", default=str(PIPELINE_DIR), help="where the pipeline folder is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=4500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--resume_from_checkpoint", default=None, help='a file, or "latest"')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    train(*load_fashion_mnist(args.data_dir, train=True), args)


if __name__ == "__main__":
    main()
