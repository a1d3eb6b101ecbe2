"""Open the records of a source: a file, a folder, a Hub dataset, or a file that ships with lora_kit.

Records are read by index and keep their place, so that every message about a record names its file and line. The
records held out for validation are a function of (seed, number of records), so every process can compute them.
"""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_kit.data.files import SUFFIXES, Part, Record, load_rows, open_file
from lora_kit.data.order import permute
from lora_kit.errors import DataError
from lora_kit.randomness import mix

ASSETS = Path(__file__).parents[1] / "assets"
ENDINGS = "ing|ate|ation|uate|uation"
SPLIT_IN_NAME = re.compile(rf"(?<![a-z])(train|valid|val|dev|eval|test)(?:{ENDINGS})?(?![a-z])")
SPLITS = {"train": "train", "test": "test"}  # all other words mean validation
COLUMN_SAMPLE = 1000  # the number of records whose keys make the column names


class HubName(NamedTuple):
    """The parts of `name:config@revision[split]`."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Records:
    """The records of a source, read by their index.

    Attributes:
        name: The source as written in the recipe.
        parts: The files of the source.
        rows: For each record the index of its row, counted over all parts; ascending. Blank lines, and records that are
            not selected (e.g. held out), have no entry.
    """

    name: str
    parts: tuple[Part, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return the place of record `index`, e.g. `data/train.jsonl:41`."""
        part, number = self._locate(int(self.rows[index]))
        return part.where(number)

    def read(self, start: int, stop: int) -> list[Record | DataError]:
        """Return the records [start, stop), or the error for a record that cannot be read."""
        result: list[Record | DataError] = []
        places = [self._locate(int(row)) for row in self.rows[start:stop]]
        for part in self.parts:
            if numbers := [number for owner, number in places if owner is part]:
                result.extend(part.read(numbers))
        return result

    def select(self, indices: np.ndarray) -> "Records":
        """Return only the records of these ascending indices."""
        return replace(self, rows=self.rows[indices])

    @property
    def columns(self) -> list[str]:
        """The keys of the first 1,000 records, in order of first appearance."""
        sample = self.read(0, COLUMN_SAMPLE)
        return list(dict.fromkeys(key for record in sample if isinstance(record, dict) for key in record))

    def _locate(self, row: int) -> tuple[Part, int]:
        """Return the part that contains a row, and the index of the row inside the part."""
        for part in self.parts:
            if row < len(part.rows):
                return part, row
            row -= len(part.rows)
        raise IndexError(f"{self.name}: the row is after the last row")


def load(source: str, *, base_dir: Path, max_examples: int | None = None) -> Records:
    """Open a source.

    Args:
        source: A file, a folder, `folder[split]`, `builtin:NAME`, or a Hub dataset `name:config@revision[split]`.
        base_dir: The folder where relative paths start.
        max_examples: Keep only the first N records; None keeps all.

    Raises:
        DataError: The source does not exist, cannot be read, or is empty.
    """
    found = files(source, base_dir)
    parts = [_from_hub(source)] if found is None else [open_file(path, label) for label, path in found.items()]
    before = np.cumsum([0, *(len(part.rows) for part in parts)])
    numbers = [start + part.numbers() for start, part in zip(before, parts, strict=False)]
    rows = np.concatenate(numbers)[:max_examples]
    if not len(rows):
        raise DataError(f"{source}: it contains no records")
    return Records(source, tuple(parts), rows)


def files(source: str, base_dir: Path) -> dict[str, Path] | None:
    """Return the files of a source by their names in messages, in the order of reading; None for a Hub dataset.

    Raises:
        DataError: The source does not exist or is not a regular file, or it is a folder without data files or with
            files of several formats.
    """
    path, split_name = _local(source, base_dir)
    if path is None:
        return None
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{source}: not a regular file; data is read more than once, so write it to a file first")
        return {source: path}
    folder = source.partition("[")[0].rstrip("/")
    return {f"{folder}/{file.relative_to(path)}": file for file in _files_of(path, source, split_name)}


