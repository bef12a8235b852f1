"""All methods, with and without synthetic images, in one real sweep."""

import pandas as pd
import pytest
import yaml

from diffult_ray import files
from diffult_ray.config import METHODS, variant
from tests.conftest import TINY

pytestmark = pytest.mark.slow

BASELINES = [m for m in METHODS if m != "diffult"]
ADDED = [m for m in METHODS if m != "ce"]


@pytest.fixture(scope="module")
def finished(new_door):
    values = yaml.safe_load(TINY)
    values["baselines"] = BASELINES
    values["search"] = [{
        "method": {"grid": ADDED}, "synthetic": {"grid": [True]},
        "classifier.normalisation": {"grid": ["count"]},
    }]
    door = new_door(yaml.safe_dump(values))
    done = door.run()
    assert done.returncode == 0, done.stdout + done.stderr
    frame = pd.read_parquet(door.storage / "sweeps" / "tiny" / "results.parquet")
    return door, done, frame


def test_every_method_has_a_result(finished):
    _, _, frame = finished
    names = [variant(m, s) for m, s in zip(frame["method"], frame["synthetic"], strict=True)]
    assert names == [*BASELINES, *(variant(m, True) for m in ADDED)]
    assert set(frame["status"]) == {"done"}
    assert frame["accuracy"].gt(20).all()  # of ten classes, after 60 steps
    added = frame[frame["synthetic"]]
    assert added["fid"].nunique() == 1 and added["kept"].nunique() == 1 and (added["kept"] > 0).all()
    alone = frame[~frame["synthetic"]]
    assert alone["fid"].isna().all() and (alone["kept"] == 0).all()
    assert frame["accuracy"].nunique() > 5  # they are not all the same classifier


def test_all_share_one_generator_and_one_pool(finished):
    stages = [key.partition("/")[0] for key in finished[0].manifests()]
    assert {s: stages.count(s) for s in set(stages) - {"classifier"}} == dict.fromkeys(
        ("split", "extractor", "reference", "generator", "images", "scores", "quality"), 1
    )
    assert stages.count("classifier") == len(BASELINES) + len(ADDED)


def test_the_steps_are_the_same_for_all(finished):
    folders = (finished[0].storage / "artifacts" / "classifier").glob("*")
    assert {files.read_json(f / "summary.json")["steps"] for f in folders} == {60}


def test_the_table_tells_them_apart_and_selects_diffult(finished):
    lines = [line.split() for line in finished[1].stdout.splitlines()]
    told = [line[1] if line[0] == "*" else line[0] for line in lines if line]
    assert {*BASELINES, *(variant(m, True) for m in ADDED)} <= set(told)
    assert any(line[:2] == ["*", "diffult"] for line in lines)
    against = finished[1].stdout.partition("Seed by seed:")[2]
    assert "against ce" in against and "against reweight+synthetic" in against
