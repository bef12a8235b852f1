"""Nothing shipped turns authentication off, listens to strangers, reads pickles or writes down secrets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from diffult_ray import config, files, sweep
from diffult_ray.plan import make_plan
from diffult_ray.store import Store

ROOT = Path(__file__).parents[1]
SHIPPED = ("diffult_ray", "clusters", "sweeps", "docs", "README.md", "Makefile", ".ci", "pyproject.toml")


def shipped() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *SHIPPED], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


OPEN = re.compile(r"0\.0\.0\.0|host[=: ]+['\"]?(\*|::)(['\"\s]|$)")
AUTH_OFF = re.compile(
    r"RAY_AUTH_MODE\W{1,6}(?!token\b)\w+|authOptions.*disabled|mode:\s*disabled|RAY_AUTH_TOKEN['\"]?\s*[=:]\s*\S",
)
WARNED = 3  # lines before it in which a warning stands


@pytest.mark.parametrize(
    "line",
    [
        "export RAY_AUTH_MODE=disabled", 'os.environ["RAY_AUTH_MODE"] = "disabled"', "RAY_AUTH_MODE: 'none'",
        "authOptions: {mode: disabled}", "RAY_AUTH_TOKEN=abc",
    ],
)
def test_the_scan_sees_authentication_turned_off(line):
    assert AUTH_OFF.search(line)


@pytest.mark.parametrize("line", ["RAY_AUTH_MODE=token ray start", '"RAY_AUTH_MODE": "token",'])
def test_the_scan_lets_authentication_be_on(line):
    assert not AUTH_OFF.search(line)


def test_no_file_turns_token_authentication_off_or_holds_a_token():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in shipped()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if AUTH_OFF.search(line)
    ]
    assert found == []


def test_no_file_listens_on_every_interface_but_in_a_warning():
    found = []
    for path in shipped():
        lines = path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            near = " ".join(lines[max(0, number - WARNED) : number + WARNED]).lower()
            is_text = line.lstrip().startswith(("#", "**", "- **"))
            if OPEN.search(line) and not ("warning" in near and is_text):
                found.append(f"{path.relative_to(ROOT)}:{number + 1}")
    assert found == []


def test_every_dashboard_and_mlflow_that_is_started_names_loopback():
    for path in shipped():
        text = path.read_text(errors="replace")
        hosts = re.findall(r"dashboard[-_]host[\"']?[=:]\s*[\"']?([\d.]+)", text)
        assert {h for h in hosts if h != "0.0.0.0"} <= {"127.0.0.1"}, path
        for line in re.findall(r"mlflow (?:ui|server)[^\n`]*--backend[^\n`]*", text):
            assert "--host 127.0.0.1" in line, path


# Reads what it has not written itself; the official CIFAR files are pickles, whose md5 is checked first.
UNPICKLES = re.compile(
    r"\bpickle\.loads?\(|\bcloudpickle\.loads?\(|Unpickler|torch\.load\(|joblib\.load\(|allow_pickle=True"
    r"|dill\.loads?|yaml\.(load|unsafe_load|full_load)\("
)


def test_nothing_from_storage_is_unpickled():
    found = {
        str(path.relative_to(ROOT))
        for path in shipped()
        if path.suffix == ".py"
        for line in path.read_text().splitlines()
        if UNPICKLES.search(line) and "weights_only=True" not in line
    }
    assert found <= {"diffult_ray/data/cifar.py"}, found


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "uri",
    [f"https://me:{SECRET}@mlflow.example.org/x", f"https://mlflow.example.org/?token={SECRET}",
     f"https://mlflow.example.org/?password={SECRET}&a=1"],
)
def test_a_planted_secret_reaches_no_file_of_the_sweep(uri, tmp_path):
    plan = make_plan(config.load("digits", [f"tracking.uri={uri}"]))
    session = sweep.Session(plan, Store(tmp_path), sweep._parser().parse_args([]), "")
    session._write_definition()
    files.write_json(session.folder / "shown.json", session._shown_uri())
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"mlflow.example.org" in written and SECRET.encode() not in written


def test_a_planted_secret_is_not_in_the_command_that_the_report_shows():
    arguments = sweep._parser().parse_args([])
    told = sweep._command("digits", [f"tracking.uri=https://me:{SECRET}@mlflow.example.org"], arguments)
    assert "mlflow.example.org" in told and SECRET not in told
