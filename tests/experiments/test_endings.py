"""Tables for the terminal."""
from experiments.endings import score_table

SPLITS = ("in_domain", "out_of_domain", "all")


def test_columns_stand_under_their_headings_and_fit_a_terminal():
    scores = {split: {"accuracy": 0.8334, "mcc": -0.6252} for split in SPLITS}
    rows = {"teacher": scores, "student with KD": scores}
    lines = score_table(rows, more={"parameters": {"teacher": "134,515,008", "student with KD": "7"}}).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    assert lines[0].split() == list(SPLITS)
    assert lines[1].split() == ["parameters", *["accuracy", "MCC"] * 3]
    assert lines[2].split() == ["teacher", "134,515,008", *["0.833", "-0.625"] * 3]
    for heading, cell in (("parameters", "134,515,008"), ("accuracy", "0.833"), ("MCC", "-0.625")):
        assert lines[1].index(heading) + len(heading) == lines[2].index(cell) + len(cell)


def test_a_long_name_of_a_split_widens_its_columns():
    name = "development_rows_of_2026"
    lines = score_table({"best epoch (3)": {name: {"accuracy": 1.0, "mcc": 1.0}}}).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == [name]
