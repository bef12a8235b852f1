"""The report: what is selected and compared, by hand-built results; a page for every kind of sweep."""

import io
import math
import re
import struct
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from diffult_ray import figures, report, statistics, summary
from diffult_ray.report import ReportData, print_table, selected, write
from diffult_ray.results import COLUMNS_AFTER_SEARCHED

STAGE_COLUMNS = ["stage", "key", "status", "seconds", "memory_mib", "gpu_memory_mib", "trials"]
WEIGHT, THRESHOLD, STEPS = "classifier.synthetic_weight", "filter.threshold", "generator.steps"


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 50)


def trial(cell, seed=0, accuracy=90.0, method="diffult", status="done", **others):
    row = {"trial": f"{cell}-{seed}", "cell": cell, "method": method, "status": status, "seed": seed}
    row |= {"accuracy": accuracy, "validation_accuracy": accuracy} if status == "done" else {}
    return {**row, **others}


def make(rows, searched=(WEIGHT,), **others):
    columns = ["trial", "method", "status", "seed", *searched, *COLUMNS_AFTER_SEARCHED]
    known = list(dict.fromkeys(columns))
    data = {
        "name": "sweep", "description": "", "searched": list(searched), "select": "validation",
        "class_names": ["a", "b"], "class_counts": [100, 5], "gallery": {}, "facts": {},
        "stages": pd.DataFrame(columns=STAGE_COLUMNS), **others,
    }
    return ReportData(results=pd.DataFrame(rows, columns=known), **data)


def cell_of(name, accuracies, **others):
    return [trial(name, seed, a, **others) for seed, a in enumerate(accuracies)]


def demo(seeds=3):
    """A sweep like the shipped one: 3 x 3 on one generator, two more generators, two baselines."""
    rng, classes, rows = np.random.default_rng(0), 10, []

    def add(name, method, level, **values):
        for seed in range(seeds):
            accuracy = level + rng.normal()
            by_class = np.linspace(100, 2 * level - 100, classes) + rng.normal(0, 2)
            rows.append(trial(
                name, seed, accuracy, method, validation_accuracy=accuracy + rng.normal(),
                per_class_accuracy=np.clip(by_class, 0, 100),
                accuracy_many=99.0, accuracy_medium=95.2, accuracy_few=85.1, balanced_accuracy=accuracy,
                nll=0.21, ece=3.2, seconds=4.2, **values,
            ))

    pool = {"generated": 869, "p_id": 0.61, "p_aid": 0.33, "p_ood": 0.06, "quality_network": "reference"}
    add("ce", "ce", 88)
    add("over", "oversample", 90, generated=869, kept=869)
    for w in (0.3, 1.0, 2.0):
        for t in (1.0, 2.0, math.inf):
            level = 94 - abs(w - 1) - (1 if t != 2 else 0)
            add(f"{w}/{t}", "diffult", level, fid=9.1, inception_score=8.4, generator="g1000", kept=678,
                **{WEIGHT: w, THRESHOLD: t, STEPS: 1000}, **pool)
    for steps, fid in ((150, 60.2), (400, 21.7)):
        add(f"s{steps}", "diffult", 93 - fid / 15, fid=fid, inception_score=8 - fid / 20, kept=650,
            generator=f"g{steps}", **{WEIGHT: 1.0, THRESHOLD: 2.0, STEPS: steps}, **pool)
    rows.append(trial("1.0/2.0", 3, status="failed", error="RuntimeError: out of [memory]",
                      **{WEIGHT: 1.0, THRESHOLD: 2.0, STEPS: 1000}))
    images = rng.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    bands = {"real": images, "ID": images, "AID": images[:4], "OOD": images[:2]}
    gallery = {c: bands if c else {"real": images} for c in range(classes)}
    stages = [
        ("split", "a" * 16, "stored", 0.4, 310, None, 39),
        ("generator", "b" * 16, "failed", None, None, None, 27),
    ]
    return make(
        rows, (WEIGHT, THRESHOLD, STEPS), name="digits", description="Weight x threshold.\nTwo lines.",
        class_names=[str(c) for c in range(classes)], class_counts=[120, 77, 50, 32, 21, 13, 8, 5, 3, 2],
        gallery=gallery, stages=pd.DataFrame(stages, columns=STAGE_COLUMNS),
        facts={"command": "python -m diffult_ray.sweep digits", "hardware": "2 CPUs, x86_64"},
    )


