# SPDX-License-Identifier: Apache-2.0
"""Certificates: what was measured of published schedules, on which noises and prompts, so that anybody can measure it again.

`certificate.json` lies beside the `scheduler_config.json` that it speaks of, and names each of its schedules by a hash:

| key | content |
|---|---|
| `teacher`, `base_model`, `pipeline`, `dtype` | whose samples are imitated: name, Hub id, revision, digest of the weights |
| `call_settings` | arguments of the pipeline's call, for the teacher and all schedulers alike |
| `solver` | of the learned schedules, with its options; of AMED's also how the `stages` of its steps are placed |
| `teacher_schedule` | the long schedule whose end points are the target |
| `metric` | in words |
| `runs` | seeds, prompts, machine, date and versions of each run of certification |
| `counts` | for each number of evaluations: hash of the schedule, its run, distances of every sample, intervals, who won |

What was read from elsewhere is only trusted after `certificate_form.validate` (its form) and [`check`] (that it agrees with the
schedules and with itself); that its distances are true, only measuring again can tell.
"""

import hashlib
import json
import math
import re
from typing import Any

import torch

from ld3_diffusers import Schedule

from .call_settings import CALL_SETTINGS, call_settings
from .certificate_form import FORMAT_VERSION
from .comparison import Contender, best_by_name, paired_interval, unbeaten
from .teacher_set import prompt_hash


METRIC = (
    "mean over all elements of the squared difference between the end state (latents, before decoding) and the teacher's from the "
    "same starting noise and prompt; noise i is torch.randn of a CPU generator seeded with the i-th seed, prompt i is prompt i "
    "modulo their number; intervals are 95 % BCa bootstrap intervals (9999 resamples) of the mean of stock - learned; a count is "
    "won if the interval of every stock scheduler, each with the best of its settings on these very samples, lies above 0"
)
# What the schedules of one folder have in common: the facts of learning that decide what they imitate.
TEACHER_SCHEDULE = ("teacher_solver", "teacher_solver_order", "teacher_discretization", "teacher_steps")
SOLVER = ("solver", "solver_order", "solver_type", "predict_x0", "lower_order_final", "afs", "starting_scale")
UNCLAIMED = ("teacher_final_sigmas_type", "teacher_solver_type")  # said by the schedules alone, not by certificates
SHARED = ("teacher_digest", "pipeline", "dtype", *CALL_SETTINGS, *TEACHER_SCHEDULE, *UNCLAIMED)


# ---------------------------------------------------------------------- what a schedule says of itself


def entry_hash(entry: dict[str, Any]) -> str:
    """sha256 of a schedule's config entry, independent of how its JSON is laid out."""
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sampler_name(solver: dict[str, Any]) -> str:
    """A certificate's `solver` in words, e.g. "unipc of order 2" or "AMED-Plugin on ipndm of order 4, static stages"."""
    order = "" if solver["solver_order"] is None else f" of order {solver['solver_order']}"
    stages = solver.get("stages")
    if stages is None:
        return f"{solver['solver']}{order}"
    steps = "AMED-Solver" if solver["solver"] == "amed" else f"AMED-Plugin on {solver['solver']}{order}"
    return f"{steps}, {'static stages' if stages == 'static' else 'stages predicted for each sample'}"


def how_made(entries: dict[str, dict]) -> str:
    """In a word: "searched" if all of these schedules come from a search program, "learned", or what both are."""
    words = {"searched" if "search" in (entry.get("provenance") or {}) else "learned" for entry in entries.values()}
    return words.pop() if len(words) == 1 else "learned or searched"


def solver_facts(entry: dict[str, Any]) -> dict[str, Any]:
    """The solver of a schedule with its options, defaults filled in."""
    schedule = Schedule.from_dict(entry)
    spec = schedule.spec
    solver = spec.make()
    return {
        "solver": spec.solver,
        "solver_order": getattr(solver, "order", None),
        "solver_type": getattr(solver, "variant", None),
        **{name: getattr(spec, name) for name in ("predict_x0", "lower_order_final", "afs", "starting_scale")},
        "stages": schedule.stages,
    }


