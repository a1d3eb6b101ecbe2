"""Open the records of a source: a file, a folder, a Hub dataset, or a file that ships with lora_kit.

Records are read by index and keep their place, so that every message about a record names its file and line. The
records held out for validation are a function of (seed, number of records), so every process can compute them.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_kit.data.files import SUFFIXES, Part, Record, open_file, read_text, stem_of, suffix_of
from lora_kit.data.order import permute
from lora_kit.data.strict_json import loads
from lora_kit.data.tables import TablePart, hub_part
from lora_kit.data.urls import download, is_url
from lora_kit.errors import DataError
from lora_kit.files import path_in
from lora_kit.randomness import mix

ASSETS = Path(__file__).parents[1] / "assets"
ENDINGS = "ing|ate|ation|uate|uation"
SPLIT_IN_NAME = re.compile(rf"(?<![a-z])(train|valid|val|dev|eval|test)(?:{ENDINGS})?(?![a-z])")
SPLITS = {"train": "train", "test": "test", "eval": "test"}  # the other words mean validation, as in `datasets`
SHARD = re.compile(r"(?:(?P<name>.+)-)?(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{8,})?")
SAVED = "state.json"  # the file in a folder of `Dataset.save_to_disk` that lists the others
NO_DATA = re.compile(  # files beside the data that hold no records, in lower case
    r"(config|dataset_infos?|dataset_dict|metadata|package|state)\.json|(readme|licen[cs]e|notice|requirements)\.txt"
)
COLUMN_SAMPLE = 1000  # records whose keys are the column names


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
        rows: For each record its number, counted over all parts; ascending. Records that are not selected (e.g. held
            out) have no entry.
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
        rows = self.rows[start:stop]
        owners = np.searchsorted(self._ends, rows, side="right")
        result: list[Record | DataError] = []
        for owner in np.unique(owners):
            result.extend(self.parts[owner].read((rows[owners == owner] - self._starts[owner]).tolist()))
        return result

    def select(self, indices: np.ndarray) -> "Records":
        """Return only the records of these ascending indices."""
        return replace(self, rows=self.rows[indices])

    @property
    def columns(self) -> list[str]:
        """The keys of the first 1,000 records that have any among them, in order of first appearance."""
        for start in range(0, len(self), COLUMN_SAMPLE):
            sample = self.read(start, start + COLUMN_SAMPLE)
            if keys := list(dict.fromkeys(key for record in sample if isinstance(record, dict) for key in record)):
                return keys
        return []

    @cached_property
    def _ends(self) -> np.ndarray:
        """The number of rows up to the end of each part, int64 [parts]."""
        return np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    @property
    def _starts(self) -> np.ndarray:
        """The number of rows before each part, int64 [parts]."""
        return np.concatenate([[0], self._ends[:-1]])

    def _locate(self, row: int) -> tuple[Part, int]:
        """Return the part that contains a row, and the number of the row inside the part."""
        owner = int(np.searchsorted(self._ends, row, side="right"))
        return self.parts[owner], row - int(self._starts[owner])


def load(source: str, *, base_dir: Path, max_examples: int | None = None, documents: bool = False) -> Records:
    """Open a source.

    Args:
        source: A file, a folder, `folder[split]`, `builtin:NAME`, a Hub dataset `name:config@revision[split]`, or the
            URL of a file or folder.
        base_dir: The folder where relative paths start.
        max_examples: Keep only the first N records; None keeps all.
        documents: Whether a .txt file is a single record; otherwise each of its lines is.

    Raises:
        DataError: The source does not exist, cannot be read, or is empty.
    """
    found = files(source, base_dir)
    parts: list[Part] = (
        [_from_hub(source)]
        if found is None
        else [open_file(path, label, documents=documents) for label, path in found.items()]
    )
    rows = np.arange(sum(map(len, parts)))[:max_examples]
    if not len(rows):
        raise DataError(f"{source}: it contains no records; write at least one")
    return Records(source, tuple(parts), rows)


def files(source: str, base_dir: Path) -> dict[str, Path] | None:
    """Return the files of a source by their names in messages, in the order of reading; None for a Hub dataset.

    Raises:
        DataError: The source does not exist, or is a folder without data files or with files of several formats.
    """
    path, split_name = _local(source, base_dir)
    if path is None:
        return None
    if path.is_dir():
        folder = source.removesuffix(f"[{split_name}]").rstrip("/")
        return {f"{folder}/{_printable(file.relative_to(path))}": file for file in _files_of(path, source, split_name)}
    if not path.is_file():
        raise DataError(f"{source}: not a regular file (perhaps a pipe); write the records to a file first")
    return {source: path}


def _printable(path: Path) -> str:
    """Return a path with `\\xNN` in place of each byte that is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


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


