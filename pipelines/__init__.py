# SPDX-License-Identifier: Apache-2.0
"""Teachers that Diffusers lacks: each file is one family and also works as a Diffusers custom pipeline."""
