# SPDX-License-Identifier: Apache-2.0
"""Train a small Flux on captioned Fashion-MNIST, from nothing, on a CPU.

    python examples/teachers/train_fashion_flux.py --output_dir work/fashion-flux

The autoencoder is fashion-sd's. On its latents a rectified flow is learned by a FluxTransformer2DModel together with
the CLIP and T5 encoders that condition it, at two resolutions, as Flux is; then the same network is distilled to take
the guidance scale as an input (as Flux-dev was): for the empty prompt and for w = 1 it stays what it was, so true
classifier-free guidance works too. The result is an ordinary FluxPipeline folder, written to `--pipeline_dir`.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from fashion_mnist import CLASSES, DATA_DIR, IMAGE_SIZE, captions_of, load_fashion_mnist
from torch.nn import functional as F
from tqdm.auto import tqdm
from train_fashion_sd import encode_images, new_text_encoder, new_tokenizer, replace_pipeline, save_whole
from transformers import T5Config, T5EncoderModel, T5Tokenizer


TEACHERS = Path(__file__).parent
PIPELINE_DIR = TEACHERS / "fashion-flux"
# Pixels a side, and in which part of the batches: sequences of 16 and 36 tokens.
RESOLUTIONS = {IMAGE_SIZE: 0.75, 48: 0.25}
LATENT_CHANNELS = 4
TEXT_WIDTH, TEXT_LENGTH = 96, 12


def new_transformer():
    """Two double and four single blocks, where Flux has 19 and 38, over 2x2 patches of the latents."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def new_t5_tokenizer():
    """T5's unigram pieces: one for each word of the captions, and letters, so that other words are spelled out."""
    words = sorted(
        {word for name in CLASSES for caption in captions_of(name) for word in re.findall(r"[a-z-]+", caption)}
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,."
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -4.0)]
    vocab += [(f"\u2581{word}", -2.0) for word in words] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def new_t5_encoder(tokenizer):
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=24,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def flow_scheduler():
    """Flux-dev's, with its sequence lengths of 256 and 4096 tokens divided by 16 and 64."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=16,
        max_image_seq_len=64,
    )


def shift_of(tokens):
    """mu, linear in the number of tokens: the mean of logit s in training is what the pipeline shifts by."""
    config = flow_scheduler().config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


class FluxParts:
    """Transformer and text encoders as one function of packed latents, times, caption rows and guidance scales."""

    def __init__(self, tokenizers):
        clip, t5 = tokenizers
        self.modules = {
            "transformer": new_transformer(),
            "text_encoder": new_text_encoder(clip),
            "text_encoder_2": new_t5_encoder(t5),
        }
        # Row 0 is the empty prompt, what guidance subtracts; then every caption of every class, class after class.
        self.captions = [captions_of(name) for name in CLASSES]
        text = ["", *(caption for captions in self.captions for caption in captions)]
        self.clip_tokens = clip(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.t5_tokens = t5(
            text, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    def parameters(self):
        return [p for module in self.modules.values() for p in module.parameters()]

    def state_dict(self):
        return {name: module.state_dict() for name, module in self.modules.items()}

    def load_state_dict(self, state):
        for name, module in self.modules.items():
            module.load_state_dict(state[name])

    def __call__(self, x, s, rows, guidance):
        side = math.isqrt(x.shape[1])
        unique, inverse = rows.unique(return_inverse=True)
        return self.modules["transformer"](
            hidden_states=x,
            timestep=s,
            guidance=guidance,
            pooled_projections=self.modules["text_encoder"](self.clip_tokens[unique]).pooler_output[inverse],
            encoder_hidden_states=self.modules["text_encoder_2"](self.t5_tokens[unique])[0][inverse],
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, x.device, x.dtype),
            return_dict=False,
        )[0]


def export_pipeline(folder, vae, tokenizers, parts, ema):
    """Write the averaged weights as a pipeline folder, whole or not at all; other files in the folder are kept."""
    averaged = FluxParts(tokenizers)
    averaged.load_state_dict(parts.state_dict())
    ema.copy_to(averaged.parameters())
    half_vae = AutoencoderKL.from_config(vae.config)
    half_vae.load_state_dict(vae.state_dict())
    # Stored in half precision for size, except the text encoders: transformers would load them in the stored one.
    pipeline = FluxPipeline(
        scheduler=flow_scheduler(),
        vae=half_vae.half(),
        text_encoder=averaged.modules["text_encoder"].eval(),
        tokenizer=tokenizers[0],
        text_encoder_2=averaged.modules["text_encoder_2"].eval(),
        tokenizer_2=tokenizers[1],
        transformer=averaged.modules["transformer"].half(),
    )
    prompts = {split: {name: captions_of(name, split) for name in CLASSES} for split in ("train", "held_out")}

    def write(temporary):
        pipeline.save_pretrained(temporary)
        (temporary / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")

    replace_pipeline(folder, write)


def train(stage, latents, labels, vae, tokenizers, args):
    """One of the two stages, `"flow"` or `"guidance"`, from its checkpoint if there is one; returns the parts."""
    work = Path(args.output_dir)
    flow = stage == "flow"
    steps = args.max_train_steps if flow else args.guidance_train_steps
    peak = args.learning_rate if flow else args.guidance_learning_rate
    parts, checkpoint, start, seconds = FluxParts(tokenizers), work / f"{stage}.pt", 0, 0.0
    if not flow:
        base = FluxParts(tokenizers)
        base.load_state_dict(averaged_state(work / "flow.pt", tokenizers))
        parts.load_state_dict(base.state_dict())
    parameters = parts.parameters()
    counts = {name: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in parts.modules.items()}
    print(stage, counts, flush=True)
    ema = EMAModel(parameters, decay=args.ema_decay)
    optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.99), weight_decay=0.01)
    if checkpoint.is_file() and args.resume_from_checkpoint == "latest":
        state = torch.load(checkpoint, weights_only=True)
        parts.load_state_dict(state["parts"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, seconds = state["step"], state["seconds"]

    first = torch.tensor([1 + sum(len(c) for c in parts.captions[:i]) for i in range(len(CLASSES))])
    number = torch.tensor([len(c) for c in parts.captions])
    sizes, share = list(RESOLUTIONS), torch.tensor(list(RESOLUTIONS.values()))
    generator = torch.Generator().manual_seed(args.seed + start + (0 if flow else 10**6))
    average, since = None, time.time()
    progress = tqdm(range(start, steps), desc=stage, initial=start, total=steps, mininterval=10)
    for step in progress:
        warm = min(1.0, (step + 1) / args.lr_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        size = sizes[torch.multinomial(share, 1, generator=generator).item()]
        # About as many tokens whatever the resolution.
        batch = args.train_batch_size * IMAGE_SIZE**2 // size**2
        index = torch.randint(len(latents[size]), (batch,), generator=generator)
        x, label = latents[size][index], labels[index]
        rows = first[label] + (torch.rand(batch, generator=generator) * number[label]).long()
        rows[torch.rand(batch, generator=generator) < args.caption_dropout] = 0
        # logit s is normal (arXiv 2403.03206), about the pipeline's shift; its quantiles are spread evenly over the batch.
        spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        s = torch.sigmoid(shift_of(x.shape[1]) + torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
        noise = torch.randn(x.shape, generator=generator)
        mixed = (1 - s[:, None, None]) * x + s[:, None, None] * noise
        if flow:
            guidance, target = torch.ones(batch), noise - x
        else:
            guidance = 1 + torch.rand(batch, generator=generator) * (args.max_guidance_scale - 1)
            guidance[torch.rand(batch, generator=generator) < 0.2] = 1.0
            with torch.no_grad():
                conditional = base(mixed, s, rows, torch.ones(batch))
                unconditional = base(mixed, s, torch.zeros_like(rows), torch.ones(batch))
            target = unconditional + guidance[:, None, None] * (conditional - unconditional)
        loss = F.mse_loss(parts(mixed, s, rows, guidance), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)

        done = step + 1
        if done % args.checkpointing_steps == 0 or done == steps:
            state = {
                "parts": parts.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": done,
                "seconds": seconds + time.time() - since,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
            export_pipeline(Path(args.pipeline_dir), vae, tokenizers, parts, ema)
    if start >= steps:
        export_pipeline(Path(args.pipeline_dir), vae, tokenizers, parts, ema)
    print(f"{stage}: {steps} steps in {(seconds + time.time() - since) / 60:.1f} min, loss {average}", flush=True)


def averaged_state(checkpoint, tokenizers):
    """The averaged weights of a finished stage."""
    state = torch.load(checkpoint, weights_only=True)
    parts = FluxParts(tokenizers)
    parts.load_state_dict(state["parts"])
    ema = EMAModel(parts.parameters())
    ema.load_state_dict(state["ema"])
    ema.copy_to(parts.parameters())
    return parts.state_dict()


def pack(latents):
    """`(n, c, h, w)` as the pipeline's tokens `(n, h w / 4, 4 c)`."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default=DATA_DIR, help="folder of the four Fashion-MNIST .gz files")
    parser.add_argument("--output_dir", required=True, help="work folder: latents, checkpoints")
    parser.add_argument("--pipeline_dir", default=str(PIPELINE_DIR), help="where the pipeline folder is written")
    parser.add_argument("--vae_dir", default=str(TEACHERS / "fashion-sd" / "vae"), help="a trained autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=8000)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--guidance_train_steps", type=int, default=1200, help="of the distillation of guidance")
    parser.add_argument("--guidance_learning_rate", type=float, default=5e-4)
    parser.add_argument("--max_guidance_scale", type=float, default=5.0)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--checkpointing_steps", type=int, default=400)
    parser.add_argument("--resume_from_checkpoint", choices=["latest"], default=None)
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
        vae = AutoencoderKL.from_pretrained(args.vae_dir)
        latents = {}
        for size in RESOLUTIONS:
            resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
            latents[size] = encode_images(vae, resized if size == IMAGE_SIZE else resized[: len(images) // 3])
        # Flux's convention: (latents - shift_factor) * scaling_factor has mean 0 and variance 1.
        shift, scale = latents[IMAGE_SIZE].mean().item(), 1 / latents[IMAGE_SIZE].std().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        torch.save({size: pack((z - shift) * scale) for size, z in latents.items()}, work / "latents.pt")
        save_whole(vae, work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae")
    latents = torch.load(work / "latents.pt", weights_only=True)
    tokenizers = new_tokenizer(), new_t5_tokenizer()
    for stage in ("flow", "guidance"):
        train(stage, latents, labels, vae, tokenizers, args)


if __name__ == "__main__":
    main()
