# SPDX-License-Identifier: Apache-2.0
"""From public checkpoints to Diffusers pipelines (`python -m pipelines.convert`), executing nothing in them."""
