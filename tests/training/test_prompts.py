# SPDX-License-Identifier: Apache-2.0
"""Prompts: of every kind of file and data set, no more rows than needed, no images; and what is refused."""

import argparse
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from training import make_teacher_set
from training.prompts import PROMPT_ARGUMENTS, add_prompt_arguments, prompts_of, read_dataset, read_prompts


CAPTIONS = ["a red fox", "blue", "", "a long road"]


def arguments(*given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_prompt_arguments(parser)
    return parser.parse_args([str(argument) for argument in given])


def write_parquet(path, columns, features) -> None:
    """As the Hub's files are: `datasets`' features stand in the schema, so that an image column is known as one."""
    table = pyarrow.table(columns).cast(features.arrow_schema)
    pyarrow.parquet.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), path)


@pytest.fixture
def folder(tmp_path):
    """A folder with a data set of each kind, of two splits."""
    for kind in ("json", "csv", "parquet"):
        (tmp_path / kind).mkdir()
    for split, captions in (("train", CAPTIONS), ("validation", ["unseen"])):
        lines = [json.dumps({"id": i, "caption": caption}) + "\n" for i, caption in enumerate(captions)]
        (tmp_path / "json" / f"{split}.jsonl").write_text("".join(lines))
        lines = [f"{i},{caption}\n" for i, caption in enumerate(captions)]
        (tmp_path / "csv" / f"{split}.csv").write_text("id,caption\n" + "".join(lines))
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "sentences": datasets.List(datasets.Value("string")),
                "id": datasets.Value("int64"),
            }
        )
        columns = {
            "image": [{"bytes": b"no image at all", "path": None}] * len(captions),
            "sentences": [[caption, f"again {caption}"] if caption else [] for caption in captions],
            "id": list(range(len(captions))),
        }
        write_parquet(tmp_path / "parquet" / f"{split}.parquet", columns, features)
    return tmp_path


@pytest.mark.parametrize("kind, column", [("json", None), ("csv", None), ("parquet", "sentences")])
def test_reads_data_sets_of_every_kind(folder, kind, column):
    assert read_dataset(str(folder / kind), caption_column=column) == ["a red fox", "blue", "a long road"]
    assert read_dataset(str(folder / kind), caption_column=column, max_prompts=2) == ["a red fox", "blue"]
    assert read_dataset(str(folder / kind), caption_column=column, split="validation") == ["unseen"]


def test_reading_ends_with_the_last_prompt_that_is_needed(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    assert read_dataset(str(tmp_path), max_prompts=2) == ["one", "two"]


def test_a_configuration_is_chosen_by_its_name(tmp_path):
    for name in ("short", "long"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: short\n  data_files: short.jsonl\n- config_name: long\n  data_files: long.jsonl\n---\n"
    )
    assert read_dataset(str(tmp_path), config_name="long") == ["long"]
    with pytest.raises(ValueError, match="--dataset_config_name"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "files, options, message",
    [
        (None, {}, "neither an existing folder nor a Hub id"),
        ({}, {}, "cannot read the split 'train' of the data set"),
        (
            {"train.jsonl": '{"text": "one"}\n'},
            {"split": "test"},
            "cannot read the split 'test'.*check .*--dataset_split",
        ),
        ({"train.jsonl": '{"text": "one"}\n'}, {"config_name": "b"}, "check .*--dataset_config_name"),
        ({"train.jsonl": "{"}, {}, "cannot read the split"),
        ({"train.parquet": "nonsense"}, {}, "cannot read the split"),
        ({"train.csv": "text\n"}, {}, "holds no (row|prompt)"),
        ({"train.jsonl": '{"text": ""}\n'}, {}, "holds no prompt; name another --caption_column"),
        (
            {"train.jsonl": '{"a": "x", "b": "y"}\n'},
            {},
            r"has the columns \['a', 'b'\]; --caption_column must name one",
        ),
        ({"train.jsonl": '{"a": "x"}\n'}, {"caption_column": "b"}, "the --caption_column 'b' must name one of them"),
        ({"train.jsonl": '{"text": 3}\n'}, {}, "holds int, not text"),
    ],
)
def test_refuses_data_sets_without_prompts(tmp_path, files, options, message):
    place = tmp_path / "data"
    if files is not None:
        place.mkdir()
        for name, content in files.items():
            (place / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_dataset(str(place), **options)


@pytest.mark.parametrize(
    "content, column, expected",
    [
        ('"one"\n\n"two"\n', None, ["one", "two"]),
        ('{"id": 1, "caption": "one"}\n{"id": 2, "caption": ["two", "zwei"]}\n{"id": 3}\n', None, ["one", "two"]),
        ('{"a": "x", "b": "y"}\n', "b", ["y"]),
    ],
)
def test_reads_json_lines(tmp_path, content, column, expected):
    (tmp_path / "a.jsonl").write_text(content)
    assert read_prompts(tmp_path / "a.jsonl", caption_column=column) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no prompt"),
        ("{\n", "not valid JSON"),
        ('"one"\n{"text": "two"}\n', "neither all strings nor all objects"),
        ('{"a": "x", "b": "y"}\n', "--caption_column must name one"),
        ('{"text": 3}\n', "holds int, not text"),
    ],
)
def test_refuses_json_lines_without_prompts(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "a.jsonl")


def test_arguments_name_a_file_or_a_data_set(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    assert all(getattr(arguments(), name) is None for name in PROMPT_ARGUMENTS)
    assert prompts_of(arguments(), 2) is None
    # What is not needed of a file is kept: it says what the file was.
    assert prompts_of(arguments("--prompts_file", file), 2) == ["one", "two", "three"]
    assert prompts_of(arguments("--prompts_file", file, "--max_prompts", 1), 2) == ["one"]
    data = ("--dataset_name", folder / "json")
    assert prompts_of(arguments(*data), 2) == ["a red fox", "blue"]
    assert prompts_of(arguments(*data), None) == ["a red fox", "blue", "a long road"]
    assert prompts_of(arguments(*data, "--max_prompts", 1), 2) == ["a red fox"]
    assert prompts_of(arguments(*data, "--dataset_split", "validation"), 2) == ["unseen"]
    with pytest.raises(ValueError, match="both given; drop one"):
        prompts_of(arguments(*data, "--prompts_file", file), 2)
    # A later empty name takes away what a recipe gave.
    assert prompts_of(arguments(*data, "--dataset_name=", "--prompts_file", file), 2) == ["one", "two", "three"]
    with pytest.raises(ValueError, match="--max_prompts must be at least 1"):
        prompts_of(arguments(*data, "--max_prompts", 0), 2)


def test_make_teacher_set_reads_as_many_prompts_as_samples(folder, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model_index.json").write_text("{}")
    given = ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out"), "--num_samples", "2"]
    args = make_teacher_set.parser().parse_args([*given, "--dataset_name", str(folder / "csv")])
    assert make_teacher_set.check(args) == ["a red fox", "blue"]
