"""The report's text, from sample results: the README's part, a GPU's complete report, the command line."""

import json

import pytest
import sample_results as sample

from benchmarks import recorded, report, schema, tables
from benchmarks.schema import FOOTNOTES

BEFORE, AFTER = "# Title\n\nAbove.\r\n\n", "\n\nBelow, with trailing blanks.  \n\n\n"
MARKED = f"{BEFORE}{report.BEGIN}\n{report.END}{AFTER}"


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(MARKED.encode())
    return path


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results"
    path.mkdir()
    return path


def call(readme, results, *options):
    return report.main(["--readme", str(readme), "--results", str(results), *options])


def text_only(readme, results):
    assert call(readme, results, "--no-plots") == 0
    return readme.read_bytes().decode()


def rows(text):
    """The cells of every table's lines, but for the lines of dashes."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| --")]
    return [[entry.strip() for entry in line.strip("|").split(" | ")] for line in lines]


def folder_report(results):
    return (results / sample.SLUG / "REPORT.md").read_text(encoding="utf-8")


# ---- the README's part -----------------------------------------------------------------------------------


def test_without_results_the_readme_says_so_and_shows_no_table(readme, results):
    text = text_only(readme, results)
    assert text == f"{BEFORE}{report.BEGIN}\n\n{tables.NOTHING_MEASURED}\n\n{report.END}{AFTER}"
    assert tables.NOTHING_MEASURED == "No GPU figure has been measured yet."


def test_only_what_is_between_the_markers_changes_and_a_second_run_changes_nothing(readme, results):
    sample.write(results, sample.full_run())
    first = text_only(readme, results)
    assert first.startswith(BEFORE + report.BEGIN) and first.endswith(report.END + AFTER)
    assert len(first) > 1000
    when = readme.stat().st_mtime_ns
    assert text_only(readme, results) == first
    assert readme.stat().st_mtime_ns == when


def test_new_results_replace_the_old_tables(readme, results):
    sample.write(results, sample.full_run())
    text_only(readme, results)
    sample.write(results, sample.run())
    once = text_only(readme, results)
    readme.write_bytes(MARKED.encode())
    assert once == text_only(readme, results)


def test_a_mode_and_a_link_survive(readme, results, tmp_path):
    readme.chmod(0o640)
    link = tmp_path / "LINK.md"
    link.symlink_to(readme)
    text_only(link, results)
    assert link.is_symlink() and tables.NOTHING_MEASURED in readme.read_text()
    assert readme.stat().st_mode & 0o777 == 0o640
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no markers\n", f"{report.BEGIN} must stand in it once, found 0 times"),
        (f"{report.BEGIN}\n", f"{report.END} must stand in it once, found 0 times"),
        (MARKED + report.BEGIN, f"{report.BEGIN} must stand in it once, found 2 times"),
        (f"{report.END}\n{report.BEGIN}\n", f"{report.END} stands before {report.BEGIN}"),
    ],
)
def test_a_readme_without_a_place_for_the_tables_is_an_error_that_says_what_to_add(
    readme, results, capsys, text, said
):
    readme.write_bytes(text.encode())
    sample.write(results, sample.run())
    assert call(readme, results) == 2
    assert said in capsys.readouterr().err
    assert readme.read_bytes().decode() == text
    assert not (results / sample.SLUG / "REPORT.md").exists()


def test_gpu_date_commit_and_versions_stand_above_each_table(readme, results):
    sample.write(results, sample.full_run())
    lines = text_only(readme, results).splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("| Model")]
    assert len(heads) == 2
    for head in heads:
        for fact in (
            "Sample GPU",
            "2001-02-03",
            "commit 0123456789",
            "torch 100.0",
            "triton 100.0",
            "CUDA 10.0",
        ):
            assert fact in lines[head - 2]
    assert "flax" not in lines[heads[0] - 2]  # it was not installed


def test_the_readmes_rows_are_those_of_the_largest_batch_up_to_256(readme, results):
    batches = {"mixer_b16_224": (1, 64, 256, 1024), "mixer_s16_224": (512, 1024)}
    cells = [sample.cell(model, batch=batch) for model, several in batches.items() for batch in several]
    sample.write(results, sample.run(cells + [sample.cell(level="token")]))
    found = rows(text_only(readme, results))[1:]
    assert [row[:2] for row in found] == [["B/16", "256"], ["S/16", "512"]]


def test_every_column_of_the_readme(readme, results):
    sample.write(results, sample.run([sample.cell(level="model")]))
    head, row = rows(text_only(readme, results))
    assert dict(zip(head, row, strict=True)) == {
        "Model": "B/16",
        "Batch": "100",
        "Direction": "forward",
        "fused ms": "48 (43.2, 1.11x)",
        "eager ms": "96 (86.4, 1.11x)",
        "torch.compile ms": "76.8 (69.12, 1.11x)",
        "max-autotune ms": "60 (54, 1.11x)",
        "TFLOP/s": "225",
        "GB/s": "212.1",
        "of roofline": "22%",
        "peak MB, fused / eager": "4,800 / 9,600",
        "launches, fused / eager": "4 / 12",
        "images/s": "2,083",
        "ViT images/s": "694.4",
        "vs best": "1.25 (max-autotune)",
        "predicted ms": "38.4",
    }


def test_the_columns_are_explained_below_the_tables(readme, results):
    footnotes = {**sample.run()["footnotes"], "clocks": "one of many that only the complete report has"}
    sample.write(results, sample.run(footnotes=footnotes | {"graph_ms": FOOTNOTES["graph_ms"]}))
    text = text_only(readme, results)
    assert "- bytes: read and written once: x, the output and the weights." in text
    assert "A prediction, not a measurement." in text
    assert "The fused side packs its weights" in text and "in every call there" in text
    assert "one of many" not in text and "- clocks: one of many" in folder_report(results)


def test_a_float32_run_is_shown_where_there_is_no_bfloat16_and_a_cpu_is_no_gpu(readme, results):
    sample.write(results, sample.run([sample.cell(dtype="float32", device="cpu")], gpu="cpu"), slug="cpu")
    text = text_only(readme, results)
    assert tables.NOTHING_MEASURED in text
    assert "**One block, float32, cpu**" in text
    sample.write(results, sample.run())
    assert tables.NOTHING_MEASURED not in text_only(readme, results)


def test_where_the_host_decides_both_times_and_their_ratio_show_it(readme, results):
    cell = sample.cell()
    for name, ms, graph in (("fused", 0.6, 0.1), ("eager", 0.25, 0.2)):
        cell["opponents"][name] |= {"ms": sample.stats(ms), "graph_ms": sample.stats(graph)}
    cell["opponents"]["flax"] = sample.opponent(0.7, cell, graph_ms=None)
    sample.write(results, sample.run([sample.judged(cell)]))
    row = dict(zip(*rows(text_only(readme, results)), strict=True))
    assert (row["fused ms"], row["eager ms"]) == ("0.6 (0.1, 6.00x)", "0.25 (0.2, 1.25x)")
    head, *found = rows(folder_report(results))
    shown = {row[head.index("Who")]: row[head.index("ms")] for row in found}
    assert (shown["fused"], shown["Flax"]) == ("0.6 (0.1, 6.00x)", "0.7")


def test_a_column_that_nothing_was_measured_for_is_left_out(readme, results):
    sample.write(results, sample.run([sample.cell(predicted_ms={})]))
    head = rows(text_only(readme, results))[0]
    assert "predicted ms" not in head and head[-1] == "vs best"


def test_links_lead_from_the_readme_to_the_report(readme, results):
    sample.write(results, sample.run())
    assert "(results/sample-gpu/REPORT.md)" in text_only(readme, results)


# ---- one GPU's report ------------------------------------------------------------------------------------


def test_the_report_holds_every_opponent_of_every_cell(readme, results):
    content = sample.full_run()
    sample.write(results, content)
    text_only(readme, results)
    found = [row for row in rows(folder_report(results)) if "ms" not in row]
    assert len(found) == sum(len(cell["opponents"]) for cell in content["cells"])
    for title in tables.LEVEL_TITLES.values():
        assert f"## {title}\n" in folder_report(results)


def test_another_network_shows_its_own_parameters_and_flops(readme, results):
    sample.write(results, sample.run([sample.cell(level="model")]))
    text_only(readme, results)
    head, *found = rows(folder_report(results))
    by_name = {row[head.index("Who")]: dict(zip(head, row, strict=True)) for row in found}
    assert by_name["fused"]["M parameters"] == "59" and by_name["fused"]["GFLOP"] == "10,800"
    assert by_name["ViT"]["M parameters"] == "86" and by_name["ViT"]["GFLOP"] == "21,600"
    assert by_name["ViT"]["ms / fused ms"] == "3" and by_name["fused"]["vs best"] == "1.25 (max-autotune)"


def test_a_red_cell_and_a_failed_opponent_are_shown_with_the_reason(readme, results):
    failed = sample.cell(errors={"compile": "RuntimeError: a | in the | text <b>"})
    del failed["opponents"]["compile"]
    cells = [sample.red(model="mixer_s16_224"), sample.judged(failed)]
    sample.write(results, sample.run(cells))
    text = text_only(readme, results)
    assert rows(text)[1][3:5] == ["parity failed, not timed", "-"]
    assert [row[5] for row in rows(text)] == ["max-autotune ms", "-", "5 (4.5, 1.11x)"]
    shown = folder_report(results)
    assert "- block S/16 x100 bfloat16 forward cuda: fused: parity failed in output; not timed" in shown
    assert "compile: RuntimeError: a \\| in the \\| text &lt;b>" in shown


def test_the_run_is_described(readme, results):
    sample.write(results, sample.run())
    text_only(readme, results)
    shown = folder_report(results)
    for line in (
        "- protocol: rounds 10, burst 10",
        "copy_gb_per_s 4000",
        "clocks.sm 1000 MHz",
    ):
        assert line in shown


# ---- which run counts ------------------------------------------------------------------------------------


def test_the_newest_complete_run_of_each_cell_counts_and_rows_name_their_run(readme, results):
    old = [sample.cell(), sample.cell("mixer_s16_224")]
    new = [sample.cell(scale=10.0)]
    sample.write(results, sample.run(old, updated="2001-01-01T00:00:00+00:00"), "z.json")
    sample.write(results, sample.run(new, updated="2001-01-02T00:00:00Z"), "a.json")
    text = text_only(readme, results)
    head, *found = rows(text)
    shown = [(row[0], row[3], row[-1]) for row in found]
    assert head[-1] == "run"
    assert shown == [("B/16", "40 (36, 1.11x)", "1"), ("S/16", "2 (1.8, 1.11x)", "2")]
    assert "1. Sample GPU, 2001-01-02" in text and "2. Sample GPU, 2001-01-01" in text


def test_a_case_is_red_or_green_in_its_newest_run_but_not_both(readme, results):
    green = [sample.cell(level="kernel", op=op) for op in sample.OPS]
    sample.write(results, sample.run(green, updated="2001-01-02T00:00:00Z"), "new.json")
    sample.write(results, sample.run([sample.red(level="kernel", op=None)], updated="2001-01-01T00:00:00Z"))
    text_only(readme, results)
    assert "not timed" not in folder_report(results) and "channel_fc2" in folder_report(results)
    sample.write(results, sample.run([sample.red(level="kernel", op=None)], updated="2001-01-03T00:00:00Z"))
    text_only(readme, results)
    assert "not timed" in folder_report(results) and "channel_fc2" not in folder_report(results)


def test_a_partial_run_is_left_out_and_noted(readme, results, capsys):
    sample.write(results, sample.run())
    path = sample.write(results, sample.run([sample.cell(scale=10.0)], complete=False), "bench.partial.json")
    text = text_only(readme, results)
    assert "4 (3.6, " in text and "40 (36, " not in text
    assert f"{path}: left out: the run is not complete" in capsys.readouterr().err


def test_a_folder_with_only_a_partial_run_counts_as_nothing_measured(readme, results, capsys):
    sample.write(results, sample.run(complete=False))
    assert tables.NOTHING_MEASURED in text_only(readme, results)
    assert "no complete run" in capsys.readouterr().err


def break_text(path):
    path.write_text(path.read_text()[:-20])


def break_field(path):
    content = json.loads(path.read_text())
    del content["cells"][0]["ok"]
    path.write_text(json.dumps(content))


def break_time(path):
    path.write_text(path.read_text().replace("2001-02-03T04:05:06+00:00", "yesterday"))


@pytest.mark.parametrize("damage", [break_text, break_field, break_time])
def test_a_corrupt_result_is_named_and_nothing_is_written(readme, results, capsys, damage):
    sample.write(results, sample.run())
    path = sample.write(results, sample.run(), "worse.json")
    damage(path)
    assert call(readme, results) == 2
    assert f"benchmarks.report: {path}: " in capsys.readouterr().err
    assert readme.read_bytes().decode() == MARKED
    assert sorted(found.name for found in path.parent.iterdir()) == ["bench.json", "worse.json"]


def test_results_of_two_gpus_in_one_folder_are_refused(readme, results, capsys):
    sample.write(results, sample.run())
    sample.write(results, sample.run(gpu="Sample GPU 2"), "other.json")
    assert call(readme, results) == 2
    assert "a folder holds the results of one GPU" in capsys.readouterr().err


def test_a_file_outside_of_a_gpus_folder_is_noted(readme, results, capsys):
    (results / "stray.json").write_text("{}")
    text_only(readme, results)
    assert "stray.json: left out: not in a GPU's folder" in capsys.readouterr().err


def test_a_results_folder_that_is_not_there_is_an_error(readme, tmp_path, capsys):
    assert call(readme, tmp_path / "nowhere") == 2
    assert "nowhere is no folder" in capsys.readouterr().err


# ---- --check ---------------------------------------------------------------------------------------------


def test_check_says_what_is_out_of_date_and_writes_nothing(readme, results, capsys):
    sample.write(results, sample.run())
    assert call(readme, results, "--check") == 1
    said = capsys.readouterr().out
    assert f"{readme}: is out of date" in said
    assert "REPORT.md: is out of date" in said
    assert "roofline-bfloat16-forward.png: is missing" in said
    assert readme.read_bytes().decode() == MARKED
    assert [path.name for path in (results / sample.SLUG).iterdir()] == ["bench.json"]


def test_check_is_content_with_what_the_report_wrote(readme, results):
    sample.write(results, sample.run())
    assert call(readme, results) == 0
    assert call(readme, results, "--check") == 0
    readme.write_text(readme.read_text().replace("B/16", "B/17"))
    assert call(readme, results, "--check") == 1


# ---- details ---------------------------------------------------------------------------------------------


def test_the_key_is_the_schemas():
    assert recorded.Key is schema.Key
    assert tuple(tables.OPPONENT_TITLES) == schema.OPPONENTS
    assert tuple(tables.LEVEL_TITLES) == schema.LEVELS


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0"), (4, "4"), (0.012345, "0.01235"), (999.94, "999.9"), (12345.6, "12,346")],
)
def test_figures(value, shown):
    assert tables.figure(value) == shown


def test_a_ratio_is_of_graphs_only_where_both_have_one():
    cell = sample.cell()
    cell["opponents"]["eager"]["graph_ms"] = sample.stats(100.0)
    both = recorded.Cell(None, cell)
    assert both.ratio("eager") == pytest.approx(100 / 3.6)
    cell["opponents"]["fused"]["graph_ms"] = None
    assert both.ratio("eager") == pytest.approx(2.0)
    assert both.ratio("flax") is None
