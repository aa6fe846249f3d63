# SPDX-License-Identifier: Apache-2.0
"""Train a small Stable Diffusion on captioned Fashion-MNIST, from nothing, on a CPU.

    python examples/teachers/train_fashion_sd.py --output_dir work/fashion-sd

Stages as in the original: an AutoencoderKL (3x32x32 images to 4x8x8 latents), its decoder once more on its own, then a
U-Net and the CLIP text encoder that conditions it, trained together on cached latents. The result is an ordinary StableDiffusionPipeline
folder with SD1.x's noise schedule, epsilon prediction and prompts, small enough to sit in a repository. Stages that
are finished are found in `--output_dir` and not repeated; the pipeline folder is written to `--pipeline_dir`.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from fashion_mnist import CLASSES, DATA_DIR, IMAGE_SIZE, captions_of, load_fashion_mnist
from tokenizers import Tokenizer, models, trainers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


PIPELINE_DIR = Path(__file__).parent / "fashion-sd"
LATENT_CHANNELS, LATENT_SIZE = 4, 8
TEXT_WIDTH, TEXT_LENGTH = 96, 16


def new_vae():
    """Few channels at full size, where a convolution is dearest; three widths make the factor 2^(3 - 1) = 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def new_unet():
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 96),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
    )


def new_tokenizer():
    """CLIP's byte-pair encoding with a vocabulary learned from the captions, so that each word becomes one token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    frame = CLIPTokenizer()._tokenizer
    bpe.normalizer, bpe.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    alphabet = sorted("abcdefghijklmnopqrstuvwxyz0123456789-,.")
    # Every letter is in the alphabet: a word outside the captions is spelled out, never unknown.
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    bpe.train_from_iterator([text for name in CLASSES for text in captions_of(name)], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    for letter in alphabet:
        vocab.setdefault(f"{letter}</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]], model_max_length=TEXT_LENGTH)


def new_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def noise_scheduler(cls=DDIMScheduler, **kwargs):
    """SD1.x's noise schedule and its conventions for the last step."""
    return cls(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        **kwargs,
    )


def train_vae(images, args):
    vae = new_vae().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), args.vae_learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.vae_learning_rate, total_steps=args.vae_train_steps, pct_start=0.1
    )
    progress = tqdm(range(args.vae_train_steps), desc="autoencoder", mininterval=10)
    for _ in progress:
        batch = images[torch.randint(len(images), (args.vae_batch_size,))].expand(-1, 3, -1, -1)
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        # The KL term, a mean over latent numbers, fixes how much noise a latent carries, hence how tolerant the
        # decoder is of the small errors that a sampler leaves.
        kl = posterior.kl().mean() / (LATENT_CHANNELS * LATENT_SIZE**2)
        loss = error.abs().mean() + error.square().mean() + args.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(
            l1=f"{error.abs().mean():.4f}", mse=f"{error.square().mean():.5f}", kl=f"{kl:.2f}", refresh=False
        )
    return vae.eval()


def train_decoder(vae, images, latents, args):
    """Go on with the decoder alone. The latents stay what they are, so a U-Net may already be learning from them."""
    vae = vae.to(memory_format=torch.channels_last).train()
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.decoder_learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.decoder_learning_rate, total_steps=args.decoder_train_steps, pct_start=0.05
    )
    progress = tqdm(range(args.decoder_train_steps), desc="decoder", mininterval=10)
    for _ in progress:
        index = torch.randint(len(images), (args.vae_batch_size,))
        batch = images[index].expand(-1, 3, -1, -1)
        # About the posterior's noise: a sampler's end points are no more exact than that.
        latent = latents[index] + args.decoder_noise * torch.randn_like(latents[index])
        error = vae.decode(latent / vae.config.scaling_factor).sample - batch
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(l1=f"{error.abs().mean():.4f}", mse=f"{error.square().mean():.5f}", refresh=False)
    return vae.eval()


@torch.no_grad()
def encode_images(vae, images, batch_size=250):
    batches = tqdm(images.split(batch_size), desc="latents", mininterval=10)
    return torch.cat([vae.encode(batch.expand(-1, 3, -1, -1)).latent_dist.mode() for batch in batches])


def save_whole(model, folder):
    """`save_pretrained` that leaves no half-written folder behind."""
    temporary = folder.with_name(folder.name + ".new")
    model.save_pretrained(temporary)
    temporary.rename(folder)


