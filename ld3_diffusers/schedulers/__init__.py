# SPDX-License-Identifier: Apache-2.0
"""The Diffusers shells."""

from .scheduling_ld3 import LD3Scheduler


__all__ = ["LD3Scheduler"]
