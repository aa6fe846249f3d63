# SPDX-License-Identifier: Apache-2.0
"""Schedules away from where they were learned: at other guidance scales, and image to image at strengths of 0.3 to 0.9.

    PYTHONPATH=. python examples/evaluation/robustness.py --config training/recipes/fashion-sd.yaml --schedules outputs/fashion-sd/schedules

compares them with the stock schedulers, from seeds and prompts that nobody saw. Other guidance scales: how far each ends from 50 evaluations of the
teacher at that scale. Image to image, for Stable Diffusion: how far each ends from 50 evaluations that start where its own truncated schedule
starts, in a picture of another garment; of each stock scheduler the spacing counts that starts nearest to the learned scheduler, which goes by the
stock spacing there. `robustness.md`, beside the results of the recipe's `evaluate`, has the differences.
"""

import argparse
import json
from pathlib import Path

import compare_schedules
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ld3_diffusers import LD3Scheduler
from training import evaluate
from training.arguments import read_recipe
from training.comparison import Contender, paired_interval
from training.contenders import stock_contenders
from training.prompts import read_prompts
from training.teacher import load_teacher
from training.whole_files import write_whole


SUBJECT = "learned"
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
FINE = 50  # evaluations of the reference
BATCH = 32
LEAST_START = 10  # of 1000; below, there is nothing left to do
STOCK = ("UniPC", "DPM++ 2M")
HEAD = "| where | evaluations | learned | best stock | | stock - learned [95 %] |\n|---|---|---|---|---|---|\n"


def line(where: str, nfe: int, own: float, name: str, best: float, interval: list[float]) -> str:
    own, best, mean, low, high = (1e3 * value for value in (own, best, best - own, *interval))
    return f"| {where} | {nfe} | {own:.2f} | {best:.2f} | {name} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] |\n"


def at_guidance(config: list[str], schedules: str, nfe: list[str], scale: float, seeds: str, folder: Path) -> str:
    """Lines of the table for one guidance scale."""
    folder = folder / f"guidance-{scale:g}"
    compared = ["--schedulers", f"{schedules}:name={SUBJECT}", "stock", "--metrics", "mse", "--no-local_errors"]
    given = ["--nfe", *nfe, "--guidance_scale", str(scale), "--seeds", seeds, "--output_dir", str(folder)]
    evaluate.main([*config, *compared, *given])
    rows, lines = json.loads((folder / "results.json").read_text())["rows"], ""
    for count in map(int, nfe):
        found = [row for row in rows if row["nfe"] == count]
        [own] = [row["values"]["mse"]["value"] for row in found if row["name"] == SUBJECT]
        rivals = [row for row in found if row["name"] != SUBJECT and row["values"]["mse"]["value"] is not None]
        best = min(rivals, key=lambda row: row["values"]["mse"]["value"])
        mse, name = best["values"]["mse"], f"{best['name']} {best['setting']}".strip()
        lines += line(f"guidance {scale:g}", count, own, name, mse["value"], mse["difference"][-2:])
    return lines


