# SPDX-License-Identifier: Apache-2.0
"""The worked example of an objective of one's own, with a small CLIP of random weights."""

import importlib
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from ld3_diffusers import LD3Scheduler
from tests.tiny_pipelines import PIPELINES


ROOT = Path(__file__).parents[2]
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_images_come_nearer_to_their_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    pipe, _ = PIPELINES["sd"]()
    pipe.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    text = {**LAYERS, "vocab_size": len(pipe.tokenizer), "max_position_embeddings": 77}
    vision = {**LAYERS, "image_size": 16, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(tmp_path / "clip")
    pipe.tokenizer.save_pretrained(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a red fox\na blue bird\n")
    arguments = [
        "--teacher",
        tmp_path / "teacher",
        "--clip_model",
        tmp_path / "clip",
        "--output_dir",
        tmp_path / "out",
    ]
    arguments += ["--prompts_file", tmp_path / "prompts.txt", "--nfe", 3, "--num_train", 8, "--num_valid", 8]
    example = importlib.import_module("clip_objective")
    example.main([str(argument) for argument in [*arguments, "--num_unseen", 16]])
    said = capsys.readouterr().out
    low = float(said.rpartition("[")[2].split(",")[0])
    assert low > 0, said
    assert LD3Scheduler.from_pretrained(tmp_path / "out").learned_counts == [3]
