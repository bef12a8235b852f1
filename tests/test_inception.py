"""Inception: which weights are taken, what is said when none can be had, and what it makes of images."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as theirs

from diffult_ray import pipeline, sweep
from diffult_ray.config import Experiment
from diffult_ray.errors import BadInput
from diffult_ray.method import inception
from diffult_ray.stages import networks, quality
from tests.inception_weights import random_weights


@pytest.fixture(scope="module")
def state():
    return random_weights()


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def _no_download(monkeypatch, tmp_path):
    """An empty cache, and no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(url, *arguments, **options):
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def pictures(n, channels=3, size=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


# --- the weights ------------------------------------------------------------------------------------


def test_the_official_file_is_torch_fidelitys():
    assert inception.URL == theirs.URL_INCEPTION_V3
    assert inception.OFFICIAL in inception.URL


def test_weights_are_told_apart_by_their_content(weights, tmp_path):
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes(weights.read_bytes())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert inception.identity(str(weights)) == inception.identity(str(moved)) == digest
    moved.write_bytes(b"others")
    assert inception.identity(str(moved)) != digest
    assert inception.identity(None) == inception.identity(inception.URL) == inception.OFFICIAL
    assert inception.identity("https://mirror.example/inception-6726825d.pth") == inception.OFFICIAL
    assert inception.identity("https://mirror.example/mine.pth") == "https://mirror.example/mine.pth"


def test_a_file_in_torchs_cache_is_taken(tmp_path):
    cached = tmp_path / "hub" / "checkpoints" / inception.URL.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    assert inception.find(None) == cached


def test_what_is_not_there_is_fetched_and_its_checksum_checked(monkeypatch, tmp_path):
    asked = []

    def fetch(url, path, hash_prefix, progress):
        asked.append((url, hash_prefix))
        with open(path, "wb") as file:
            file.write(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert inception.find(None).read_bytes() == b"weights"
    inception.find(None)
    inception.find("https://mirror.example/mine.pth")
    assert asked == [(inception.URL, inception.OFFICIAL), ("https://mirror.example/mine.pth", None)]


def test_weights_that_cannot_be_had_say_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(BadInput) as refused:
        inception.find(None)
    text = str(refused.value)
    assert "\n" not in text and text.startswith("quality.network: inception needs")
    for part in ("no network here", inception.URL, str(tmp_path / "hub"), "quality.inception_weights",
                 "quality.network: reference"):
        assert part in text


def test_a_file_that_is_not_there_or_holds_something_else_is_refused(weights, tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        inception.find(str(tmp_path / "missing.pth"))
    for name, content in (("text.pth", b"hello"), ("text.safetensors", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match="must be the weights of torch-fidelity's InceptionV3"):
            inception.read(tmp_path / name)
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="must be the weights"):
        inception.read(tmp_path / "other.pth")


def test_nothing_but_tensors_is_loaded_from_a_torch_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BadInput):
        inception.read(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_safetensors_hold_the_same_weights(state, weights, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    one, two = inception.read(weights), inception.read(tmp_path / "w.safetensors")
    assert one.keys() == two.keys() == state.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- the network ------------------------------------------------------------------------------------


@pytest.fixture
def network(state, tmp_path, monkeypatch):
    monkeypatch.setitem(inception.BATCH, "cpu", 4)
    save_file(state, tmp_path / "model.safetensors")
    return networks.load_network("inception", tmp_path, torch.device("cpu"))


def test_features_and_logits_are_torch_fidelitys(network, weights):
    images = pictures(3)
    whole = theirs.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    expected = whole(torch.from_numpy(images))
    found = network(images)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert found[0].shape == (3, inception.DIMENSIONS)
    assert float(found[0].std(dim=0).mean()) > 1e-3


def test_grey_is_shown_as_three_equal_channels(state):
    network, cpu = inception.build(state), torch.device("cpu")
    grey = torch.from_numpy(pictures(2, channels=1))
    for one, three in zip(
        inception.outputs(network, grey, cpu),
        inception.outputs(network, grey.repeat(1, 3, 1, 1), cpu),
        strict=True,
    ):
        torch.testing.assert_close(one, three)


def test_what_is_found_of_an_image_does_not_depend_on_its_company():
    sizes = []

    def measure(images):
        sizes.append(len(images))
        return images.flatten(1).float(), images.flatten(1).float().sum(1, keepdim=True)

    network, images = networks._padded(measure, 4), pictures(10, size=2)
    features, logits = network(images)
    assert sizes == [4, 4, 4]
    assert features.numpy().tolist() == images.reshape(10, -1).tolist()
    assert logits.shape == (10, 1)


# --- before anything is trained -----------------------------------------------------------------------


def experiment(**quality):
    dataset = {"name": "cifar10", "root": "data"}
    return Experiment.model_validate({"select": "test", "dataset": dataset, "quality": quality})


def test_inception_takes_the_references_place_and_its_key_is_its_weights(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "identity", lambda dataset: "content")
    moved = tmp_path / "moved.pth"
    moved.write_bytes(weights.read_bytes())
    one, two, official = (
        experiment(network="inception", inception_weights=where and str(where))
        for where in (weights, moved, None)
    )
    names = [s.name for s in pipeline.stages(one)]
    assert "inception" in names and "reference" not in names
    assert pipeline.quality(one).key == pipeline.quality(two).key != pipeline.quality(official).key
    assert pipeline.quality(one).inputs["reference"].resources.weights == str(weights)
    assert pipeline.classifier(one).key == pipeline.classifier(official).key


SPLIT = {"parts": {"balanced": 60}, "image_size": 32, "channels": 3, "class_names": ["a", "b"]}
SECTION = {"network": "inception", "images": 50_000, "neighbours": 3}


def test_images_too_small_for_inception_are_refused():
    with pytest.raises(BadInput, match="inception needs images of 32 pixels or more .got '16x16'"):
        quality.check(SECTION, {}, {**SPLIT, "image_size": 16})


@pytest.mark.parametrize(("images", "real"), [(3, 60), (20, 3)])
def test_too_few_images_for_precision_and_recall_are_refused(images, real):
    split = {**SPLIT, "parts": {"balanced": real}}
    with pytest.raises(BadInput, match="quality.neighbours: must be below the number of images"):
        quality.check({**SECTION, "images": images}, {}, split)


def test_a_fid_of_few_images_for_its_dimensions_is_warned_of_with_their_number():
    (note,) = quality.check(SECTION, {}, SPLIT)
    assert "50000 generated and 60 real images in 2048 dimensions" in note and "4096 or more" in note
    assert quality.check(SECTION, {}, {**SPLIT, "parts": {"balanced": 50_000}}) == []
    reference = {**SECTION, "network": "reference", "images": 127}
    (note,) = quality.check(reference, {"architecture": "resnet32"}, {**SPLIT, "parts": {"balanced": 500}})
    assert "127 generated and 500 real images in 64 dimensions" in note
    assert quality.check({**reference, "images": 128}, {"architecture": "resnet32"},
                         {**SPLIT, "parts": {"balanced": 128}}) == []


DIGITS = "name: d\nexperiment:\n  select: test\n  dataset: {max_per_class: 20, imbalance_factor: 5}\n"
FOLDER = "name: f\nexperiment:\n  select: test\n  dataset: {name: folder, root: ROOT, image_size: 32}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DIGITS + "  quality: {network: inception}\n", ["quality.network", "not of 8x8", "reference"]),
        (FOLDER.replace("32", "16") + "  quality: {network: inception}\n", ["network", "not of 16x16"]),
        (DIGITS + "  quality: {inception_weights: a.pth}\n", ["inception_weights", "is for `network"]),
        (FOLDER + "  quality: {network: inception, inception_weights: a.pth}\n", ["no such file", "a.pth"]),
        (FOLDER + "  quality: {network: inception}\n", ["no network here", inception.URL]),
    ],
)
def test_the_front_door_refuses_in_one_line_and_writes_nothing(text, told, tmp_path, capsys, monkeypatch):
    from tests.data_files import write_folder

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_folder(tmp_path / "images", {"train": {"a": 8, "b": 8}, "test": {"a": 2, "b": 2}})
    (tmp_path / "s.yaml").write_text(text.replace("ROOT", str(tmp_path / "images")))
    assert sweep.main([str(tmp_path / "s.yaml"), "--storage", str(tmp_path / "storage")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for part in told:
        assert part in err
    assert not (tmp_path / "storage").exists()


# --- on a real cluster --------------------------------------------------------------------------------

TINY = """
name: tiny
experiment:
  select: test
  dataset: {name: folder, root: ROOT, image_size: 32}
  extractor: &recipe {architecture: cnn, steps: 5, batch_size: 8}
  generator: {channels: [8, 8], blocks: 1, attention: [], steps: 3, batch_size: 8, warmup_steps: 1, ema: 0.5}
  generation: {per_class: 10, steps: 2}
  classifier: *recipe
  quality: {network: inception, inception_weights: WEIGHTS, images: 24, kid_subsets: 5}
"""


@pytest.mark.slow
def test_a_generator_is_measured_with_inception(cluster, weights, tmp_path):
    """The stage's numbers are those of all its features at once, and of torch-fidelity."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    from diffult_ray import config, files
    from diffult_ray.build import build_one
    from diffult_ray.data import load_split
    from diffult_ray.stages import pool
    from diffult_ray.stages.sampler import Sampler
    from diffult_ray.store import Store
    from tests.data_files import write_folder

    sizes = {"train": {"a": 14, "b": 6}, "test": {"a": 2, "b": 2}}
    root, store = write_folder(tmp_path / "images", sizes, size=(32, 32)), Store(tmp_path / "storage")
    text = TINY.replace("ROOT", str(root)).replace("WEIGHTS", str(weights))
    (tmp_path / "tiny.yaml").write_text(text)
    (trial,) = config.experiments(config.load(str(tmp_path / "tiny.yaml")))
    stage = pipeline.quality(trial)
    for each in stage.walk():
        if store.find(each) is None:
            artifact = build_one(each, store)
    found = artifact.summary
    assert (found["network"], found["images"], found["real_images"]) == ("inception", 24, 20)
    assert found["notes"] and found["per_class_fid"] == [None, None]

    network, cpu = inception.build(torch.load(weights, weights_only=True)), torch.device("cpu")
    real = load_split(store.folder(stage.inputs["split"])).balanced.images
    rows = pool.requests([12, 12], seed=0)
    sampler = Sampler(store.folder(stage.inputs["generator"]), stage.config["generation"], cpu)
    made = sampler(rows["label"].to_numpy(), rows["seed"].to_numpy())
    features = [inception.outputs(network, torch.from_numpy(x.copy()), cpu)[0].double() for x in (made, real)]
    theirs_fid = fid_statistics_to_metric(*map(fid_features_to_statistics, features), verbose=False)
    assert found["fid"] == pytest.approx(theirs_fid["frechet_inception_distance"], rel=1e-4)
    stored = files.read_tensors(store.folder(stage.inputs["reference"]) / "features.safetensors")["features"]
    torch.testing.assert_close(stored.double(), features[1], rtol=1e-4, atol=1e-5)
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1 and found["kid"] > 0
