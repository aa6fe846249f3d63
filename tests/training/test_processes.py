# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same result as one, to the bit; what remains when one is killed; sharded teachers; launch files."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch.multiprocessing import ProcessExitedException

from ld3_diffusers import LD3Scheduler
from tests.tiny_pipelines import PIPELINES
from tests.training.rollouts import schedule_for
from training import train_ld3
from training.learner import Problem, learn, parameters_for
from training.learner_adam import AdamLearner
from training.learner_default import DefaultLearner
from training.learner_published import PublishedLearner
from training.processes import lost_process_message, on_main, shard, share, turns
from training.recipe import AdamRecipe, DefaultRecipe, PublishedRecipe
from training.rollout import PipelineRollout


ROOT = Path(__file__).parents[2]
TRAIN = ("-m", "training.train_ld3")
# a batch of three micro-batches, the last one smaller: two for one process, one for the other
RECIPES = {
    "default": DefaultRecipe(max_steps=2, first_pairs=5, micro_batch_size=2),
    "adam": AdamRecipe(max_steps=3, batch_size=5, micro_batch_size=2, validation_steps=1, relaxation=1e-3),
    "published": PublishedRecipe(
        mode="time", rounds_v1=1, rounds_v2=1, batch_size=5, valid_batch_size=3, micro_batch_size=2, radius=1e-2
    ),
}


def on_two_processes(function, *args) -> None:
    """Forks, in which an earlier test may have settled that there is only one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        debug_launcher(function, args, num_processes=2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


class Pairs:
    """Random end points: what is learned means nothing, but every bit of it can be compared."""

    def __init__(self, shape, embeddings, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.noise, self.end = (torch.randn(count, *shape, generator=generator) for _ in range(2))
        self.embeddings = embeddings

    def __len__(self):
        return len(self.noise)

    def batch(self, indices, device):
        rows = [i % 2 for i in indices]
        return self.noise[indices], self.end[indices], {key: value[rows] for key, value in self.embeddings.items()}


def tiny_problem(accelerator, prepare=lambda pipe: None):
    pipe, _ = PIPELINES["sd"]()
    prepare(pipe)
    rollout = PipelineRollout(pipe, guidance_scale=2.0, height=32, width=32)
    embeddings = rollout.encode(["a red fox", "a blue bird"])
    shape = rollout.state_shape(embeddings)
    pairs = [Pairs(shape, embeddings, count, seed) for count, seed in ((7, 1), (5, 2))]
    return Problem(rollout, *pairs, rollout.path, accelerator=accelerator), schedule_for(rollout)


def learn_on_tiny_sd(folder, prepare=lambda pipe, accelerator: None, recipes=tuple(RECIPES)) -> None:
    """Saves the first gradient, the schedule, the losses and the moved noises of each recipe, as this process has them."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    problem, initial = tiny_problem(accelerator, lambda pipe: prepare(pipe, accelerator))
    for name in recipes:
        recipe = RECIPES[name]
        if name == "default":
            learner = DefaultLearner(problem, recipe, parameters_for(recipe, initial, problem.path))
            learner.alone = True
            gradients, moved = torch.cat([part.flatten() for part in learner._linearised(range(5))[1:]]), {}
        else:
            learner = {"adam": AdamLearner, "published": PublishedLearner}[name](problem, recipe, initial, 0)
            learner.start(1.0)
            learner.step()
            gradients = torch.cat([value.grad for value in learner.parameters.parameters()])
            moved = learner.moved
        arguments = (problem.rollout, problem.train, problem.valid, initial, recipe)
        result = learn(*arguments, path=problem.path, accelerator=accelerator)
        times = torch.cat([result.schedule.times, result.schedule.network_times])
        values = {"gradients": gradients, "times": times, "moved": moved, "history": result.history}
        values["loss"] = result.loss
        torch.save(values, f"{folder}/{name}-{accelerator.num_processes}-{accelerator.process_index}.pt")


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    learn_on_tiny_sd(folder)
    return folder


@pytest.mark.slow
def test_two_processes_learn_bit_for_bit_what_one_does(one_process, tmp_path):
    on_two_processes(learn_on_tiny_sd, str(tmp_path))
    for name in RECIPES:
        alone = torch.load(one_process / f"{name}-1-0.pt")
        assert alone["gradients"].abs().max() > 0
        for rank in range(2):
            assert same(torch.load(tmp_path / f"{name}-2-{rank}.pt"), alone)


# ---------------------------------------------------------------------- sharing work


