# SPDX-License-Identifier: Apache-2.0
"""What the README tells a user to type is run here, the long commands with fewer pairs and steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ld3_diffusers import LD3Scheduler


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# options that are put behind the README's own: the last one given counts
SHORTER = {
    "training.make_teacher_set": ["--num_samples", "6", "--num_inference_steps", "6"],
    "training.train_ld3": ["--num_train", "4", "--num_valid", "2", "--max_train_steps", "2", "--allow_worse"],
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_commands_for_learning(tmp_path):
    commands = [
        shlex.split(line) for block in blocks("bash") for line in block.splitlines() if " -m training." in line
    ]
    assert [command[2] for command in commands] == list(SHORTER)
    for _, flag, module, *arguments in commands:
        arguments = [a.replace("outputs/", f"{tmp_path}/", 1) for a in arguments] + SHORTER[module]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, flag, module, *arguments], cwd=ROOT, env=environment, check=True, timeout=600)
    assert LD3Scheduler.from_pretrained(tmp_path / "my-schedule").learned_counts == [5]


@pytest.mark.slow
def test_the_python_examples(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["image"].size == (32, 32)
    assert names["pipe"].scheduler.learned_counts == []  # the last example left the learned schedules out


@pytest.mark.slow
def test_the_example_script():
    command = [sys.executable, "examples/import_published_schedule.py"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    assert "LD3: timesteps [999.0, 766.06, 480.03, 182.96]" in result.stdout
    assert "AYS: timesteps [999.0, 850" in result.stdout
