# SPDX-License-Identifier: Apache-2.0
"""Learned timestep schedules for Diffusers: `pipe.scheduler = LD3Scheduler.from_pretrained(...)`."""

# Diffusers loads a saved pipeline's scheduler through the module that names it, and asks that module for its base class.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .hub import PublishedSchedules, Variant, find_schedules, list_variants, save_pipeline
from .importing import import_pt, import_sigmas, import_times, scheduler_for
from .schedule import Schedule, SolverSpec
from .schedulers import LD3Scheduler


__version__ = "0.1.0.dev0"
__all__ = [
    "LD3Scheduler",
    "PublishedSchedules",
    "Schedule",
    "SchedulerMixin",
    "SolverSpec",
    "Variant",
    "__version__",
    "find_schedules",
    "import_pt",
    "import_sigmas",
    "import_times",
    "list_variants",
    "save_pipeline",
    "scheduler_for",
]
