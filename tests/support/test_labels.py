import json

import pytest

from llamagen.support.errors import InputError
from llamagen.support.labels import Labels, RecordedName

ANIMALS = Labels(("cat", "dog", "golden retriever", "crane", "crane"), (("n1",), (), (), (), ()))


@pytest.mark.parametrize("text", ["cat", "CAT", " Cat ", "n1", "0", 0])
def test_finds_any_spelling(text):
    assert ANIMALS.find(text) == 0


@pytest.mark.parametrize("text", ["golden_retriever", "Golden-Retriever", "golden  retriever"])
def test_finds_joined_words(text):
    assert ANIMALS.find(text) == 2


def test_suggests_nearest_names():
    with pytest.raises(InputError, match="did you mean 'golden retriever'"):
        ANIMALS.find("goldn retriver")
    with pytest.raises(InputError, match="did you mean 'golden retriever'"):
        ANIMALS.find("retriever")


def test_shows_example_names():
    with pytest.raises(InputError, match=r"5 classes: cat, dog"):
        ANIMALS.find("xylophone")


def test_rejects_ambiguous_name():
    with pytest.raises(InputError, match="3, 4"):
        ANIMALS.find("crane")


@pytest.mark.parametrize("index", ["5", 7, -1])
def test_rejects_numbers_out_of_range(index):
    with pytest.raises(InputError, match=r"0 to 4|no class"):
        ANIMALS.find(index)


def test_numbers_are_names_first(caplog):
    labels = Labels(tuple("123456789"))
    assert [labels.find(name) for name in ("1", "9", "09", 0, 8)] == [0, 8, 8, 0, 8]
    assert not caplog.records
    # As the last resort, and not without a word.
    assert labels.find("0") == 0
    assert "no class is named 0; read as an index, '1'" in caplog.text
    years = Labels(("2019", "2020", "cat"))
    assert [years.find(name) for name in ("2020", "cat", 2)] == [1, 2, 2]
    for name in ("2021", "-2020", "\u0662", "\uff11", "9" * 5000):
        with pytest.raises(InputError, match="there is no class"):
            years.find(name)


def test_exact_spelling_comes_first():
    labels = Labels(("Cat", "cat", "cafe\u0301", "01", "1"))
    assert [labels.find(name) for name in ("Cat", "cat", "caf\u00e9", "CAF\u00c9")] == [0, 1, 2, 2]
    assert [labels.find(name) for name in ("1", "01")] == [4, 3]
    with pytest.raises(InputError, match=r"'CAT' is ambiguous: it names 0, 1 \('Cat', 'cat'\)"):
        labels.find("CAT")


def test_recorded_classes_are_found_by_name():
    assert ANIMALS.find(RecordedName("crane", 4)) == 4
    assert ANIMALS.find(RecordedName("dog", 7)) == 1
    for name in ("horse", "1"):
        with pytest.raises(InputError, match=f"there is no class '{name}'"):
            ANIMALS.find(RecordedName(name, 1))


def test_matches_names(caplog):
    assert ANIMALS.match(["dog", "n1", "Dog", "horse"], "d") == {"dog": 1, "n1": 0, "Dog": 1}
    # Some numbers among names are names, too, and so are all where a class has a number.
    assert ANIMALS.match(["dog", "0"], "d") == {"dog": 1}
    assert Labels(("1", "2")).match(["0", "2"], "d") == {"2": 1}
    assert Labels(("1", "2")).match(["0"], "d") == {}
    assert not caplog.records
    assert ANIMALS.match(["0", "4", "5"], "d") == {"0": 0, "4": 4}
    assert "the classes of d are numbers, no names: read as indices" in caplog.text
    with pytest.raises(InputError, match="d has a class 'ape' that these models do not have"):
        ANIMALS.match_all(["cat", "ape"], "d", "these models")


def test_imagenet_classes():
    labels = Labels.imagenet()
    assert len(labels) == 1000
    assert labels.find("golden retriever") == 207
    assert labels.find("n02099601") == 207
    assert labels.name(207) == "golden retriever"
    # The classes of the published demo.
    assert [labels.find(i) for i in (207, 360, 387, 974)] == [207, 360, 387, 974]


def test_round_trip(tmp_path):
    ANIMALS.save(tmp_path / "labels.json")
    assert Labels.load(tmp_path / "labels.json") == ANIMALS
    plain = Labels(("a", "b"))
    plain.save(tmp_path / "plain.json")
    assert Labels.load(tmp_path / "plain.json") == plain
    assert json.loads((tmp_path / "plain.json").read_text()) == [{"name": "a"}, {"name": "b"}]


def test_loads_list_of_strings(tmp_path):
    (tmp_path / "labels.json").write_text('["a", "b"]')
    assert Labels.load(tmp_path / "labels.json") == Labels(("a", "b"))


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"title": "a"}]'])
def test_rejects_damaged_files(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(InputError, match=r"labels\.json"):
        Labels.load(tmp_path / "labels.json")
