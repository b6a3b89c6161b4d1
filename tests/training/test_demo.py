import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llamagen.training import demo
from llamagen.training.demo import (
    Digits,
    _classifier,
    enlarged,
    load_digits,
    run_training_demo,
)


def test_digits_are_split_without_overlap():
    digits = load_digits()
    assert (len(digits.train), len(digits.held_out)) == (1438, 359)
    assert set(digits.train_labels) == set(digits.held_out_labels) == set(range(10))
    again = load_digits()
    assert np.array_equal(digits.held_out, again.held_out)


def test_a_scan_survives_enlarging():
    """Box-filtered back to 8x8, a picture is still close to its scan."""
    scan = load_digits().train[0]
    picture = enlarged(scan)
    assert picture.size == (32, 32)
    small = picture.convert("L").resize((8, 8), Image.Resampling.BOX)
    back = np.asarray(small, dtype=float) * 16 / 255
    assert np.corrcoef(back.flatten(), scan.flatten())[0, 1] > 0.98


def test_classifier_recognises_real_digits():
    """Also after they were enlarged, as generated ones are."""
    digits = load_digits()
    pictures = [enlarged(scan) for scan in digits.held_out]
    assert _classifier(digits)(pictures, digits.held_out_labels) > 0.97


def test_every_stage_in_short(tmp_path, monkeypatch, curves):
    """A few steps of each on few scans: all is there, and a second call trains nothing anew."""
    scans = load_digits()
    few = Digits(*(part[:300] for part in scans[:2]), *(part[:50] for part in scans[2:]))
    monkeypatch.setattr(demo, "load_digits", lambda: few)
    result = run_training_demo(tmp_path / "demo", steps=(2, 2))
    for name in ("sheet.png", "curves.png", "summary.json"):
        assert (tmp_path / "demo" / name).is_file()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["psnr"] == result.psnr
    assert 0 <= result.recognised <= 1
    assert result.recognised_real > 0.9
    weights = tmp_path / "demo" / "transformer" / "pipeline" / "transformer" / "model.safetensors"
    before = weights.read_bytes()
    again = run_training_demo(tmp_path / "demo", steps=(2, 2))
    assert weights.read_bytes() == before
    assert again.recognised == result.recognised
    assert again.bits_per_code == result.bits_per_code


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_as_it_ships(tmp_path):
    """What the README promises: nine tenths recognised, in less than 2 GiB."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from llamagen.cli.main import main\n"
        "try:\n"
        "    main(['demo-train', '--out', sys.argv[1]])\n"
        "except SystemExit as stopped:\n"
        "    assert not stopped.code\n"
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(line.split()[1] for line in status if line.startswith('VmHWM')))\n"
    )
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=True
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recognised"] >= 0.9
    assert summary["psnr"] >= 24
    assert summary["codebook_usage"] >= 0.5
    assert summary["bits_per_code"] < 3.6
    assert int(done.stdout.splitlines()[-1]) < 2 * 2**20, "peak memory in KiB"