def replace_pipeline(folder, write):
    """Let `write(copy)` change a copy of `folder`, then put it in its place: whole or not at all."""
    temporary, retired = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if retired.exists() and not folder.exists():
        retired.rename(folder)  # an earlier run ended between the two renamings below
    for leftover in (temporary, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, temporary)
    write(temporary)
    if folder.exists():
        folder.rename(retired)
    temporary.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def export_pipeline(folder, vae, text_encoder, tokenizer, unet, ema):
    """Write the averaged weights as a pipeline folder, whole or not at all; other files in the folder are kept."""
    averaged = [new_unet(), new_text_encoder(tokenizer)]
    averaged[0].load_state_dict(unet.state_dict())
    averaged[1].load_state_dict(text_encoder.state_dict())
    ema.copy_to([p for model in averaged for p in model.parameters()])
    half_vae = new_vae()
    half_vae.load_state_dict(vae.state_dict())
    half_vae.register_to_config(scaling_factor=vae.config.scaling_factor)
    # Stored in half precision for size, except the text encoder: transformers would load it in the stored one.
    pipeline = StableDiffusionPipeline(
        vae=half_vae.half(),
        text_encoder=averaged[1].eval(),
        tokenizer=tokenizer,
        unet=averaged[0].half(),
        scheduler=noise_scheduler(PNDMScheduler, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts = {split: {name: captions_of(name, split) for name in CLASSES} for split in ("train", "held_out")}

    def write(temporary):
        pipeline.save_pretrained(temporary)
        # PNDM does not know this key and SD1.x's file has it: DDIM and others, made from this config, need it.
        path = temporary / "scheduler" / "scheduler_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "clip_sample": False}, indent=2, sort_keys=True) + "\n"
        )
        (temporary / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")

    replace_pipeline(folder, write)


def train_unet(latents, labels, vae, tokenizer, args):
    work = Path(args.output_dir)
    unet = new_unet().to(memory_format=torch.channels_last).train()
    text_encoder = new_text_encoder(tokenizer).train()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    print(f"U-Net {unet.num_parameters() / 1e6:.2f} M, text encoder {text_encoder.num_parameters() / 1e6:.2f} M")
    ema = EMAModel(parameters, decay=args.ema_decay)
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    checkpoint, start, seconds = work / "checkpoint.pt", 0, 0.0
    if args.resume_from_checkpoint is not None:
        path = checkpoint if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
        if not path.is_file():
            raise ValueError(f"There is no checkpoint '{path}' to resume from: leave out --resume_from_checkpoint.")
        state = torch.load(path, weights_only=True)
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, seconds = state["step"], state["seconds"]

    # Row 0 is the empty prompt, what guidance subtracts; then every caption of every class, class after class.
    captions = [captions_of(name) for name in CLASSES]
    first = torch.tensor([1 + sum(len(c) for c in captions[:i]) for i in range(len(captions))])
    counts = torch.tensor([len(c) for c in captions])
    text = [""] + [caption for c in captions for caption in c]
    tokens = tokenizer(text, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids

    scheduler = noise_scheduler()
    snr = compute_snr(scheduler, torch.arange(1000))
    # Min-SNR weighting (arXiv 2303.09556) for epsilon prediction: nearly noiseless times teach the least.
    weights = snr.clamp(max=args.snr_gamma) / snr
    generator = torch.Generator().manual_seed(args.seed + start)
    average, since, exported = None, time.time(), False
    progress = tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, mininterval=10)
    for step in progress:
        warm = min(1.0, (step + 1) / args.lr_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / args.max_train_steps))
        index = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        x, label = latents[index], labels[index]
        uniform = torch.rand(len(x), generator=generator)
        row = first[label] + (uniform * counts[label]).long()
        row[torch.rand(len(x), generator=generator) < args.caption_dropout] = 0
        rows, inverse = row.unique(return_inverse=True)
        # One uniform shift of evenly spread times: each time is uniform, and a batch covers them all.
        spread = (torch.arange(len(x)) + torch.rand((), generator=generator)) / len(x)
        t = (spread * 1000).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=generator)
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, t, text_encoder(tokens[rows])[0][inverse]).sample
        loss = (weights[t] * F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))).mean()
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
                "text_encoder": text_encoder.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": done,
                "seconds": seconds + time.time() - since,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
            export_pipeline(Path(args.pipeline_dir), vae, text_encoder, tokenizer, unet, ema)
            exported = True
    if not exported:
        # Nothing was left to train: the checkpoint as it is, with the autoencoder as it is now.
        export_pipeline(Path(args.pipeline_dir), vae, text_encoder, tokenizer, unet, ema)
    print(f"U-Net: {args.max_train_steps} steps in {(seconds + time.time() - since) / 60:.1f} min, loss {average}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default=DATA_DIR, help="folder of the four Fashion-MNIST .gz files")
    parser.add_argument("--output_dir", required=True, help="work folder: autoencoder, latents, checkpoint")
    parser.add_argument("--pipeline_dir", default=str(PIPELINE_DIR), help="where the pipeline folder is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None)
    parser.add_argument("--vae_train_steps", type=int, default=1500)
    parser.add_argument("--vae_batch_size", type=int, default=32)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=1.5e-3)
    parser.add_argument("--decoder_train_steps", type=int, default=1500, help="of the decoder alone")
    parser.add_argument("--decoder_learning_rate", type=float, default=1e-3)
    parser.add_argument("--decoder_noise", type=float, default=0.15, help="added to latents, in their unit")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=5700)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--snr_gamma", type=float, default=5.0)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--checkpointing_steps", type=int, default=300)
    parser.add_argument("--resume_from_checkpoint", default=None, help='a file, or "latest"')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    work = Path(args.output_dir)
    work.mkdir(parents=True, exist_ok=True)
    images, labels = load_fashion_mnist(args.data_dir, train=True)

    if not (work / "vae").exists():
        vae = train_vae(images, args)
        latents = encode_images(vae, images)
        # SD's convention: the factor that gives latents unit variance.
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        torch.save(latents * vae.config.scaling_factor, work / "latents.pt")
        save_whole(vae, work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae")
    latents = torch.load(work / "latents.pt", weights_only=True)
    if args.decoder_train_steps > 0:
        if not (work / "vae-decoder").exists():
            save_whole(train_decoder(vae, images, latents, args), work / "vae-decoder")
        vae = AutoencoderKL.from_pretrained(work / "vae-decoder")
    train_unet(latents, labels, vae, new_tokenizer(), args)


if __name__ == "__main__":
    main()