class ImageToImage:
    """Schedulers that go on from noised pictures, each beside a fine run from the same noised picture."""

    def __init__(self, teacher: str, prompts: list[str], scale: float, count: int):
        pipe = load_teacher(teacher)
        pipe.set_progress_bar_config(disable=True)
        self.stock = pipe.scheduler
        self.seeds = [compare_schedules.FIRST_SEED + k for k in range(count)]
        self.prompts = [prompts[k % len(prompts)] for k in range(count)]
        self.call = {"guidance_scale": scale, "output_type": "latent"}
        pipe.scheduler = self._unlearned()
        others = [prompts[(k + 1) % len(prompts)] for k in range(count)]
        self.pictures = self._batches(lambda part: pipe([others[k] for k in part], **self._noise(part), **self.call))
        self.pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)

    def _unlearned(self) -> LD3Scheduler:
        return LD3Scheduler.from_config(self.stock.config, schedules=None, solver="unipc", solver_order=2)

    def _noise(self, part: range) -> dict:
        return {"generator": [torch.Generator().manual_seed(self.seeds[k]) for k in part]}

    def _batches(self, ends) -> Tensor:
        parts = [range(k, min(k + BATCH, len(self.seeds))) for k in range(0, len(self.seeds), BATCH)]
        return torch.cat([ends(part).images for part in parts])

    def _from_pictures(self, scheduler, **options) -> Tensor:
        self.pipe.scheduler = scheduler
        return self._batches(
            lambda part: self.pipe(
                [self.prompts[k] for k in part],
                self.pictures[part.start : part.stop],
                **self._noise(part),
                **self.call,
                **options,
            )
        )

    def start(self, contender: Contender, strength: float) -> float:
        """The timestep at which a scheduler whose timesteps are set goes on from a noised picture."""
        nfe = contender.num_inference_steps
        return float(contender.scheduler.timesteps[nfe - int(nfe * strength)])

    def measure(self, contender: Contender, strength: float) -> None:
        """Fills in its distances."""
        end = self._from_pictures(
            contender.scheduler, num_inference_steps=contender.num_inference_steps, strength=strength
        )
        # A learned schedule is left for another one when its pipeline starts in a picture.
        grid = torch.linspace(self.start(contender, strength), 1, FINE + 1)[:-1].tolist()
        reference = self._from_pictures(self._unlearned(), timesteps=grid, strength=1.0)
        contender.distances = (end - reference).double().square().flatten(1).mean(1)

    def lines(self, schedules: str, nfe: int, strength: float) -> str:
        own = Contender(SUBJECT, LD3Scheduler.from_pretrained(schedules), nfe)
        self.measure(own, strength)
        first, nearest = self.start(own, strength), {}
        for each in stock_contenders(self.stock.config, nfe):
            each.scheduler.set_timesteps(nfe)
            start = self.start(each, strength)
            way = abs(start - first)
            if (
                each.name in STOCK
                and start > LEAST_START
                and (each.name not in nearest or way < nearest[each.name][0])
            ):
                nearest[each.name] = way, each
        stock = [each for _, each in nearest.values()]
        for contender in tqdm(stock, desc=f"{nfe} evaluations, strength {strength}", unit="scheduler"):
            self.measure(contender, strength)
        best = min(stock, key=lambda each: each.mean)
        _, low, high = paired_interval(best.distances, own.distances)
        where = f"image to image, strength {strength:g}, from t = {first:.0f}"
        name = f"{best.label}, from t = {self.start(best, strength):.0f}"
        return line(where, nfe, own.mean, name, best.mean, [low, high])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="training/recipes/fashion-sd.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--schedules", help="folder of learned schedules; default: what the recipe's train_ld3 learns")
    parser.add_argument("--nfe", nargs="+", default=["6", "8"], help="default: 6 8")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.5, 3, 5, 7.5])
    parser.add_argument("--num_samples", type=int, default=256, help="to judge on (default: %(default)s)")
    args = parser.parse_args(argv)
    recipe = read_recipe(args.config)
    schedules = args.schedules or recipe["train_ld3"]["output_dir"]
    folder = Path(recipe["evaluate"]["output_dir"]) / "robustness"
    seeds = f"{compare_schedules.FIRST_SEED}-{compare_schedules.FIRST_SEED + args.num_samples - 1}"
    text = HEAD
    for scale in args.guidance_scales:
        text += at_guidance(["--config", args.config], schedules, args.nfe, scale, seeds, folder)
    teacher = recipe["common"]["pretrained_model_name_or_path"]
    if json.loads(Path(teacher, "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline":
        asked = recipe["evaluate"]
        problem = ImageToImage(teacher, read_prompts(asked["prompts_file"]), asked["guidance_scale"], args.num_samples)
        for strength in STRENGTHS:
            for nfe in map(int, args.nfe):
                text += problem.lines(schedules, nfe, strength)
    write_whole(folder / "robustness.md", lambda file: file.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
