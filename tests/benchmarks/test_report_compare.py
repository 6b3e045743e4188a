"""What ``--compare`` says about two sample results, and its exit codes."""

import pytest
import sample_results as sample

from benchmarks import report


@pytest.fixture
def compared(tmp_path, capsys):
    """Compares two results: the exit code, what was printed, and what went to stderr."""

    def run(old, new, *options):
        paths = [
            sample.write(tmp_path, content, f"{name}.json") for name, content in (("a", old), ("b", new))
        ]
        code = report.main(["--compare", *map(str, paths), *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_same_run_has_not_moved(compared):
    code, out, err = compared(sample.full_run(), sample.full_run())
    cells = len(sample.full_run()["cells"])
    assert (code, err) == (0, "")
    assert out == f"0 slower, 0 faster, {2 * cells} within the spread or 2%, 0 lost, 0 only in the second\n"


@pytest.mark.parametrize("spread", [0.01, 0.2])
def test_a_change_counts_beyond_the_spread_only(compared, spread):
    def wide(scale):
        cell = sample.cell(scale=scale)
        for kind in ("ms", "graph_ms"):
            stats = cell["opponents"]["fused"][kind]
            cell["opponents"]["fused"][kind] = sample.stats(stats["median"], spread)
        return sample.run([cell])

    code, out, _ = compared(wide(1.0), wide(1.1))
    assert code == (1 if spread == 0.01 else 0)
    assert ("2 slower" in out) == (spread == 0.01)


def test_a_change_of_less_than_two_per_cent_does_not_count_however_small_the_spread(compared):
    def sharp(scale):
        cell = sample.cell(scale=scale)
        cell["opponents"]["fused"]["ms"] = sample.stats(4.0 * scale, 0.0)
        cell["opponents"]["fused"]["graph_ms"] = sample.stats(3.6 * scale, 0.0)
        return sample.run([sample.judged(cell)])

    assert compared(sharp(1.0), sharp(1.019))[0] == 0
    assert compared(sharp(1.0), sharp(1.021))[0] == 1


def test_a_regression_is_shown_with_both_times_and_exits_1(compared):
    old = sample.run([sample.cell(), sample.cell("mixer_s16_224")])
    new = sample.run([sample.cell(scale=1.5), sample.cell("mixer_s16_224")])
    code, out, _ = compared(old, new)
    assert code == 1
    calls = next(line for line in out.splitlines() if "calls" in line)
    entries = [entry.strip() for entry in calls.strip("|").split("|")]
    assert entries == [
        "block B/16 x100 bfloat16 forward cuda", "fused", "calls", "4", "6", "1.500", "SLOWER"
    ]  # fmt: skip
    assert "2 slower, 0 faster, 2 within" in out
    assert "eager itself takes 1.250 times what it took" in out


def test_an_improvement_is_shown_and_exits_0(compared):
    code, out, _ = compared(sample.run(), sample.run([sample.cell(scale=0.5)]))
    assert code == 0
    assert "faster" in out and "0 slower, 2 faster" in out


def test_the_worst_comes_first_and_hides_behind_no_improvement(compared):
    models = ("mixer_b16_224", "mixer_s16_224", "mixer_l16_224")
    old = sample.run([sample.cell(model) for model in models])
    new = sample.run([sample.cell(m, scale=s) for m, s in zip(models, (0.5, 1.2, 2.0), strict=True)])
    code, out, _ = compared(old, new)
    assert code == 1
    assert [line.split()[2] for line in out.splitlines()[2:8:2]] == ["L/16", "S/16", "B/16"]


def test_opponents_that_moved_are_no_regression(compared):
    new = sample.cell()
    for name in ("eager", "compile_max_autotune"):
        new["opponents"][name] = sample.opponent(1000.0, new)
    code, out, _ = compared(sample.run(), sample.run([sample.judged(new)]))
    assert code == 0 and "0 slower, 0 faster" in out


def test_a_missing_cell_and_a_red_one_are_regressions_and_a_new_one_is_not(compared):
    two = [sample.cell(), sample.cell("mixer_s16_224")]
    code, out, _ = compared(sample.run(two), sample.run(two[:1]))
    assert code == 1 and "LOST  block S/16 x100 bfloat16 forward cuda: missing" in out
    code, out, _ = compared(sample.run(two), sample.run([two[0], sample.red(model="mixer_s16_224")]))
    assert (
        code == 1 and "S/16 x100 bfloat16 forward cuda: red: fused: parity failed in output; not timed" in out
    )
    code, out, _ = compared(sample.run(two[:1]), sample.run(two))
    assert code == 0 and "1 only in the second" in out
    code, out, _ = compared(sample.run([sample.red()]), sample.run([sample.red()]))
    assert code == 0


def test_a_fused_variant_that_is_no_longer_timed_is_a_regression(compared):
    both = sample.cell()
    both["opponents"]["fused_lean"] = sample.opponent(5.0, both)
    gone = sample.cell(errors={"fused_lean": "RuntimeError: out of memory"})
    code, out, _ = compared(sample.run([both]), sample.run([gone]))
    assert code == 1
    assert "fused_lean, calls: no longer timed: RuntimeError: out of memory" in out


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (sample.run(gpu="Sample GPU 2"), "another GPU: Sample GPU against Sample GPU 2"),
        (sample.run([sample.cell(device="cpu")]), "another device: cuda against cpu"),
        (sample.run(complete=False), "the run is not complete"),
    ],
)
def test_what_says_nothing_about_the_other_is_refused_unless_forced(compared, new, reason):
    code, out, err = compared(sample.run(), new)
    assert (code, out) == (2, "")
    assert reason in err and "--force" in err
    code, out, err = compared(sample.run(), new, "--force")
    assert code in (0, 1) and "within the spread" in out
    assert reason in err


def test_another_schema_is_refused(tmp_path, capsys):
    paths = [sample.write(tmp_path, sample.run(), f"{name}.json") for name in "ab"]
    paths[1].write_text(paths[1].read_text().replace('"schema": 3', '"schema": 1'))
    assert report.main(["--compare", *map(str, paths)]) == 2
    said = capsys.readouterr().err
    assert str(paths[1]) in said and "schema must be 3, got 1" in said


def test_folders_are_compared_by_their_newest_complete_runs(tmp_path, capsys):
    old = sample.write(tmp_path, sample.run(), slug="before").parent
    sample.write(tmp_path, sample.run([sample.cell(scale=3.0)], complete=False), "b.partial.json", "before")
    new = sample.write(tmp_path, sample.run([sample.cell(scale=2.0)]), slug="after").parent
    sample.write(tmp_path, sample.run(updated="2001-03-01T00:00:00+00:00"), "newer.json", "after")
    assert report.main(["--compare", str(old), str(new)]) == 0
    said = capsys.readouterr()
    assert "b.partial.json: left out" in said.err and "0 slower, 0 faster, 2 within" in said.out


def test_a_folder_without_results_and_a_missing_file_are_errors(tmp_path, capsys):
    path = sample.write(tmp_path, sample.run())
    (tmp_path / "empty").mkdir()
    assert report.main(["--compare", str(path.parent), str(tmp_path / "empty")]) == 2
    assert "holds no complete result" in capsys.readouterr().err
    assert report.main(["--compare", str(path), str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
