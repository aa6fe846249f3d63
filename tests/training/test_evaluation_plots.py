# SPDX-License-Identifier: Apache-2.0
"""Figures of evaluations: that what is drawn are the numbers of the results."""

import math

import numpy
import pytest
from matplotlib.colors import to_rgba

from ld3_diffusers.noise_path import RectifiedFlow, VPLinear
from tests.training.evaluations import METRICS, by_mean_squared_error, made_up_results, row, save_images, scored
from training.evaluation_plots import (
    evenly,
    half_log_snr,
    image_folder,
    local_errors_figure,
    quality_figure,
    samples_figure,
    schedules_figure,
    styles,
)
from training.evaluation_table import shown


@pytest.fixture
def results():
    return made_up_results()


@pytest.fixture
def by_mse():
    return by_mean_squared_error(made_up_results())


def drawn(axes):
    return {line.get_label(): line for line in axes.lines}


def test_quality_shows_each_value_at_the_evaluations_made(by_mse):
    figure = quality_figure(by_mse)
    mse, psnr = figure.axes
    lines = drawn(mse)
    assert lines["UniPC"].get_xydata() == pytest.approx(numpy.array([[4, 16.09], [5, 5.2]]))
    assert lines["Heun"].get_xydata() == pytest.approx(numpy.array([[5, 12.3]]))  # both counts make five
    assert len(lines["broken"].get_xydata()) == 0 and len(lines["never"].get_xydata()) == 0
    assert (mse.get_yscale(), psnr.get_yscale()) == ("log", "linear")
    assert "lower is better" in mse.get_title() and "higher is better" in psnr.get_title()
    band, ends = mse.collections  # the subject's interval, which PSNR has not
    assert band.get_datalim(mse.transData).get_points() == pytest.approx(numpy.array([[4, 5.5], [5, 11.31]]))
    assert numpy.array(ends.get_segments()) == pytest.approx(
        numpy.array([[[4, 9.51], [4, 11.31]], [[5, 5.5], [5, 7.2]]])
    )
    assert not psnr.collections
    assert lines["LD3"].get_linewidth() > 2 * lines["UniPC"].get_linewidth()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["LD3", "UniPC", "Heun", "broken"]


def test_the_teachers_own_value_is_a_line(by_mse):
    by_mse["facts"]["teacher_values"] = {"mse": 0.0042, "psnr": None}
    figure = quality_figure(by_mse)
    mse, psnr = figure.axes
    assert list(drawn(mse)["teacher"].get_ydata()) == [4.2, 4.2] and "teacher" not in drawn(psnr)
    assert mse.get_ylim()[0] < 4.2 and figure.legends[0].get_texts()[-1].get_text() == "teacher"


def test_a_metric_without_a_finite_value_has_an_empty_panel(by_mse):
    by_mse["rows"] = [row("LD3", 4, 0.01, None), row("A", 4, 0.02, None)]
    mse, psnr = quality_figure(by_mse).axes
    assert "nothing finite" in psnr.get_title() and "nothing finite" not in mse.get_title()


def test_without_numbers_of_evaluations_there_is_no_quality_to_draw(by_mse):
    by_mse["rows"] = [row("LD3", None, 0.01, 20.0)]
    assert quality_figure({**by_mse, "absent": []}) is None


def test_quality_leaves_out_what_was_not_measured(by_mse):
    del by_mse["rows"][0]["values"]["psnr"]
    assert drawn(quality_figure(by_mse).axes[1])["LD3"].get_xydata().tolist() == [[5, 23.0]]


def test_quality_cuts_off_what_would_flatten_the_rest(by_mse):
    by_mse["rows"].append(row("LMS", 4, 1e6, -300.0))
    mse, psnr = quality_figure(by_mse).axes
    assert mse.get_ylim()[1] < 30 and "lower is better, 1 above the scale" in mse.get_title()
    assert psnr.get_ylim()[0] > 0 and "higher is better, 1 below the scale" in psnr.get_title()
    assert drawn(mse)["LMS"].get_ydata()[0] == 1e9


def test_distances_that_may_be_negative_have_a_linear_axis(by_mse):
    by_mse["rows"][0]["values"]["mse"] = scored(-0.0001)
    assert quality_figure(by_mse).axes[0].get_yscale() == "linear"


def test_colour_and_marker_tell_forty_contenders_apart():
    schedule = {"levels": [1.0, 0.0], "told": [1.0]}
    rows = [row(f"learned {k}", 4, 1.0, 1.0, schedule=schedule) for k in range(20)]
    rows += [row(f"stock {k}", 4, 1.0, 1.0) for k in range(20)]
    results = {"metrics": METRICS, "subject": "learned 0", "rows": rows, "absent": []}
    found = styles(results, shown(results))
    assert len({(to_rgba(style["color"]), style["marker"]) for style in found.values()}) == 40
    for name, style in found.items():
        red, green, blue, _ = to_rgba(style["color"])
        assert (red == green == blue) is name.startswith("stock")


