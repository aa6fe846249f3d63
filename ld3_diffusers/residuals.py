# SPDX-License-Identifier: Apache-2.0
r"""Learned coefficients: residuals on a solver's rows, as in generalised solvers (GAS, Oganov et al., arXiv:2510.17699).

A network's output is a data prediction $D_k$ in another form, and every state a combination of the starting one and of the predictions
made since. So the rows of any solver, one-stage or two-stage, noise or velocity form, can be written on data predictions alone,

$$ x_{i+1} = a_i x_i + \sum_{k\le i} c_{ik} D_k, $$

where a consistent solver has $a_i = \sigma_{i+1}/\sigma_i$ and $\sum_k c_{ik} = \alpha_{i+1} - a_i\alpha_i$. In this form a change of any
coefficient moves the sample by about as much, which it does not in noise form, where x and $\sigma\hat\epsilon$ are nearly parallel while noise
prevails. What is learned is relative to the row, 0 where nothing is:

$$ x_{i+1} = a_i x_i + \sum_{k\le i} (c_{ik} + s_i C_{ik}) D_k, \qquad s_i = \sum_{k\le i} |c_{ik}|. $$

It has no unit, and keeps its meaning when the times move: under a resolution shift, or while they are learned too. The weight $a_i$ of
the state stays the solver's: it says how much noise is left, which is what the times are for.
"""

import torch
from torch import Tensor

from .noise_path import NoisePath
from .solvers.rows import Row


LARGEST_DEVIATION = 0.5  # of what a state has of a constant prediction, relative to alpha + sigma
LARGEST_GROWTH = 5.0  # of how far errors of predictions are carried to the end, in units of the solver's own


def tail_of(residuals: Tensor, first: int) -> Tensor:
    """(rows, window) residuals, of the newest prediction first: those of the rows `first` and later.

    A row that reaches back beyond `first` has none: half of it would be of no use.
    """
    rest = residuals[first:]
    count, window = rest.shape
    missing = torch.arange(window)[None] > torch.arange(count)[:, None]
    whole = ~(missing & (rest.detach() != 0)).any(1)
    return torch.where(whole[:, None], rest, 0.0)[:, :count]


def data_conversion(path: NoisePath, form: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with m = p x + q D at the network's time t, for a prediction m in a solver's form and the data prediction D."""
    if form == "data":
        return torch.zeros_like(t), torch.ones_like(t)
    if form == "noise":
        return 1 / path.sigma(t), -path.alpha(t) / path.sigma(t)
    return 1 / t, -1 / t


def composition(rows: list[Row], p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    r"""(N + 1,) $\kappa$ and (N + 1, N) $g$ with $x_i = \kappa_i x_0 + \sum_k g_{ik} D_k$, for rows on predictions $m_k = p_k x_k + q_k D_k$."""
    states = [torch.eye(1 + len(rows), dtype=torch.float64)[0]]  # coefficients of x_0, D_0, ..., D_{N-1}
    predictions: list[Tensor] = []
    for i, row in enumerate(rows):
        prediction = p[i] * states[i] + q[i] * torch.eye(1 + len(rows), dtype=torch.float64)[1 + i]
        predictions.insert(0, prediction)
        states.append(row.state * states[i] + sum(w * m for w, m in zip(row.history, predictions)))
    together = torch.stack(states)
    return together[:, 0], together[:, 1:]


def in_data_form(rows: list[Row], p: Tensor, q: Tensor) -> list[Row]:
    """The same states from rows on data predictions; `p` and `q` are of [`data_conversion`]."""
    kappa, weights = composition(rows, p, q)
    result = []
    for i in range(len(rows)):
        state = kappa[i + 1] / kappa[i]
        result.append(Row(state, list((weights[i + 1] - state * weights[i])[: i + 1].flip(0))))
    return result


def with_residuals(rows: list[Row], residuals: Tensor) -> list[Row]:
    """Rows on data predictions, with (rows, window) residuals."""
    result = []
    for row, own in zip(rows, residuals):
        total = sum(w.abs() for w in row.history)
        longer = [*row.history, *[torch.zeros_like(total)] * (len(own) - len(row.history))]
        learned = [w + total * c for w, c in zip(longer, own)]
        result.append(Row(row.state, learned + longer[len(own) :]))
    return result


def check_stability(learned: list[Row], own: list[Row], starting_sigma: float) -> None:
    """Compare rows with residuals with the solver's own, both on data predictions; `starting_sigma` is the first noise level.

    Raises:
        ValueError: if a constant prediction or errors of predictions are carried far from where the solver carries them.
    """
    zero, one = torch.zeros(len(own), dtype=torch.float64), torch.ones(len(own), dtype=torch.float64)
    (_, weights), (noise, own_weights) = (
        [part.detach() for part in composition(rows, zero, one)] for rows in (learned, own)
    )
    deviation = (weights - own_weights).sum(1) / (starting_sigma * noise.abs() + own_weights.sum(1).abs())
    bad = (~(deviation.abs() <= LARGEST_DEVIATION)).nonzero().flatten().tolist()
    growth = float(weights[-1].abs().sum() / own_weights[-1].abs().sum())
    if bad:
        found = (
            f"carry a constant prediction {float(deviation[bad[0]]):+.3g} times its size too far in row {bad[0] - 1}"
        )
    elif not growth <= LARGEST_GROWTH:
        found = f"carry errors of predictions {growth:.3g} times as far as the solver's own"
    else:
        return
    raise ValueError(
        f"the learned coefficients are not stable: they {found}; learn on more pairs or with a smaller coefficient_window, or "
        "drop the 'residuals'"
    )
