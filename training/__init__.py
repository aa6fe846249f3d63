# SPDX-License-Identifier: Apache-2.0
"""Programs that make learned schedules: `accelerate launch -m training.X`, from a clone of the repository."""
