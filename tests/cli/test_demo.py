def test_the_sheet_and_what_to_do_next(run, tmp_path):
    result = run("demo", "--out", tmp_path / "demo", "--seed", 1)
    assert result.status == 0, result.err
    assert str(tmp_path / "demo" / "sheet.png") in result.out
    assert "llamagen generate --model" in result.out
    assert (tmp_path / "demo" / "sheet.png").is_file()


def test_a_file_is_in_the_way(fails, tmp_path):
    (tmp_path / "demo").write_text("")
    fails("demo", "--out", tmp_path / "demo")
