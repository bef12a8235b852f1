"""Every shipped sweep on the smoke overlay: digits, and little enough work for minutes on two cores."""

import re
from collections import Counter

import pytest
import yaml

from diffult_ray import config, sweepfile
from diffult_ray.data import make_split
from diffult_ray.expected import matched
from diffult_ray.plan import Plan, make_plan

# In 122 seconds the demo trains one generator of 1,000 steps and 42 classifiers of 800 steps, beside 14
# other stages (README.md).
MOST_GENERATOR_STEPS, MOST_STAGES, MOST_TRIALS, MOST_TRIAL_STEPS = 500, 50, 50, 200
ASKED = (
    "cifar100_lt/fid_accuracy", "cifar100_lt/bands_alone", "cifar100_lt/head_share", "cifar100_lt/main",
    "cifar10_lt/main", "imagenet_lt/main", "cifar100_lt/weight", "cifar100_lt/threshold",
    "cifar100_lt/per_class", "cifar100_lt/generator_steps", "cifar100_lt/losses",
    "cifar100_lt/sampler_guidance", "digits_studies/fid_accuracy", "digits_studies/bands_alone",
    "digits_studies/threshold", "digits_studies/weight", "digits_studies/per_class",
    "digits_studies/baselines",
)


def smoke(name: str) -> Plan:
    return make_plan(config.load(name, overlay="smoke"))


def generator_steps(p: Plan) -> int:
    """A generator of fewer steps is written on the way of a longer one."""
    longest: Counter[str] = Counter()
    for stage in p.stages:
        if stage.name == "generator":
            longest[stage.family] = max(longest[stage.family], stage.config["steps"])
    return longest.total()


def test_every_question_of_the_paper_has_its_sweep():
    assert set(ASKED) <= set(config.shipped())


def test_overlays_and_bases_are_no_sweeps():
    assert not [n for n in config.shipped() if n.startswith(("overlays", "bases"))]
    assert "smoke" in sweepfile.overlays() and "cifar100_lt" in sweepfile.bases()
    assert "digits" in sweepfile.bases()


@pytest.mark.parametrize("name", config.shipped())
def test_at_smoke_scale_it_is_on_digits_with_little_work(name):
    p = smoke(name)
    assert p.sweep.name == f"{name}-smoke"
    assert {t.experiment.dataset.name for t in p.trials} == {"digits"}
    assert generator_steps(p) <= MOST_GENERATOR_STEPS
    assert len(p.stages) <= MOST_STAGES and len(p.trials) <= MOST_TRIALS
    for e in (t.experiment for t in p.trials):
        sections = (e.classifier, e.extractor, e.quality.reference)
        assert all(s.architecture == "cnn" and s.steps <= MOST_TRIAL_STEPS for s in sections)
        assert e.quality.images <= 200 and e.generation.per_class <= 60 and e.generation.steps <= 8
        assert e.generator.channels == (16, 32)


@pytest.mark.parametrize("name", config.shipped())
def test_at_smoke_scale_it_asks_the_same(name):
    """The searched keys stay, but for what digits does not have."""
    own, small = config.load(name), config.load(name, overlay="smoke")
    gone = set(config.searched(own)) - set(config.searched(small))
    assert gone <= {"classifier.architecture", "extractor.architecture"}
    assert small.baselines == own.baselines and small.expected == own.expected
    assert any("smoke scale on digits" in text for text in small.differs)


def test_every_data_set_of_the_smoke_sweeps_can_be_cut():
    datasets = {t.experiment.dataset for name in config.shipped() for t in smoke(name).trials}
    assert {d.imbalance_factor for d in datasets} == {10, 50, 100}
    for dataset in datasets:
        split = make_split(dataset)
        assert min(split.counts) >= 1 and len(split.validation) == 80


@pytest.mark.parametrize("name", config.shipped())
def test_each_expected_number_is_of_one_cell(name, imagenet_lists):
    rows = matched(make_plan(config.load(name)))
    assert all(len(cells) == (1 if row.where else 0) for row, cells in rows)


@pytest.mark.parametrize("name", config.shipped())
def test_a_shipped_file_has_no_line_that_a_screen_cuts_and_needs_no_folder(name):
    text = config.shipped()[name].read_text()
    assert max(map(len, text.splitlines())) <= 112 and text.endswith("\n")
    base = yaml.safe_load(text).get("base")
    assert base is None or re.fullmatch(r"\w+", base)


PAPER = {
    "cifar100_lt/fid_accuracy": [38.3, 43.8, 44.8, 46.0, 46.6, 7.76, 7.42, 6.82, 5.86,
                                 39.1, 21.2, 39.7, 38.6, 29.1, 32.3, 40.2, 33.5, 26.3, 44.8, 36.3, 18.9],
    "cifar100_lt/bands_alone": [38.3, 44.2, 45.2, 36.2, 46.6, 21511, 11886, 5756, 39153],
    "cifar100_lt/head_share": [25.0, 26.0, 29.7, 32.5, 32.8],
    "cifar100_lt/main": [38.3, 51.5, 56.3, 63.8, 69.0, 51.6, 29.7],
    "cifar10_lt/main": [84.7, 86.9, 90.7],
    "imagenet_lt/main": [50.4, 56.4, 63.3, 55.6, 39.4],
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers_are_all_there(name):
    rows = config.load(name).expected
    assert [r.value for r in rows if r.standing == "reported"] == PAPER[name]


def test_the_papers_constants_reach_the_experiments():
    e = next(c for c in config.load("cifar100_lt/main").cells)
    assert (e.generator.steps, e.generator.batch_size, e.generator.tau) == (300_000, 48, 1.0)
    assert (e.generation.sampler, e.generation.steps, e.generation.guidance) == ("ddim", 100, 1.5)
    assert (e.generation.per_class, e.classifier.synthetic_weight, e.filter.threshold) == (500, 0.3, 2)
    assert (e.classifier.epochs, e.classifier.architecture) == (200, "resnet32")
    ten, imagenet = (config.load(n).cells[0] for n in ("cifar10_lt/main", "imagenet_lt/main"))
    assert (ten.generation.per_class, ten.dataset.max_per_class) == (5000, 5000)
    assert (imagenet.generation.per_class, imagenet.classifier.synthetic_weight) == (300, 0.5)
    generators = [c.generator for c in config.load("cifar100_lt/fid_accuracy").cells]
    batches = {g.regulariser: g.batch_size for g in generators}
    assert batches == {"none": 64, "cbdm": 48}