def _share_and_raise(folder):
    accelerator = Accelerator(cpu=True)
    for count in (0, 1, 2, 5):
        computed = share(list(range(count)), lambda part: (part, accelerator.process_index), accelerator)
        assert computed == [(part, part % 2) for part in range(count)]
    numbers = share([0.1, 0.2, 0.3], lambda part: torch.tensor([part], dtype=torch.float64), accelerator)
    assert torch.cat(numbers).tolist() == [0.1, 0.2, 0.3]

    assert on_main(lambda: accelerator.process_index, accelerator) == 0
    with pytest.raises(ValueError, match="the disk of 0 is full"):
        on_main(lambda: _refuse(f"the disk of {accelerator.process_index} is full"), accelerator)

    problem, initial = tiny_problem(accelerator)
    told = {
        "train_batch_size": AdamRecipe(max_steps=1, batch_size=4, micro_batch_size=None),
        "first_pairs": DefaultRecipe(max_steps=1, first_pairs=4),
    }
    for argument, recipe in told.items():
        message = f"keeps only 1 of 2 processes busy; lower --micro_batch_size or raise --{argument}"
        with pytest.warns(UserWarning, match=message) if accelerator.is_main_process else pytest.raises(StopIteration):
            pairs = problem.rollout, problem.train, problem.valid
            learn(*pairs, initial, recipe, path=problem.path, accelerator=accelerator)
            if not accelerator.is_main_process:
                raise StopIteration
    Path(folder, str(accelerator.process_index)).touch()


def _refuse(sentence):
    raise ValueError(sentence)


def test_parts_are_shared_errors_too_and_idle_processes_are_told(tmp_path):
    on_two_processes(_share_and_raise, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------------- sharding


def _pretend_fsdp(accelerator) -> None:
    """Accelerate offers FSDP on accelerators only; PyTorch's works on CPUs, too."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )


def _shard(pipe, accelerator) -> None:
    _pretend_fsdp(accelerator)
    # What the launcher's mixed precision would set; it must not round the times that the network is told.
    accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    whole = sum(p.numel() for p in pipe.unet.parameters())
    shard(pipe, accelerator)
    assert sum(p.to_local().numel() for p in pipe.unet.parameters()) < 0.6 * whole
    blocks = [part for part in pipe.unet.modules() if type(part).__name__.startswith("FSDP")]
    assert len(blocks) > 5
    # Both do as many parts as the busier one, but the last one counts once.
    mine = turns([7, 8, 9], accelerator)
    assert mine == ([(7, True), (9, True)] if accelerator.is_main_process else [(8, True), (9, False)])


@pytest.mark.slow
def test_a_sharded_teacher_is_learned_from_like_a_whole_one(one_process, tmp_path):
    on_two_processes(learn_on_tiny_sd, str(tmp_path), _shard, ("default",))
    alone = torch.load(one_process / "default-1-0.pt")
    first, second = (torch.load(tmp_path / f"default-2-{rank}.pt") for rank in range(2))
    assert same(first, second)
    # Gathered weights lie elsewhere in memory, so that kernels may add in another order.
    assert (first["gradients"] - alone["gradients"]).abs().max() <= 1e-6 * alone["gradients"].abs().max()
    torch.testing.assert_close(first["times"], alone["times"], atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- losing a process


def launch(*program, folder: Path = ROOT) -> subprocess.Popen:
    """Two processes on CPUs under the launcher that GPUs have; `accelerate launch --cpu` starts only one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", *program]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


SILENT = """
import time
from datetime import timedelta
from accelerate import Accelerator
from training import processes
processes.COLLECTIVE_TIMEOUT.timeout = timedelta(seconds=3)
accelerator = Accelerator(kwargs_handlers=[processes.COLLECTIVE_TIMEOUT])
time.sleep(300 * accelerator.process_index)
with processes.lost_process_message("runs"):
    processes.share([0, 1], lambda part: part, accelerator)
"""


@pytest.mark.slow
def test_a_silent_process_ends_the_run_with_a_sentence(tmp_path):
    (tmp_path / "silent.py").write_text(SILENT)
    for step in (20, 100):
        (tmp_path / "runs" / "nfe-5" / f"checkpoint-{step}").mkdir(parents=True)
    program = launch("silent.py", folder=tmp_path)
    _, errors = program.communicate(timeout=120)
    assert program.returncode != 0
    [sentence] = [line for line in errors.splitlines() if "another process was lost" in line]
    assert sentence.startswith("another process was lost (") and "Timed out" in sentence
    left = (
        f"checkpoints up to step 100 are in {Path('runs', 'nfe-5')}: start again with --resume_from_checkpoint latest"
    )
    assert sentence.endswith(f"; {left}")


def test_our_own_failures_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="out of memory"), lost_process_message(tmp_path):
        assert signal.getsignal(signal.SIGTERM) is not handler
        raise RuntimeError("CUDA out of memory")
    assert signal.getsignal(signal.SIGTERM) is handler


