# SPDX-License-Identifier: Apache-2.0
"""Files in the form of AMED's `network-snapshot-*.pkl`: genuine names, of modules that exist only while pickling."""

import contextlib
import pickle
import sys
import types

import torch
from torch import nn


SETTINGS = {
    "dataset_name": "ms_coco",
    "img_resolution": 64,
    "num_steps": 4,
    "sampler_stu": "dpmpp",
    "sampler_tea": "dpmpp",
    "M": 2,
    "guidance_type": "cfg",
    "guidance_rate": 7.5,
    "schedule_type": "discrete",
    "schedule_rho": 1.0,
    "afs": False,
    "scale_dir": 0.01,
    "scale_time": 0.2,
    "max_order": 2,
    "predict_x0": False,
    "lower_order_final": True,
}
SOLVERS = ("amed", "euler", "ipndm", "dpm_2", "dpm_pp", "heun")


@contextlib.contextmanager
def foreign_modules():
    """`torch_utils.persistence`, `dnnlib.util` and `solvers_amed` by name, which refuse to do anything."""

    def function(module, name):
        def refuse(*_, **__):
            raise AssertionError(f"{module.__name__}.{name} was called")

        refuse.__module__, refuse.__qualname__, refuse.__name__ = module.__name__, name, name
        setattr(module, name, refuse)

    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util", "solvers_amed")
    made = {name: types.ModuleType(name) for name in names}
    function(made["torch_utils.persistence"], "_reconstruct_persistent_obj")
    for solver in SOLVERS:
        function(made["solvers_amed"], f"{solver}_sampler")
    made["dnnlib.util"].EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    assert not made.keys() & sys.modules.keys()
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


class Persistent:
    """Pickled as persistence does it: the name of its class, a source text and its attributes."""

    source = "raise SystemExit('the source text in the file was run')"

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


class Linear(Persistent, nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.1)


class PositionalEmbedding(Persistent, nn.Module):
    def __init__(self):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = 8, 10000, True


class AMED_predictor(Persistent, nn.Module):
    def __init__(self, **settings):
        super().__init__()
        for name, value in settings.items():
            setattr(self, name, value)
        self.map_noise = PositionalEmbedding()
        self.map_layer0 = Linear(8, 8)
        self.enc_layer0, self.enc_layer1 = Linear(64, 128), Linear(128, 4)
        self.fc_r = Linear(20, 1)
        if settings.get("scale_dir", True):
            self.fc_scale_dir = Linear(20, 1)
        if settings["scale_time"]:
            self.fc_scale_time = Linear(20, 1)
        self.sigmoid = nn.Sigmoid()
        self._init_args, self._init_kwargs = (), dict(settings)


class AMED_loss(Persistent):
    def __init__(self, sigma_min, sigma_max):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.t_steps = torch.tensor([14.6146, 2.9, 0.9, 0.0292], dtype=torch.float64)
        self.buffer_model = [torch.randn(2, 4, 8, 8).half()[:, ::2]]
        self.buffer_t, self.tea_slice = [self.t_steps[1]], [3, 6, 9]


def make_model(**settings) -> AMED_predictor:
    return AMED_predictor(**{**SETTINGS, **settings}).eval().requires_grad_(False)


def predictor_bytes(model, sigma_min=0.0291675, sigma_max=14.61464, protocol=4) -> bytes:
    """What the authors' program would have written; the noise levels are Stable Diffusion's."""
    loss = AMED_loss(sigma_min, sigma_max)
    with foreign_modules():
        loss.solver_stu = loss.solver_tea = sys.modules["solvers_amed"].dpm_pp_sampler
        loss.options = sys.modules["dnnlib.util"].EasyDict(sigma_min=0.1)
        return pickle.dumps({"model": model, "loss_fn": loss}, protocol)


def write(file, model, **options):
    file.write_bytes(predictor_bytes(model, **options))
    return file
