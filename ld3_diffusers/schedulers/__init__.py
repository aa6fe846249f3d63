# SPDX-License-Identifier: Apache-2.0
"""The Diffusers shells."""

from .scheduling_amed import AMEDScheduler
from .scheduling_ld3 import LD3Scheduler


__all__ = ["AMEDScheduler", "LD3Scheduler"]
