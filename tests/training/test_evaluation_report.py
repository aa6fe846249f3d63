# SPDX-License-Identifier: Apache-2.0
"""Reports of evaluations: every cell against a hand-computed one, and that all files follow from the JSON."""

import copy
import json
import math

import pytest
import torch
from PIL import Image

from tests.training.evaluations import METRICS, by_mean_squared_error, made_up_results, row, save_images, scored
from training import evaluation_report
from training.comparison import Contender, best_by_name
from training.evaluation_report import read_results, write_report
from training.evaluation_table import cells, columns, decimals, markdown, ranked, short_table, shown, unit


@pytest.fixture
def results():
    return made_up_results()


@pytest.fixture
def by_mse():
    return by_mean_squared_error(made_up_results())


def lines_after(text, title):
    """Cells of the table that follows a line of the report."""
    lines = text.split(title, 1)[1].splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *found = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows[name] = found
    return rows


# ---------------------------------------------------------------------- tables


def test_cells_are_the_hand_computed_ones(by_mse):
    table = lines_after(markdown(by_mse), "## MSE x 1e-3, lower is better")
    assert table == {
        "LD3": ["**10.24**", "6.100"],
        "UniPC": ["16.09 ▲", "**5.200** ▼"],
        "Heun": ["12.30 ≈ †5", "12.300 ▲"],
        "broken": ["not finite", "-"],
        "never": ["-", "-"],
    }
    differences = lines_after(markdown(by_mse), "of LD3 its own value.")
    assert differences == {
        "LD3": ["10.24 [9.51, 11.31]", "6.100 [5.500, 7.200]"],
        "UniPC": ["+5.85 [+3.81, +10.37]", "-0.900 [-1.400, -0.300]"],
        "Heun": ["+2.06 [-0.10, +4.10]", "+6.200 [+5.000, +8.000]"],
        "broken": ["not finite", "-"],
        "never": ["-", "-"],
    }


def test_marks_follow_the_number_and_the_key_says_what_is_good(by_mse):
    text = markdown(by_mse)
    mse, psnr = text.split("## PSNR, higher is better")
    assert "▲ surely larger than LD3's (worse), ▼ surely smaller (better)" in mse
    assert "▲ surely larger than LD3's (better), ▼ surely smaller (worse)" in psnr
    # the rows shown are those that MSE chose: 23.10 though the other setting has a PSNR of 24
    table = lines_after(text, "## PSNR, higher is better")
    assert table["UniPC"] == ["18.50 ▼", "**23.10** ≈"] and table["LD3"] == ["**20.00**", "23.00"]
    assert table["Heun"] == ["19.50 †5", "19.50"]  # no interval, no mark


def test_settings_are_chosen_by_the_first_metric_with_samples(results, by_mse):
    assert shown(by_mse)["UniPC"][5]["setting"] == "linspace"
    assert shown(results)["UniPC"][5]["setting"] == "leading"  # PSNR 24 over 23.1
    set_first = copy.deepcopy(by_mse)
    set_first["metrics"] = {"fid": {**METRICS["mse"], "per_sample": False}, **METRICS}
    assert shown(set_first)["UniPC"][5]["setting"] == "leading"  # PSNR is the first of those with samples
    table = lines_after(markdown(by_mse), "## Settings shown")
    assert table == {"UniPC": ["leading", "linspace"]}
    assert "the best MSE at each NFE is shown, chosen on these very samples. This favours" in markdown(by_mse)


def test_the_choice_is_that_of_comparisons():
    draws = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    contenders = [
        Contender(f"c{k % 4}", None, 5, f"s{k}", 5, torch.tensor([draw, math.nan if k == 5 else draw]))
        for k, draw in enumerate(draws)
    ]
    rows = [row(c.name, 5, c.mean, 1.0, c.setting) for c in contenders]
    results = {"metrics": {"mse": METRICS["mse"]}, "subject": "c0", "rows": rows, "absent": []}
    found = {name: of_name[5]["setting"] for name, of_name in shown(results).items()}
    assert found == {c.name: c.setting for c in best_by_name(contenders)}
    others = [c.name for c in best_by_name(contenders) if c.name != "c0"]
    assert ranked(results, shown(results), "mse") == ["c0", *others]