def shared_facts(entries: dict[str, dict]) -> dict[str, Any]:
    """What decides the target of all these schedules, and their solver; from their provenance.

    Raises:
        ValueError: if they differ, or one does not say what it was learned on.
    """
    first: dict[str, Any] = {}
    for nfe, entry in entries.items():
        made = entry.get("provenance") or {}
        _check_learned_on(nfe, made)
        facts = {**{name: made.get(name) for name in SHARED}, **solver_facts(entry)}
        for name in ("teacher_digest", "pipeline", "dtype", "teacher_solver", "teacher_steps"):
            if facts[name] is None:
                raise ValueError(f"the schedule for {nfe} evaluations does not name its {name}; make it again")
        first = first or facts
        different = [name for name in facts if facts[name] != first[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"the schedules for {next(iter(entries))} and {nfe} evaluations differ in {name}: {first[name]!r} and "
                f"{facts[name]!r}; publish them from folders of their own, or choose those that are alike with --nfe"
            )
    return first


def _check_learned_on(nfe, made: dict[str, Any]) -> None:
    used = made.get("learned_on")
    try:
        for part in ("train", "valid"):
            first, last = used[part]["seeds"]
            if not (type(first) is type(last) is int and 0 <= first <= last):
                raise ValueError
            if not all(isinstance(prompt, str) for prompt in used[part]["prompts"]):
                raise ValueError
    except (TypeError, KeyError, ValueError):
        raise ValueError(
            f"the schedule for {nfe} evaluations does not say which seeds and prompts it was learned on, so unseen ones cannot be "
            "told; make it again with this version of train_ld3, search_gits or search_oss"
        ) from None


def seeds_learned_on(entries: dict[str, dict]) -> list[tuple[int, int]]:
    """First and last seed of every set of pairs that these schedules were learned or selected on."""
    learned_on = [entry["provenance"]["learned_on"] for entry in entries.values()]
    return sorted({tuple(used[part]["seeds"]) for used in learned_on for part in ("train", "valid")})


def prompts_learned_on(entries: dict[str, dict]) -> set[str]:
    """Hashes of the prompts that these schedules were learned or selected on."""
    learned_on = [entry["provenance"]["learned_on"] for entry in entries.values()]
    return {prompt for used in learned_on for part in ("train", "valid") for prompt in used[part]["prompts"]}


# ---------------------------------------------------------------------- building


def settings(teacher: dict, base_model: str | None, facts: dict) -> dict[str, Any]:
    """The part of a certificate that is known before anything is measured.

    Args:
        teacher: name, hub_id, revision and digest.
        facts: from [`shared_facts`].
    """
    return {
        "format_version": FORMAT_VERSION,
        "teacher": teacher,
        "base_model": base_model,
        "pipeline": facts["pipeline"],
        "dtype": facts["dtype"],
        "call_settings": call_settings(facts),
        "solver": {name: facts[name] for name in (*SOLVER, *(["stages"] if facts["stages"] else []))},
        "teacher_schedule": {name.removeprefix("teacher_"): facts[name] for name in TEACHER_SCHEDULE},
        "metric": METRIC,
    }


def build(settings: dict, run: dict, counts: dict[str, dict]) -> dict[str, Any]:
    """A certificate of one run.

    Args:
        run: seeds, prompts, disjoint, left_out, batch_size, arguments, versions, device, date.
        counts: from [`count_record`], by number of evaluations.
    """
    label = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]
    numbered = {nfe: {**counts[nfe], "run": label} for nfe in sorted(counts, key=int)}
    return {**settings, "runs": {label: run}, "counts": numbered}


def count_record(entry: dict[str, Any], learned: Contender, stock: list[Contender]) -> dict[str, Any]:
    """What was measured of one schedule, without its run."""
    return {
        "entry_sha256": entry_hash(entry),
        "won": not unbeaten(learned, best_by_name(stock)),
        "learned": _record(learned),
        "stock": [{**_record(other), "difference": _difference(other, learned)} for other in stock],
    }


def _record(contender: Contender) -> dict[str, Any]:
    finite = contender.mean < math.inf
    return {
        "name": contender.name,
        "class": type(contender.scheduler).__name__,
        "setting": contender.setting,
        "num_inference_steps": contender.num_inference_steps,
        "evaluations": contender.evaluations,
        "mean": contender.mean if finite else None,
        "distances": contender.distances.tolist() if finite else None,
    }


def _difference(other: Contender, learned: Contender) -> list[float] | None:
    return list(paired_interval(other.distances, learned.distances)) if other.mean < math.inf else None