def test_half_log_snr_is_the_paths():
    for path, times in ((VPLinear(), [1.0, 0.5, 0.1]), (RectifiedFlow(), [0.9, 0.5, 0.1])):
        levels = path.levels(times)
        found = [half_log_snr(z, path.kind == "flow") for z in levels.z.tolist()]
        assert found == pytest.approx(levels.lam.tolist(), rel=1e-12)
    assert half_log_snr(1.0, True) == -math.inf and half_log_snr(0.0, True) == half_log_snr(0.0, False) == math.inf
    assert half_log_snr(1.0, False) == 0.0


def test_schedules_show_levels_and_the_told_times_that_differ(results):
    results["rows"][0]["schedule"] = {
        "levels": [math.e**2, 1.0, math.e**-1, 0.0],
        "told": [math.e**2, math.e**0.5, math.e**-1],
    }
    figure = schedules_figure(results)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LD3"]  # stock has no schedule
    marks = {line.get_marker(): line for line in axes.lines}
    assert marks["|"].get_xdata() == pytest.approx([-2.0, 0.0, 1.0])
    assert marks["x"].get_xdata() == pytest.approx([-0.5])
    assert marks[">"].get_xdata()[0] > 1.0 and "<" not in marks
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "level",
        "told to the network",
        "clean data",
    ]


def test_schedules_of_flow_models_begin_at_the_edge(results):
    results["facts"]["path"] = "flow"
    results["rows"][0]["schedule"] = {"levels": [1.0, 0.5, 0.25], "told": [1.0, 0.5]}
    results["rows"][1]["schedule"] = {"levels": [1.0, 0.9, 0.0], "told": [0.95, 0.9]}
    four, five = schedules_figure(results).axes
    marks = {line.get_marker(): line for line in four.lines}
    assert marks["|"].get_xdata() == pytest.approx([0.0, math.log(3)])
    left = four.get_xlim()[0]
    assert left < marks["<"].get_xdata()[0] < -math.log(9) and "x" not in marks and ">" not in marks
    marks = {line.get_marker(): line for line in five.lines}
    assert marks["x"].get_xdata() == pytest.approx([-math.log(19)])  # told 0.95 while it stands at 1
    assert four.get_title() == "4 NFE" and five.get_title() == "5 NFE"
    assert [label.get_text() for label in four.get_yticklabels()] == ["LD3"]


def test_schedules_need_to_know_the_path(results):
    assert schedules_figure(results) is None
    results["rows"][0]["schedule"] = {"levels": [1.0, 0.0], "told": [1.0]}
    del results["facts"]["path"]
    with pytest.raises(ValueError, match="name no noise path"):
        schedules_figure(results)


def test_four_panels_are_chosen_evenly():
    assert evenly([3, 4, 5]) == [3, 4, 5]
    assert evenly([3, 4, 5, 6, 7, 8, 9, 10]) == [3, 5, 8, 10]
    assert evenly(list(range(10))) == [0, 3, 6, 9]


def test_local_errors_show_each_step(results):
    assert local_errors_figure(results) is None
    results["rows"][0]["local_errors"] = [1e-3, None, 1e-5, 0.0]
    results["rows"][1]["local_errors"] = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
    four, five = local_errors_figure(results).axes
    assert drawn(four)["LD3"].get_xydata().tolist() == [[1, 1e-3], [3, 1e-5]]
    assert drawn(five)["LD3"].get_ydata().tolist() == [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
    assert four.get_yscale() == "log"


# ---------------------------------------------------------------------- samples


def test_samples_stand_by_contender_and_seed(tmp_path, results):
    assert samples_figure(tmp_path, results) is None
    save_images(tmp_path, "teacher", None, 10, (7, 2, 30))
    save_images(tmp_path, "LD3", 5, 20, (2, 7, 30))
    save_images(tmp_path, "Heun", 4, 30, (2,))
    save_images(tmp_path, "Heun", 5, 40, (2, 7))
    results["facts"]["shown"] = [{"seed": 7, "prompt": "an ankle boot"}, {"seed": 2, "prompt": None}]
    (axes,) = samples_figure(tmp_path, results).axes  # of 4 and 5 the second
    assert [label.get_text() for label in axes.get_xticklabels()] == ["seed 7\nan ankle boot", "seed 2", "seed 30"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["teacher", "LD3\n5 evaluations", "Heun\n5 evaluations"]
    placed = {}
    for image in axes.images:
        left, _, bottom, _ = image.get_extent()
        placed[int(bottom), int(left)] = tuple(int(v) for v in image.get_array()[0, 0])
    assert placed == {
        **{(0, k): (10, 10, seed) for k, seed in enumerate((7, 2, 30))},
        **{(1, k): (20, 20, seed) for k, seed in enumerate((7, 2, 30))},
        **{(2, k): (40, 40, seed) for k, seed in enumerate((7, 2))},
    }
    (axes,) = samples_figure(tmp_path, results, nfe=4).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["teacher", "Heun\n5 evaluations"]  # it was asked for 4
    with pytest.raises(ValueError, match="6 NFE was not evaluated; choose one of 4, 5"):
        samples_figure(tmp_path, results, nfe=6)


def test_image_folders_stay_inside(tmp_path):
    assert image_folder("LD3 (unipc)", 5) == "images/LD3 (unipc)-5"
    assert "/" not in image_folder("../user/schedules", 5).removeprefix("images/")