def test_rows_follow_the_subject_by_mean_rank(by_mse):
    rows = shown(by_mse)
    # ranks at 4 and 5: LD3 1, 2; UniPC 3, 1; Heun 2, 3; broken 4
    assert ranked(by_mse, rows, "mse") == ["LD3", "UniPC", "Heun", "broken", "never"]
    assert ranked({**by_mse, "subject": "Heun"}, rows, "mse") == ["Heun", "LD3", "UniPC", "broken", "never"]
    assert columns(rows) == [4, 5]


def test_what_is_absent_or_doubtful_is_said(results):
    del results["rows"][-2]  # Heun at 5: nowhere said why
    text = markdown(results)
    absent, warnings = text.split("## Not taking part (-)")[1].split("## Warnings")
    assert [line for line in absent.splitlines() if line] == [
        "- broken at 5 NFE: no schedule for 5",
        "- never at 4, 5 NFE: no schedule",
        "- Heun at 5 NFE: not measured",
    ]
    assert warnings.split("- ")[1].strip() == "64 samples are few"
    assert "†n: makes n evaluations" in text
    assert "teacher: fashion; samples: 64; path: vp_discrete." in text and "nested" not in text


def test_footnotes_stand_only_where_something_needs_them(results):
    results |= {"rows": [row("LD3", 4, 0.01, 20.0), row("A", 4, 0.02, 19.0)], "absent": [], "warnings": []}
    text = markdown(results)
    for footnote in ("†", "▲", "Difference", "Settings", "Not taking part", "Warnings", "Standard deviation"):
        assert footnote not in text
    assert markdown({**results, "rows": []}).endswith("Nothing is measured.\n")


def test_the_teachers_own_samples_and_the_command_are_told(by_mse):
    by_mse["facts"] |= {"teacher_values": {"mse": 0.0042, "psnr": None}, "command": "python -m training.evaluate"}
    text = markdown(by_mse)
    assert text.count("The teacher's own samples: 4.200.") == text.count("The teacher's own samples") == 1
    assert "```bash\npython -m training.evaluate\n```" in text and "command: " not in text


def test_spread_over_blocks(by_mse):
    # the standard deviation of 10, 11 and 12 is 1
    assert "Standard deviation of LD3's value over 3 blocks of seeds: 1.0 at 4 NFE." in markdown(by_mse)


@pytest.mark.parametrize("value", [None, math.inf, math.nan])
def test_what_is_not_finite_is_last_and_never_best(by_mse, value):
    by_mse["rows"] = [row("LD3", 4, value, value), row("A", 4, 0.02, 19.0)]
    found = cells(by_mse, shown(by_mse), "mse")
    assert found["LD3", 4].value == found["LD3", 4].difference == "not finite" and not found["LD3", 4].best
    assert found["A", 4].best and found["A", 4].mark == ""
    assert ranked({**by_mse, "subject": "A"}, shown(by_mse), "mse")[:2] == ["A", "LD3"]


def test_a_metric_that_a_row_lacks_is_no_number(by_mse):
    del by_mse["rows"][0]["values"]["psnr"]
    found = cells(by_mse, shown(by_mse), "psnr")
    assert found["LD3", 4].value == "-" and found["Heun", 4].best


def test_numbers_have_the_digits_that_tell_the_best_apart():
    assert decimals([16.09, 2.345, 100.0], 4) == 3
    assert decimals([160.0, 2000.0], 4) == 1
    assert decimals([1234.5], 4) == 0
    assert decimals([1e-9, 5.0, 6.0], 4) == 6  # nothing beside the others: a thousandth of their median
    assert decimals([0.0, math.inf], 4) == 2
    assert unit(METRICS["mse"]) == "MSE x 1e-3" and unit(METRICS["psnr"]) == "PSNR"
    assert unit({"label": "A", "scale": 100.0}) == "A x 1e-2" and unit({"label": "A", "scale": 3.0}) == "A x 1/3"


