"""A driver that ends in whatever way: its exit code, and what it leaves behind. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import pytest

from diffult_ray import __version__, processes

HEAD = """
import os, signal, subprocess, sys, time
from diffult_ray import supervisor

def orphan():
    'A process whose parent has ended, as are those of a raylet that was killed.'
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3).pid)"
    made = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True).stdout
    print('orphan', made.strip(), flush=True)

def work():
"""
TAIL = """
sys.exit(supervisor.supervise(work, lambda: print("tidied")))
"""


def runs(pid: int) -> bool:
    found = processes.look(pid)
    return found is not None and not found.ended


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(body: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(HEAD + textwrap.indent(textwrap.dedent(body), "    ") + TAIL)
        process = subprocess.Popen(
            [sys.executable, str(script)], text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def number(process: subprocess.Popen[str], word: str) -> int:
    """Of the next line, which is `word number`."""
    said, told = process.stdout.readline().split()
    assert said == word
    return int(told)


@pytest.mark.parametrize("code", [0, 1, 2, 4])
def test_a_code_that_was_meant_is_told(start, code):
    process = start(f"return {code}")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == code


def test_the_code_stands_whatever_the_end_of_the_process_makes_of_it(start):
    process = start("""
        import atexit
        atexit.register(os._exit, 1)
        return 4
    """)
    process.communicate(timeout=60)
    assert process.returncode == 4


def test_an_error_and_an_exit_are_as_without_it(start):
    process = start("raise ValueError('broken')")
    said, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "ValueError: broken" in told and said == "tidied\n"
    process = start("sys.exit(3)")
    process.communicate(timeout=60)
    assert process.returncode == 3
    process = start("sys.exit()")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_the_command_tells_its_version_once():
    command = [sys.executable, "-m", "diffult_ray.sweep", "--version"]
    assert subprocess.check_output(command, text=True, timeout=60) == f"{__version__}\n"


@pytest.mark.parametrize("number_", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("end", ["os._exit(1)", "os.abort()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_driver_that_breaks_off_at_a_signal_was_interrupted(start, number_, end):
    process = start(f"""
        orphan()
        try:
            print('driver', os.getpid(), flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            {end}
    """)
    orphan = number(process, "orphan")
    assert runs(orphan) and number(process, "driver") != process.pid
    process.send_signal(number_)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "interrupted; the same command continues\n" and said == "tidied\n"
    assert not runs(orphan)


def test_a_signal_to_all_processes_of_the_group_comes_once(start):
    process = start("""
        heard = 0
        while True:
            try:
                if not heard:
                    print('driver', os.getpid(), flush=True)
                time.sleep(0.5 if heard else 600)
                break
            except KeyboardInterrupt:
                heard += 1
        from diffult_ray import interruption
        interruption.heard()
        return heard
    """)
    number(process, "driver")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1  # times


def test_a_driver_that_was_killed_is_told_of_and_nothing_of_it_is_left(start):
    process = start("""
        orphan()
        print('driver', os.getpid(), flush=True)
        time.sleep(600)
    """)
    orphan, driver = number(process, "orphan"), number(process, "driver")
    os.kill(driver, signal.SIGKILL)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert told == "error: the driver was ended by SIGKILL; the same command continues\n"
    assert said == "tidied\n" and not runs(orphan)


def test_a_driver_does_not_outlive_the_process_that_was_started(start):
    process = start("""
        print('driver', os.getpid(), flush=True)
        time.sleep(600)
    """)
    driver = number(process, "driver")
    process.kill()
    process.wait(60)
    end = time.monotonic() + 10
    while runs(driver):
        assert time.monotonic() < end
        time.sleep(0.01)
