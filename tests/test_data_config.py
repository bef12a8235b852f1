"""The `dataset` section: each set's own defaults, and every rule with its message."""

import pytest
from pydantic import ValidationError

from diffult_ray import config
from diffult_ray.config import Dataset
from diffult_ray.errors import BadInput

FOLDER = {"name": "folder", "root": "/data", "image_size": 32}


@pytest.mark.parametrize(("values", "profile", "most"), [
    ({}, "exp", 500),
    ({"name": "cifar10", "root": "/d"}, "exp", 5000),
    ({"name": "cifar100", "root": "/d"}, "exp", 500),
    ({"name": "cifar100", "root": "/d", "profile": "natural"}, "natural", None),
    ({"name": "cifar100", "root": "/d", "max_per_class": 90}, "exp", 90),
    (FOLDER, "natural", None),
    ({**FOLDER, "max_per_class": 1000}, "natural", 1000),
    ({**FOLDER, "profile": "exp"}, "exp", 500),
])
def test_defaults_of_the_set(values, profile, most):
    found = Dataset(**values)
    assert (found.profile, found.max_per_class) == (profile, most)
    assert Dataset(**{**values, "profile": profile, "max_per_class": most}) == found
    assert hash(found) == hash(Dataset(**values))


@pytest.mark.parametrize(("values", "message"), [
    ({"name": "folder", "image_size": 8}, "is needed for folder"),
    ({"name": "cifar10"}, "is needed for cifar10"),
    ({"name": "folder", "root": "", "image_size": 8}, "is needed for folder"),
    ({"download": True}, "is for cifar10 and cifar100"),
    ({"name": "folder", "root": "/d"}, "is needed for folder, whose images may have any size"),
    ({"name": "parquet", "root": "/d"}, "is needed for parquet, whose"),
    ({"loading": "stream"}, "digits are held in memory"),
    ({"name": "cifar10", "root": "/d", "loading": "stream"}, "cifar10 are held in memory"),
    ({**FOLDER, "name": "lists"}, "is needed: a file under `root`"),
    ({"lists": {"train": "a.txt"}}, "is for `name: lists`"),
    ({**FOLDER, "columns": {"image": "img"}}, "is for `name: parquet`"),
    ({"group_pattern": "(a)"}, "reads file names"),
    ({**FOLDER, "group_pattern": "abc"}, "with a capture group"),
    ({**FOLDER, "group_pattern": "(abc"}, "with a capture group"),
    ({"name": "cifar10", "root": "/d", "test_per_class": 5}, "cifar10 has its own"),
    ({**FOLDER, "root": "s3://bucket/x"}, "a URI is for parquet"),
    ({**FOLDER, "name": "parquet", "root": "s3://me:secret@bucket/x"}, "so it holds no secret"),
    ({"name": "imagenet"}, "Input should be 'digits'"),
    ({"channels": 2}, "Input should be 1 or 3"),
    ({"profile": "zipf"}, "Input should be 'exp'"),
    ({"on_error": "ignore"}, "Input should be 'stop' or 'skip'"),
    ({**FOLDER, "lists": {"valid": "a"}}, "Extra inputs"),
])
def test_rules(values, message):
    with pytest.raises(ValidationError, match=message):
        Dataset(**values)


def test_a_mistake_is_one_line():
    with pytest.raises(BadInput, match="dataset.root: is needed for cifar100") as refused:
        config.load("digits", ["dataset.name=cifar100"])
    assert "\n" not in str(refused.value)


def test_a_secret_in_a_uri_is_refused_and_not_told():
    overrides = ["dataset.name=parquet", "dataset.image_size=8", "dataset.root=s3://me:Zx9/q@bucket/x"]
    with pytest.raises(BadInput, match="is kept with every result") as refused:
        config.load("digits", overrides)
    assert "override dataset.root=s3://me:***@bucket/x: is" in str(refused.value)
    assert "Zx9" not in str(refused.value)


def test_nested_keys_can_be_overridden():
    overrides = ["dataset.name=lists", "dataset.root=/d", "dataset.image_size=8", "dataset.lists.train=t.txt"]
    loaded = config.load("digits", overrides)
    assert next(config.experiments(loaded)).dataset.lists.train == "t.txt"


@pytest.mark.parametrize(("values", "expected"), [
    ({}, "digits, exp profile, imbalance factor 100, at most 500 a class"),
    (FOLDER, "folder, as it comes"),
])
def test_summary(values, expected):
    assert Dataset(**values).summary == expected
