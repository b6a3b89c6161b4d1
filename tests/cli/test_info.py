from llamagen.pictures import save_png
from tests.models import tiny_pipeline


def test_what_is_known(run):
    result = run("info")
    assert result.status == 0, result.err
    for name in ("XXXL", "VQ-8", "c2i-L-384", "t2i-XL-512"):
        assert name in result.out


def test_a_pipeline(run, model_folder):
    out = run("info", model_folder).out
    pipe = tiny_pipeline()
    assert f"{pipe.transformer.parameter_count():,}" in out
    assert f"{pipe.tokenizer.parameter_count():,}" in out
    assert "4 x 4 = 16 codes of 64" in out
    assert "cat, dog" in out


def test_a_tokenizer(run, model_folder):
    out = run("info", model_folder / "tokenizer").out
    assert "image tokenizer" in out
    assert "64 x 4" in out


def test_an_image(run, fails, tmp_path):
    output = tiny_pipeline()("dog", seed=3)
    save_png(output.images[0], tmp_path / "a.png", metadata=output.metadata[0])
    assert '"seed": 3' in run("info", tmp_path / "a.png").out
    save_png(output.images[0], tmp_path / "b.png")
    assert "how it was made" in fails("info", tmp_path / "b.png")


def test_unknown_things(fails, tmp_path):
    assert "c2i-B-256" in fails("info", "c2i-B-265")
    assert "missing" in fails("info", tmp_path / "missing")
