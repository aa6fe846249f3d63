# SPDX-License-Identifier: Apache-2.0
"""How to learn: the numbers of the three recipes. Values for single models stand in `training/recipes/*.yaml`."""

import math
from dataclasses import dataclass, fields
from typing import Any

from .parameters import LEARNABLE, check_learnable


@dataclass(frozen=True)
class PublishedRecipe:
    """LD3 as its authors run it (Tong et al., arXiv:2405.15506, and its code); see `learner_published`.

    Attributes:
        mode: softmax gaps in "lambda" (their pixel models) or in "time" (their latent models).
        window: their `win_rate`.
        logit_window_bug: in mode "lambda", keep their window taken from raw logits.
        radius: gamma of the bound gamma d / N^2 on moved noise; 0 is the hard objective.
        fixed_bound: a bound that replaces it (their `--fix_bound` with `prior_bound`).
        batch_size, valid_batch_size: pairs of a step, and of a pass over validation pairs. 2 and 150 for pixel models, 1 and 50
            for latent ones, 1 and 1 for Stable Diffusion.
        micro_batch_size: see [`AdamRecipe`].
        rounds_v1, rounds_v2: epochs of times alone, then of both vectors; 2 and 5 for pixel models, 2 and 3 for latent ones.
        no_v1: learn network times only, in all rounds.
        lr_times: RMSprop's rate; `momentum`, `weight_decay` also its.
        lr_network_times: divided by N, SGD's; .1 for pixel models, .001 for latent ones.
        min_lr_times, min_lr_network_times, lr_decay: the floors of both and their factor after lost patience.
        shift_lr: rate of the moved noise, 12/N if None; `shift_lr_decay`, its factor after a round without a move.
        patience: validations without improvement until the best is restored.
        floor_patience: how often the network times' rate may be found at its floor.
        max_grad_norm: of each vector's gradient.
    """

    name = "published"
    mode: str = "lambda"
    window: float = 0.5
    logit_window_bug: bool = True
    radius: float = 1e-3
    fixed_bound: float | None = None
    batch_size: int = 2
    valid_batch_size: int = 150
    micro_batch_size: int | None = 8
    rounds_v1: int = 2
    rounds_v2: int = 5
    no_v1: bool = False
    lr_times: float = 5e-3
    lr_network_times: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    min_lr_times: float = 5e-5
    min_lr_network_times: float = 1e-6
    lr_decay: float = 0.8
    shift_lr: float | None = None
    shift_lr_decay: float = 0.5
    patience: int = 5
    floor_patience: int = 5
    max_grad_norm: float = 1.0

    def __post_init__(self):
        _positive(
            self, "batch_size", "valid_batch_size", "micro_batch_size", "lr_times", "patience", "floor_patience",
            "max_grad_norm",
        )  # fmt: skip
        _not_negative(self, "rounds_v1", "rounds_v2", "lr_network_times", "radius")
        if self.rounds_v1 + self.rounds_v2 == 0:
            raise ValueError("rounds_v1 and rounds_v2 are both 0; give at least one round")

    def steps(self, num_train: int) -> int:
        """Iterations of a run that is not stopped early."""
        return (self.rounds_v1 + self.rounds_v2) * math.ceil(num_train / self.batch_size)


@dataclass(frozen=True)
class DefaultRecipe:
    """Levenberg-Marquardt on gaps, network times and coefficients, by finite differences; see `learner_default`.

    Attributes:
        learn, last_level, coefficient_window: see [`GapParameters`].
        max_steps: iterations; fewer, when a step from all pairs, along all directions, is not surely better on held-out ones.
        first_pairs: pairs of the first iteration; each later one takes twice as many, up to all.
        directions: of each state, along which the network is differenced (see `sensitivity`); twice as many from where a step from all
            pairs is not surely better.
        micro_batch_size: see [`AdamRecipe`].
    """

    name = "default"
    learn: tuple[str, ...] = LEARNABLE
    last_level: str = "free"
    coefficient_window: int | None = None
    max_steps: int = 6
    first_pairs: int = 16
    directions: int = 8
    micro_batch_size: int | None = 32

    def __post_init__(self):
        object.__setattr__(self, "learn", _learnable(self.learn))
        _positive(self, "max_steps", "first_pairs", "directions", "micro_batch_size", "coefficient_window")


@dataclass(frozen=True)
class AdamRecipe:
    """Adam on gaps, network times and coefficients, by backpropagation through the pipeline; see `learner_adam`.

    For objectives that are no sums of squares, relaxed noise, and pipelines that draw their own.

    Attributes:
        learn, last_level, coefficient_window: see [`GapParameters`].
        max_steps: iterations.
        batch_size: pairs of an iteration, over all processes; None: all of them.
        micro_batch_size: pairs that go through the network at once; the unit that is given to processes, and in which
            gradients are summed, so that results do not depend on the number of processes. None: the batch.
        lr_times, lr_network_times, lr_coefficients: Adam's rates, decayed to 0 by a cosine; `warmup_steps` before that.
        times_first: share of the iterations in which only times are learned, if both are.
        betas: Adam's.
        max_grad_norm: of all parameters together.
        validation_steps: iterations between validations.
        patience: validations without improvement until learning stops; None: never.
        averaging: decay of an exponential average of the parameters, which then is what is validated and kept; None: off.
        relaxation: gamma; the student may start from noise within gamma d / NFE^2 of the teacher's. 0: off.
        relaxation_lr: step of that noise, as a share of the radius.
    """

    name = "adam"
    learn: tuple[str, ...] = LEARNABLE
    last_level: str = "free"
    coefficient_window: int | None = None
    max_steps: int = 300
    batch_size: int | None = 16
    micro_batch_size: int | None = 8
    lr_times: float = 0.1
    lr_network_times: float = 0.03
    lr_coefficients: float = 0.01
    warmup_steps: int = 0
    times_first: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    validation_steps: int = 10
    patience: int | None = None
    averaging: float | None = 0.98
    relaxation: float = 0.0
    relaxation_lr: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "learn", _learnable(self.learn))
        object.__setattr__(self, "betas", tuple(self.betas))
        _positive(
            self, "max_steps", "batch_size", "micro_batch_size", "lr_times", "lr_network_times", "lr_coefficients",
            "max_grad_norm", "validation_steps", "patience", "coefficient_window",
        )  # fmt: skip
        _not_negative(self, "warmup_steps", "times_first", "relaxation", "relaxation_lr")
        if self.averaging is not None and not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must be in [0, 1), got {self.averaging}; .99 is usual")


Recipe = DefaultRecipe | AdamRecipe | PublishedRecipe
RECIPES: dict[str, type] = {"default": DefaultRecipe, "adam": AdamRecipe, "published": PublishedRecipe}


def _learnable(learn: str | tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (learn.split(",") if isinstance(learn, str) else learn))
    check_learnable(names)
    return names


def _positive(recipe, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


def _not_negative(recipe, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(recipe, name)!r}")


def make_recipe(name: str, values: dict[str, Any] | None = None) -> Recipe:
    """The recipe of that name with some values changed; raises a `ValueError` for names it does not have."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; use one of {', '.join(RECIPES)}")
    known = [field.name for field in fields(RECIPES[name])]
    unknown = sorted(set(values or {}) - set(known))
    if unknown:
        raise ValueError(f"the recipe {name!r} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return RECIPES[name](**(values or {}))
