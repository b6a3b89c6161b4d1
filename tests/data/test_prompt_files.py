import json

import pytest

from llamagen.data.sources import read_prompts
from llamagen.support.errors import InputError

PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tone "word\nthe sky\tWorld\tx\t\n'


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_lines(tmp_path):
    found = read_prompts(write(tmp_path, "p.txt", "a red heart\n\n  llama \n"))
    assert [prompt.text for prompt in found] == ["a red heart", "llama"]
    assert found[0].about == {}


def test_reads_partiprompts(tmp_path):
    found = read_prompts(write(tmp_path, "parti.tsv", PARTI))
    assert [prompt.text for prompt in found] == ["bond", "the sky"]
    assert found[0].about == {"Category": "Abstract", "Challenge": "Basic", "Note": 'one "word'}


def test_reads_coco(tmp_path):
    values = {
        "images": [],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "A cat.\n"},
            {"image_id": 7, "id": 2, "caption": "a dog"},
        ],
    }
    found = read_prompts(write(tmp_path, "captions.json", json.dumps(values)))
    assert found[0] == ("A cat.", {"image_id": 7, "id": 1})
    assert found[1].text == "a dog"


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl"])
def test_splits_at_newlines_only(tmp_path, name):
    text = "one\u2028two\u0085three\x0cfour"
    lines = {"p.txt": text, "p.jsonl": json.dumps({"prompt": text}, ensure_ascii=False)}
    path = write(
        tmp_path, name, lines.get(name, f"prompt\n{text}") + "\nlast\n" * (name == "p.txt")
    )
    assert read_prompts(path)[0].text == text


def test_reads_other_tables(tmp_path):
    table = 'id,caption,other\n1,"a, b",x\n2,c,y\n'
    found = read_prompts(write(tmp_path, "t.csv", table))
    assert [prompt.text for prompt in found] == ["a, b", "c"]
    found = read_prompts(write(tmp_path, "t.csv", table), column="other")
    assert found[1] == ("y", {"id": "2", "caption": "c"})
    lines = '{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n'
    assert read_prompts(write(tmp_path, "t.jsonl", lines))[1] == ("b", {"n": 2})
    assert read_prompts(write(tmp_path, "t.json", '["a", "b"]'))[1] == ("b", {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "no rows in it"),
        ("p.csv", "a,b\n1,2\n", "no column of prompts .it has a, b."),
        ("p.csv", "prompt,b\n ,2\n", "prompt 1 of .* is empty"),
        ("p.csv", 'prompt\n"open', "cannot be read as .csv"),
        ("p.jsonl", '{"prompt": 3}\n', "prompt 1 of .* is empty"),
        ("p.txt", "a\n\u200b\ufeff\n", "prompt 2 of .* is empty"),
        ("p.jsonl", "{", "cannot be read as .jsonl"),
        ("p.json", '{"a": 1}', "annotations"),
        ("p.xml", "<a/>", "should end in .txt"),
    ],
)
def test_rejects_files(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_rejects_missing_files_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="no column 'x'"):
        read_prompts(write(tmp_path, "p.txt", "a"), column="x")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match=r"cannot be read as \.txt"):
        read_prompts(tmp_path / "bytes.txt")
