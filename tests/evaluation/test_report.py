import json
import math

from PIL import Image

from llamagen.evaluation.report import JSON_NAME, PAGE_NAME, Curve, Picture, Report, Table


def test_a_report_is_two_files(tmp_path):
    report = Report(
        protocol="c2i",
        title="a title",
        metrics={"fid": 3.25},
        reference={"source": "images.npz"},
        samples={"images": 10},
        settings={"top_k": 0},
        warnings=["too few"],
        tables=[Table(title="t", columns=("a", "b"), rows=(("x", None), ("y", 1.5)))],
        curves=[Curve(title="fid", x="guidance", series={"a": [(1.0, 2.0), (2.0, 3.0)]})],
        pictures=[Picture(title="p", image=Image.new("RGB", (4, 4)))],
    )
    report.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [PAGE_NAME, JSON_NAME]
    values = json.loads((tmp_path / "new" / JSON_NAME).read_text(encoding="utf-8"))
    assert values["metrics"] == {"fid": 3.25}
    assert values["tables"][0]["rows"] == [["x", None], ["y", 1.5]]
    assert values["curves"][0]["series"] == {"a": [[1.0, 2.0], [2.0, 3.0]]}
    assert set(values["versions"]) == {"python", "llamagen", "torch", "numpy", "pillow"}
    assert "pictures" not in values
    page = (tmp_path / "new" / PAGE_NAME).read_text(encoding="utf-8")
    assert "a title" in page
    assert "data:image/png;base64," in page


def test_what_is_no_number_survives_the_file(tmp_path):
    report = Report(
        protocol="tokenizer",
        title="t",
        metrics={"psnr": math.inf, "ssim": math.nan},
        reference={},
        samples={},
        settings={},
    )
    report.save(tmp_path)
    values = json.loads((tmp_path / JSON_NAME).read_text(encoding="utf-8"))
    assert values["metrics"]["psnr"] == math.inf
    assert math.isnan(values["metrics"]["ssim"])
