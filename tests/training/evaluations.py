# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation that never was, small enough to compute its report by hand."""

from PIL import Image

from training.evaluation_plots import image_folder


METRICS = {
    "psnr": {"label": "PSNR", "higher_is_better": True, "scale": 1.0, "per_sample": True},
    "mse": {"label": "MSE", "higher_is_better": False, "scale": 1e3, "per_sample": True},
}


def scored(value, interval=None, difference=None, blocks=None):
    return {"value": value, "interval": interval, "difference": difference, "blocks": blocks}


def row(name, nfe, mse, psnr, setting="", evaluations=None, schedule=None, local_errors=None):
    values = {
        name: score if isinstance(score, dict) else scored(score) for name, score in (("mse", mse), ("psnr", psnr))
    }
    return {
        "name": name,
        "setting": setting,
        "nfe": nfe,
        "evaluations": nfe if evaluations is None else evaluations,
        "schedule": schedule,
        "values": values,
        "local_errors": local_errors,
    }


def made_up_results():
    """A learned schedule, which wins at 4 and not at 5, UniPC with two settings, Heun, and one that fails or is not there."""
    return {
        "facts": {"teacher": "fashion", "samples": 64, "path": "vp_discrete", "nested": {"a": 1}},
        "metrics": METRICS,
        "subject": "LD3",
        "warnings": ["64 samples are few"],
        "absent": [
            {"name": "broken", "nfe": 5, "reason": "no schedule for 5"},
            {"name": "never", "nfe": 4, "reason": "no schedule"},
            {"name": "never", "nfe": 5, "reason": "no schedule"},
        ],
        "rows": [
            row("LD3", 4, scored(0.01024, [0.00951, 0.01131], None, [0.010, 0.011, 0.012]), scored(20.0)),
            row("LD3", 5, scored(0.0061, [0.0055, 0.0072]), scored(23.0)),
            row("UniPC", 4, scored(0.0300, None, [0.0198, 0.0100, 0.0300]), 15.0, "linspace"),
            row("UniPC", 4, scored(0.01609, None, [0.00585, 0.00381, 0.01037]), scored(18.5, None, [-1.5, -2.0, -1.0]), "leading"),
            row("UniPC", 5, scored(0.0052, None, [-0.0009, -0.0014, -0.0003]), scored(23.1, None, [0.1, -0.2, 0.4]), "linspace"),
            row("UniPC", 5, scored(0.0073, None, [0.0012, 0.0006, 0.0019]), 24.0, "leading"),
            row("Heun", 4, scored(0.0123, None, [0.00206, -0.0001, 0.0041]), 19.5, evaluations=5),
            row("Heun", 5, scored(0.0123, None, [0.0062, 0.0050, 0.0080]), 19.5),
            row("broken", 4, scored(None), scored(None)),
        ],
    }  # fmt: skip


def by_mean_squared_error(results):
    """With MSE as the first metric, by which settings are chosen."""
    return {**results, "metrics": {name: METRICS[name] for name in ("mse", "psnr")}}


def save_images(folder, name, nfe, gray, seeds):
    """Pictures whose colour tells the contender's gray and the seed."""
    place = folder / image_folder(name, nfe)
    place.mkdir(parents=True)
    for seed in seeds:
        Image.new("RGB", (8, 8), (gray, gray, seed)).save(place / f"{seed:06d}.png")