def path_of(text: str, base_dir: Path, label: str) -> Path:
    """Return the path of a text, which may begin with `~`; it may not exist.

    Raises:
        DataError: The home folder is unknown, the name is too long, or a folder of the path cannot be searched.
    """
    try:
        return path_in(base_dir, text)
    except OSError as error:
        raise DataError(
            f"{label}: the path cannot be used: {error.strerror}; check its spelling and permissions"
        ) from error


def _local(source: str, base_dir: Path) -> tuple[Path | None, str | None]:
    """Return the existing path that a source names, and its split; (None, None) for a Hub name.

    Raises:
        DataError: The source can only be a path, and the path does not exist.
    """
    match = re.fullmatch(r"(.+?)(?:\[(\w+)\])?", source)
    name, split_name = match.groups() if match else (source, None)
    if name.startswith("builtin:"):
        return _builtin(name.removeprefix("builtin:")), split_name
    if is_url(name):
        return download(name), split_name
    for text, chosen in ((source, None), (name, split_name)):
        path = path_of(text, base_dir, source)
        if path.exists():
            return path, chosen
    is_path = suffix_of(path) in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not is_path and parse_hub_name(source):
        return None, None
    siblings = list[str]()
    with suppress(OSError, ValueError):  # there is no such folder, or it cannot be read
        siblings = os.listdir(path.parent)  # noqa: PTH208
    similar = difflib.get_close_matches(path.name, siblings)
    hint = f"did you mean {similar[0]}?" if similar else "relative paths start in the recipe's folder"
    if re.search(r"[*?{]", path.name):
        hint = "patterns are not expanded, so name the folder to read all files in it"
    raise DataError(f"{source}: {path} does not exist; {hint}")


def _builtin(name: str) -> Path:
    shipped = {path.name: path for path in ASSETS.iterdir() if suffix_of(path) in SUFFIXES or path.is_dir()}
    for spelling in (name, *(f"{name}{suffix}" for suffix in SUFFIXES)):
        if spelling in shipped:
            return shipped[spelling]
    known = ", ".join(sorted(shipped))
    raise DataError(f"builtin:{name}: not shipped with lora_kit; choose one of {known or 'none'}")


class DataFile(NamedTuple):
    """A data file in a folder.

    Attributes:
        path: The file.
        split: train, validation or test by the words in its path, of which those of folders count first.
        exact: The split as shards (`NAME-00000-of-00002`) or saved datasets name it, e.g. `train_sft`; else None.
    """

    path: Path
    split: str
    exact: str | None


def _files_of(folder: Path, source: str, split_name: str | None) -> list[Path]:
    """Return the data files of a split in a folder, sorted by name.

    A file belongs to validation or test if a folder in its path, or else its name, contains a word such as valid, dev
    or test, otherwise to train.

    Raises:
        DataError: The folder has no data file, files of several formats, no file of the split, or lacks a shard.
    """
    files = [_in_split(path, folder) for path in _walk(folder, source)]
    if not files:
        raise DataError(f"{source}: the folder has no file of {', '.join(SUFFIXES)}; name a single file")
    wanted = split_name or "train"
    by_word = [file for file in files if file.split == wanted]
    exact = [file for file in files if file.exact == wanted]
    chosen = sorted({*exact, *(file for file in by_word if file.exact is None)}) if exact else by_word
    names, bare = sorted({file.exact or file.split for file in files}), source.removesuffix(f"[{split_name}]")
    if not chosen:
        ways = " or ".join(f"{bare}[{name}]" for name in names)
        raise DataError(f"{source}: no file or folder name contains the split {wanted}; choose {ways}")
    if len(several := sorted({file.exact for file in chosen if file.exact})) > 1:
        raise DataError(
            f"{source}: the folder has the splits {' and '.join(several)}; choose one: {bare}[{several[0]}]"
        )
    paths = [file.path for file in chosen]
    by_format = {SUFFIXES[suffix_of(path)]: path.name for path in reversed(paths)}
    if len(by_format) > 1:
        found = ", ".join(f"{format}: {name}" for format, name in sorted(by_format.items()))
        raise DataError(f"{source}: the folder has files of several formats ({found}); name a single file")
    _check_shards(paths, source)
    return paths


