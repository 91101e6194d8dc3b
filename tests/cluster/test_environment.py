"""`cluster/environment.py`: pip's settings for uv, an interrupted call, two calls at once, and the pins of this environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from cluster import environment

ROOT = Path(__file__).parents[2]
OWN_UV = ROOT / ".venv" / "uv" / "bin"
BACKEND = """
import pathlib, time, zipfile
HERE = pathlib.Path(__file__).parent

def build_wheel(folder, settings=None, metadata=None):
    with open(HERE / "builds", "a") as builds:
        builds.write("x")
    while not (HERE / "released").exists():
        time.sleep(0.05)
    info = "pear-1.0.dist-info/"
    files = {
        "pear.py": "",
        info + "METADATA": "Metadata-Version: 2.1\\nName: pear\\nVersion: 1.0\\n",
        info + "WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    with zipfile.ZipFile(HERE / folder / "pear-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(info + "RECORD", "".join(f"{name},,\\n" for name in [*files, info + "RECORD"]))
    return "pear-1.0-py3-none-any.whl"
"""


def test_settings_of_pip_become_those_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "7")
    listing = "\n".join(
        (
            ":env:.default-timeout='60'",
            ":env:.find-links='/wheels https://example.org/wheels'",
            "download.index-url='https://example.org/other'",
            "global.cert='/certificates.pem'",
            "global.constraint='/a.txt /b.txt'",
            "global.find-links='/overridden'",
            "global.index-url='https://name:word@example.org/simple'",
            "install.extra-index-url='file:///first\\nfile:///second'",
            "install.quiet='1'",
        )
    )
    settings, options = environment.uv_settings(environment.parse_settings(listing))
    assert settings == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://name:word@example.org/simple",
        "UV_INDEX": "file:///first file:///second",
        "UV_FIND_LINKS": "/wheels,https://example.org/wheels",
        "UV_HTTP_TIMEOUT": "7",
        "SSL_CERT_FILE": "/certificates.pem",
    }
    assert options == ["-c", "/a.txt", "-c", "/b.txt"]


def test_a_setting_that_uv_does_not_have_means_pip() -> None:
    assert environment.uv_settings({"quiet": "1", "no-index": "false", "prefix": "/opt"}) == "prefix"


def test_this_environment_has_the_pinned_versions() -> None:
    """Whoever installed it, uv or pip: every package is pinned and has its pin, but for what comes with `python -m venv`."""

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    packages = sysconfig.get_path("purelib")  # other tests put further folders on the path
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    distributions = importlib.metadata.distributions(path=[packages])
    installed = {canonical(item.name): item.version.partition("+")[0] for item in distributions}
    assert len(installed) > 100
    for name, version in installed.items():
        if name not in ("pip", "setuptools", "voco", "fruit"):
            assert pins.get(name) == version, name


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package whose build waits until a file `released` is there, and says in `builds` how often it began."""
    (tmp_path / "pear").mkdir()
    (tmp_path / "pear" / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "pear"\nversion = "1.0"\n'
    )
    (tmp_path / "pear" / "backend.py").write_text(BACKEND)
    (tmp_path / "pins.txt").write_text("./pear\n")
    return tmp_path


def start(project: Path) -> subprocess.Popen[str]:
    """`environment.py` in a separate process group, without an index; with the uv that `make env` installed, else pip."""
    path = f"{OWN_UV}:{os.environ['PATH']}"
    values = {**os.environ, "PATH": path, "PIP_NO_INDEX": "1", "UV_CACHE_DIR": str(project / "cache")}
    command = [sys.executable, str(ROOT / "cluster/environment.py"), ".venv/.ready", "-r", "pins.txt"]
    return subprocess.Popen(
        command, cwd=project, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_build(project: Path) -> None:
    deadline = time.monotonic() + 300
    while not (project / "pear" / "builds").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def imports(project: Path) -> bool:
    return subprocess.run([project / ".venv/bin/python", "-c", "import pear"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_call_is_made_good_by_the_next(project: Path, number: signal.Signals) -> None:
    first = start(project)
    wait_for_build(project)
    os.killpg(first.pid, number)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], output
    assert not (project / ".venv/.ready").exists()
    assert not imports(project)
    (project / ".venv" / "half").touch()  # the rest of an interrupted installation
    (project / "pear" / "released").touch()
    second = start(project)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert (project / ".venv/.ready").exists()
    assert not (project / ".venv/half").exists()
    assert imports(project)


@pytest.mark.slow
def test_two_calls_at_once_install_once(project: Path) -> None:
    first = start(project)
    wait_for_build(project)
    second = start(project)
    assert second.stdout is not None
    assert "waiting for another call" in second.stdout.readline()
    (project / "pear" / "released").touch()
    assert first.wait(timeout=300) == second.wait(timeout=300) == 0
    assert (project / "pear" / "builds").read_text() == "x"
    assert imports(project)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv", path=str(OWN_UV)) is None, reason="uv of the PATH or pip made this environment")
def test_the_lock_outlives_a_killed_caller(project: Path) -> None:
    """Its installer still runs: a second call must not begin beside it."""
    first = start(project)
    wait_for_build(project)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = start(project)
    assert second.stdout is not None
    assert "waiting for another call" in second.stdout.readline()
    (project / "pear" / "released").touch()
    assert second.wait(timeout=300) == 0
    assert imports(project)
