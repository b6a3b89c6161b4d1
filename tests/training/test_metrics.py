import pytest
import torch

from llamagen.support.errors import InputError
from llamagen.training.losses import Term, mean_psnr, total_loss
from llamagen.training.metrics import CodebookUsage, Meter
from llamagen.training.optimizer import Ema
from llamagen.training.trackers import MetricsLog, draw_curves, read_metrics


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


class TestMeter:
    def test_means(self):
        meter = Meter()
        meter.add(scalars(a=1.0, b=5.0))
        meter.add(scalars(a=2.0))
        assert meter.means() == {"a": 1.5, "b": 5.0}
        meter.clear()
        assert meter.means() == {}

    def test_resumes(self):
        whole, first, second = Meter(), Meter(), Meter()
        values = [0.1, 0.2, 0.7]
        for value in values:
            whole.add(scalars(a=value))
        first.add(scalars(a=values[0]))
        second.load_state_dict(first.state_dict(), torch.device("cpu"))
        for value in values[1:]:
            second.add(scalars(a=value))
        assert second.means() == whole.means()


class TestMetricsLog:
    def test_lines_after_the_resumed_step_are_dropped(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, last_step=0)
        for step in (1, 2, 3):
            log.metrics(step, "train", {"loss": float(step)})
        again = MetricsLog(path, last_step=2)
        again.metrics(3, "train", {"loss": 30.0})
        assert [record["loss"] for record in read_metrics(path)] == [1.0, 2.0, 30.0]
        assert again.latest("train") == {"loss": 30.0}
        assert again.latest("validation") == {}

    def test_half_a_line(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        MetricsLog(path, last_step=0).metrics(1, "train", {"loss": 1.0})
        with path.open("a") as file:
            file.write('{"step": 2, "spl')
        assert len(MetricsLog(path, last_step=2).records) == 1
        assert path.read_text().endswith("}\n")


class TestCodebookUsage:
    def test_share(self):
        usage = CodebookUsage(8, window=100)
        assert usage.share() == 0.0
        usage.add(torch.tensor([[0, 1], [1, 5]]))
        assert usage.share() == 3 / 8

    def test_old_codes_drop_out(self):
        usage = CodebookUsage(8, window=4)
        usage.add(torch.tensor([0, 1, 2, 3]))
        usage.add(torch.tensor([4, 4, 4, 4]))
        assert usage.share() == 1 / 8

    def test_resumes(self):
        first, second = CodebookUsage(8, window=4), CodebookUsage(8, window=4)
        first.add(torch.tensor([0, 1]))
        second.load_state_dict(first.state_dict())
        second.add(torch.tensor([2, 3]))
        assert second.share() == 4 / 8


class TestEma:
    def make(self, decay):
        """A mean that began at 0, of a weight that is 1 now."""
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        ema = Ema(model, decay)
        torch.nn.init.ones_(model.weight)
        return model, ema

    def test_follows_slowly(self):
        model, ema = self.make(0.9)
        for _ in range(3):
            ema.update(1_000_000)
        with ema.in_place():
            assert float(model.weight.detach()) == pytest.approx(1 - 0.9**3)
        assert float(model.weight.detach()) == 1.0
        assert not ema.state_dict()["weight"].requires_grad

    def test_first_steps_count_more(self):
        _, ema = self.make(0.9999)
        ema.update(1)
        assert float(ema.state_dict()["weight"]) == pytest.approx(1 - 2 / 11)

    def test_weights_return_after_an_error(self):
        model, ema = self.make(0.9)
        with pytest.raises(KeyError), ema.in_place():
            raise KeyError
        assert float(model.weight.detach()) == 1.0

    def test_frozen_weights_have_no_mean(self):
        model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        model[0].requires_grad_(False)
        assert set(Ema(model, 0.9).state_dict()) == {"1.weight", "1.bias"}


def test_total_loss():
    a = torch.tensor(2.0, requires_grad=True)
    total = total_loss({"a": Term(a, 0.5), "b": Term(torch.tensor(3.0), 2.0)})
    assert total.item() == 7.0
    total.backward()
    assert float(a.grad) == 0.5


def test_mean_psnr():
    images = torch.zeros(2, 3, 4, 4)
    off = images.clone()
    off[0] += 0.2
    expected = (20 * torch.log10(torch.tensor(2 / 0.2)) + 100) / 2
    assert float(mean_psnr(off, images)) == pytest.approx(float(expected), abs=1e-3)
    assert float(mean_psnr(images + 5, images + 1)) == pytest.approx(100, abs=1e-3)


def test_curves(tmp_path):
    from PIL import Image

    records = [
        {"step": step, "split": split, "loss": 1 / step}
        for step in (1, 2, 3)
        for split in ("train", "validation")
    ]
    path = tmp_path / "curves.png"
    panels = {"loss": ("loss",), "nothing yet": ("psnr",), "again": ("loss", "psnr")}
    draw_curves(records, panels, path)
    with Image.open(path) as image:
        assert min(image.size) > 300
    assert list(tmp_path.iterdir()) == [path]


def test_curves_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'llamagen\[train\]'"):
        draw_curves([], {"loss": ("loss",)}, tmp_path / "curves.png")
