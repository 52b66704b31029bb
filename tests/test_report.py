"""Runs compared: the table's text and the picture, from directories made by hand."""

import json

import pytest

from sdegen.runs import report


def make(directory, config, losses, *, final=(), timing=(), tail=""):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    rows = [{"step": 10 * (i + 1), "loss": x} for i, x in enumerate(losses)]
    rows += final
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(text + tail)
    text = "".join(json.dumps(row) + "\n" for row in timing)
    (directory / "timing.jsonl").write_text(text)
    return directory


def config(**changes):
    plain = {
        "class": "Config",
        "out": "runs/x",
        "seed": 0,
        "process": {"class": "VP", "beta_max": 20.0},
    }
    return plain | changes


@pytest.fixture
def runs(tmp_path):
    process = {"class": "VE", "sigma_max": 50.0}
    a = make(
        tmp_path / "a",
        config(rate=0.001),
        [1.0] * 18 + [0.5, 0.25],
        final=[{"images": "samples", "W2": 2.5, "n": 7}, {"images": "real", "W2": 1.5}],
        timing=[{"step": 10}, {"step": 20, "samples_per_second": 1234.6}],
    )
    b = make(
        tmp_path / "b",
        config(out="runs/y", rate=0.002, process=process),
        [2.0, None, 0.125],
    )
    return a, b


def printed(capsys, *words):
    report.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def test_the_table_has_what_differs_and_how_it_went(runs, tmp_path, capsys):
    header, rule, *body, picture = printed(
        capsys, *runs, "--out", tmp_path / "out" / "report.png"
    )
    # run, the class of the process, the rate; not the seed, nor where it was written
    names = ["run", "process", "rate", "step", "loss", "samples/s", "W2", "n"]
    assert header.split() == names
    assert set(rule) == {"-"}
    # the mean of the last tenth of 20 rows; the first row of the end
    assert body[0].split() == [
        "a",
        "VP",
        "0.001",
        "200",
        "0.375",
        "1,235",
        "2.500",
        "7",
    ]
    # the last row of three, a loss that was not finite left out; no figures
    assert body[1].split() == "b VE 0.002 30 0.125 - - -".split()
    assert picture == f"picture: {tmp_path}/out/report.png"


def test_the_picture_shows_the_losses(runs, tmp_path, capsys):
    printed(capsys, *runs, "--out", tmp_path / "report.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 200
    # two coloured curves: greys have no spread between the channels
    assert (pixels.max(-1) - pixels.min(-1) > 0.3).sum() > 200


def test_a_missing_run_is_named(runs, tmp_path):
    with pytest.raises(SystemExit, match="error: no run in .*nowhere: expected rows"):
        report.main([str(runs[0]), str(tmp_path / "nowhere")])


def test_a_half_written_line_is_survived(tmp_path, capsys):
    tail = '{"step": 40, "lo'
    run = make(tmp_path / "run", config(), [1.0, 0.5, 0.25], tail=tail)
    with open(run / "timing.jsonl", "a") as file:
        # a run that went on after the line was cut
        file.write('{"step": 10, "samp{"step": 20}\n')
        file.write('{"step": 30, "samples_per_second": 10}\n{"step": 30, "other": 1}\n')
    body = printed(capsys, run, "--out", tmp_path / "report.png")[2]
    assert body.split() == ["run", "30", "0.250", "10"]


def test_runs_of_the_same_name_are_told_apart(tmp_path, capsys):
    places = [make(tmp_path / k / "run", config(), [1.0]) for k in "ab"]
    body = printed(capsys, *places, "--out", tmp_path / "report.png")[2:4]
    assert [line.split()[0] for line in body] == [str(place) for place in places]


def test_a_run_that_has_no_rows_yet_is_a_line(tmp_path, capsys):
    run = make(tmp_path / "run", config(), [])
    assert printed(capsys, run)[-1].split() == ["run", "0", "-", "-"]
