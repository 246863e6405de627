"""A sample is uniform, in order, repeatable and whole pairs."""

import json

import numpy as np
import pytest

from data_prep import sample as module


def write(folder, count):
    for code in ("uk", "en"):
        (folder / f"in.{code}").write_text("".join(f"{code} {n}\n" for n in range(count)))


def run(folder, *flags):
    return module.main(["--pair", "uk-en", "--input", f"{folder}/in", "--out", f"{folder}/out", *flags])


def test_pairs_stay_together_in_their_order_and_the_seed_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LINES", 7)
    write(tmp_path, 40)
    taken = []
    for seed in ("1", "1", "2"):
        assert run(tmp_path, "--max-pairs", "12", "--seed", seed) == 0
        sides = [(tmp_path / f"out.{code}").read_text().splitlines() for code in ("uk", "en")]
        assert [line.split()[1] for line in sides[0]] == [line.split()[1] for line in sides[1]]
        taken.append([int(line.split()[1]) for line in sides[0]])
    assert len(taken[0]) == 12
    assert taken[0] == sorted(taken[0])
    assert taken[0] == taken[1] != taken[2]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["lines_in"], report["lines_out"], report["seed"]) == (40, 12, 2)


def test_every_line_is_equally_likely(monkeypatch):
    """Over 2,000 seeds each of 20 lines is drawn 500 times on average, with a standard deviation of 19."""
    monkeypatch.setattr(module, "CHUNK_LINES", 7)
    counts = sum(np.concatenate(list(module.chosen_in_chunks(20, 5, seed))).astype(int) for seed in range(2000))
    assert counts.sum() == 2000 * 5
    assert (np.abs(counts - 500) < 5 * 19.4).all(), counts


@pytest.mark.parametrize(("count", "message"), [(3, "fewer pairs than the 12 asked for"), (12, "")])
def test_a_short_text_is_taken_whole_and_said_so(tmp_path, capsys, count, message):
    write(tmp_path, count)
    (tmp_path / "in.uk").write_text((tmp_path / "in.uk").read_text().rstrip("\n"))  # no LF at the end
    assert run(tmp_path, "--max-pairs", "12") == 0
    assert (tmp_path / "out.uk").read_text() == "".join(f"uk {n}\n" for n in range(count))
    assert message in capsys.readouterr().err


def test_unequal_sides_are_refused_and_nothing_is_written(tmp_path, capsys):
    write(tmp_path, 5)
    (tmp_path / "in.uk").write_text("one\n")
    assert run(tmp_path, "--max-pairs", "2") == 1
    assert "in.uk has 1 lines" in capsys.readouterr().err
    assert not (tmp_path / "out.uk").exists()
