# SPDX-License-Identifier: Apache-2.0
"""The model card of a repository of certified schedules, written from its certificates."""

import inspect
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from ld3_diffusers import Schedule
from ld3_diffusers.hub import NFE_TAG, SCHEDULE_TAG
from pipelines.repository import FAMILIES

from .call_settings import CALL_SETTINGS
from .certificate import contenders, how_made, sampler_name
from .comparison import CONFIDENCE, best_by_name, paired_interval
from .published import PICTURES, Repository, Variant


# by the recipe that a schedule names
SEARCHES = {"gits": ("GITS", "https://arxiv.org/abs/2405.11326"), "oss": ("OSS", "https://arxiv.org/abs/2503.21774")}
LD3 = ("LD3", "https://arxiv.org/abs/2405.15506")
GENERALISED = ("LD3 with a generalised solver", "https://arxiv.org/abs/2510.17699")
AMED = ("AMED", "https://arxiv.org/abs/2312.00094")
NOUNS = {"learned": "learning", "searched": "the search"}
LIMITS = """- A schedule belongs to this model, dtype, guidance scale, resolution and solver, and to its number of evaluations; nothing was
  measured for fine-tuned models.
- It imitates the teacher's long schedule from the same noise. What was measured is the distance to its end points, not how
  pictures please.
- Deterministic sampling only: no `eta`, no ancestral noise."""
LIMIT_PER_SAMPLE = """
- Stages that are predicted for each sample need a U-Net, and no guidance or guidance by one call with a doubled batch."""
ATTACHED = (
    "`attach` watches the denoiser's bottleneck, from which a small network predicts each sample's stages; "
    "`pipe.scheduler.detach()` leaves the pipeline as it was."
)


def model_card(repository: Repository, repo_id: str, license: str) -> str:
    """The text of `README.md`: what the repository holds, how to use it, what was measured and how to measure it again.

    Args:
        repo_id: the repository's name, as it stands in the code to copy; of a folder, its path.
    """
    root = repository[""].certificate
    base_model = next((v.certificate["base_model"] for v in repository.values() if v.certificate["base_model"]), None)
    counts = sorted({int(nfe) for variant in repository.values() for nfe in variant.certificate["counts"]})
    prompted = any(run["disjoint"] == ["seeds", "prompts"] for run in root["runs"].values())
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        license=license,
        tags=[
            "diffusers",
            SCHEDULE_TAG,
            *(f"{NFE_TAG}{nfe}" for nfe in counts),
            *([f"text-to-{_samples(root)}"] if prompted else []),
        ],
    )
    name = base_model or root["teacher"]["name"]
    every = {f"{v}/{nfe}": entry for v in repository for nfe, entry in repository[v].config["schedules"].items()}
    made, methods = how_made(every), {_method(entry) for entry in every.values()}
    predicted = any(_is_predicted(variant) for variant in repository.values())
    sources = ", ".join(f"[{method}]({address})" for method, address in sorted(methods))
    parts = [
        f"# {made.capitalize()} schedules for {name}",
        f"{_numbers(counts)} network evaluations instead of {root['teacher_schedule']['steps']}: {_chosen(methods)}, {made} ({sources}) through "
        f"`{root['pipeline']}` and saved as a scheduler config of "
        f"`ld3_diffusers`{' with small networks beside it' if predicted else ''}. The model's weights, prompts and code stay as they are.",
        "## Use",
        _usage(repository, name, repo_id),
        _variants(repository),
        "## Measured",
        _measured_how(root, NOUNS.get(made, "learning or search")),
        *(_table(variant_name, variant) for variant_name, variant in repository.items()),
        *(_pictures(variant_name, variant) for variant_name, variant in repository.items()),
        "## Where they come from",
        *(_provenance(variant_name, variant) for variant_name, variant in repository.items()),
        "## Verify",
        _verify(root, name, repo_id),
        "## Limits",
        LIMITS + (LIMIT_PER_SAMPLE if predicted else ""),
    ]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _method(entry: dict[str, Any]) -> tuple[str, str]:
    """Name of a schedule's method, and the address of its paper."""
    schedule = Schedule.from_dict(entry)
    if schedule.stages is not None:
        return AMED
    if schedule.residuals is not None:
        return GENERALISED
    return SEARCHES.get((entry.get("provenance") or {}).get("recipe"), LD3)


