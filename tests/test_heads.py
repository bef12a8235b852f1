"""The share of the head's images that a generator learns from."""

import numpy as np
import pytest
import torch

from diffult_ray import pipeline
from diffult_ray.config import Experiment
from diffult_ray.data.heads import head_classes, head_subset
from diffult_ray.errors import BadInput

LABELS = np.repeat([0, 1, 2], [150, 101, 7])


def test_the_head_is_the_many_shot_classes():
    assert head_classes([500, 101, 100, 20, 5]) == [0, 1]


def test_without_many_shot_classes_it_is_the_largest_third():
    assert head_classes([20, 100, 3, 50, 50, 1]) == [1, 3]
    assert head_classes([3, 2]) == []


@pytest.mark.parametrize(
    ("share", "kept"), [(0.0, (0, 0)), (0.4, (60, 40)), (0.5, (75, 51)), (1.0, (150, 101))]
)
def test_a_share_is_taken_of_each_head_class_and_the_rest_stays_whole(share, kept):
    rows = head_subset(LABELS, 3, share)
    assert np.bincount(LABELS[rows], minlength=3).tolist() == [*kept, 7]
    assert (np.diff(rows) > 0).all()


def test_a_smaller_share_is_a_part_of_a_larger_one():
    labels = np.random.default_rng(0).permutation(LABELS)
    rows = [set(head_subset(labels, 3, share).tolist()) for share in (0, 0.13, 0.4, 0.8, 1)]
    assert all(a < b for a, b in zip(rows, rows[1:], strict=False))


def test_a_set_that_is_all_head_leaves_nothing():
    with pytest.raises(BadInput, match="^generator.head_share: leaves no image"):
        head_subset(np.zeros(101, np.int64), 1, 0.0)


def test_the_class_frequencies_are_those_of_what_is_learnt_from():
    labels = torch.from_numpy(LABELS[head_subset(LABELS, 3, 0.0)])
    assert torch.bincount(labels, minlength=3).tolist() == [0, 0, 7]


def test_a_share_of_all_is_the_generator_that_was_stored_before_there_were_shares():
    whole, part = (Experiment(select="test", generator={"head_share": share}) for share in (1.0, 0.4))
    assert "head_share" not in pipeline.generator(whole).config
    assert pipeline.generator(part).config["head_share"] == 0.4
    assert pipeline.generator(part).key != pipeline.generator(whole).key
