# SPDX-License-Identifier: Apache-2.0
"""Learned timestep schedules for Diffusers: `pipe.scheduler = LD3Scheduler.from_pretrained(...)`."""

# Diffusers loads a saved pipeline's scheduler through the module that names it, and asks that module for its base class.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .hub import PublishedSchedules, Variant, find_schedules, list_variants, load_scheduler, save_pipeline
from .importing import import_amed, import_pt, import_sigmas, import_times, scheduler_for
from .schedule import Schedule, SolverSpec
from .schedule_curve import ScheduleCurve
from .schedulers import AMEDScheduler, LD3Scheduler


__version__ = "0.1.0.dev0"
__all__ = [
    "AMEDPredictor",
    "AMEDScheduler",
    "LD3Scheduler",
    "PublishedSchedules",
    "Schedule",
    "ScheduleCurve",
    "SchedulerMixin",
    "SolverSpec",
    "Variant",
    "__version__",
    "find_schedules",
    "import_amed",
    "import_pt",
    "import_sigmas",
    "import_times",
    "list_variants",
    "load_scheduler",
    "save_pipeline",
    "scheduler_for",
]


def __getattr__(name: str):
    if name == "AMEDPredictor":  # not before it is asked for: Diffusers' models import accelerate and transformers
        from .amed_predictor import AMEDPredictor

        return AMEDPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