def _chosen(methods: set[tuple[str, str]]) -> str:
    """What these methods choose."""
    words = ["when the solver steps" + (" and what time the network is told" if methods & {LD3, GENERALISED} else "")]
    words[0] += ", and its coefficients" if GENERALISED in methods else ""
    words = words if methods - {AMED} else []
    if AMED in methods:
        words.append("where the solver evaluates within each step and how far that leads")
    return ", or ".join(words)


def _is_predicted(variant: Variant) -> bool:
    """Whether stages are predicted for each sample."""
    return variant.certificate["solver"].get("stages") == "per sample"


def _numbers(values: list[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


# ---------------------------------------------------------------------- use


def _usage(repository: Repository, name: str, repo_id: str) -> str:
    root = repository[""].certificate
    return (
        "With ld3_diffusers installed:\n\n```python\n"
        + usage_code(root, name, repo_id)
        + "\n```\n\n`num_inference_steps` is the number of network evaluations; one without a schedule is refused."
        + (f" {ATTACHED}" if _is_predicted(repository[""]) else "")
    )


def usage_code(certificate: dict[str, Any], name: str, repo_id: str, subfolder: str = "") -> str:
    """Python that samples with a certified schedule."""
    pipeline = certificate["pipeline"] if hasattr(diffusers, certificate["pipeline"]) else "DiffusionPipeline"
    call = {key: certificate["call_settings"][key] for key in CALL_SETTINGS if key in certificate["call_settings"]}
    run = next(iter(certificate["runs"].values()))
    arguments = []
    if run["prompts"]:
        first = run["prompts"][0]
        label = first if first.isdecimal() else repr(first)
        arguments.append(repr(first) if run["disjoint"] == ["seeds", "prompts"] else f"class_labels=[{label}]")
    arguments += [f"num_inference_steps={min(map(int, certificate['counts']))}"]
    arguments += [f"{key}={value!r}" for key, value in call.items()]
    dtype = "" if certificate["dtype"] == "float32" else f", torch_dtype=torch.{certificate['dtype']}"
    where = f", subfolder={subfolder!r}" if subfolder else ""
    predicted = certificate["solver"].get("stages") == "per sample"
    scheduler = "AMEDScheduler" if predicted else "LD3Scheduler"
    lines = ["import torch"] if dtype else []
    lines += [f"from diffusers import {pipeline}", f"from ld3_diffusers import {scheduler}", ""]
    trust = ", trust_remote_code=True" if certificate["pipeline"] in FAMILIES else ""
    lines += [f"pipe = {pipeline}.from_pretrained({name!r}{dtype}{trust})"]
    lines += [f"pipe.scheduler = {scheduler}.from_pretrained({repo_id!r}{where})"]
    lines += ["pipe.scheduler.attach(pipe)"] if predicted else []
    kind = _samples(certificate)
    lines += [f"{kind} = pipe({', '.join(arguments)}).{'frames' if kind == 'video' else 'images'}[0]"]
    return "\n".join(lines)


def _samples(certificate: dict[str, Any]) -> str:
    """What the pipeline returns, "image" or "video"."""
    kind = getattr(diffusers, certificate["pipeline"], None)
    return "video" if kind is not None and "num_frames" in inspect.signature(kind.__call__).parameters else "image"


def _variants(repository: Repository) -> str:
    if len(repository) == 1:
        return ""
    rows = ["| `subfolder=` | solver | evaluations | settings |", "|---|---|---|---|"]
    for name, variant in repository.items():
        certificate = variant.certificate
        counts = ", ".join(certificate["counts"])
        sampler = sampler_name(certificate["solver"])
        rows.append(f"| {name or '(none)'} | {sampler} | {counts} | {_settings(certificate)} |")
    predicted = [f"`{name}`" for name, variant in repository.items() if name and _is_predicted(variant)]
    if predicted:
        said = "" if _is_predicted(repository[""]) else f" {ATTACHED}"
        rows += ["", f"Load {', '.join(predicted)} with `AMEDScheduler` and call `pipe.scheduler.attach(pipe)`.{said}"]
    return "\n".join(rows)


def _settings(certificate: dict[str, Any]) -> str:
    call = certificate["call_settings"]
    words = [f"{name.replace('_', ' ')} {call[name]!r}" for name in CALL_SETTINGS if name in call]
    return ", ".join([*words, certificate["dtype"]])


# ---------------------------------------------------------------------- measured


def _measured_how(root: dict[str, Any], making: str) -> str:
    steps = root["teacher_schedule"]["steps"]
    return (
        f"Mean squared distance (x 1e-3) of the end states to those of the teacher's {steps} evaluations, from the same noises, on "
        f"seeds that {making} never saw, and where there are prompts, on prompts that it never saw. Best stock: the nearest of the stock "
        "schedulers of Diffusers with the best of their timestep spacings, chosen on these very samples; stock Heun makes an odd number "
        f"of evaluations, so it gets one more at even counts. In brackets the {100 * CONFIDENCE:.0f} % bootstrap interval of the mean "
        "difference. Distances of every sample and every scheduler stand in `certificate.json`."
    )


def _table(name: str, variant: Variant) -> str:
    certificate, made = variant.certificate, how_made(variant.config["schedules"])
    rows = [
        f"**{sampler_name(certificate['solver'])}**, {_settings(certificate)}"
        + (f" (`subfolder={name!r}`)" if name else ""),
        "",
        f"| evaluations | {made} | best stock | scheduler | stock - {made} | samples |",
        "|---|---|---|---|---|---|",
    ]
    for nfe, record in certificate["counts"].items():
        learned, stock = contenders(record)
        best = best_by_name(stock)[0]
        mean, low, high = (1e3 * x for x in paired_interval(best.distances, learned.distances))
        rows.append(
            f"| {nfe} | **{1e3 * learned.mean:.3f}** | {1e3 * best.mean:.3f} | {best.label} "
            f"| {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {len(learned.distances)} |"
        )
    return "\n".join(rows)


def _pictures(name: str, variant: Variant) -> str:
    prefix, least = f"{name}/" if name else "", min(map(int, variant.certificate["counts"]))
    made = how_made({least: variant.config["schedules"][str(least)]})
    stages = ", stages those of the bare solver" if _is_predicted(variant) else ""
    about = {
        "samples.png": f"Samples at {least} evaluations: teacher, best stock, {made}",
        "schedules.png": f"Noise levels and network times at {least} evaluations{stages}",
    }
    return "\n\n".join(f"![{about[file]}]({prefix}{file})" for file in PICTURES if file in variant.pictures)


# ---------------------------------------------------------------------- provenance and verification


def _provenance(name: str, variant: Variant) -> str:
    certificate, schedules = variant.certificate, variant.config["schedules"]
    teacher, target = certificate["teacher"], certificate["teacher_schedule"]
    long = target["solver"] + ("" if target["discretization"] is None else f" on the {target['discretization']} grid")
    lines = [f"`{name}`:"] if name else []
    revision = f" at revision {teacher['revision']}" if teacher["revision"] else ""
    lines += [
        f"- teacher: {teacher['name']}{revision}, digest `{teacher['digest']}`; target: {target['steps']} evaluations of {long}",
        f"- settings: {_settings(certificate)}",
    ]
    for nfe, record in certificate["counts"].items():
        made, run = schedules[nfe].get("provenance") or {}, certificate["runs"][record["run"]]
        pairs = f"{made.get('train_pairs', '?')} + {made.get('valid_pairs', '?')} pairs"
        won = f", taken: {made['won']}" if "won" in made else ""
        amed = "".join(f", {key.replace('_', ' ')} {value}" for key, value in (made.get("amed") or {}).items())
        unseen = " and ".join(run["disjoint"])
        left_out = f"; seen prompts left out: {run['left_out']}" if run["left_out"] else ""
        lines.append(
            f"- {nfe} evaluations: {how_made({nfe: schedules[nfe]})} on {pairs}, recipe {made.get('recipe', '?')}{won}{amed}; judged on seeds {run['seeds'][0]} to "
            f"{run['seeds'][1]} (unseen: {unseen}{left_out}) with Diffusers {run['versions'].get('diffusers', '?')} on "
            f"{run['device']}, {run['date'][:10]}"
        )
    return "\n".join(lines)


def _verify(root: dict[str, Any], name: str, repo_id: str) -> str:
    teacher = "" if root["teacher"]["hub_id"] or root["base_model"] else f" --teacher {name}"
    return (
        "From a clone of ld3_diffusers, this samples with the teacher, the schedules and all stock schedulers again and compares:\n\n"
        f"```bash\npython -m training.publish --verify {repo_id}{teacher}\n```\n\n"
        "`--subfolder` chooses a variant, `--num_samples` fewer samples."
    )
