"""Statistics against numpy's and scipy's own numbers, and the table beside what was expected."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from diffult_ray import statistics, summary
from diffult_ray.config import Expected
from diffult_ray.statistics import Correlation, correlation
from tests.test_report import STEPS, WEIGHT, cell_of, generators, make, page, trial

X = [7.76, 7.42, 6.82, 5.86, 9.1, 5.2]
Y = [43.8, 44.8, 46.0, 46.6, 41.0, 46.1]


# --- over seeds ---------------------------------------------------------------------------------


def test_an_estimate_is_numpys_mean_and_deviation_with_scipys_t_interval():
    values = [90.1, 92.4, 88.7, 91.0, 90.0]
    e = summary.estimate(values)
    assert (e.mean, e.deviation, e.n) == (np.mean(values), np.std(values, ddof=1), 5)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert e.interval == pytest.approx((low, high))


def test_a_paired_difference_is_that_of_scipys_paired_test():
    ours, theirs = [90.0, 93.0, 91.5, 92.0], [88.0, 90.0, 90.0, 89.0]
    data = make([*cell_of("ce", theirs, method="ce"), *cell_of("a", ours)])
    (_, e), = summary.differences(data)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (e.mean, e.n) == (2.375, 4)
    assert e.interval == pytest.approx((low, high))


# --- correlation --------------------------------------------------------------------------------


def test_the_coefficients_and_the_interval_of_r_are_scipys():
    found = correlation(list(zip(X, Y, strict=True)))
    assert found.n == 6
    assert found.pearson == pytest.approx(stats.pearsonr(X, Y)[0])
    assert found.spearman == pytest.approx(stats.spearmanr(X, Y)[0])
    z, half = np.arctanh(found.pearson), 1.959963985 / np.sqrt(3)
    assert found.pearson_interval == pytest.approx((np.tanh(z - half), np.tanh(z + half)))


def test_the_interval_of_rho_has_bonett_and_wrights_variance():
    found = correlation(list(zip(X, Y, strict=True)))
    z, half = np.arctanh(found.spearman), 1.959963985 * np.sqrt((1 + found.spearman**2 / 2) / 3)
    assert found.spearman_interval == pytest.approx((np.tanh(z - half), np.tanh(z + half)))


def test_three_points_have_coefficients_and_no_interval_and_it_is_said():
    found = correlation(list(zip(X[:3], Y[:3], strict=True)))
    assert found.pearson is not None and found.pearson_interval is found.spearman_interval is None
    assert found.text.endswith("n = 3, too few for an interval (it takes 4)")


def test_two_points_or_equal_ones_have_no_coefficient():
    assert correlation([(1, 2), (2, 3), (None, 4), (math.nan, 5)]) == Correlation(2)
    assert correlation([(1, 2)] * 5).text == "n = 5, all alike on one axis: no coefficient"


def test_points_on_a_line_have_no_interval():
    found = correlation([(i, 2 * i) for i in range(6)])
    assert found.pearson == pytest.approx(1) and found.spearman == pytest.approx(1)
    assert found.pearson_interval is None and found.spearman_interval is None


def test_generators_that_differ_in_seeds_are_told_apart_and_as_one():
    rows = []
    for seed in range(3):
        for row in generators([80.0, 85.0, 87.0, 86.0], [40.0, 20.0, 10.0, 5.0]):
            rows.append({**row, "seed": seed, "generator": f"{row['generator']}/{seed}",
                         "fid": row["fid"] + seed, "accuracy": row["accuracy"] - seed})
    claim = next(statistics.claims(make(rows, [STEPS])))
    assert (claim.over_generators.n, claim.over_settings.n) == (12, 4)
    r, _ = stats.pearsonr([41.0, 21.0, 11.0, 6.0], [79.0, 84.0, 86.0, 85.0])
    assert claim.over_settings.pearson == pytest.approx(r)


def test_two_quality_networks_are_never_in_one_coefficient():
    rows = generators([80.0, 85.0, 86.0, 87.0, 88.0], [40.0, 20.0, 4.0, 3.0, 1.0])
    for row in rows[3:]:
        row["quality_network"] = "inception"
    found = {c.network: c.over_generators.n for c in statistics.claims(make(rows, [STEPS]))}
    assert found == {"reference": 3, "inception": 2}


# --- as a file, and on the page -------------------------------------------------------------------


def test_the_statistics_are_written_as_json_without_what_json_lacks(tmp_path):
    rows = [*cell_of("ce", [80.0, 82.0], method="ce"), *cell_of("a", [90.0, 91.0], **{WEIGHT: math.inf})]
    statistics.write(make(rows), tmp_path)
    text = (tmp_path / "statistics.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)
    ce, ours = found["cells"]
    assert ours["measures"]["accuracy"]["n"] == 2 and ours["values"] == {WEIGHT: "inf"}
    low, high = stats.t.interval(0.95, 1, loc=81.0, scale=stats.sem([80.0, 82.0]))
    assert ce["measures"]["accuracy"]["interval"] == pytest.approx([low, high])
    (difference,) = found["differences"]
    assert (difference["baseline_method"], difference["mean"], difference["n"]) == ("ce", 9.5, 2)


def test_every_cell_shows_its_paired_difference_to_the_named_baseline(tmp_path):
    rows = [*cell_of("ce", [80.0, 82.0], method="ce"), *cell_of("a", [90.0, 91.0], **{WEIGHT: 1.0})]
    head, ce, ours = page(make(rows), tmp_path).rows[:3]
    at = head.index("against ce")
    low, high = stats.ttest_rel([90.0, 91.0], [80.0, 82.0]).confidence_interval(0.95)
    assert (ce[at], ours[at]) == ("-", f"+9.5 ({low:+.1f} to {high:+.1f})")


def expected(measure="accuracy", value=46.6, **others) -> Expected:
    row = {"where": {"generator.tau": 1}, "measure": measure, "value": value, "standing": "reported",
           "source": "CIFAR100-LT", **others}
    return Expected.model_validate(row)


def test_the_page_sets_expected_numbers_beside_ours(tmp_path):
    rows = [*cell_of("a", [90.0, 92.0], p_id=0.5, fid=1.234, **{WEIGHT: 1.0}), trial("b", 0, 70.0)]
    data = make(rows, facts={"dataset": "digits, exp profile"}, expected=[
        (expected(), ["a"]),
        (expected("p_id", 44.8), ["a"]),
        (expected("fid", 5.86), ["a"]),
        (expected(where=None, label="BBN", value=42.6, standing="code"), []),
    ])
    found = page(data, tmp_path)
    assert ["diffult tau=1", "accuracy", "reported", "CIFAR100-LT", "91.0 ± 1.4 (2)", "46.6"] in found.rows
    assert ["diffult tau=1", "ID, %", "reported", "CIFAR100-LT", "50.0 ± 0.0 (2)", "44.8"] in found.rows
    assert ["diffult tau=1", "FID", "reported", "CIFAR100-LT", "1.23 ± 0.00 (2)", "5.86"] in found.rows
    assert ["BBN", "accuracy", "code", "CIFAR100-LT", "-", "42.6"] in found.rows
    assert "Here: digits, exp profile" in found.text and "Not comparable" not in found.text


def test_what_differs_is_said_once_above_the_table(tmp_path):
    reasons = ("smoke scale on digits", "with the override seed=3")
    rows = [(expected(), ["a"]), (expected("fid"), ["a"])]
    text = page(make(cell_of("a", [90.0]), expected=rows, differs=reasons), tmp_path).text
    assert text.count("Not comparable: smoke scale on digits; with the override seed=3.") == 1


def test_a_row_of_several_cells_names_each(tmp_path):
    rows = [trial(str(w), 0, 80.0 + w, **{WEIGHT: w}) for w in (1.0, 2.0)]
    names = [b.name for b in statistics.beside(make(rows, expected=[(expected(), ["1.0", "2.0"])]))]
    assert names == ["diffult tau=1: synthetic_weight=1", "diffult tau=1: synthetic_weight=2"]


def test_a_page_without_expected_numbers_has_no_such_table(tmp_path):
    assert "expected" not in page(make([trial("a")]), tmp_path).text


def test_what_tells_of_a_generator_counts_each_generator_once():
    rows = [
        trial("a", seed, 90.0, fid=fid, p_ood=fid / 10, kept=10 * fid, generator=f"g{fid}", pool=f"p{fid}")
        for seed, fid in enumerate((4.0, 4.0, 4.0, 6.0))
    ]
    (cell,) = summary.cells(make(rows))
    assert cell.over_seeds("accuracy").n == 4
    for measure, values in {"fid": (4.0, 6.0), "p_ood": (0.4, 0.6), "kept": (40.0, 60.0)}.items():
        assert cell.over_seeds(measure) == summary.estimate(values)
    (alone,) = summary.cells(make(rows[:3]))
    assert alone.over_seeds("fid") == summary.Estimate(4.0, None, 1)


def test_copies_belong_to_no_pool():
    rows = [trial("a", seed, 90.0, "oversample", kept=kept) for seed, kept in enumerate((5, 7))]
    (cell,) = summary.cells(make(rows))
    assert cell.over_seeds("kept") == summary.estimate((5, 7))


@pytest.mark.parametrize(("network", "told"), [
    ("reference", "by the reference network: not comparable"), ("inception", "4.00"),
])
def test_fid_of_another_network_is_shown_and_not_compared(network, told, tmp_path):
    row = Expected(where={WEIGHT: 1.0}, measure="fid", value=5.86, standing="reported", source="paper")
    cell = cell_of("a", [90.0, 91.0], fid=4.0, generator="g", quality_network=network, **{WEIGHT: 1.0})
    data = make(cell, expected=[(row, ["a"])])
    (found,) = statistics.beside(data)
    assert found.ours == summary.Estimate(4.0, None, 1) and found.compares == (network == "inception")
    page(data, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert told in text and ("not comparable" in text) == (network == "reference")
    statistics.write(data, tmp_path)
    (written,) = json.loads((tmp_path / "statistics.json").read_text())["expected"]
    assert written["compares"] == found.compares