def split(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """Split records at random into training and validation records.

    Args:
        records: The records.
        fraction: The share of validation records, between 0 and 1.
        seed: Selects the validation records.

    Returns:
        The training records and the validation records, both in the original order.

    Raises:
        DataError: There are fewer than two records.
    """
    if len(records) < 2:
        raise DataError(f"data.validation: {records.name} has only one record, so none can be held out; set a file")
    chosen = validation_indices(len(records), fraction, seed)
    rest = np.setdiff1d(np.arange(len(records)), chosen, assume_unique=True)
    return records.select(rest), records.select(chosen)


def validation_indices(count: int, fraction: float, seed: int) -> np.ndarray:
    """Return the indices of the held-out records out of `count`, ascending: at least one, and never all."""
    held_out = min(max(1, round(count * fraction)), count - 1)
    return np.sort(permute(np.arange(held_out), count, mix(seed, 3)))


def parse_hub_name(source: str) -> HubName | None:
    """Parse `name:config@revision[split]`; return None if the text does not have this form."""
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([^@\[\]]+))?(?:@([^\[\]]+))?(?:\[(.+)\])?", source)
    return HubName(*match.groups()) if match else None


def _local(source: str, base_dir: Path) -> tuple[Path | None, str | None]:
    """Return the existing path that a source names, and its split; (None, None) for a Hub name.

    Raises:
        DataError: The source can only be a path, and the path does not exist.
    """
    match = re.fullmatch(r"(.+?)(?:\[(\w+)\])?", source)
    name, split_name = match.groups() if match else (source, None)
    if name.startswith("builtin:"):
        return _builtin(name.removeprefix("builtin:")), split_name
    for text, chosen in ((source, None), (name, split_name)):
        path = base_dir / Path(text).expanduser()
        if path.exists():
            return path, chosen
    is_path = path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not is_path and parse_hub_name(source):
        return None, None
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, siblings)
    hint = f"did you mean {similar[0]}?" if similar else "relative paths start in the recipe's folder"
    raise DataError(f"{source}: {path} does not exist; {hint}")


def _builtin(name: str) -> Path:
    for path in (ASSETS / name, *(ASSETS / f"{name}{suffix}" for suffix in SUFFIXES)):
        if name and path.exists():
            return path
    known = sorted(path.name for path in ASSETS.glob("*") if path.suffix in SUFFIXES or path.is_dir())
    raise DataError(f"builtin:{name}: not shipped with lora_kit; choose one of {', '.join(known) or 'none'}")


def _files_of(folder: Path, source: str, split_name: str | None) -> list[Path]:
    """Return the data files of a split in a folder, sorted by name.

    A file belongs to validation or test if its name contains a word such as valid, dev or test, otherwise to train.

    Raises:
        DataError: The folder has no data file, files of several formats, or no file of the split.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    formats = sorted({SUFFIXES[path.suffix] for path in files})
    if len(formats) != 1:
        found = f"files of several formats ({', '.join(formats)})" if formats else f"no file of {', '.join(SUFFIXES)}"
        raise DataError(f"{source}: the folder has {found}; name a single file")
    groups: dict[str, list[Path]] = {}
    for path in files:
        word = SPLIT_IN_NAME.search(path.stem.lower())
        groups.setdefault(SPLITS.get(word[1], "validation") if word else "train", []).append(path)
    chosen = split_name or "train"
    if chosen not in groups:
        raise DataError(f"{source}: no file name contains the split {chosen}; found files for {', '.join(groups)}")
    return groups[chosen]


def _from_hub(source: str) -> Part:
    parts = parse_hub_name(source)
    assert parts is not None
    name, config, revision, split_name = parts
    try:
        rows = load_rows(source, name, config, revision=revision, split=split_name or "train")
    except DataError as error:
        raise DataError(
            f"{error}; the recipe's folder has no such file either. For a Hub dataset check the network, the "
            "name (name:config@revision[split]) and, if it is private, `hf auth login`"
        ) from error
    return Part(source, None, "hub", rows)
