import json

import pytest

from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

ANIMALS = Labels(("cat", "dog", "golden retriever", "crane", "crane"), (("n1",), (), (), (), ()))


@pytest.mark.parametrize("text", ["cat", "CAT", " Cat ", "n1", "0", 0])
def test_spellings(text):
    assert ANIMALS.find(text) == 0


@pytest.mark.parametrize("text", ["golden_retriever", "Golden-Retriever", "golden  retriever"])
def test_words_may_be_joined(text):
    assert ANIMALS.find(text) == 2


def test_a_misspelt_name_answers_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'golden retriever'"):
        ANIMALS.find("goldn retriver")
    with pytest.raises(InputError, match="did you mean 'golden retriever'"):
        ANIMALS.find("retriever")


def test_a_name_like_no_other_answers_with_examples():
    with pytest.raises(InputError, match=r"5 classes: cat, dog"):
        ANIMALS.find("xylophone")


def test_an_ambiguous_name_asks_for_the_number():
    with pytest.raises(InputError, match="3, 4"):
        ANIMALS.find("crane")


@pytest.mark.parametrize("index", ["5", 7, -1])
def test_numbers_outside_the_range(index):
    with pytest.raises(InputError, match=r"0 to 4|no class"):
        ANIMALS.find(index)


def test_imagenet():
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


def test_a_list_of_strings_is_enough(tmp_path):
    (tmp_path / "labels.json").write_text('["a", "b"]')
    assert Labels.load(tmp_path / "labels.json") == Labels(("a", "b"))


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"title": "a"}]'])
def test_damaged_files(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(InputError, match=r"labels\.json"):
        Labels.load(tmp_path / "labels.json")
