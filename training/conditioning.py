# SPDX-License-Identifier: Apache-2.0
"""What a pipeline is conditioned on: prompts encoded once, by the pipeline itself, and kept as one row per prompt.

A conditioning is a dict of keyword arguments of the pipeline's `__call__`, each a tensor with a leading batch axis or a
list with one tensor or string per sample.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable

import torch
from torch import Tensor


Conditioning = dict[str, Tensor | list[Tensor] | list[str]]


def returned_names(encode_prompt) -> list[str]:
    """Names of what a pipeline's `encode_prompt` returns, in order.

    Pipelines return two to seven embeddings and masks in orders of their own, under the names by which `__call__` takes them
    back; nothing but the return statement says which is which. Empty if there is no source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(encode_prompt)))
    except (OSError, TypeError, SyntaxError):
        return []
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    if not returns:
        return []
    value = max(returns, key=lambda node: node.lineno).value
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    names = []
    for node in values:
        while not isinstance(node, ast.Name):
            # `embeds.to(device)` and `embeds if guided else None` are still embeds
            inner = getattr(node, "body", None) or getattr(node, "func", None) or getattr(node, "value", None)
            if inner is None:
                return []
            node = inner
        names.append(node.id)
    return names


def named_embeddings(encode_prompt, captured: list, accepted) -> Conditioning:
    """What calls of `encode_prompt` returned, by the names under which `__call__` accepts it.

    A second call, which Flux and Qwen-Image make with true guidance, is that of the negative prompt. Empty if the embeddings
    have no place among the `accepted` names, so that prompts have to be passed as they are.
    """
    names = returned_names(encode_prompt)
    conditioning: Conditioning = {}
    for prefix, result in zip(("", "negative_"), captured):
        values = result if isinstance(result, tuple) else (result,)
        if len(values) != len(names):
            return {}
        for name, value in zip(names, values):
            if value is not None and prefix + name in accepted:
                conditioning[prefix + name] = value
    return conditioning if "prompt_embeds" in conditioning else {}


def batch_size(conditioning: Conditioning) -> int | None:
    return max((len(value) for value in conditioning.values()), default=None)


def repeated(conditioning: Conditioning, times: int) -> Conditioning:
    """For a batch that is `times` copies of another, one after the other; single rows, which serve any batch, stay."""
    return {
        name: value
        if len(value) == 1
        else value.repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor)
        else times * value
        for name, value in conditioning.items()
    }


def expanded(conditioning: Conditioning, batch: int, device) -> Conditioning:
    """On `device`, with single rows repeated over the batch.

    Raises:
        ValueError: if some value has neither one row nor `batch`.
    """
    result: Conditioning = {}
    for name, value in conditioning.items():
        if len(value) not in (1, batch):
            raise ValueError(
                f"{name} has {len(value)} rows but there are {batch} samples of noise; give one row a sample"
            )
        if isinstance(value, Tensor):
            value = value.to(device)
            result[name] = value.expand(batch, *value.shape[1:]) if len(value) == 1 else value
        else:
            value = [v.to(device) if isinstance(v, Tensor) else v for v in value]
            result[name] = value * batch if len(value) == 1 else value
    return result


class ConditioningStore:
    """Conditioning of many prompts, on the host, one row each; equal rows (the negative prompt's) are stored once."""

    def __init__(self, rows: dict[str, list], lists: frozenset[str] = frozenset()):
        self.rows = rows
        self.lists = lists  # names whose values a pipeline takes as a list with one tensor a sample

    @property
    def has_text(self) -> bool:
        """Whether a pipeline will read prompts at each call, and so needs its text encoders."""
        return any(isinstance(rows[0], str) for rows in self.rows.values())

    @classmethod
    def of(cls, chunks: Iterable[Conditioning]) -> "ConditioningStore":
        """Rows of the conditioning of consecutive chunks of prompts, each moved to the host before the next is asked for."""
        rows: dict[str, list] = {}
        lists = set()
        for chunk in chunks:
            for name, value in chunk.items():
                if not isinstance(value, Tensor) and isinstance(value[0], Tensor):
                    lists.add(name)
                rows.setdefault(name, []).extend(
                    v.detach().cpu().clone() if isinstance(v, Tensor) else v for v in value
                )
        return cls(rows, frozenset(lists))

    def select(self, indices: list[int], device="cpu") -> Conditioning:
        """The conditioning of prompts `indices`. Rows of unequal length are padded with zeros, as their masks are.

        Raises:
            ValueError: if rows differ in length and no mask tells which entries count.
        """
        conditioning: Conditioning = {}
        for name, rows in self.rows.items():
            chosen = [rows[i] if len(rows) > 1 else rows[0] for i in indices]
            if name in self.lists or not isinstance(chosen[0], Tensor):
                conditioning[name] = [v.to(device) if isinstance(v, Tensor) else v for v in chosen]
                continue
            longest = max(v.shape[0] if v.ndim else 0 for v in chosen)
            if any(v.ndim and v.shape[0] != longest for v in chosen):
                if not any("mask" in other for other in self.rows):
                    raise ValueError(
                        f"{name} differs in length from prompt to prompt; use prompts of one length, or --max_prompts 1"
                    )
                chosen = [
                    torch.nn.functional.pad(v, (0, 0) * (v.ndim - 1) + (0, longest - v.shape[0])) for v in chosen
                ]
            conditioning[name] = torch.stack(chosen).to(device)
        return conditioning

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat names and tensors for safetensors. Text is not among them."""
        tensors = {}
        for name, rows in self.rows.items():
            if not isinstance(rows[0], Tensor):
                continue
            if all(v.shape == rows[0].shape and torch.equal(v, rows[0]) for v in rows[1:]):
                rows = rows[:1]
            if name in self.lists or any(v.shape != rows[0].shape for v in rows):
                tensors[f"{name}:lengths"] = torch.tensor([len(v) for v in rows])
                tensors[f"{name}:{'list' if name in self.lists else 'padded'}"] = torch.cat(rows).contiguous()
            else:
                tensors[name] = torch.stack(rows)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], texts: dict[str, list[str]]) -> "ConditioningStore":
        """Inverse of [`to_tensors`]; `texts` are the values that are strings."""
        rows: dict[str, list] = dict(texts)
        lists = set()
        for key, value in tensors.items():
            name, _, kind = key.partition(":")
            if kind == "lengths":
                continue
            if kind == "list":
                lists.add(name)
            rows[name] = list(value.split(tensors[f"{name}:lengths"].tolist())) if kind else list(value)
        return cls(rows, frozenset(lists))
