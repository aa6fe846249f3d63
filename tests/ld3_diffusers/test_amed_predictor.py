# SPDX-License-Identifier: Apache-2.0
"""AMED's predictor against the authors' numbers; its static form, its pooling, and how it is kept."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ld3_diffusers import AMEDPredictor
from ld3_diffusers.amed_predictor import LARGEST

from .amed_steps import random_predictor


with np.load(Path(__file__).parents[1] / "golden" / "amed.npz") as file:
    GOLDEN = {
        key.removeprefix("amed/network/"): torch.from_numpy(file[key]) for key in file.files if "/network/" in key
    }

HEADS = [("0", "0"), ("0.01", "0"), ("0", "0.2"), ("0.01", "0.2")]
FEATURES = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(1))


def prediction(predictor, features=FEATURES, z=9.0, z_next=2.5, step=0):
    with torch.no_grad():
        return torch.stack(predictor(features, z, z_next, step))


@pytest.mark.parametrize("scale_dir, scale_time", HEADS)
def test_published_forward_pass(scale_dir, scale_time):
    prefix = f"scale_dir={scale_dir},scale_time={scale_time}/"
    predictor = AMEDPredictor(scale_dir=float(scale_dir), scale_time=float(scale_time)).double()
    weights = {
        key.removeprefix(prefix + "param/"): v for key, v in GOLDEN.items() if key.startswith(prefix + "param/")
    }
    predictor.load_state_dict(weights)
    for (z, z_next), expected in zip(GOLDEN["t_cur_next"], GOLDEN[prefix + "out"]):
        r, c, a = prediction(predictor, GOLDEN["bottleneck"], z, z_next)
        columns = [r, *([c] if scale_dir != "0" else []), *([a] if scale_time != "0" else [])]
        torch.testing.assert_close(torch.stack(columns, 1), expected, rtol=0, atol=1e-15)
        assert scale_dir != "0" or (c == 1).all()
        assert scale_time != "0" or (a == 1).all()


def test_published_sizes():
    counts = [AMEDPredictor(scale_dir=float(c), scale_time=float(a)).num_parameters() for c, a in HEADS]
    assert counts == [8929, 8950, 8950, 8971]


def test_first_weights():
    # Xavier's uniform bound sqrt(6 / (8 + 8)), and normal ones of deviation sqrt(1 / inputs); all biases 0
    torch.manual_seed(0)
    predictor = AMEDPredictor(hidden_dim=1024, bottleneck_input_dim=1024, noise_channels=64)
    bound = math.sqrt(6 / 128)
    assert 0.99 * bound < predictor.map_layer0.weight.abs().max() <= bound
    assert predictor.enc_layer0.weight.std().item() == pytest.approx(1 / 32, rel=0.01)
    assert predictor.enc_layer1.weight.std().item() == pytest.approx(1 / 32, rel=0.05)
    for head in (predictor.fc_r, predictor.fc_scale_dir):
        assert head.weight.std().item() == pytest.approx((4 + 2 * 64) ** -0.5, rel=0.2)
    assert all((parameter == 0).all() for name, parameter in predictor.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("form", ["per_sample", "static"])
def test_ranges(form):
    predictor = AMEDPredictor(form, scale_dir=0.03, scale_time=0.4, num_steps=1)
    limits = []
    for value in (-60.0, 60.0):
        with torch.no_grad():
            for name, parameter in predictor.named_parameters():
                if name.startswith(("logits", "fc")):
                    parameter.fill_(0.0 if name.endswith("weight") else value)
        limits.append(prediction(predictor).reshape(3, -1)[:, 0])
    expected = torch.tensor([[0.0, 0.97, 0.6], [1.0, 1.03, 1.4]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(limits), expected, rtol=0, atol=1e-12)


def test_features_of_an_analytical_first_step():
    predictor = random_predictor()
    assert torch.equal(prediction(predictor, None), prediction(predictor, torch.zeros(1, 8, 8)))
    assert not torch.equal(prediction(predictor, None), prediction(predictor, FEATURES[:1]))


def test_samples_do_not_see_each_other():
    predictor = random_predictor()
    together = prediction(predictor)
    assert together.shape == (3, 5) and together.dtype == torch.float64
    for k in range(5):
        torch.testing.assert_close(
            prediction(predictor, FEATURES[k : k + 1])[:, 0], together[:, k], rtol=1e-6, atol=1e-7
        )


# The static form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale_dir, scale_time, count", [(0.0, 0.0, 1), (0.01, 0.0, 2), (0.0, 0.2, 2), (0.01, 0.2, 3)]
)
def test_static_form_begins_as_the_bare_solver(scale_dir, scale_time, count):
    predictor = AMEDPredictor("static", scale_dir=scale_dir, scale_time=scale_time, num_steps=4)
    assert predictor.num_parameters() == 4 * count
    for step in range(4):
        assert prediction(predictor, None, 9.0, 2.5, step).tolist() == [0.5, 1.0, 1.0]


def test_static_form_depends_on_the_step_only():
    predictor = random_predictor(form="static", num_steps=3)
    for step in range(3):
        value = prediction(predictor, None, 9.0, 2.5, step)
        assert torch.equal(value, prediction(predictor, FEATURES, 80.0, 0.1, step))
        r, c, a = torch.sigmoid(predictor.logits[step].detach()).double()
        assert torch.equal(value, torch.stack([r, 1 + 0.01 * (2 * c - 1), 1 + 0.2 * (2 * a - 1)]))
        assert not torch.equal(value, prediction(predictor, None, 9.0, 2.5, (step + 1) % 3))


def test_a_step_learns_nothing_for_the_others():
    # Adam moves a parameter whose gradient is 0, but not one that has none.
    predictor = random_predictor(form="static", num_steps=3)
    sum(predictor(None, 9.0, 2.5, 1)).backward()
    assert [parameter.grad is None for parameter in predictor.logits] == [True, False, True]
    assert (predictor.logits[1].grad != 0).all()


@pytest.mark.parametrize("form", ["per_sample", "static"])
def test_gradients(form):
    predictor = random_predictor(form=form, num_steps=2).double()
    names, parameters = zip(*predictor.named_parameters())
    features = FEATURES[:2].double().requires_grad_()

    def outputs(features, *parameters):
        replaced = dict(zip(names, parameters))
        return torch.stack(torch.func.functional_call(predictor, replaced, (features, 9.0, 2.5, 1)))

    assert torch.autograd.gradcheck(outputs, (features, *parameters), eps=1e-6, atol=1e-7, fast_mode=True)


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (12, 12), (17, 9), (8, 12), (1, 1)])
def test_pooling(size):
    """Cell i of 8 is the mean over floor(i n / 8) .. ceil((i + 1) n / 8) - 1 of n."""
    features = torch.randn(3, *size, generator=torch.Generator().manual_seed(2))
    rows, columns = (
        torch.stack(
            [
                torch.tensor([i * n // 8 <= k < -(-(i + 1) * n // 8) for k in range(n)], dtype=torch.float64)
                for i in range(8)
            ]
        )
        for n in size
    )
    rows, columns = (part / part.sum(1, keepdim=True) for part in (rows, columns))
    pooled = (rows @ features.double() @ columns.T).float()
    predictor = random_predictor()
    torch.testing.assert_close(prediction(predictor, features), prediction(predictor, pooled), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(
        prediction(predictor, features), prediction(predictor, pooled.flip(0)), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(8, 8), (12, 9)])
def test_features_of_any_dtype(dtype, size):
    predictor = random_predictor()
    features = torch.randn(3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(prediction(predictor, features), prediction(predictor, features.float()))


# Kept on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["per_sample", "static"])
def test_saved_bit_for_bit(form, tmp_path):
    options = {"solver": "dpmpp", "solver_order": 2, "predict_x0": False, "z_max": 14.6, "z_min": 1 / 3}
    saved = random_predictor(form=form, num_steps=3, **options)
    saved.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = AMEDPredictor.from_pretrained(tmp_path)
    ours, theirs = ({k: v for k, v in p.config.items() if k[0] != "_"} for p in (saved, loaded))
    assert ours == theirs and loaded.config["z_min"] == 1 / 3
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    for step in range(3):
        assert torch.equal(prediction(saved, step=step), prediction(loaded, step=step))
    assert loaded.digest() == saved.digest() and len(saved.digest()) == 16


def test_digest_is_the_same_everywhere():
    # of weights and settings alone: a value to hold on to
    predictor = AMEDPredictor("static", scale_dir=0.01, scale_time=0.2, num_steps=2)
    assert predictor.digest() == AMEDPredictor("static", scale_dir=0.01, scale_time=0.2, num_steps=2).digest()
    assert predictor.digest() == "02ed369ac48e7e39"


@pytest.mark.parametrize("form", ["per_sample", "static"])
def test_digest_sees_every_weight(form):
    predictor = random_predictor(form=form, num_steps=2)
    digests = {predictor.digest()}
    for parameter in predictor.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            for k in {0, len(flat) // 2, len(flat) - 1}:
                flat[k] = torch.nextafter(flat[k], torch.tensor(9.0))  # a last bit
                before = len(digests)
                digests.add(predictor.digest())
                assert len(digests) == before + 1


@pytest.mark.parametrize(
    "edit",
    [
        {"scale_dir": 0.02},
        {"scale_time": 0.3},
        {"num_steps": 5},
        {"solver": "ipndm"},
        {"solver_order": 3},
        {"predict_x0": False},
        {"lower_order_final": False},
        {"afs": True},
        {"z_max": 80.0},
        {"z_min": 0.002},
        {"bottleneck": "another"},
    ],
)
def test_digest_sees_every_setting(edit):
    plain, other = (random_predictor(**options) for options in ({}, edit))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert plain.digest() != other.digest()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"form": "both"}, "unknown form 'both' of a predictor; use one of per_sample, static"),
        ({"form": "static"}, "the static form needs num_steps"),
        ({"solver": "unipc"}, "'unipc' is no solver of AMED steps; use one of amed"),
        ({"scale_dir": 1.0}, r"scale_dir must be a number of at least 0 and below 1, got 1\.0"),
        ({"scale_time": -0.1}, r"scale_time must be a number of at least 0 and below 1, got -0\.1"),
        ({"scale_time": math.nan}, "scale_time must be a number of at least 0 and below 1, got nan"),
        ({"scale_dir": "0.1"}, "scale_dir must be a number of at least 0 and below 1, got '0.1'"),
        ({"scale_dir": 10**400}, "scale_dir must be a number of at least 0 and below 1"),
        ({"z_max": math.inf}, "z_max must be a finite number, got inf"),
        ({"z_min": "0"}, "z_min must be a finite number, got '0'"),
        ({"hidden_dim": LARGEST + 1}, "sizes of a predictor are integers from 1 to 4096"),
        ({"hidden_dim": 10**400}, "sizes of a predictor are integers from 1 to 4096"),
        ({"hidden_dim": 0}, "sizes of a predictor are integers from 1 to 4096"),
        ({"bottleneck_output_dim": 4.0}, "sizes of a predictor are integers from 1 to 4096"),
        ({"noise_channels": True}, "sizes of a predictor are integers from 1 to 4096"),
        ({"form": "static", "num_steps": 0}, "sizes of a predictor are integers from 1 to 4096"),
        ({"noise_channels": 7}, "noise_channels must be even and at least 4, got 7"),
        ({"noise_channels": 2}, "noise_channels must be even and at least 4, got 2"),
        ({"bottleneck_input_dim": 65}, "bottleneck_input_dim must be a square, as 8 x 8 = 64, got 65"),
    ],
)
def test_impossible_arguments(options, match):
    with pytest.raises(ValueError, match=match) as error:
        AMEDPredictor(**options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
