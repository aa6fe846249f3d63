# SPDX-License-Identifier: Apache-2.0
"""The learned schedules in a scheduler's config: reading them, and comparing them with the model that they are to serve."""

import json
from pathlib import Path
from typing import Any

from ..noise_path import NoisePath
from ..schedule import MAX_NFE, Schedule, check_checksum, interpolate, same_checksum
from ..schedule_curve import ScheduleCurve
from .stock_config import BETA_KEYS


COUNTS = frozenset(map(str, range(1, MAX_NFE + 1)))


def plain_json(schedules) -> dict[str, Any]:
    """A deep copy of schedules by number of evaluations as JSON has it: decimal strings as keys, lists for tuples, finite numbers, no tensors.

    Raises:
        ValueError: for what JSON has not.
    """
    if not isinstance(schedules, dict):
        raise ValueError(f"schedules must map a number of evaluations to a schedule, got {type(schedules).__name__}")
    bad = [key for key in schedules if str(key) not in COUNTS]
    if bad or len(set(map(str, schedules))) < len(schedules):
        raise ValueError(
            f"schedules has the keys {str(bad or list(schedules)):.200}; use the number of network evaluations, 1 to "
            f"{MAX_NFE}, as a decimal string, each once"
        )
    return {str(key): plain_copy(entry, "schedules") for key, entry in schedules.items()}


def plain_copy(entry, name: str):
    """A deep copy as JSON has it, of the option of that name. Raises a `ValueError` for what JSON has not."""
    try:
        return json.loads(json.dumps(entry, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be plain JSON with finite numbers ({error}); see Schedule.to_dict") from error


def read_schedules(
    schedules: dict[str, Any], config, path: NoisePath, with_predictors: bool = False
) -> dict[int, Schedule]:
    """The schedules, by number of evaluations, for the model that `config` describes.

    Args:
        with_predictors: whether stages may be predicted while sampling.

    Raises:
        ValueError: if one is malformed, was made for another model, or builds another table than it was saved with.
    """
    return {int(nfe): _read(nfe, entry, config, path, with_predictors) for nfe, entry in schedules.items()}


def _read(nfe, entry, config, path, with_predictors) -> Schedule:
    try:
        schedule = Schedule.from_dict(entry)
        if schedule.predictor is not None and not with_predictors:
            raise ValueError("its stages are predicted for each sample; load it with AMEDScheduler")
        _check_same_model(schedule, config, path)
        check_checksum(schedule.table(path), schedule.checksum)
        schedule.check_stability(path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedules[{nfe!r}]: {error}") from error
    if schedule.nfe != int(nfe):
        raise ValueError(
            f"schedules[{nfe!r}] makes {schedule.nfe} network evaluations; rename the key to {str(schedule.nfe)!r}"
        )
    return schedule


def read_curve(entry: dict[str, Any], config, path: NoisePath) -> ScheduleCurve:
    """The curve, for the model that `config` describes. Raises a `ValueError` as [`read_schedules`]."""
    try:
        curve = ScheduleCurve.from_dict(entry)
        _check_same_model(curve, config, path)
        actual = curve.check(path)
        same_checksum(actual, actual if curve.checksum is None else curve.checksum)
    except (TypeError, ValueError) as error:
        raise ValueError(f"curve: {error}") from error
    return curve


def _check_same_model(learned: Schedule | ScheduleCurve, config, path) -> None:
    # a path of kind "ve" is that of an "edm" config too, which only adds the preconditioning
    for name, mine in (("prediction_type", config["prediction_type"]), ("noise_path", path.kind)):
        if mine != getattr(learned, name):
            raise ValueError(
                f"it was learned for {name}={getattr(learned, name)!r} but this model has {mine!r}; "
                "use a schedule made for this model"
            )


def learned_schedule(
    schedules: dict[int, Schedule], curve: ScheduleCurve | None, nfe: int, path: NoisePath, may_interpolate: bool
) -> Schedule | None:
    """The learned schedule for `nfe` evaluations, else that of the curve; None if nothing was learned at all.

    Raises:
        ValueError: if there are schedules for other counts only, and interpolation was not asked for.
    """
    if nfe in schedules:
        return schedules[nfe]
    if curve is not None and curve.serves(nfe):
        return curve.schedule(nfe, path)
    if not schedules and curve is None:
        return None
    if not may_interpolate:
        counts = [*map(str, sorted(schedules)), *([] if curve is None else ["{} to {}".format(*curve.counts)])]
        raise ValueError(
            f"no schedule was learned for {nfe} evaluations; use num_inference_steps = {' or '.join(counts)}, or load with "
            "interpolate=True"
        )
    ends = {} if curve is None else {count: curve.schedule(count, path) for count in curve.counts}
    return interpolate({**ends, **schedules}, nfe, path)


def check_model(config, of_pipeline) -> None:
    """Raises a `ValueError` if the config of a pipeline's scheduler speaks of another model than `config`."""
    betas = BETA_KEYS if of_pipeline["noise_path"] == "vp_discrete" else ()
    for key in ("noise_path", "prediction_type", *betas):
        if config[key] != of_pipeline[key]:
            raise ValueError(
                f"these schedules are for {key}={config[key]!r} and the scheduler of this pipeline has "
                f"{of_pipeline[key]!r}; use schedules made for this model"
            )


def check_provenance(learned: dict[str, Schedule | ScheduleCurve], pipe) -> None:
    """Raises a `ValueError` that names in what the pipeline's network differs from the one that one of these was learned with."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is None:
        raise ValueError(
            "this pipeline has neither a unet nor a transformer; check the schedule against its model card"
        )
    actual = {
        "denoiser": type(denoiser).__name__,
        "in_channels": denoiser.config.get("in_channels"),
        "guidance_embeds": denoiser.config.get("guidance_embeds"),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "teacher": getattr(pipe.config, "_name_or_path", None) or denoiser.config.get("_name_or_path"),
    }
    for what, schedule in learned.items():
        facts = schedule.provenance
        different = [
            f"{key} {facts[key]!r} (here {value!r})"
            for key, value in actual.items()
            if key in facts
            and value is not None
            and facts[key] != value
            and not (key == "teacher" and Path(value).is_dir())  # a local copy has a name of its own
        ]
        if different:
            raise ValueError(
                f"{what} was learned with another {', '.join(different)}; "
                "results may differ from its card: learn one for this pipeline, or sample without check()"
            )


def describe_curve(curve: ScheduleCurve) -> str:
    """One line of a scheduler's `repr`."""
    facts = ", ".join(f"{k}={v!r}" for k, v in curve.provenance.items() if isinstance(v, (str, int, float)))
    return f"  {curve.counts[0]} to {curve.counts[1]} evaluations: {curve.spec.solver}, one curve, {facts or 'no provenance'}"


def describe(nfe: int, schedule: Schedule) -> str:
    """One line of a scheduler's `repr`."""
    facts = ", ".join(f"{k}={v!r}" for k, v in schedule.provenance.items() if isinstance(v, (str, int, float)))
    kind = "" if schedule.direction_scales is None else " with AMED's static stages"
    kind = kind if schedule.residuals is None else " with learned coefficients"
    kind = kind if schedule.predictor is None else " with stages predicted for each sample"
    return f"  {nfe} evaluations: {schedule.spec.solver}{kind}, {facts or 'no provenance'}"
