"""Which run of a case is shown where several have it."""

import pytest
import sample_results as sample

from benchmarks import recorded
from benchmarks.schema import RIVALS


def without(*names: str) -> dict:
    found = sample.cell()
    found["opponents"] = {name: o for name, o in found["opponents"].items() if name not in names}
    return sample.judged(found)


def shown(tmp_path, *contents: dict) -> str:
    """The name of the file whose cell is shown; the contents from the oldest to the newest."""
    for index, content in enumerate(contents):
        content["updated"] = f"2001-01-0{index + 1}T00:00:00Z"
        sample.write(tmp_path, content, f"{index}.json")
    runs, _ = recorded.read_all([tmp_path / sample.SLUG])
    (cell,) = recorded.newest_cells(runs).values()
    return cell.run.path.stem


def dirty(content: dict) -> dict:
    content["environment"]["dirty"] = True
    return content


def quick(*cells: dict) -> dict:
    return sample.run(list(cells), protocol={"quick": True})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: sample.run([without("compile_max_autotune")]), "0"),
        (lambda: sample.run([without(*RIVALS)]), "0"),
        (lambda: dirty(sample.run()), "0"),
        (lambda: quick(sample.cell()), "0"),
        (lambda: sample.run(), "1"),
        (lambda: sample.run([sample.red()]), "1"),
        (lambda: quick(sample.red()), "1"),
        (lambda: dirty(sample.run([sample.red()])), "0"),
    ],
    ids=["rival", "rivals", "dirty", "quick", "same", "red", "quick red", "dirty red"],
)
def test_a_newer_run_counts_unless_it_shows_less(tmp_path, make, expected):
    assert shown(tmp_path, sample.run(), make()) == expected


def test_a_rival_that_failed_was_there(tmp_path):
    failed = without("compile")
    failed["errors"] = {"compile": "RuntimeError: sample"}
    assert shown(tmp_path, sample.run(), sample.run([failed])) == "1"


def test_an_older_red_cell_never_hides_a_newer_green_one(tmp_path):
    assert shown(tmp_path, sample.run([sample.red()]), quick(without(*RIVALS))) == "1"
