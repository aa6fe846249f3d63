# SPDX-License-Identifier: Apache-2.0
"""Pickles read as data: plain ones and tensors come back, and nothing in a hostile one is executed."""

import builtins
import copyreg
import os
import pickle
import struct
import sys
import time
import tracemalloc
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from ld3_diffusers import LD3Scheduler
from ld3_diffusers.amed_predictor_file import read_predictor_file
from ld3_diffusers.importing import import_amed
from ld3_diffusers.inert_pickle import PERSISTENCE, Instance, Refused, StoredTensor, load_pickle, quoted

from .amed_predictor_files import make_model, predictor_bytes, write


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def config():
    return LD3Scheduler(**SD).config


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "network-snapshot-000005.pkl", make_model())


# ---------------------------------------------------------------------- plain data and tensors


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back(tmp_path, protocol):
    shared = ["x", 1.5]
    data = {
        "integers": [0, 255, 65536, -1, 2**100, -(2**100)],
        "rest": (
            None,
            True,
            False,
            1e300,
            "ä" * 300,
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            [],
            {},
            {"a": {"b": []}},
        ),
        "set": {"a", "b"},
        "twice": [shared, shared],
        "ordered": OrderedDict(z=1, a=2),
        "many": list(range(3000)),
    }
    if protocol > 2:
        data["bytes"] = [b"", b"abc", b"abc" * 1000]
    (tmp_path / "a").write_bytes(pickle.dumps(data, protocol))
    found = load_pickle(tmp_path / "a", PERSISTENCE, wanted="this", max_bytes=2**20, max_opcodes=10_000)
    assert found == data and found["twice"][0] is found["twice"][1]
    assert list(found["ordered"]) == ["z", "a"]


TENSORS = {
    "whole": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).T,
    "part": lambda: torch.randn(6, 8)[1:5:2, 2::3],
    "scalar": lambda: torch.tensor(2.5, dtype=torch.float64),
    "empty": lambda: torch.empty(0, 3),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "bool": lambda: torch.tensor([True, False]),
    "int64": lambda: torch.arange(5),
    "parameter": lambda: nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back(tmp_path, name):
    tensor = TENSORS[name]()
    (tmp_path / "a").write_bytes(pickle.dumps([tensor]))
    (found,) = load_pickle(tmp_path / "a", PERSISTENCE, wanted="this", max_bytes=2**20, max_opcodes=100)
    assert found.tensor().dtype == tensor.dtype and torch.equal(found.tensor(), tensor.detach())


def storage(values: torch.Tensor) -> bytes:
    return values._typed_storage().__reduce__()[1][0]


