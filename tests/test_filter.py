"""The filter is a mask over stored scores, taken when a classifier is trained."""

import numpy as np
import pyarrow as pa
import pytest

from diffult_ray import pipeline
from diffult_ray.config import Experiment
from diffult_ray.method.bands import BANDS, band
from diffult_ray.stages import pool
from diffult_ray.stages.classifier import kept


@pytest.fixture
def scored():
    """Six images of two classes at distances of every band but OOD; one in three is taken for the other."""
    import torch

    rows = pool.requests([3, 3], seed=0)
    distance = np.array([0.5, 1.0, 1.5, 0.2, 1.9, 2.0])
    return pool.Pool(pa.table({
        **{name: rows[name] for name in rows.column_names},
        "distance": distance,
        "band": [BANDS[code] for code in band(torch.from_numpy(distance)).tolist()],
        "predicted": [0, 1, 0, 1, 1, 0],
    }))


def rule(**others):
    return {"threshold": None, "bands": None, "agreement": False, **others}


def test_thresholds_bands_and_agreement_are_masks(scored):
    assert kept(rule(threshold="inf"), scored).tolist() == [True] * 6
    assert kept(rule(threshold=1.0), scored).tolist() == [True, True, False, True, False, False]
    assert kept(rule(bands=["AID"]), scored).tolist() == [False, False, True, False, True, True]
    agreeing = [True, False, True, True, True, False]
    assert kept(rule(threshold="inf", agreement=True), scored).tolist() == agreeing
    both = kept(rule(bands=["ID"], agreement=True), scored)
    assert both.tolist() == [True, False, False, True, False, False]


def test_a_band_that_holds_no_image_is_told_in_one_line(scored):
    with pytest.raises(ValueError, match=r"^filter.bands \[OOD\] keeps none of the 6 images: name another"):
        kept(rule(bands=["OOD"]), scored)
    nobody = scored.table.set_column(5, "predicted", pa.array([1, 1, 1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"\[ID, AID\] with filter.agreement keeps none"):
        kept(rule(bands=["ID", "AID"], agreement=True), pool.Pool(nobody))


def test_a_threshold_may_keep_none_since_that_is_the_plain_classifier(scored):
    assert kept(rule(threshold=0.0), scored).tolist() == [False] * 6


def test_agreement_makes_another_classifier_of_the_same_scores():
    without, agreeing = (
        Experiment.model_validate({"select": "test", "filter": {"agreement": a}}) for a in (False, True)
    )
    assert pipeline.scores(without).key == pipeline.scores(agreeing).key
    assert pipeline.classifier(without).key != pipeline.classifier(agreeing).key
    assert pipeline.classifier(agreeing).config["filter"] == {
        "threshold": 2.0, "bands": None, "agreement": True,
    }
