# SPDX-License-Identifier: Apache-2.0
"""Teacher sets: starting noise, conditioning and the teacher's end state, made once and used for every schedule.

A set is a folder:

| file | content |
|---|---|
| `pairs/` | a Hugging Face dataset with columns index, seed, prompt_index, noise and end, both float32 and flat |
| `conditioning.safetensors` | embeddings or labels, one row a prompt |
| `prompts.json` | the prompts, and negative prompts that are passed as text |
| `provenance.json` | teacher, settings, seeds, shapes, versions |

Sample i starts from `torch.randn` of a CPU generator with seed `base_seed + i`, whatever the batch size, device or number of
processes. Pipelines that draw their own noise are given such a generator; their sets have no noise column.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import (
    Dataset,
    Features,
    List,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from datasets.arrow_writer import ArrowWriter
from datasets.utils.logging import is_progress_bar_enabled
from safetensors.torch import load_file, save_file
from torch import Tensor

from .call_settings import call_settings
from .conditioning import Conditioning, ConditioningStore
from .request_file import differing
from .teacher import scheduler_digest, teacher_digest
from .whole_files import write_whole


__all__ = ["TeacherSet", "TeacherSetWriter", "check_disjoint", "prompt_hash", "starting_noise", "teacher_digest"]

LARGEST_SEED = 2**63 - 1


def starting_noise(seeds, shape: tuple[int, ...]) -> Tensor:
    """(len(seeds), *shape) float32, unit-normal, each sample from its own seed."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float32) for seed in seeds]
    )


def prompt_hash(prompt: str) -> str:
    """Twelve hexadecimal digits by which a schedule remembers the prompts (or labels) that it was learned on."""
    return hashlib.sha256(str(prompt).strip().encode()).hexdigest()[:12]


