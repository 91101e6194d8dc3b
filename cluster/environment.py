"""Make a virtual environment with pinned packages: by uv, which is several times quicker, and by pip where uv cannot.

    python cluster/environment.py VENV/STAMP INSTALL...

INSTALL are arguments that `uv pip install` and `pip install` share: `-c FILE`, `-r FILE`, `-e FOLDER[EXTRAS]`. STAMP appears when
the environment is ready. It is removed before anything else changes and written last, so an interrupted run leaves none, and the
next one begins with an empty environment. Two stamps of one environment are two sets of extras for the same pins: the second is
installed over the first. A lock beside the environment lets a second call wait for the first one's installer, even for one that
outlives a killed caller.

uv reads no settings of pip. They are translated, so that whoever has set up an index, a mirror or a certificate for pip need set
up nothing for uv; where uv has no equal setting, pip installs. It needs only the standard library.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

PYTHONS = ((3, 11), (3, 12))
OLDEST_UV = (0, 5)  # reads UV_INDEX and UV_DEFAULT_INDEX; an older one would ignore the user's indexes
# what every process of a run imports: it is compiled once here, not by each process at once, and an environment that cannot
# import it is not ready. Compiling everything would take ten times as long, nearly all for modules that nothing imports.
IMPORTS = (
    "torch",
    "deepspeed",
    "transformers",
    "pandas",
    "wandb",
    "ray.data",
    "ray.train.torch",
    "ray.tune",
    "ray.job_submission",
)
# settings of pip that do not change which packages it takes
NO_EFFECT = {
    "break-system-packages", "cache-dir", "compile", "disable-pip-version-check", "exists-action", "log", "no-color",
    "no-compile", "no-input", "no-python-version-warning", "no-warn-script-location", "progress-bar", "quiet",
    "require-virtualenv", "retries", "root-user-action", "use-feature", "verbose",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Make the environment, unless it is ready; returns the exit code."""
    stamp, install = Path(arguments[0]), arguments[1:]
    if sys.version_info[:2] not in PYTHONS:
        _say(f"expected Python 3.11 or 3.12, got {sys.version.split()[0]}; `make PYTHON=python3.11 env` takes another")
        return 2
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # so that the installer ends too, as after Ctrl-C
    try:
        with open(f"{stamp.parent}.lock", "w") as lock:
            _lock(lock, stamp.parent)
            return _make(stamp, install, lock)
    except KeyboardInterrupt:
        _say("interrupted; the next call begins with an empty environment")
        return 130


def _make(stamp: Path, install: list[str], lock: IO[str]) -> int:
    venv, pins = stamp.parent, _pins(install)
    stamps = [file for file in sorted(venv.glob(".ready*")) if file.read_text() == pins]
    if stamp in stamps:  # another call made it, or a file of the pins was only touched
        stamp.touch()
        return 0
    for file in venv.glob(".ready*"):
        file.unlink()
    installer = Installer(venv, lock)
    try:
        if not stamps:
            installer.create()
        if not installer.by_uv(install):
            installer.by_pip(install)
        installer.import_packages()
    except subprocess.CalledProcessError as error:
        print(installer.output, file=sys.stderr)
        _say(f"failed: {' '.join(error.cmd[:6])} ... ended with {error.returncode}; its output is above")
        return 1
    for file in {*stamps, stamp}:
        unfinished = file.with_name(f"unfinished{file.name}")
        unfinished.write_text(pins)
        unfinished.replace(file)
    _say(f"{venv} is ready; {', '.join(f'{part} {seconds:.1f} s' for part, seconds in installer.seconds.items())}")
    return 0


