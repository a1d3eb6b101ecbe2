"""Where records come from: files, folders, the Hub, and what ships with lora_kit.

Records are read by number and keep their place, so that every message about one names its file and line. What
is held out for validation is a function of (seed, number of records), so no process has to be told.
"""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_kit.data.files import SUFFIXES, Part, Record, open_file, read_with
from lora_kit.data.order import permute
from lora_kit.errors import DataError
from lora_kit.randomness import mix

ASSETS = Path(__file__).parents[1] / "assets"
ENDINGS = "ing|ate|ation|uate|uation"
SPLIT_IN_NAME = re.compile(rf"(?<![a-z])(train|valid|val|dev|eval|test)(?:{ENDINGS})?(?![a-z])")
SPLITS = {"train": "train", "test": "test"}  # every other of these words means validation
COLUMN_SAMPLE = 1000  # records whose keys are looked at to find the columns


class HubName(NamedTuple):
    """The parts of `name:config@revision[split]`."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Records:
    """Records with random access.

    Attributes:
        name: The source as the recipe names it.
        parts: Its files.
        positions: For each record its number over the rows of all parts; ascending.
    """

    name: str
    parts: tuple[Part, ...]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def where(self, index: int) -> str:
        """Return the place of record `index`, e.g. `data/train.jsonl:41`."""
        part, number = self._locate(int(self.positions[index]))
        return part.where(number)

    def read(self, start: int, stop: int) -> list[Record | DataError]:
        """Return records `start` to `stop`, or what is wrong with them."""
        found: list[Record | DataError] = []
        wanted = [self._locate(int(position)) for position in self.positions[start:stop]]
        for part in self.parts:
            if numbers := [number for owner, number in wanted if owner is part]:
                found.extend(part.read(numbers))
        return found

    def select(self, indices: np.ndarray) -> "Records":
        """Return the records of these indices, which ascend."""
        return replace(self, positions=self.positions[indices])

    @property
    def columns(self) -> list[str]:
        """The keys of the first records, in the order in which they appear."""
        sample = self.read(0, COLUMN_SAMPLE)
        return list(dict.fromkeys(key for record in sample if isinstance(record, dict) for key in record))

    def _locate(self, position: int) -> tuple[Part, int]:
        for part in self.parts:
            if position < len(part.rows):
                return part, position
            position -= len(part.rows)
        raise IndexError(position)


def load(source: str, *, base_dir: Path, max_examples: int | None = None) -> Records:
    """Open a source.

    Args:
        source: A file, a folder, `folder[split]`, `builtin:NAME`, or on the Hub
            `name:config@revision[split]`. base_dir: The folder that a relative path starts from: the
            recipe's. max_examples: Keep only the first ones.

    Raises:
        DataError: There is no such source, it cannot be read, or it is empty.
    """
    found = files(source, base_dir)
    if found is None:
        parts = [_from_hub(source)]
    else:
        path, _ = _local(source, base_dir)
        assert path is not None
        parts = [open_file(file, _label(file, path, source)) for file in found]
    before = np.cumsum([0, *(len(part.rows) for part in parts)])
    numbers = [start + part.numbers() for start, part in zip(before, parts, strict=False)]
    positions = np.concatenate(numbers)[:max_examples]
    if not len(positions):
        raise DataError(f"{source}: there are no records in it")
    return Records(source, tuple(parts), positions)


def files(source: str, base_dir: Path) -> list[Path] | None:
    """Return the files that a source is read from, in order; None when it is on the Hub.

    Raises:
        DataError: There is no such source, or it is a folder from which none can be chosen.
    """
    path, wanted = _local(source, base_dir)
    if path is None:
        return None
    return _files_of(path, source, wanted) if path.is_dir() else [path]


def split(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """Return the records to train on, and those held out.

    Raises:
        DataError: There are too few records for both to have some.
    """
    if len(records) < 2:
        raise DataError(f"data.validation: {records.name} has one record, so none can be held out; name a file")
    chosen = validation_indices(len(records), fraction, seed)
    rest = np.setdiff1d(np.arange(len(records)), chosen, assume_unique=True)
    return records.select(rest), records.select(chosen)


def validation_indices(count: int, fraction: float, seed: int) -> np.ndarray:
    """Return which of `count` records are held out, ascending: at least one, and never all."""
    wanted = min(max(1, round(count * fraction)), count - 1)
    return np.sort(permute(np.arange(wanted), count, mix(seed, 3)))


def parse_hub_name(source: str) -> HubName | None:
    """Take `name:config@revision[split]` apart; None when it is not such a name."""
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([^@\[\]]+))?(?:@([^\[\]]+))?(?:\[(.+)\])?", source)
    return HubName(*match.groups()) if match else None


def _local(source: str, base_dir: Path) -> tuple[Path | None, str | None]:
    """Return the path that a source names and its split; no path for a Hub name.

    Raises:
        DataError: It can only be a path, and nothing is there.
    """
    match = re.fullmatch(r"(.+?)(?:\[(\w+)\])?", source)
    name, wanted = match.groups() if match else (source, None)
    if name.startswith("builtin:"):
        return _builtin(name.removeprefix("builtin:")), wanted
    for text, chosen in ((source, None), (name, wanted)):
        path = base_dir / Path(text).expanduser()
        if path.exists():
            return path, chosen
    is_path = path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not is_path and parse_hub_name(source):
        return None, None
    siblings = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings)
    hint = f"did you mean {near[0]}?" if near else "a relative path starts from the recipe's folder"
    raise DataError(f"{source}: there is no {path}; {hint}")


def _builtin(name: str) -> Path:
    for path in (ASSETS / name, *(ASSETS / f"{name}{suffix}" for suffix in SUFFIXES)):
        if name and path.exists():
            return path
    known = sorted(path.name for path in ASSETS.glob("*") if path.suffix in SUFFIXES or path.is_dir())
    raise DataError(f"builtin:{name}: lora_kit ships no such data; it has {', '.join(known) or 'none'}")


def _files_of(folder: Path, source: str, wanted: str | None) -> list[Path]:
    """Return a folder's data files; where names say train, validation or test, those of the wanted split.

    Raises:
        DataError: There are none, or several kinds.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    kinds = sorted({SUFFIXES[path.suffix] for path in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else f"no file of {', '.join(SUFFIXES)}"
        raise DataError(f"{source}: the folder has {found}; name one file")
    groups: dict[str, list[Path]] = {}
    for path in files:
        word = SPLIT_IN_NAME.search(path.stem.lower())
        groups.setdefault(SPLITS.get(word[1], "validation") if word else "train", []).append(path)
    if (wanted or "train") not in groups:
        found = ", ".join(groups)
        raise DataError(f"{source}: no file is named for the split {wanted or 'train'}; the names say {found}")
    return groups[wanted or "train"]


def _label(file: Path, path: Path, source: str) -> str:
    return source if file == path else f"{source.partition('[')[0].rstrip('/')}/{file.relative_to(path)}"


def _from_hub(source: str) -> Part:
    parts = parse_hub_name(source)
    assert parts is not None
    name, config, revision, wanted = parts
    try:
        rows = read_with(
            source,
            lambda library: library.load_dataset(name, config, revision=revision, split=wanted or "train"),
        )
    except DataError as error:
        raise DataError(
            f"{error}; there is no such file beside the recipe either. For the Hub check the network, the "
            "name (name:config@revision[split]) and, for a private dataset, `hf auth login`"
        ) from error
    return Part(source, None, "hub", rows)