class Page(HTMLParser):
    """What a browser would read of a page: text, tags, attributes that load or link."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.images, self.rows = [], [], [], []
        self.text, self.in_cell = "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def page(data, folder):
    write(data, folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def printed(data, **console):
    out = io.StringIO()
    print_table(data, Console(file=out, **{"width": 100, **console}))
    return out.getvalue()


# --- selection --------------------------------------------------------------------------------


@pytest.mark.parametrize(("select", "winner"), [("validation", "b"), ("test", "a")])
def test_the_selection_set_chooses(select, winner):
    rows = [trial("a", 0, 95.0, validation_accuracy=80.0), trial("b", 0, 90.0, validation_accuracy=85.0)]
    assert selected(make(rows, select=select)) == winner


def test_a_baseline_is_never_selected():
    assert selected(make([trial("ce", 0, 99.0, "ce"), trial("a", 0, 50.0)])) == "a"


def test_a_cell_with_fewer_finished_seeds_does_not_win():
    lucky = [trial("lucky", 0, 99.0), trial("lucky", 1, status="failed")]
    data = make([*lucky, *cell_of("steady", [90.0, 91.0]), *cell_of("worse", [80.0, 82.0])])
    assert selected(data) == "steady"
    told = "Chosen by mean validation accuracy among 2 diffult cells with 2 finished seeds; 1 cell with fewer"
    assert told in printed(data)


def test_equal_means_go_to_the_lower_nll_then_to_the_earlier_cell():
    first = cell_of("a", [90.1, 90.2, 90.3], nll=0.5)
    same = cell_of("b", [90.3, 90.1, 90.2], nll=0.5)
    surer = cell_of("c", [90.2, 90.3, 90.1], nll=0.4)
    unknown = cell_of("d", [90.1, 90.3, 90.2])
    assert selected(make([*first, *same, *unknown])) == "a"
    assert selected(make([*same, *first])) == "b"
    assert selected(make([*unknown, *first, *same, *surer])) == "c"


@pytest.mark.parametrize("rows", [
    [],
    [trial("ce", 0, 90.0, "ce")],
    [trial("a", status="failed", error="lost")],
    [trial("a", validation_accuracy=None)],
], ids=["no trial", "baselines only", "all failed", "no validation"])
def test_nothing_is_selected_and_all_is_still_shown(rows, tmp_path):
    data = make(rows)
    assert selected(data) is None
    assert "No cell is selected" in printed(data)
    assert "No cell is selected" in page(data, tmp_path).text


# --- estimates --------------------------------------------------------------------------------


def test_the_interval_is_students():
    # t_{0.975, 2} = 4.302653 (any table); the mean of 1, 2, 3 has the standard error 1 / sqrt(3)
    low, high = summary.estimate([1.0, 2.0, 3.0]).interval
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


def test_what_is_not_finite_does_not_count():
    assert summary.estimate([4.0, None, math.nan, math.inf, "x"]) == summary.Estimate(4.0, None, 1)
    assert summary.estimate([]).interval is None


def test_differences_are_paired_by_seed():
    rows = [trial("ce", s, a, "ce") for s, a in ((2, 70.0), (0, 80.0), (5, 10.0))]
    rows += [trial("over", s, 60.0, "oversample") for s in (1, 2)]
    rows += [trial("a", s, a) for s, a in ((0, 90.0), (1, 88.0), (2, 86.0))]
    data = make([rows[3], rows[4], *rows[:3], *rows[5:]])
    (ce, to_ce), (over, to_over) = summary.differences(data)
    assert (ce.method, over.method) == ("ce", "oversample")  # `ce` first, wherever it stands
    assert (to_ce.mean, to_ce.n) == (13.0, 2)  # 90 - 80 and 86 - 70
    assert to_ce.deviation == pytest.approx(18**0.5)
    assert (to_over.mean, to_over.n) == (27.0, 2)
    assert "+13.0 ± 4.2 (n = 2) against ce" in printed(data)


def test_methods_with_synthetic_images_are_cells_of_their_own_and_are_not_selected(tmp_path):
    """Whether `method` and `synthetic` are searched or not: their names tell, no column repeats them."""
    rows = [trial("ce", 0, 80.0, "ce", synthetic=False, **{WEIGHT: None})]
    rows += [trial("r", 0, 82.0, "reweight", synthetic=False, **{WEIGHT: None})]
    rows += [trial("rs", 0, 99.0, "reweight", synthetic=True, **{WEIGHT: 0.3})]
    rows += [trial("rs1", 0, 60.0, "reweight", synthetic=True, **{WEIGHT: 1.0})]
    rows += [trial("a", 0, 90.0, synthetic=True, **{WEIGHT: 0.3})]
    data = make(rows, searched=("method", "synthetic", WEIGHT))
    assert data.keys == [WEIGHT] and summary.selected(data) == "a"
    told = [(cell.name, e.mean) for cell, e in summary.differences(data)]
    assert told == [("ce", 10.0), ("reweight", 8.0), ("reweight+synthetic", -9.0)]
    assert "-9.0 ± - (n = 1) against reweight+synthetic" in printed(data)
    names = [row[0] for row in page(data, tmp_path).rows[1:6]]
    assert names == ["ce", "reweight", "reweight+synthetic", "reweight+synthetic", "diffult, selected"]


def test_results_of_before_synthetic_was_a_column_read_as_they_did():
    data = make([trial("ce", 0, 80.0, "ce"), trial("a", 0, 90.0)])
    assert [c.name for c in summary.cells(data)] == ["ce", "diffult"]


def test_a_failed_seed_pairs_with_nothing():
    rows = [trial("ce", 0, 80.0, "ce"), trial("ce", 1, method="ce", status="failed")]
    (_, e), = summary.differences(make([*rows, *cell_of("a", [90.0, 95.0])]))
    assert e == summary.Estimate(10.0, None, 1)


def test_a_searched_key_that_a_baseline_uses_is_compared_at_its_own_value():
    key = "dataset.imbalance_factor"
    rows = [trial(f"ce{f}", 0, a, "ce", **{key: f}) for f, a in ((10.0, 80.0), (50.0, 60.0))]
    rows += [trial("a", 0, 70.0, **{key: 50.0}), trial("b", 0, 69.0, **{key: 10.0})]
    (baseline, e), = summary.differences(make(rows, [key]))
    assert (baseline.id, e.mean) == ("ce50.0", 10.0)


# --- accuracy against FID and IS --------------------------------------------------------------


def generators(accuracies, fids, **others):
    return [
        trial(f"g{i}", 0, a, fid=f, generator=f"g{i}", quality_network="reference",
              **{STEPS: 100 * (i + 1), WEIGHT: 1.0, **others})
        for i, (a, f) in enumerate(zip(accuracies, fids, strict=True))
    ]


def captions(data):
    return [p.caption for p in figures.pictures(data)]


def test_the_coefficients_are_scipys_over_generators():
    caption, = captions(make(generators([80.0, 85.0, 87.0, 86.0], [40.0, 20.0, 10.0, 5.0]), [WEIGHT, STEPS]))
    r = np.corrcoef([80.0, 85.0, 87.0, 86.0], [40.0, 20.0, 10.0, 5.0])[0, 1]
    assert f"Pearson's r = {r:.2f} (95% -1.00 to 0.10)" in caption  # tanh(atanh(r) -+ 1.96 / sqrt(n - 3))
    assert "Spearman's rho = -0.80 (95% -1.00 to 0.82), n = 4" in caption  # ranks 1 2 4 3 and 4 3 2 1
    assert "at synthetic_weight = 1." not in caption and "at synthetic_weight = 1," in caption


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_generators_have_no_coefficient(n):
    picture, = figures.pictures(make(generators([80.0, 85.0][:n], [40.0, 20.0][:n]), [STEPS]))
    assert f"n = {n}: no coefficient" in picture.caption
    assert (picture.png is None) == (n == 1)


def test_generators_that_are_all_alike_have_no_coefficient():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caption, = captions(make(generators([80.0] * 3, [40.0, 20.0, 10.0]), [STEPS]))
    assert "no coefficient" in caption


def test_generators_are_compared_at_the_setting_that_most_of_them_share():
    common = generators([80.0, 85.0, 87.0], [40.0, 20.0, 10.0])
    best = [dict(common[0], cell="best", accuracy=99.0, validation_accuracy=99.0, **{WEIGHT: 0.3})]
    data = make([*best, *common], [WEIGHT, STEPS])
    fixed, points = statistics.generator_points(data, "fid", data.results)
    assert fixed == {WEIGHT: 1.0}
    assert [(p.label, p.quality, p.accuracy.mean) for p in points] == [
        ("steps=100", 40.0, 80.0), ("steps=200", 20.0, 85.0), ("steps=300", 10.0, 87.0),
    ]


def test_between_equal_settings_the_selected_cells_is_compared():
    low, high = (generators(a, [40.0, 20.0, 10.0], **{WEIGHT: w}) for w, a in (
        (0.3, [70.0, 71.0, 72.0]), (1.0, [80.0, 85.0, 87.0])
    ))
    for row in low:
        row["cell"] += "low"
    data = make([*low, *high], [WEIGHT, STEPS])
    assert statistics.generator_points(data, "fid", data.results)[0] == {WEIGHT: 1.0}


def test_each_quality_network_has_an_axis_of_its_own(tmp_path):
    rows = generators([80.0, 85.0, 86.0, 87.0], [40.0, 20.0, 4.0, 3.0])
    for row in rows[2:]:
        row["quality_network"] = "inception"
    write(make(rows, [STEPS]), tmp_path)
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert names == {"accuracy_fid_reference.png", "accuracy_fid_inception.png"}
    assert all("n = 2: no coefficient" in c for c in captions(make(rows, [STEPS])))


def test_the_measures_of_a_generator_are_columns_and_what_to_know_of_them_is_told(tmp_path, capsys):
    measures = {"fid": 4.2, "kid": 0.0123, "precision": 0.81, "recall": 0.4, "memorised": 0.25,
                "fid_images": 1000, "quality_network": "inception", "per_class_fid": [None, 3.0]}
    data = make([trial("a", **{WEIGHT: 1.0}, **measures)], notes=["FID of 1000 images & few"])
    found = page(data, tmp_path)
    shown = dict(zip(found.rows[0], found.rows[1], strict=True))
    assert [shown[k] for k in ("FID", "KID", "precision", "recall", "memorised", "images", "network")] == [
        "4.20", "0.0123", "0.810", "0.400", "25.0", "1000", "inception",
    ]
    assert "FID of 1000 images & few." in found.text
    print_table(data, Console())
    assert "Note: FID of 1000 images & few." in capsys.readouterr().out


def test_a_table_of_before_these_measures_is_still_shown():
    data = make([trial("a", **{WEIGHT: 1.0}, fid=4.2)])
    older = data.results.drop(columns=["kid", "memorised", "fid_images"])
    (cell,) = summary.cells(replace(data, results=older))
    assert cell.mean("kid") is None and cell.mean("fid") == 4.2


def test_each_way_to_sample_a_generator_is_a_point():
    key = "generation.guidance"
    rows = [
        trial(str(w), 0, 80.0 + w, fid=10 - w, generator="g", quality_network="reference", **{key: w})
        for w in (0.0, 1.0, 2.0)
    ]
    data = make(rows, [key])
    points = statistics.generator_points(data, "fid", data.results)[1]
    assert [p.label for p in points] == ["guidance=0", "guidance=1", "guidance=2"]


# --- the heat map -----------------------------------------------------------------------------


def heat_map(rows, searched):
    return figures.heat_map(make(rows, searched))


def test_the_heat_map_is_of_weight_and_threshold_at_one_setting_of_the_rest():
    picture = figures.heat_map(demo())
    assert picture.title == "Accuracy over synthetic_weight and threshold"
    assert "at steps = 1000" in picture.caption
    assert picture.alt.count("%") == 9
    assert "synthetic_weight 1, threshold none:" in picture.alt


def test_any_two_numeric_keys_that_cross_make_a_heat_map():
    keys = ["generator.regulariser", "generator.tau", STEPS]
    rows = [
        trial(f"{r}{t}{s}", 0, 80.0, **dict(zip(keys, (r, t, s), strict=True)))
        for r in ("none", "cbdm") for t in (1, 2) for s in (100, 200)
    ]
    picture = heat_map(rows, keys)
    assert picture.title == "Accuracy over tau and steps"
    assert "at regulariser = none" in picture.caption


def test_a_heat_map_of_many_cells_is_no_larger_than_one_of_few():
    def size(rows, columns):
        cells = [(w, t) for w in range(rows) for t in range(columns)]
        trials = [trial(f"{w} {t}", **{WEIGHT: w, THRESHOLD: t}) for w, t in cells]
        picture = heat_map(trials, [WEIGHT, THRESHOLD])
        assert ("parentheses" in picture.caption) == (len(cells) <= 600)
        assert len(re.findall("threshold", picture.alt)) > len(cells)
        return struct.unpack(">2I", picture.png[16:24])

    assert size(30, 20) == size(31, 61)
    assert size(3, 4) < size(30, 20)


def test_keys_that_move_together_or_stay_make_no_heat_map():
    together = [trial(str(v), 0, 80.0, **{WEIGHT: v, THRESHOLD: v}) for v in (1.0, 2.0, 3.0)]
    assert heat_map(together, [WEIGHT, THRESHOLD]) is None
    constant = [trial(str(v), 0, 80.0, **{WEIGHT: v, THRESHOLD: 2.0}) for v in (1.0, 2.0, 3.0)]
    assert heat_map(constant, [WEIGHT, THRESHOLD]) is None


def test_of_many_cells_the_console_has_the_selected_one_the_baselines_and_the_best():
    rows = cell_of("ce", [10.0, 11.0], method="ce")
    for place in range(60):
        rows += cell_of(f"c{place}", [50.0 + place] * 2, **{WEIGHT: float(place)})
    rows += cell_of("lucky", [200.0], **{WEIGHT: 99.0})  # of one seed only: it does not compete
    rows += [trial("lost", 0, status="failed", error="boom", **{WEIGHT: 77.0})]
    text = printed(make(rows))
    table = text.split("\n\n")[0]
    shown = [line for line in table.splitlines() if re.search(r"\(\d\)", line)]
    assert len(shown) == 40
    assert shown[0].split()[0] == "ce"
    assert [line.split()[2] for line in shown if line.startswith("*")] == ["59"]
    weights = [line.replace("*", " ").split()[1] for line in shown[1:]]
    assert weights == [str(w) for w in range(22, 60)] + ["99"]  # in the order of the sweep
    assert "and 23 cells of lower or no mean validation accuracy, in the report" in text


# --- per-class accuracy -----------------------------------------------------------------------


def test_per_class_accuracy_is_of_ce_and_the_selected_cell():
    rows = [trial("over", 0, 60.0, "oversample", per_class_accuracy=[1.0, 1.0])]
    rows += [trial("ce", s, 50.0, "ce", per_class_accuracy=[100.0, v]) for s, v in ((0, 0.0), (1, 3.0))]
    rows += [trial("a", 0, 90.0, per_class_accuracy=np.array([95.0, np.nan]))]
    picture = figures.per_class(make(rows))
    assert "a (100 images): ce 100.0 %, diffult 95.0 %" in picture.alt
    assert "b (5 images): ce 1.5 %, diffult - %" in picture.alt
    assert "oversample" not in picture.alt
    assert "FID" not in picture.alt + picture.caption


def test_without_a_selected_cell_each_method_is_compared_seed_by_seed():
    rows = [*cell_of("mix", [53.0, 54.0, 99.0], method="mixup"), *cell_of("ce", [50.0, 52.0], method="ce")]
    text = printed(make([*rows, trial("a", 0, status="failed")]))
    assert "Seed by seed:\n    mixup: +2.5 ± 0.7 (n = 2) against ce" in text
    assert text.count("against") == 1
    assert "Seed by seed" not in printed(make(rows[:3]))


def test_without_a_selected_cell_each_method_has_its_accuracy_by_class():
    rows = [trial("mix", 0, 60.0, "mixup", per_class_accuracy=[70.0, 1.0])]
    rows += [trial("ce", 0, 50.0, "ce", per_class_accuracy=[100.0, 2.0])]
    rows += [trial("late", 0, 70.0, "mixup", per_class_accuracy=[30.0, 30.0])]
    rows += [trial("a", 0, status="failed")]
    picture = figures.per_class(make(rows))
    assert "a (100 images): ce 100.0 %, mixup 70.0 %; b (5 images): ce 2.0 %, mixup 1.0 %" in picture.alt
    assert "of ce and mixup;" in picture.caption and "Lines" not in picture.caption
    alone = figures.per_class(make(rows[:1]))
    assert "of mixup;" in alone.caption and alone.png


def test_of_many_classes_the_figure_has_the_mean_of_neighbours():
    counts, values = list(range(40, 0, -1)), np.linspace(90, 10, 40)
    rows = [trial("ce", 0, 50.0, "ce", per_class_accuracy=values)]
    rows += [trial("mix", 0, 50.0, "mixup", per_class_accuracy=[*values[:39], np.nan])]
    names = [f"class {n}" for n in counts]
    picture = figures.per_class(make(rows, class_names=names, class_counts=counts))
    assert "Lines: the mean of 9 classes of about as many images." in picture.caption
    assert "class 1 (1 images): ce 10.0 %, mixup - %" in picture.alt


def test_a_class_has_the_fid_of_its_generated_images_each_generator_once():
    measured = {"per_class_accuracy": [95.0, 90.0], "quality_network": "reference"}
    rows = [trial("ce", 0, 50.0, "ce", per_class_accuracy=[100.0, 0.0])]
    for seed, generator, fid in ((0, "g", 4.0), (1, "g", 4.0), (2, "h", 7.0)):
        known = {"generator": generator, "per_class_fid": [fid, None]}
        rows.append(trial("a", seed, 90.0, **known, **measured))
    picture = figures.per_class(make(rows))
    assert "a (100 images): ce 100.0 %, diffult 95.0 %, FID 5.50" in picture.alt
    assert "b (5 images): ce 0.0 %, diffult 90.0 %, FID -" in picture.alt
    assert "by the reference network" in picture.caption


# --- the page ---------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_no_script(tmp_path):
    found = page(demo(), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert found.links and all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "url(" not in html and "@import" not in html
    assert all(image["alt"].strip() for image in found.images)


def test_the_page_and_the_folder_have_the_same_figures(tmp_path):
    import base64

    found = page(demo(), tmp_path)
    inside = {base64.b64decode(i["src"].partition(",")[2]) for i in found.images}
    beside = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    assert inside == set(beside.values())
    assert set(beside) == {
        "accuracy_fid_reference.png", "accuracy_inception_score_reference.png", "heat_map.png",
        "per_class.png", "gallery.png",
    }


def test_figures_of_an_earlier_report_go(tmp_path):
    write(demo(), tmp_path)
    write(make([trial("a")]), tmp_path)
    assert not list((tmp_path / "figures").glob("*"))


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    write(make([trial("a")], name="old"), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(report.files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write(make([trial("a")], name="new"), tmp_path)
    assert "<h1>old</h1>" in (tmp_path / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["report.html"]


def test_names_are_text_wherever_they_come_from(tmp_path):
    evil = '<script>alert(1)</script>"&$x^$'
    rows = [trial("ce", 0, 80.0, "ce", per_class_accuracy=[1.0, 2.0])]
    rows += [trial("a", 0, 90.0, per_class_accuracy=[1.0, 2.0], **{WEIGHT: evil})]
    rows += [trial("b", 1, status="failed", error=evil, **{WEIGHT: "x"})]
    data = make(
        rows, name=evil, description=evil, class_names=[evil, "$\\frac{$"], facts={evil: evil},
        gallery={0: {"real": np.zeros((1, 8, 8), np.uint8)}},
        stages=pd.DataFrame([(evil, evil, evil, 1.0, 300, None, 1)], columns=STAGE_COLUMNS),
    )
    found = page(data, tmp_path)
    assert "script" not in found.tags
    assert found.text.count(evil) >= 8
    assert any(evil in image["alt"] for image in found.images)


def test_the_table_has_mean_deviation_n_and_interval_of_every_cell(tmp_path):
    rows = [*cell_of("a", [89.0, 90.0, 91.0], **{WEIGHT: 0.3}), trial("ce", 0, 80.0, "ce")]
    head, ce, ours = page(make(rows), tmp_path).rows[:3]
    at = {name: i for i, name in enumerate(head)}
    wanted = [at[k] for k in ("method", "synthetic_weight", "accuracy", "sd", "n", "95% interval")]
    assert [ours[i] for i in wanted] == ["diffult, selected", "0.3", "90.0", "1.0", "3", "87.5 to 92.5"]
    assert [ce[i] for i in wanted] == ["ce", "-", "80.0", "-", "1", "-"]


def test_a_single_seed_has_no_deviation(tmp_path):
    data = make([trial("ce", 0, 80.0, "ce"), trial("a", 0, 90.0)])
    found = page(data, tmp_path)
    assert ["ce", "+10.0", "-", "1", "-"] in found.rows
    assert "nan" not in found.text.lower()
    assert "+10.0 ± - (n = 1) against ce" in printed(data)


@pytest.mark.parametrize(("select", "warned"), [("validation", False), ("test", True)])
def test_a_selection_by_the_test_set_is_called_optimistic(select, warned, tmp_path):
    data = make([trial("a")], select=select)
    assert ("optimistic" in page(data, tmp_path).text) == warned
    assert ("optimistic" in printed(data)) == warned
    assert f"Chosen by mean {select} accuracy" in " ".join(printed(data).split())


def test_a_sweep_without_baselines_says_so(tmp_path):
    data = make(cell_of("a", [90.0, 91.0], per_class_accuracy=[1.0, 2.0]))
    found = page(data, tmp_path)
    assert "No baseline" in found.text and "against the baselines" not in found.text
    assert "No baseline" in printed(data)


@pytest.mark.parametrize(("key", "value", "text"), [
    (THRESHOLD, math.inf, "none"),
    (THRESHOLD, "inf", "none"),
    (STEPS, 300000.0, "300000"),
    (WEIGHT, np.float64(0.1 + 0.2), "0.3"),
    ("filter.bands", np.array(["ID", "AID"], dtype=object), "[ID, AID]"),
    ("generator.channels", [16, 32], "[16, 32]"),
    ("generator.regulariser", "cbdm", "cbdm"),
    ("filter.normalise", True, "true"),
])
def test_searched_values_of_any_kind_are_shown(key, value, text, tmp_path):
    data = make([trial("ce", 0, 80.0, "ce"), trial("a", 0, 90.0, **{key: value})], [key])
    found = page(data, tmp_path)
    assert found.rows[1][1] == "-" and found.rows[2][1] == text
    assert f"={text}" in printed(data)


def test_a_table_read_from_parquet_shows_the_same(tmp_path):
    data = demo()
    data.results[["per_class_accuracy"]] = data.results[["per_class_accuracy"]].map(
        lambda v: [float(x) for x in v] if isinstance(v, np.ndarray) else None
    )
    data.results.to_parquet(tmp_path / "results.parquet")
    write(data, tmp_path / "one")
    data.results = pd.read_parquet(tmp_path / "results.parquet")
    write(data, tmp_path / "two")
    one, two = (tmp_path / n / "report.html" for n in ("one", "two"))
    assert one.read_text() == two.read_text()


def test_a_seed_among_the_searched_keys_tells_no_cells_apart(tmp_path):
    rows = [trial("a", 0, a, **{"generator.seed": s, WEIGHT: 1.0}) for s, a in ((0, 90.0), (1, 92.0))]
    data = make(rows, [WEIGHT, "generator.seed"])
    assert "generator.seed" not in page(data, tmp_path).text
    assert len(summary.cells(data)) == 1


def test_failed_trials_are_counted_with_their_error(tmp_path):
    data = demo()
    out = printed(data)
    assert "1 of 40 trials failed:" in out and "RuntimeError: out of [memory]" in out
    text = page(data, tmp_path).text
    assert "selected, 1 failed" in text and "RuntimeError: out of [memory]" in text


def test_many_classes_and_colours_make_a_page(tmp_path):
    names = [f"class {c}" for c in range(60)]
    rows = [trial("a", 0, 90.0, per_class_accuracy=list(np.linspace(90, 10, 60)))]
    images = np.full((2, 32, 32, 3), 7, np.uint8)
    data = make(rows, class_names=names, class_counts=list(range(60, 0, -1)),
                gallery={c: {"real": images, "OOD": images[:0]} for c in range(60)})
    assert "20 of 60 classes" in page(data, tmp_path).text


def test_generated_pixels_are_shown_as_they_are(tmp_path):
    from PIL import Image

    data = make([trial("a")], gallery={0: {"real": np.full((1, 8, 8), 90, np.uint8)},
                                       1: {"ID": np.tile(np.uint8([200, 30, 60]), (1, 8, 8, 1))}})
    write(data, tmp_path)
    shown = np.asarray(Image.open(tmp_path / "figures" / "gallery.png").convert("RGB")).reshape(-1, 3)
    for colour in ([90, 90, 90], [200, 30, 60]):
        assert (shown == colour).all(axis=1).sum() > 200


# --- the console ------------------------------------------------------------------------------


@pytest.mark.parametrize("console", [{"force_terminal": True}, {}, {"width": 80}], ids=str)
def test_the_table_fits_a_hundred_columns(console):
    out = re.sub("\x1b[^m]*m", "", printed(demo(), **console))
    rows = [line for line in out.splitlines() if re.search(r"± +\d", line) and "n =" not in line]
    assert len(rows) == 13
    assert max(map(len, out.splitlines())) <= 100
    assert [line.split()[0] for line in rows[:3]] == ["ce", "oversample", "diffult"]
    assert sum(line.startswith("*") for line in rows) == 1


def test_settings_that_do_not_fit_follow_the_table():
    data = demo()
    long = "a value of {} that takes some room".format
    data.results[WEIGHT] = data.results[WEIGHT].map(long, "ignore")
    out = printed(data)
    assert max(map(len, out.splitlines()[:16])) <= 100
    assert "  3: synthetic_weight=a value of 0.3 that takes some room, threshold=1, steps=1000" in out


def test_a_console_without_unicode_can_print_it():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as stream:
        print_table(demo(), Console(file=stream, width=100))
        stream.flush()
        assert b"+-" in raw.getvalue()


def test_importing_the_report_is_cheap():
    import subprocess
    import sys

    heavy = "{'matplotlib', 'pandas', 'scipy', 'jinja2', 'torch', 'ray'}"
    code = f"import sys, diffult_ray.report, diffult_ray.figures; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