def test_names_cannot_break_the_table(results):
    results["rows"].append(row("a|b\n*c*", 4, 0.02, 19.0))
    assert "| a\\|b \\*c\\* | 19.00 | - |" in markdown(results)


def test_image_files_have_one_column(by_mse):
    by_mse |= {"absent": [], "rows": [row("LD3", None, 0.01, 20.0), row("A", None, 0.02, 19.0)]}
    for each in by_mse["rows"]:
        each["evaluations"] = None
    text = markdown(by_mse)
    assert "| contender | images |" in text and "| LD3 | **10.00** |" in text and "†" not in text
    assert "images" in short_table(by_mse)


def test_short_table_fits_the_terminal(by_mse):
    lines = short_table(by_mse).splitlines()
    assert lines[0].startswith("MSE x 1e-3, lower is better; * best")
    table = {
        line.split()[0]: line.split()[1:] for line in lines if line.split()[0] in ("LD3", "UniPC", "Heun", "broken")
    }
    assert table == {
        "LD3": ["*10.2", "6.10"],
        "UniPC": ["16.1▲", "*5.20▼"],
        "Heun": ["12.3≈†5", "12.30▲"],
        "broken": ["inf", "-"],
    }
    by_mse["rows"] = [
        row(f"a scheduler with a long name {k}", nfe, scored(1e4 * k, None, [1.0, 0.5, 2.0]), 1.0)
        for nfe in range(1, 30)
        for k in range(1, 23)
    ]
    text = short_table({**by_mse, "subject": "a scheduler with a long name 1"})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and "not shown: " in text and "29 NFE" in text
    assert sum("a scheduler with a long…" in line for line in lines) == 22
    assert short_table({**by_mse, "rows": []}) == "nothing is measured yet"


# ---------------------------------------------------------------------- files


PICTURES = {"quality.png", "schedules.png", "local_errors.png", "samples.png"}


def test_the_report_is_drawn_again_from_the_json_alone(tmp_path, by_mse, capsys):
    by_mse["rows"][0] |= {"schedule": {"levels": [2.0, 1.0, 0.0], "told": [2.0, 1.1]}, "local_errors": [1e-3, 2e-3]}
    save_images(tmp_path, "teacher", None, 10, (0, 1))
    text = write_report(tmp_path, by_mse)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(files) == {"table.md"} | PICTURES  # no partial files
    assert files["table.md"].decode() == text
    (tmp_path / "results.json").write_text(json.dumps(by_mse))
    for name in files:
        (tmp_path / name).unlink()
    evaluation_report.main([str(tmp_path)])
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert capsys.readouterr().out == short_table(by_mse) + "\n"


def test_pictures_of_what_is_gone_go_too(tmp_path, by_mse):
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"old")
    write_report(tmp_path, by_mse)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "quality.png"}
    with Image.open(tmp_path / "quality.png") as image:
        assert image.format == "PNG" and image.width > 500


def test_a_report_that_fails_leaves_the_old_one(tmp_path, by_mse):
    write_report(tmp_path, by_mse)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_images(tmp_path, "teacher", None, 10, (0,))
    by_mse["rows"][0]["values"]["mse"]["value"] = 0.5
    with pytest.raises(ValueError, match="was not evaluated"):
        write_report(tmp_path, by_mse, nfe=9)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_folder_without_results_is_a_usage_error(tmp_path, capsys):
    def complaint():
        with pytest.raises(SystemExit) as stopped:
            evaluation_report.main([str(tmp_path)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "name the --output_dir of an evaluation" in complaint()
    (tmp_path / "results.json").write_text("{")
    assert "cannot read" in complaint()
    (tmp_path / "results.json").write_text('{"facts": {}, "rows": []}')
    assert "it has no metrics, subject, warnings, absent" in complaint()
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="not of an evaluation"):
        read_results(tmp_path)