def _walk(folder: Path, source: str) -> Iterator[Path]:
    """Yield the data files below a folder, by name. Hidden files and `__MACOSX` are left out, as `datasets` does.

    Raises:
        DataError: A folder cannot be read, or a data file is not a regular file.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{source}: {error.filename}: {error.strerror}; check its permissions") from error

    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        here = Path(name)
        if (real := here.resolve()) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__")))
        for path in _saved(here) if SAVED in files else [here / each for each in sorted(files)]:
            if path.name.startswith(".") or suffix_of(path) not in SUFFIXES or NO_DATA.fullmatch(path.name.lower()):
                continue
            if not path.is_file():
                raise DataError(f"{source}: {path} is not a regular file, or is a broken link; remove or replace it")
            yield path


def _saved(folder: Path) -> list[Path]:
    """Return the files of a folder of `Dataset.save_to_disk`, which may contain caches too.

    If the list of files is damaged, or names something other than files of this folder, all files are returned.
    """
    try:
        names = [entry["filename"] for entry in loads(read_text(folder / SAVED, SAVED))["_data_files"]]
    except (DataError, KeyError, TypeError):
        names = [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        names = sorted(os.listdir(folder))  # noqa: PTH208
    return [folder / name for name in names if not (folder / name).is_dir()]


def _in_split(path: Path, folder: Path) -> DataFile:
    """Return a file of a folder with its split."""
    *folders, _ = path.relative_to(folder).parts
    stem = stem_of(path)
    shard = SHARD.fullmatch(stem)
    exact = shard["name"] if shard and SPLIT_IN_NAME.search(stem.lower()) else None
    if (path.parent / SAVED).is_file():
        exact = path.parent.name if folders else None
    for text in (*reversed(folders), stem):
        if word := SPLIT_IN_NAME.search(text.lower()):
            return DataFile(path, SPLITS.get(word[1], "validation"), exact)
    return DataFile(path, "train", exact)


def _check_shards(paths: Sequence[Path], source: str) -> None:
    """Refuse a set of files `NAME-00000-of-00002` of which some are missing."""
    sets: dict[Any, set[int]] = {}
    for path in paths:
        if shard := SHARD.fullmatch(stem_of(path)):
            sets.setdefault((path.parent, shard["name"], int(shard["count"])), set()).add(int(shard["number"]))
    for (folder, name, count), numbers in sets.items():
        if missing := sorted(set(range(count)) - numbers):
            first = f"{folder / (name or '')}-{missing[0]:05d}-of-{count:05d}"
            raise DataError(f"{source}: {len(missing)} of {count} shards are missing, first {first}; copy them too")


def _from_hub(source: str) -> TablePart:
    parts = parse_hub_name(source)
    assert parts is not None
    name, config, revision, split_name = parts
    try:
        rows = _load_from_hub(source, name, config, revision=revision, split=split_name or "train")
    except DataError as error:
        raise DataError(
            f"{error}; the recipe's folder has no such file either. For a Hub dataset check the network, the "
            "name (name:config@revision[split]) and, if it is private, `hf auth login`"
        ) from error
    return hub_part(source, rows)


def _load_from_hub(label: str, *arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`, with its progress bars and log messages switched off.

    Raises:
        DataError: `load_dataset` raised an error.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # readers of many kinds are called here, each with its own errors
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{label}: cannot be read: {reason[0]}") from error