def contenders(record: dict[str, Any]) -> tuple[Contender, list[Contender]]:
    """The learned schedule and the stock schedulers of one count, without their schedulers."""
    length = len(record["learned"]["distances"])

    def contender(row) -> Contender:
        # None: some sample was not finite
        values = [math.inf] * length if row["distances"] is None else row["distances"]
        distances = torch.tensor(values, dtype=torch.float64)
        steps, setting = row["num_inference_steps"], row["setting"]
        return Contender(row["name"], None, steps, setting, row["evaluations"], distances)

    return contender(record["learned"]), [contender(row) for row in record["stock"]]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The counts of both, of one variant; those of `new` replace those of `old`.

    Raises:
        ValueError: if they are not about the same teacher and settings.
    """
    check_alike(old, new)
    counts = {**old["counts"], **new["counts"]}
    runs = {**old["runs"], **new["runs"]}
    used = {record["run"] for record in counts.values()}
    return {
        **new,
        "teacher": new["teacher"] if new["teacher"]["hub_id"] else old["teacher"],
        "base_model": new["base_model"] or old["base_model"],
        "runs": {label: run for label, run in runs.items() if label in used},
        "counts": {nfe: counts[nfe] for nfe in sorted(counts, key=int)},
    }


def check_alike(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises a `ValueError` if two certificates, of one variant, are not about the same teacher and settings."""
    for name in ("pipeline", "dtype", "call_settings", "solver", "teacher_schedule"):
        if old[name] != new[name]:
            raise ValueError(
                f"what is published there already has another {name}: {old[name]}, here {new[name]}; choose another repository"
            )
    if old["teacher"]["digest"] != new["teacher"]["digest"]:
        raise ValueError("what is published there already has another teacher; choose another repository")


def to_json(certificate: dict[str, Any]) -> str:
    """With each list of numbers on a line of its own."""
    text = json.dumps(certificate, allow_nan=False, ensure_ascii=False, indent=1)
    return re.sub(r"\[\n\s*([-+.\de,\s]+?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


# ---------------------------------------------------------------------- believing


def check(certificate: dict[str, Any], schedules: dict[str, dict]) -> None:
    """That a valid certificate belongs to these schedules, that its samples were unseen, and that its numbers follow from its distances.

    Args:
        schedules: `schedules` of the scheduler config beside it.

    Raises:
        ValueError: naming what is not so.
    """
    if set(certificate["counts"]) != set(schedules):
        raise ValueError(
            f"the certificate is about the counts {', '.join(certificate['counts'])}, the config beside it has "
            f"{', '.join(schedules)}; publish them together"
        )
    facts = shared_facts(schedules)
    claimed = {
        **dict.fromkeys((*CALL_SETTINGS, "stages")),
        **certificate["call_settings"],
        **certificate["solver"],
        **{f"teacher_{name}": value for name, value in certificate["teacher_schedule"].items()},
        **{"teacher_digest": certificate["teacher"]["digest"], "pipeline": certificate["pipeline"]},
        "dtype": certificate["dtype"],
    }
    for name, value in facts.items():
        if name not in UNCLAIMED and claimed[name] != value:
            raise ValueError(
                f"the certificate names {name}={claimed[name]!r}, the schedules were learned for {value!r}"
            )
    for nfe, record in certificate["counts"].items():
        if record["entry_sha256"] != entry_hash(schedules[nfe]):
            raise ValueError(f"the schedule for {nfe} evaluations is not the one that was certified: its hash differs")
        _check_unseen(nfe, certificate["runs"][record["run"]], {nfe: schedules[nfe]})
        _check_numbers(nfe, record)


def _check_unseen(nfe: str, run: dict, entries: dict[str, dict]) -> None:
    first, last = run["seeds"]
    for used_first, used_last in seeds_learned_on(entries):
        if first <= used_last and used_first <= last:
            raise ValueError(
                f"the schedule for {nfe} evaluations was learned on seeds {used_first} to {used_last} and judged on {first} to {last}"
            )
    if "prompts" in run["disjoint"]:
        seen = [prompt for prompt in run["prompts"] if prompt_hash(prompt) in prompts_learned_on(entries)]
        if seen:
            raise ValueError(
                f"the schedule for {nfe} evaluations was learned on the prompt {seen[0]!r} and judged on it"
            )


def _check_numbers(nfe: str, record: dict) -> None:
    learned, stock = contenders(record)
    for row, contender in zip([record["learned"], *record["stock"]], [learned, *stock]):
        if row["mean"] is not None and not math.isclose(row["mean"], contender.mean, rel_tol=1e-9):
            raise ValueError(f"at {nfe} evaluations the mean of {contender.label} does not follow from its distances")
        stated = row.get("difference")
        if stated is not None:
            mean, low, high = paired_interval(contender.distances, learned.distances)
            # Another version of SciPy may draw other resamples.
            slack = 0.05 * (high - low) + 1e-9 * abs(mean)
            if not all(abs(a - b) <= slack for a, b in zip(stated, (mean, low, high))):
                raise ValueError(
                    f"at {nfe} evaluations the interval of {contender.label} does not follow from its distances"
                )
    if record["won"] != (not unbeaten(learned, best_by_name(stock))) or not stock:
        raise ValueError(
            f"at {nfe} evaluations the certificate claims a result that does not follow from its distances"
        )
