"""Which run of a case is shown where several have it."""

import pytest
import sample_results as sample

from benchmarks import recorded, report
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
    runs = recorded.read_all([tmp_path / sample.SLUG])
    (cell,) = recorded.newest_cells(runs)
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


# ---- files and folders anywhere --------------------------------------------------------------------------


def test_files_and_folders_anywhere_are_printed_as_one_report(tmp_path, capsys):
    sample.write(tmp_path, sample.run([sample.cell("mixer_s16_224")]), "a.json", "bench/here")
    killed = sample.write(tmp_path, sample.run(complete=False), "b.partial.json", "bench/here")
    (tmp_path / "summary.json").write_text('{"stages": []}')  # what another program wrote
    (tmp_path / "rows.json").write_text("[1]")
    before = sorted(tmp_path.rglob("*"))
    assert report.main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("# Sample GPU\n") and "| S/16 " in said.out and "| B/16 " not in said.out
    for name in ("summary.json", "rows.json"):
        assert f"{tmp_path / name}: left out: not of bench" in said.err
    assert "b.partial.json: left out: the run is not complete" in said.err
    # A file that is named counts as it is.
    assert report.main([str(tmp_path / "bench" / "here"), str(killed)]) == 0
    said = capsys.readouterr()
    assert "| S/16 " in said.out and "| B/16 " in said.out
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_what_cannot_be_printed_is_an_error_that_names_it(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: no complete run with a cell in it" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
    sample.write(tmp_path, sample.run(), "a.json", "a")
    sample.write(tmp_path, sample.run(gpu="Sample GPU 2"), "b.json", "b")
    assert report.main([str(tmp_path)]) == 2
    assert "measured on 'Sample GPU" in capsys.readouterr().err
    (tmp_path / "b" / "b.json").write_text('{"kind": "bench"}')
    assert report.main([str(tmp_path)]) == 2
    assert "b.json: not a valid result" in capsys.readouterr().err