@pytest.mark.parametrize(
    "offset, size, stride, message",
    [
        (0, (2**30,), (0,), "larger than its storage"),
        (0, (2**30, 2**30), (0, 0), "larger than its storage"),
        (0, (11,), (1,), "larger than its storage"),
        (1, (10,), (1,), "larger than its storage"),
        (0, (2,), (10,), "larger than its storage"),
        (10, (1,), (1,), "larger than its storage"),
        (-1, (2,), (1,), "no possible shape"),
        (0, (2,), (-1,), "no possible shape"),
        (0, (2, 2), (1,), "no possible shape"),
        (0, (1,) * 9, (1,) * 9, "no possible shape"),
        (0, (2.0,), (1,), "no possible shape"),
        (0, ("2",), (1,), "no possible shape"),
        (2**70, (1,), (1,), "no possible shape"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(offset, size, stride, message):
    with pytest.raises(Refused, match=message):
        StoredTensor(storage(torch.randn(10)), offset, size, stride).tensor()


def test_damaged_storages():
    whole = storage(torch.arange(10.0))
    assert torch.equal(StoredTensor(whole, 0, (10,), (1,)).tensor(), torch.arange(10.0))
    for cut in range(len(whole)):
        with pytest.raises(Refused):
            StoredTensor(whole[:cut], 0, (1,), (1,)).tensor()
    at = len(whole) - 48  # where the number of values stands
    assert whole[at : at + 8] == struct.pack("<q", 10)
    for numel in (2**62, -1, 9, 11):
        with pytest.raises(Refused, match="storage is damaged"):
            StoredTensor(whole[:at] + struct.pack("<q", numel) + whole[at + 8 :], 0, (1,), (1,)).tensor()


# ---------------------------------------------------------------------- hostile files


def nested(levels: int) -> list:
    """A list of the same list twice, and so on: a few bytes of a pickle, and 2**levels values to print."""
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


def test_quotations_are_short_and_quick():
    started = time.monotonic()
    for value in (nested(100), {"a": nested(100)}, (nested(100),) * 3, "a" * 10**7, Instance("A", {"a": nested(100)})):
        assert len(quoted(value)) < 150
    assert time.monotonic() - started < 1
    plain = [None, True, 0.5, float("inf"), -3, "a'b", (1, 2), [1, [2]], {"a": 1}, {"a"}]
    assert [quoted(value) for value in plain] == [repr(value) for value in plain]
    assert quoted(torch.zeros(2)) == "a Tensor" and quoted(b"ab") == "a bytes"


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def doubled(levels: int) -> bytes:
    """t = (t, t), so often that to hash it takes 2**levels steps."""
    return b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(levels))


SYSTEM = b"cos\nsystem\n"
DICT = b"ccollections\nOrderedDict\n"
HOSTILE = {  # of the path of a file that must not appear -> content, refusal
    "os.system": (lambda path: pickle.dumps(Calls(os.system, f"touch {path}")), r"names 'posix.system'"),
    "eval": (lambda path: pickle.dumps(Calls(eval, f"open({path!r}, 'w')")), "names 'builtins.eval'"),
    "exec": (lambda path: pickle.dumps(Calls(exec, f"open({path!r}, 'w')")), "names 'builtins.exec'"),
    "open": (lambda path: pickle.dumps(Calls(open, path, "w")), "names '_?io.open'"),
    "old form of a call": (lambda path: b"\x80\x02(" + b"X" + struct.pack("<I", len(path)) + path.encode() + b"ios\nmkdir\n.", "instruction INST"),
    "call of a class": (lambda path: b"\x80\x02(" + SYSTEM + text("x") + b"o.", "names 'os.system'"),
    "pickle in a pickle": (
        lambda path: pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, path)))),
        "names '_pickle.loads'",
    ),
    "chain of getattr": (
        lambda path: pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
        "names 'builtins.getattr'",
    ),
    "copyreg": (lambda path: pickle.dumps(Calls(copyreg._reconstructor, deque, object, None)), "names 'copyreg._recon"),
    "torch.load": (lambda path: pickle.dumps(Calls(torch.load, path)), "names 'torch.serialization.load'"),
    "a class that is not listed": (lambda path: pickle.dumps(deque([1])), "names 'collections.deque'"),
    "a name with dots": (lambda path: pickled(text("collections"), text("OrderedDict.fromkeys"), b"\x93"), "names 'coll"),
    "a name that is no text": (lambda path: pickled(b"K\x01", text("system"), b"\x93"), "int where only text"),
    "state of a listed class": (lambda path: pickled(DICT, b"}", text("a"), b"K\x01sb"), "sets the state of a Name"),
    "state of a dict": (lambda path: pickled(DICT, b")R}", text("a"), b"K\x01sb"), "sets the state of a dict"),
    "__setstate__": (
        lambda path: pickled(b"ctorch.nn.modules.activation\nSigmoid\n)\x81", text("a"), b"b"),
        "sets the state of a Instance",
    ),
    "slots": (
        lambda path: pickled(b"ctorch.nn.modules.activation\nSigmoid\n)\x81N}\x86b"),
        "sets the state of a Instance",
    ),
    "what may only be mentioned": (lambda path: pickled(b"csolvers_amed\named_sampler\n)R"), "calls solvers_amed.amed"),
    "call of a dict": (lambda path: pickled(b"})R"), "calls a dict"),
    "call without a tuple": (lambda path: pickled(DICT, b"]R"), "calls collections.OrderedDict"),
    "other arguments": (lambda path: pickled(DICT, b"N\x85R"), "arguments that it never has"),
    "text as a tensor's bytes": (
        lambda path: pickled(b"ctorch.storage\n_load_from_bytes\n", text("a"), b"\x85R"),
        "a str as if it were a bytes",
    ),
    "another persistence": (
        lambda path: pickled(b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R"),
        "another form than version 6",
    ),
    "persistent id": (lambda path: pickled(text("a"), b"Q"), "instruction BINPERSID"),
    "persistent id as text": (lambda path: b"\x80\x02Pa\n.", "instruction PERSID"),
    "registered extension": (lambda path: pickled(b"\x82\x01"), "instruction EXT1"),
    "buffers from elsewhere": (lambda path: b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "keywords": (lambda path: pickled(DICT, b")}\x92"), "instruction NEWOBJ_EX"),
    "nothing": (lambda path: b"", "is no pickle"),
    "text": (lambda path: b"not a pickle", "is no pickle"),
    "protocol 0": (lambda path: pickle.dumps({"model": 1}, 0), "is no pickle"),
    "zip archive": (lambda path: b"PK\x03\x04" + bytes(40), "is no pickle"),
    "unknown instruction": (lambda path: pickled(b"\xff"), "damaged or cut short"),
    "nothing on the stack": (lambda path: pickled(), "damaged or cut short"),
    "no mark": (lambda path: pickled(b"t"), "damaged or cut short"),
    "nothing in the memo": (lambda path: pickled(b"h\x07"), "damaged or cut short"),
    "key without value": (lambda path: pickled(b"}(", text("a"), b"u"), "damaged or cut short"),
    "long integer": (lambda path: pickled(b"\x8b", struct.pack("<i", 10**6), b"\x01" * 10**6), "integer of 7999993 bits"),
    "length of an integer": (lambda path: pickled(b"\x8b\xff\xff\xff\x7f"), "damaged or cut short"),
    "negative length": (lambda path: pickled(b"\x8b\xff\xff\xff\xff"), "damaged or cut short"),
    "length of bytes": (lambda path: pickled(b"\x8e", struct.pack("<Q", 2**62)), "damaged or cut short"),
    "length beyond all": (lambda path: pickled(b"\x8e", struct.pack("<Q", 2**64 - 1)), "damaged or cut short"),
    "length of text": (lambda path: pickled(b"\x8d", struct.pack("<Q", 2**40)), "damaged or cut short"),
    "no text": (lambda path: pickled(b"\x8c\x01\xff"), "damaged or cut short"),
    "place in the memo": (lambda path: pickled(b"]r\xff\xff\xff\xff"), "no AMED_predictor"),
    "flood of the memo": (lambda path: pickled(b"]", b"\x94" * 10**6), "more than 50000 instructions"),
    "deep lists": (lambda path: pickled(b"]" * 10_000, b"a" * 9_999), "no AMED_predictor"),
    "deep tuples": (lambda path: pickled(b")", b"\x85" * 20_000), "no AMED_predictor"),
    "deep key": (lambda path: pickled(b"})", b"\x85" * 20_000, b"K\x01s"), "a tuple where only text"),
    "key that takes forever": (lambda path: pickled(doubled(100), b"}h\x64K\x01s"), "a tuple where only text"),
    "element that takes forever": (lambda path: pickled(doubled(100), b"\x8f(h\x64\x90"), "a tuple where only text"),
    "keys of one hash": (lambda path: pickled(b"}K\x01K\x01s"), "a int where only text"),
    "items of a number": (lambda path: pickled(b"K\x01", text("a"), b"K\x01s"), "fills in a int"),
    "appended to a tuple": (lambda path: pickled(b")K\x01a"), "fills in a tuple"),
    "no predictor": (lambda path: pickle.dumps({"model": {"fc_r": 1}}), "no AMED_predictor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, config, name):
    make, message = HOSTILE[name]
    never, file = tmp_path / "never", tmp_path / "network-snapshot-000005.pkl"
    file.write_bytes(make(str(never)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as refusal:
            import_amed(file, config)
        assert tracemalloc.get_traced_memory()[1] < 2**25  # of files of at most 1 MB
    finally:
        tracemalloc.stop()
    assert not never.exists()
    sentence = str(refusal.value)
    assert (
        sentence.startswith(repr(str(file))) and "\n" not in sentence and "pass a network-snapshot-*.pkl" in sentence
    )


def test_every_hostile_pickle_that_calls_something_would_have_been_executed(tmp_path):
    """The corpus is alive: Python's own loader runs it."""
    for name in ("os.system", "eval", "exec", "open", "old form of a call", "pickle in a pickle"):
        never = tmp_path / "never"
        pickle.loads(HOSTILE[name][0](str(never)))
        assert never.exists(), name
        never.rmdir() if never.is_dir() else never.unlink()


def test_source_text_is_never_run(tmp_path, config, monkeypatch):
    never = tmp_path / "never"
    model = make_model()
    monkeypatch.setattr("tests.ld3_diffusers.amed_predictor_files.Persistent.source", f"open({str(never)!r}, 'w')")
    file = write(tmp_path / "a.pkl", model)
    assert str(never).encode() in file.read_bytes()

    def forbidden(*_, **__):
        raise AssertionError("code was run")

    for name in ("exec", "eval", "compile"):
        monkeypatch.setattr(builtins, name, forbidden)
    before = set(sys.modules)
    read_predictor_file(file)
    monkeypatch.undo()
    assert not never.exists() and not {"torch_utils", "dnnlib", "solvers_amed"} & (set(sys.modules) - before)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_the_place_of_weights(tmp_path, config, zipped):
    never, model = tmp_path / "never", make_model()
    torch.save(Calls(os.mkdir, str(never)), tmp_path / "bytes", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "bytes").read_bytes()

    class Weight:
        def __reduce__(self):
            storage = Calls(torch.storage._load_from_bytes, content)
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1, 20), (20, 1), False, OrderedDict())

    model.fc_r._parameters["weight"] = Weight()
    file = write(tmp_path / "a.pkl", model)
    with pytest.raises(ValueError, match="'posix.mkdir', which is refused" if not zipped else "damaged or cut short"):
        import_amed(file, config)
    assert not never.exists()


def test_every_cut_of_a_file(tmp_path):
    whole, file = predictor_bytes(make_model()), tmp_path / "a.pkl"
    for cut in range(0, len(whole), 173):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is no pickle" if not cut else "damaged or cut short"):
            read_predictor_file(file)


def test_changed_bytes_never_raise_anything_else(tmp_path):
    whole, file = predictor_bytes(make_model()), tmp_path / "a.pkl"
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        content = bytearray(whole)
        for place in torch.randint(len(whole), (4,), generator=generator):
            content[place] = int(torch.randint(256, (1,), generator=generator))
        file.write_bytes(content)
        try:
            read_predictor_file(file)
        except ValueError as refusal:
            assert str(refusal).startswith(repr(str(file)))


def test_files_that_are_too_large_or_missing(tmp_path, config, monkeypatch):
    monkeypatch.setattr("ld3_diffusers.amed_predictor_file.MAX_BYTES", 2**20)
    file = tmp_path / "a.pkl"
    with open(file, "wb") as stream:
        stream.truncate(2**20 + 1)
    with pytest.raises(ValueError, match="is larger than 1 MiB"):
        import_amed(file, config)
    with pytest.raises(ValueError, match="there is no file .*give the path of a network-snapshot"):
        import_amed(tmp_path / "b.pkl", config)
    with pytest.raises(ValueError, match="there is no file"):
        import_amed(tmp_path, config)
