import json

import pytest

from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

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
