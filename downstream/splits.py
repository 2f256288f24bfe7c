"""Which cases train, validate and test: split by patient, kept in a file, and which of them carry labels."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from datasets.index import IMAGE_SUFFIXES
from utils.config import read_yaml
from utils.errors import UserError
from utils.files import read_json, write_json

SUFFIXES = (".nii.gz", ".nii", ".npy", *sorted(IMAGE_SUFFIXES))  # that the name of a case may carry or leave out


@dataclass(frozen=True)
class Split:
    """Names of the cases of each part."""

    train: list[str]
    validation: list[str]
    test: list[str]


PARTS = tuple(part.name for part in fields(Split))


def make_split(cases: Sequence[str], patients: Sequence[str], fractions: Sequence[float], seed: int) -> Split:
    """Draw a split in which all cases of a patient are in one part; it depends on the names and the seed alone.

    patients: of each case.  fractions: of the patients in train, validation and test; every part whose fraction is
    above 0 gets at least one. Raises UserError where that cannot be done.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions: {list(fractions)} must be three numbers (train, validation, test) that sum to 1")
    people = sorted(set(patients))
    counts = [max(round(fraction * len(people)), 1) if fraction else 0 for fraction in fractions]
    if len(people) < np.count_nonzero(counts):
        raise UserError(f"{len(people)} patient(s) cannot be split into {np.count_nonzero(counts)} parts; give --split")
    while sum(counts) != len(people):  # rounding: the largest part gives or takes
        counts[int(np.argmax(counts))] += 1 if sum(counts) < len(people) else -1
    drawn = np.array(people)[np.random.default_rng(seed).permutation(len(people))]
    part_of = dict(zip(drawn.tolist(), np.repeat(range(3), counts).tolist(), strict=True))
    of = dict(zip(cases, patients, strict=True))
    return Split(*(sorted(case for case in of if part_of[of[case]] == part) for part in range(3)))


def check_split(split: Split, patients: Mapping[str, str]) -> None:
    """Raise UserError for a case that is not among `patients`, or named twice, and for a patient in two parts."""
    part_of: dict[str, str] = {}  # of each patient
    seen: set[str] = set()
    for part, case in ((name, case) for name, cases in asdict(split).items() for case in cases):
        if case not in patients:
            raise UserError(f"split: {part} names {case!r}, which is not among the {len(patients)} cases found")
        if case in seen:
            raise UserError(f"split: {case!r} is named twice; name every case once")
        seen.add(case)
        if (other := part_of.setdefault(patients[case], part)) != part:
            where = f"in {other} and, with {case}, in {part}"
            raise UserError(f"split: patient {patients[case]} is in two parts: {where}; put all cases into one")


def draw_split(
    file: str | None, fractions: Sequence[float], patients: Mapping[str, str], seed: int, needed: Sequence[str] = PARTS
) -> Split:
    """The split in a file, or one drawn by patient; checked: UserError.

    patients: of every case.  needed: parts that must not be empty.
    """
    split = read_split(file, patients) if file else make_split([*patients], [*patients.values()], fractions, seed)
    check_split(split, patients)
    for part in needed:
        if not getattr(split, part):
            raise UserError(f"split: {part} has no case; change {file or '--fractions'}")
    return split


def read_split(file: str, patients: Mapping[str, str]) -> Split:
    """The split in a YAML or JSON file, with the names that cases have; a name of no case stays as it is.

    A file may leave out folders and suffixes or have those of another task, so that one made for `segment` serves
    `classify` on the same volumes, and it may name a patient in place of all of the patient's cases.
    Raises UserError naming what is wrong with it.
    """
    path, naming = Path(file), Naming(patients)
    try:
        values = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"split: {path}: cannot be read ({error}); correct it, or leave --split out") from None
    parts = [values.get(part) for part in PARTS] if isinstance(values, dict) and set(values) == set(PARTS) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in parts):
        lists = ", ".join(PARTS)
        raise UserError(f"{path}: must hold the lists {lists} of case names (quoted where they are numbers), no more")

    of_patient = defaultdict(list)
    for case, patient in patients.items():
        of_patient[patient].append(case)

    def cases(name: str) -> list[str]:
        found = naming.find(name, "split") or naming.find(Path(name).name, "split")
        return [found] if found else of_patient.get(name, [name])

    return Split(*([case for name in names for case in cases(name)] for names in parts))


def write_split(split: Split, path: Path) -> None:
    write_json(asdict(split), path)


def choose_labelled(
    train: Sequence[str], count: int, seed: int, patients: Mapping[str, str] | None = None
) -> list[str]:
    """`count` of the training cases, 0: all; those of a smaller count are the first of a larger one.

    patients: of the cases; all cases of one come before the next patient's, as people annotate them.
    Raises UserError for more than there are.
    """
    if count > len(train):
        raise UserError(f"labelled: {count} cases were asked for; the split has {len(train)} for training")
    of = defaultdict(list)
    for case in sorted(train):
        of[patients[case] if patients else case].append(case)
    people = sorted(of)
    order = np.random.default_rng(seed).permutation(len(people))
    return [case for i in order for case in of[people[i]]][: count or None]


def choose_by_turns(train: Sequence[str], labels: Mapping[str, int], count: int, seed: int) -> list[str]:
    """As `choose_labelled`, the classes by turns, so that few labels show every class; each keeps that order."""
    choose_labelled(train, count, seed)  # checks the count
    classes = sorted({labels[case] for case in train})
    queues = [choose_labelled([case for case in train if labels[case] == k], 0, seed) for k in classes]
    turns = [case for turn in itertools.zip_longest(*queues) for case in turn if case is not None]
    return turns[: count or len(turns)]


def without_suffix(name: str) -> str:
    """`a/b.nii.gz` -> `a/b`, for all file types that hold cases; other endings stay."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


class Naming:
    """How people may name cases: by the path or the file name, each with or without its suffix."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names, self.known = set(names), defaultdict(set)
        for name in self.names:
            for way in (name, without_suffix(name), Path(name).name, without_suffix(Path(name).name)):
                self.known[way].add(name)

    def find(self, name: str, where: str) -> str | None:
        """The case, None where there is none. Raises UserError, which `where` begins, for several."""
        found = sorted({name} & self.names or self.known.get(name) or self.known.get(without_suffix(name)) or ())
        if len(found) > 1:
            raise UserError(f"{where}: {name!r} may be {found[0]} or {found[1]}; write the path below data_path")
        return found[0] if found else None
