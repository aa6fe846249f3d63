# SPDX-License-Identifier: Apache-2.0
"""The program that samples pictures: as the pipeline itself would, whatever else is sampled, and again from where it stopped."""

import json

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from tests.tiny_pipelines import PIPELINES
from training import sample
from training.comparison import Comparison


PROMPTS = ["a red fox", "a blue bird", "a green frog"]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    PIPELINES["sd"]()[0].save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def arguments(room, output, *more, scheduler="UniPCMultistepScheduler", seeds="3-5,9,20") -> list[str]:
    given = {"teacher": room / "sd", "prompts_file": room / "prompts.txt", "output_dir": output, "seeds": seeds}
    given |= {"scheduler": scheduler, "nfe": 4, "guidance_scale": 2, "resolution": 32, "batch_size": 2}
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def pixels(output, seed) -> torch.Tensor:
    with Image.open(output / "images" / f"{seed:06d}.png") as image:
        return torch.from_numpy(numpy.array(image)).int()


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_pictures_are_those_that_the_pipeline_makes_of_a_generator_with_that_seed(room, tmp_path, kind):
    output = tmp_path / "out"
    sample.main(arguments(room, output, "--save_latents", "--grid", "4", scheduler=kind.__name__))
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": 32, "width": 32}
    for position, seed in enumerate([3, 4, 5, 9, 20]):
        generator = torch.Generator().manual_seed(seed)
        prompt = PROMPTS[position % 3]
        latents = pipe(prompt, generator=generator, output_type="latent", **call).images
        own = load_file(output / "latents" / f"{seed:06d}.safetensors")["latents"]
        assert torch.allclose(own, latents[0], atol=1e-4, rtol=1e-4)
        [image] = pipe(prompt, generator=generator.manual_seed(seed), **call).images
        difference = pixels(output, seed) - torch.from_numpy(numpy.array(image)).int()
        assert difference.abs().max() <= 1  # a level of 255, where rounding tips
    lines = [json.loads(line) for line in (output / "images" / "metadata.jsonl").read_text().splitlines()]
    assert lines[3] == {"file_name": "000009.png", "seed": 9, "prompt": "a red fox"}
    assert (output / "grid.png").stat().st_size > 1000


def test_a_stopped_run_samples_only_what_is_missing(room, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    sample.main(arguments(room, whole))
    write, follow, sampled = sample.write_png, Comparison.follow, []

    def interrupted(file, image):
        if file.name == "000005.png":
            raise KeyboardInterrupt
        write(file, image)

    monkeypatch.setattr(sample, "write_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(arguments(room, broken))
    assert {file.name for file in (broken / "images").iterdir()} == {"000003.png", "000004.png"}
    before = (broken / "images" / "000003.png").stat().st_mtime_ns

    def counted(self, contender, noise, *rest):
        sampled.append(len(noise))
        return follow(self, contender, noise, *rest)

    monkeypatch.setattr(sample, "write_png", write)
    monkeypatch.setattr(Comparison, "follow", counted)
    sample.main(arguments(room, broken))
    assert sampled == [2, 1] and (broken / "images" / "000003.png").stat().st_mtime_ns == before
    for seed in (3, 4, 5, 9, 20):
        name = f"{seed:06d}.png"
        assert (broken / "images" / name).read_bytes() == (whole / "images" / name).read_bytes()


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--nfe=0"], "--nfe must be at least 1"),
        (["--scheduler=stock"], "stock names several schedulers"),
        (["--scheduler=unipc"], "did you mean UniPCMultistepScheduler"),
        (["--seeds=1,1"], "gives 1 more than once"),
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--class_labels=0-3"], "--class_labels and prompts are both given"),
        (["--grid=-1"], "--grid must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(room, tmp_path, capsys, monkeypatch, more, sentence):
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as error:
        sample.main(arguments(room, tmp_path / "out", *more))
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_prompts_that_are_forgotten_may_be_given_later(room, tmp_path, capsys):
    command = arguments(room, tmp_path / "out", seeds="0")
    with pytest.raises(SystemExit):
        sample.main([argument for argument in command if not argument.startswith("--prompts_file")])
    assert "needs prompts" in capsys.readouterr().err
    sample.main(command)
    assert pixels(tmp_path / "out", 0).max() > 0


def test_a_folder_is_not_continued_with_other_settings(room, tmp_path, capsys):
    sample.main(arguments(room, tmp_path / "out", seeds="0"))
    with pytest.raises(SystemExit):
        sample.main(arguments(room, tmp_path / "out", "--guidance_scale=3", seeds="0"))
    assert "was made with another guidance_scale: 2.0, now 3.0" in " ".join(capsys.readouterr().err.split())
