# SPDX-License-Identifier: Apache-2.0
"""An objective of one's own: learn a schedule by which images fit their prompts, as CLIP sees it, without a teacher's pairs.

    PYTHONPATH=. python examples/clip_objective.py --teacher examples/teachers/fashion-sd --clip_model openai/clip-vit-base-patch32

The default recipe minimises squares. Of unit vectors |u - v|^2 = 2 - 2 cos(u, v), so that CLIP's embedding u of the image is the features, and
that of the prompt, v, stands where the teacher's end point otherwise does. A reward that no sum of squares expresses is any callable
`(end, target) -> losses`, learned by `AdamRecipe`. What scores well need not look well: CLIP can be pleased by artefacts, so look at samples.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from ld3_diffusers import LD3Scheduler, SolverSpec
from training.comparison import paired_interval
from training.initial import grid_schedule
from training.learner import Problem, learn
from training.objectives import Distance, decoded, mean_square
from training.prompts import read_prompts
from training.recipe import DefaultRecipe
from training.rollout import PipelineRollout


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels


class Prompts:
    """What `training.learner.Pairs` asks for: noises by seed, and embeddings of prompts in place of a teacher's end points."""

    def __init__(self, rollout: PipelineRollout, clip: "CLIP", prompts: list[str], first_seed: int, count: int):
        self.rollout, self.first_seed = rollout, first_seed
        self.prompts = [prompts[i % len(prompts)] for i in range(count)]
        self.embeddings = clip.of_prompts(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: list[int], device) -> tuple[Tensor, Tensor, dict]:
        conditioning = self.rollout.encode([self.prompts[i] for i in indices])
        shape = self.rollout.state_shape(conditioning)
        generators = [torch.Generator().manual_seed(self.first_seed + i) for i in indices]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(device), self.embeddings[list(indices)].to(device), conditioning


class CLIP:
    def __init__(self, name: str):
        self.model = CLIPModel.from_pretrained(name).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(name)

    @torch.no_grad()
    def of_prompts(self, prompts: list[str]) -> Tensor:
        """(n, d) unit vectors."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=1)

    def of_images(self, images: Tensor) -> Tensor:
        """(n, d) unit vectors of images in [-1, 1]."""
        side, (mean, std) = self.model.config.vision_config.image_size, torch.tensor([MEAN, STD]).to(images)
        pixels = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        pixels = (pixels / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
        return F.normalize(self.model.to(images.device).get_image_features(pixel_values=pixels).pooler_output, dim=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="examples/teachers/fashion-sd")
    parser.add_argument("--clip_model", default="openai/clip-vit-base-patch32", help="Hub id or folder")
    parser.add_argument("--prompts_file", default="examples/prompts.txt")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--num_train", type=int, default=64)
    parser.add_argument("--num_valid", type=int, default=64)
    parser.add_argument("--num_unseen", type=int, default=128, help="noises to judge on")
    parser.add_argument("--output_dir", default="outputs/clip-schedules")
    args = parser.parse_args(argv)
    pipe, clip = DiffusionPipeline.from_pretrained(args.teacher), CLIP(args.clip_model)
    prompts = read_prompts(args.prompts_file)
    with PipelineRollout(pipe, guidance_scale=args.guidance_scale) as rollout:
        counts = (0, args.num_train), (1_000_000, args.num_valid), (2_000_000, args.num_unseen)
        train, valid, unseen = (Prompts(rollout, clip, prompts, *count) for count in counts)
        path, prediction_type = rollout.path, rollout.scheduler.config.prediction_type
        initial = grid_schedule("time_uniform", path, args.nfe, SolverSpec("unipc", 2), prediction_type)
        distance = Distance(mean_square, features=clip.of_images, target_features=lambda embeddings: embeddings)
        objective = decoded(distance, rollout.decode)
        result = learn(rollout, train, valid, initial, DefaultRecipe(), path=path, objective=objective)
        problem = Problem(rollout, train, unseen, path, objective)
        before, after = (
            1 - problem.each_loss(schedule, unseen, 32) * unseen.embeddings.shape[1] / 2
            for schedule in (initial, result.schedule)
        )
        mean, low, high = paired_interval(after, before)
        print(f"cosine of image and prompt: {before.mean():.4f} by the grid that learning starts from")
        print(f"{after.mean():.4f} learned: {mean:+.4f} [{low:+.4f}, {high:+.4f}] on {len(unseen)} unseen noises")
        schedules = {str(args.nfe): rollout.rounded(result.schedule).to_dict(path)}
        LD3Scheduler.from_config(rollout.stock_scheduler.config, schedules=schedules).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