class TeacherSet:
    """Teacher pairs on disk.

    Attributes:
        pairs: the `datasets.Dataset`.
        prompts: text or labels, one for each row of the conditioning; [] for unconditional teachers.
        provenance: plain JSON, see [`TeacherSetWriter`].
    """

    def __init__(self, pairs: Dataset, store: ConditioningStore, prompts: list, provenance: dict[str, Any]):
        self.pairs = pairs.with_format("torch")
        self.store = store
        self.prompts = prompts
        self.provenance = provenance

    @classmethod
    def load(cls, path: str | Path) -> "TeacherSet":
        """Open a finished set; samples stay on disk.

        Raises:
            ValueError: if the folder is no teacher set, or is one that is still being made.
        """
        path = Path(path)
        if not (path / "provenance.json").is_file():
            state = (
                "is not finished; run make_teacher_set again with the same arguments"
                if _partial(path).exists()
                else ("is not there; make it with `python -m training.make_teacher_set`")
            )
            raise ValueError(f"the teacher set {str(path)!r} {state}")
        try:
            provenance = json.loads((path / "provenance.json").read_text(encoding="utf-8"))
            texts = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
            store = ConditioningStore.from_tensors(load_file(path / "conditioning.safetensors"), texts["conditioning"])
            pairs = load_from_disk(str(path / "pairs"))
            prompts = texts["prompts"]
            if len(pairs) != provenance["num_samples"]:
                raise ValueError(f"it holds {len(pairs)} of {provenance['num_samples']} pairs")
        except Exception as error:  # whatever datasets, safetensors and json raise on damaged files
            raise ValueError(
                f"the teacher set {str(path)!r} is damaged ({error}); delete it and make it again"
            ) from error
        return cls(pairs, store, prompts, provenance)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def needs_text_encoders(self) -> bool:
        """Whether a pipeline that learns from this set needs them; False where embeddings, labels or nothing are stored."""
        return self.store.has_text

    @property
    def seeds(self) -> range:
        first = self.provenance["base_seed"]
        return range(first, first + len(self))

    def batch(self, indices, device="cpu") -> tuple[Tensor, Tensor, Conditioning]:
        """(noise, end, conditioning) of pairs `indices`, on `device`; noise and end float32.

        Noise is (batch, ...) unit-normal, or a LongTensor of seeds for pipelines that draw their own.
        """
        indices = [int(i) for i in indices]
        rows = self.pairs[indices]
        shape = (len(indices), *self.provenance["shape"])
        end = rows["end"].reshape(shape).to(device)
        if "noise" in self.pairs.column_names:
            noise = rows["noise"].reshape(shape).to(device)
        else:
            noise = rows["seed"].long()
        return noise, end, self.store.select([int(i) for i in rows["prompt_index"]], device)

    def used(self, indices) -> dict[str, list]:
        """What pairs `indices` were made of: `seeds`, as [first, last], and `prompts`, as sorted hashes, plain JSON."""
        seeds = [self.seeds[i] for i in indices]
        rows = set(self.pairs.with_format(None)[list(indices)]["prompt_index"])
        prompts = {prompt_hash(self.prompts[row]) for row in rows} if self.prompts else set()
        return {"seeds": [min(seeds), max(seeds)], "prompts": sorted(prompts)}

    @property
    def call_settings(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call that made the pairs."""
        return call_settings(self.provenance)

    def check(self, pipe, **settings) -> None:
        """Compare with the pipeline and call settings that a schedule is to be learned for; settings that are None are not compared.

        Raises:
            ValueError: naming what differs.
        """
        if self.provenance["teacher_digest"] != teacher_digest(pipe):
            raise ValueError(
                f"this teacher set was made by other weights or in another dtype (teacher {self.provenance['teacher']!r}, "
                f"{self.provenance['dtype']}); make one with this pipeline, or load the pipeline that made it"
            )
        recorded = self.provenance.get("scheduler_digest")
        if recorded is not None and recorded != scheduler_digest(pipe.scheduler.config):
            raise ValueError(
                "this teacher set was made with another noise path, prediction type or shift in the config of the pipeline's "
                "scheduler; make one with this pipeline"
            )
        for name, value in settings.items():
            made = self.provenance.get(name)
            if value is not None and made is not None and made != value:
                raise ValueError(
                    f"this teacher set was made with {name}={made}, not {value}; make one with {name}={value}"
                )


def check_disjoint(a: TeacherSet, b: TeacherSet) -> None:
    """Raises a `ValueError` if two sets share a seed: what is learned on one must not be judged on the other."""
    first, last = max(a.seeds.start, b.seeds.start), min(a.seeds.stop, b.seeds.stop)
    if first < last:
        raise ValueError(
            f"the teacher sets share the seeds {first} to {last - 1}; make one of them with a --seed of "
            f"{max(a.seeds.stop, b.seeds.stop)} or more"
        )


# ---------------------------------------------------------------------- making


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def has_embeddings(path: str | Path) -> bool:
    """Whether a set, finished or not, can be continued without text encoders."""
    files = [folder / "prompts.json" for folder in (Path(path), _partial(Path(path)))]
    found = [file for file in files if file.is_file()]
    return bool(found) and not json.loads(found[0].read_text(encoding="utf-8"))["conditioning"]


def _write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class TeacherSetWriter:
    """Makes a set shard by shard in `<path>.partial`, which becomes `path` when all is there.

    Each shard is written to a temporary name and renamed, so that a killed run leaves whole shards only, and the next
    run with the same request continues; the finished set is the same, bit for bit. Processes may write shards side by side.

    Args:
        path: folder of the finished set.
        request: plain JSON that decides the content: teacher, teacher_digest, dtype, guidance_scale, height, width, sampler,
            base_seed, num_samples, shard_size, prompts_digest, split, versions. It becomes the provenance.

    Raises:
        ValueError: if `path` holds another set or anything else, or cannot be written.
    """

    def __init__(self, path: str | Path, request: dict[str, Any]):
        self.path, self.request = Path(path), json.loads(json.dumps(request, allow_nan=False))
        self.partial = _partial(self.path)
        self.num_samples, self.shard_size = request["num_samples"], request["shard_size"]
        if not 0 <= request["base_seed"] <= LARGEST_SEED - self.num_samples:
            raise ValueError(f"the seeds must be between 0 and {LARGEST_SEED}; choose another --seed")
        self.finished = (self.path / "provenance.json").is_file()
        if self.finished:
            self._compare(self.path / "provenance.json", "another --output_dir")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{str(self.path)!r} exists and is no teacher set; choose another --output_dir")
        elif (self.partial / "request.json").is_file():
            self._compare(self.partial / "request.json", f"another --output_dir, or delete {str(self.partial)!r}")

    def _compare(self, file: Path, remedy: str) -> None:
        made = json.loads(file.read_text(encoding="utf-8"))
        different = differing(made, self.request, self.request)
        if different:
            raise ValueError(
                f"{str(file.parent)!r} was made with another {different[0]}: {made.get(different[0])!r}, now "
                f"{self.request[different[0]]!r}; repeat its arguments to continue it, or choose {remedy}"
            )

    def begin(self, prompts: list, encode) -> None:
        """Create the folder and store the conditioning; `encode()` is called only if it is not there. In one process.

        Raises:
            ValueError: if the folder cannot be written.
        """
        # Encoded before anything is written: this is where wrong prompts are found out.
        store: ConditioningStore | None = None if (self.partial / "prompts.json").is_file() else encode()
        try:
            (self.partial / "shards").mkdir(parents=True, exist_ok=True)
            _write_json(self.partial / "request.json", self.request)
        except OSError as error:
            raise ValueError(
                f"cannot write to {str(self.partial)!r}: {error.strerror or error}; choose another --output_dir"
            ) from error
        if store is not None:
            texts = {name: rows for name, rows in store.rows.items() if isinstance(rows[0], str)}
            write_whole(self.partial / "conditioning.safetensors", lambda file: save_file(store.to_tensors(), file))
            _write_json(self.partial / "prompts.json", {"prompts": prompts, "conditioning": texts})

    def store(self) -> ConditioningStore:
        texts = json.loads((self.partial / "prompts.json").read_text(encoding="utf-8"))
        return ConditioningStore.from_tensors(
            load_file(self.partial / "conditioning.safetensors"), texts["conditioning"]
        )

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_size)

    def indices(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_samples))

    def missing(self) -> list[int]:
        """Shards that are still to be made."""
        return [shard for shard in range(self.num_shards) if not self._shard(shard).is_file()]

    def _shard(self, shard: int) -> Path:
        return self.partial / "shards" / f"{shard:06d}.arrow"

    def write(self, shard: int, noise: Tensor | None, end: Tensor, prompt_indices: list[int]) -> None:
        """Store the pairs of one shard, whole or not at all.

        Raises:
            ValueError: if an end state is not finite.
        """
        bad = [i for i, sample in zip(self.indices(shard), end) if not bool(torch.isfinite(sample).all())]
        if bad:
            raise ValueError(
                f"the teacher's end state of sample {bad[0]} is not finite; use --mixed_precision no or bf16"
            )
        columns: dict[str, Any] = {
            "index": list(self.indices(shard)),
            "seed": [self.request["base_seed"] + i for i in self.indices(shard)],
            "prompt_index": prompt_indices,
            "end": end.float().cpu().flatten(1).numpy(),
        }
        features = {name: Value("int64") for name in ("index", "seed", "prompt_index")}
        features["end"] = List(Value("float32"), length=columns["end"].shape[1])
        if noise is not None:
            columns["noise"] = noise.float().cpu().flatten(1).numpy()
            features["noise"] = List(Value("float32"), length=columns["noise"].shape[1])

        def write(file: Path) -> None:
            with ArrowWriter(path=str(file), features=Features(features)) as writer:
                writer.write_batch(columns)
                writer.finalize()

        write_whole(self._shard(shard), write)

    def finish(self, shape: tuple[int, ...]) -> TeacherSet:
        """Assemble the shards under `path`; `shape` is that of one sample. In one process, after all others are done.

        Raises:
            ValueError: if shards are missing.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{len(missing)} of {self.num_shards} shards are missing; run again with the same arguments"
            )
        assembled = self.partial / "assembled"
        shutil.rmtree(assembled, ignore_errors=True)
        assembled.mkdir()
        pairs = concatenate_datasets([Dataset.from_file(str(self._shard(shard))) for shard in range(self.num_shards)])
        # Otherwise the fingerprint in the saved files would depend on the names and times of the shards.
        pairs._fingerprint = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()[:16]
        shown = is_progress_bar_enabled()
        disable_progress_bars()
        try:
            pairs.save_to_disk(str(assembled / "pairs"))
        finally:
            if shown:
                enable_progress_bars()
        for name in ("conditioning.safetensors", "prompts.json"):
            shutil.copyfile(self.partial / name, assembled / name)
        _write_json(assembled / "provenance.json", {**self.request, "shape": list(shape)})
        if self.path.is_dir():
            self.path.rmdir()  # empty: checked when the writer was made
        os.rename(assembled, self.path)
        del pairs  # its shards are mapped into memory
        shutil.rmtree(self.partial)
        return TeacherSet.load(self.path)
