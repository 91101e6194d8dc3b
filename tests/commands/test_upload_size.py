"""The size of an upload is that of the package that Ray makes, and what the dashboard would refuse is refused before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package

from voco.commands.upload_size import check_upload_size, package_bytes, package_sizes
from voco.errors import Refused


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with ignored files at two levels, an empty folder, Ray's default excludes and a name beyond ASCII."""
    root = tmp_path / "project"
    contents = {
        "job.yaml": "name: x", "jobs/größe.yaml": "a: 1", "data/.gitignore": "*.bin\n", "data/big.bin": "x" * 5000,
        "data/small.txt": "y" * 333, ".rayignore": "out\n", "out/model": "z" * 9000, ".git/objects/ab": "g" * 7000,
        ".venv/lib/site.py": "v" * 7000, "src/__pycache__/a.pyc": "c" * 100, "src/a.py": "pass\n",
    }  # fmt: skip
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "empty").mkdir()
    return root


def packed_bytes(project: Path) -> int:
    """Bytes of the package of Ray's own."""
    package = project.parent / "package.zip"
    package.unlink(missing_ok=True)
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    return package.stat().st_size


def test_the_size_is_that_of_rays_package(project: Path) -> None:
    sizes = package_sizes(str(project))
    assert set(sizes) == {
        "job.yaml", "jobs/größe.yaml", "data/.gitignore", "data/small.txt", ".rayignore", "src/a.py", "empty/",
    }  # fmt: skip
    assert package_bytes(sizes) == packed_bytes(project)
    check_upload_size(str(project))


def test_one_byte_above_the_limit_is_refused_with_the_largest_files(project: Path) -> None:
    limit = ray_constants.DASHBOARD_CLIENT_MAX_SIZE
    for number in range(4):
        (project / f"part-{number}").write_bytes(os.urandom(1000 + number))
    room = limit - package_bytes(package_sizes(str(project)) | {"weights.pt": 0})
    with (project / "weights.pt").open("wb") as file:  # sparse: a hole of the disk, but every byte would be sent
        file.write(os.urandom(1 << 20))
        file.truncate(room)
    assert packed_bytes(project) == limit
    check_upload_size(str(project))
    with (project / "weights.pt").open("ab") as file:
        file.write(b"1")
    with pytest.raises(Refused) as refused:
        check_upload_size(str(project))
    message = str(refused.value)
    assert "\n" not in message
    assert "12 files, 104,857,601 bytes, would be uploaded with the job, and a Ray dashboard takes at most 104,857,600" in message
    assert ".rayignore" in message
    assert message.endswith("the largest: weights.pt 100.0 MiB, part-3 1,003 B, part-2 1,002 B, part-1 1,001 B, part-0 1,000 B")
    (project / ".rayignore").write_text("out\nweights.pt\n")
    check_upload_size(str(project))