def _wait_until_told_to_end(folder):
    accelerator = Accelerator(cpu=True)
    [first, _] = gather_object([os.getpid()])
    if accelerator.process_index == 1:
        time.sleep(1)
        os.kill(first, signal.SIGTERM)
        time.sleep(60)
    sys.stderr = open(f"{folder}/stderr", "w")
    with lost_process_message(folder):
        gather_object([0])  # in C++ code, for ever


def test_a_process_that_waits_for_ever_ends_when_the_launcher_tells_it(tmp_path):
    with pytest.raises(ProcessExitedException, match="exit code 143"):
        on_two_processes(_wait_until_told_to_end, str(tmp_path))
    [sentence] = (tmp_path / "stderr").read_text().splitlines()
    assert sentence.startswith("another process was lost, or all were told to end; there is no checkpoint in ")


# ---------------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    PIPELINES["sd"]()[0].save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    train_ld3.main(arguments(folder, folder / "one"))
    facts = LD3Scheduler.from_pretrained(folder / "one").config.schedules["3"]["provenance"]
    assert facts["loss"] < 0.5 * facts["initial_loss"]  # so that it is a learned schedule that is compared
    return folder


def arguments(room, output, *more) -> list[str]:
    given = {
        "teacher": room / "sd",
        "prompts_file": room / "prompts.txt",
        "output_dir": output,
        "num_train": 6,
        "num_valid": 5,
        "teacher_steps": 5,
        "resolution": 32,
        "guidance_scale": 2,
        "nfe": 3,
        "solver": "dpmpp",
        "discretization": "edm",
        "recipe": "adam",
        "max_train_steps": 10,
        "validation_steps": 2,
        "train_batch_size": 5,
        "micro_batch_size": 2,
        "checkpointing_steps": 2,
        "report_to": "none",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), "--allow_worse", *more]


def digests(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outcome(folder) -> dict[str, str]:
    """Digests of all that does not come and go with the way to it."""
    return {name: digest for name, digest in digests(folder).items() if "checkpoint-" not in name}


@pytest.mark.slow
def test_the_program_writes_the_same_files_on_two_processes(room, tmp_path):
    program = launch(*TRAIN, *arguments(room, tmp_path / "two"))
    _, errors = program.communicate(timeout=300)
    assert program.returncode == 0, errors
    assert outcome(tmp_path / "two") == outcome(room / "one")
    assert {"scheduler_config.json", "teacher_set/provenance.json"} < set(outcome(room / "one"))
    assert set(digests(tmp_path / "two")) == set(digests(room / "one"))


def killed(program: subprocess.Popen, folder: Path) -> str:
    """Kills the main process, which writes the files, once it has written `folder`; what was printed."""
    for _ in range(3000):
        if folder.exists() or program.poll() is not None:
            break
        time.sleep(0.1)
    workers = psutil.Process(program.pid).children(recursive=True)
    [main] = [worker for worker in workers if worker.environ().get("RANK") == "0"]
    main.kill()
    _, errors = program.communicate(timeout=60)
    assert program.returncode != 0
    return errors


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_another_number_of_them_resumes_it(room, tmp_path):
    output = tmp_path / "killed"
    errors = killed(launch(*TRAIN, *arguments(room, output)), output / "nfe-3" / "checkpoint-4")
    [sentence] = [line for line in errors.splitlines() if "another process was lost" in line]
    assert sentence.endswith(f"are in {output / 'nfe-3'}: start again with --resume_from_checkpoint latest")
    assert not (output / "scheduler_config.json").exists()
    train_ld3.main(arguments(room, output, "--resume_from_checkpoint", "latest"))
    assert outcome(output) == outcome(room / "one")


# ---------------------------------------------------------------------- files for the launcher


@pytest.mark.parametrize("file", sorted((ROOT / "training" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_files_are_what_accelerate_reads(file):
    config = load_config_from_file(str(file))  # refuses unknown keys
    command = ["--config_file", str(file), "--machine_rank", "0", "-m", "training.train_ld3"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.num_processes == {"one_gpu": 1, "two_nodes_of_eight": 16}.get(file.stem, 8)
    known = vars(launch_command_parser().parse_args(["-m", "training.train_ld3"]))
    assert set(config.fsdp_config) <= set(known)
    assert arguments.use_fsdp == (file.stem == "fsdp") and arguments.multi_gpu == ("eight" in file.stem)
    if arguments.use_fsdp:
        assert {name: getattr(arguments, name) for name in config.fsdp_config} == config.fsdp_config


def test_every_launch_file_is_there():
    names = {file.stem for file in (ROOT / "training" / "accelerate").iterdir()}
    assert names == {"one_gpu", "eight_gpus", "two_nodes_of_eight", "fsdp"}