class Installer:
    """Runs the programs that fill `venv`. Each inherits the lock, and so keeps it if this process is killed.

    What they print goes to VENV.log. `output` is what the last one printed, `seconds` how long each part took.
    """

    def __init__(self, venv: Path, lock: IO[str]) -> None:
        self.venv = venv
        self.python = str(venv / "bin" / "python")
        self.own_uv = venv / "uv"  # beside site-packages, so that the list of packages does not depend on who installs them
        self.output = ""
        self.seconds: dict[str, float] = {}
        self._lock = lock
        self._log = Path(f"{venv}.log")
        self._log.write_text("")

    def create(self) -> None:
        """An empty environment, whatever was there."""
        _say(f"making {self.venv} with Python {sys.version.split()[0]}")
        self._run("venv", [sys.executable, "-m", "venv", "--clear", str(self.venv)])

    def by_uv(self, install: list[str]) -> bool:
        """Install with uv; False where there is none, where pip's settings have no equal, and where it fails."""
        settings = uv_settings(parse_settings(self._run("settings", [*self._pip("config"), "list"])))
        uv = None if isinstance(settings, str) else self._uv()
        if isinstance(settings, str):
            _say(f"uv has no equal of pip's setting {settings}, so pip installs, which takes minutes")
            return False
        if uv is None:
            _say("there is no uv on the PATH, and none for this machine in the index, so pip installs, which takes minutes")
            return False
        environment, options = settings
        _say(f"installing with {_version(uv)}")
        try:
            self._run("uv", [uv, "pip", "install", "--no-progress", "--python", self.python, *options, *install], environment)
        except subprocess.CalledProcessError:
            last_line = (self.output.strip().splitlines() or ["no output"])[-1].strip()
            _say(f"uv failed ({last_line}; more in {self._log}), so pip installs, which takes minutes")
            self.create()
            return False
        return True

    def by_pip(self, install: list[str]) -> None:
        """Install with pip."""
        self._run("pip", [*self._pip("install"), *install])

    def import_packages(self) -> None:
        """Import, and so compile, what every process imports, as far as this environment has it: `.venv-peers` has less."""
        code = (
            "import importlib, importlib.util, sys\n"
            "for name in sys.argv[1:]:\n"
            "    if importlib.util.find_spec(name.split('.')[0]):\n"
            "        importlib.import_module(name)"
        )
        self._run("first imports", [self.python, "-c", code, *IMPORTS], {"PYTHONDONTWRITEBYTECODE": ""})

    def _uv(self) -> str | None:
        """uv of the PATH, else the pinned one, which pip installs into the environment. None that must first be compiled."""
        uv = shutil.which("uv")
        if uv and tuple(int(part) for part in _version(uv).split()[1].split(".")[:2]) >= OLDEST_UV:
            return uv
        own = self.own_uv / "bin" / "uv"
        if not own.exists():
            options = ["--no-deps", "--only-binary", ":all:", "-c", "constraints.txt", "--target", str(self.own_uv)]
            try:
                self._run("uv itself", [*self._pip("install"), *options, "uv"])
            except subprocess.CalledProcessError:
                return None
        return str(own)

    def _pip(self, command: str) -> list[str]:
        return [self.python, "-m", "pip", "--disable-pip-version-check", command]

    def _run(self, part: str, command: list[str], environment: dict[str, str] | None = None) -> str:
        """What a command prints. Raises CalledProcessError if it fails; if this process is interrupted, the command is killed."""
        started = time.monotonic()
        with open(self._log, "a+") as log:
            start = log.tell()
            values = {**os.environ, **(environment or {})}
            done = subprocess.run(command, env=values, pass_fds=(self._lock.fileno(),), stdout=log, stderr=subprocess.STDOUT)
            log.seek(start)
            self.output = log.read()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
        done.check_returncode()
        return self.output


def parse_settings(listing: str) -> dict[str, str]:
    """What `pip install` sees, from `pip config list`: the environment before [install] before [global]."""
    settings: dict[str, str] = {}
    rows = [line.partition("=") for line in listing.splitlines() if "=" in line]
    for section in ("global.", "install.", ":env:."):
        for key, _, value in rows:
            if key.startswith(section):
                settings[key.removeprefix(section)] = str(ast.literal_eval(value))
    return settings


def uv_settings(settings: dict[str, str]) -> tuple[dict[str, str], list[str]] | str:
    """Environment and arguments with which uv takes the files that pip would; the name of a setting that has no equal.

    `unsafe-best-match` is what pip does: all indexes are one. Variables of uv that the user has set win. Constraints are
    arguments because UV_CONSTRAINT is ignored beside a `-c`; the rest is in the environment, where other users see no passwords.
    """
    environment, options = {"UV_INDEX_STRATEGY": "unsafe-best-match"}, []
    for key, value in settings.items():
        words = value.split()
        if key in NO_EFFECT or value.lower() in ("", "0", "false", "no", "off"):
            continue
        match key:
            case "index-url":
                environment["UV_DEFAULT_INDEX"] = value
            case "extra-index-url":
                environment["UV_INDEX"] = " ".join(words)
            case "find-links":
                environment["UV_FIND_LINKS"] = ",".join(words)
            case "trusted-host":
                environment["UV_INSECURE_HOST"] = " ".join(words)
            case "timeout" | "default-timeout":
                environment["UV_HTTP_TIMEOUT"] = str(int(float(value)))
            case "proxy":
                environment |= {"HTTP_PROXY": value, "HTTPS_PROXY": value}
            case "cert":
                environment["SSL_CERT_DIR" if os.path.isdir(value) else "SSL_CERT_FILE"] = value
            case "client-cert":
                environment["SSL_CLIENT_CERT"] = value
            case "constraint":
                options += [word for file in words for word in ("-c", file)]
            case "no-index":
                options.append("--no-index")
            case "no-cache-dir":
                options.append("--no-cache")
            case _:
                return key
    return {key: os.environ.get(key, value) if key.startswith("UV_") else value for key, value in environment.items()}, options


def _pins(install: list[str]) -> str:
    """What an environment of this Python must have been made from: a hash of the files that INSTALL names."""
    named = list(itertools.pairwise(install))
    files = {name for flag, name in named if flag in ("-c", "-r")}
    projects = {f"{name.split('[')[0]}/pyproject.toml" for flag, name in named if flag == "-e"}
    contents = [Path(file).read_bytes() for file in sorted(files | projects)]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *contents])).hexdigest() + "\n"


def _lock(lock: IO[str], venv: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(f"waiting for another call that makes {venv}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _version(uv: str) -> str:
    """`uv 0.13.9`."""
    return " ".join(subprocess.run([uv, "--version"], capture_output=True, text=True, check=True).stdout.split()[:2])


def _say(text: str) -> None:
    print(f"environment: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
