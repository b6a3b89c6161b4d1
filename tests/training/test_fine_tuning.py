"""Starting from another model: new classes, LoRA, adapters; and exporting from checkpoints."""

import dataclasses
import json
import shutil

import pytest
import torch

from llamagen.checkpoints.adapters import merge_adapter
from llamagen.config import TransformerConfig
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.training import train_tokenizer, train_transformer
from llamagen.training.config import LoraConfig
from llamagen.training.export import export_run
from tests.images import write_digits
from tests.training.runs import assert_same_state, state, tokenizer_recipe, transformer_recipe

LORA = LoraConfig(lora_rank=2, lora_alpha=4.0)


@pytest.fixture(scope="module")
def base(digits, tokenizer_folder, tmp_path_factory):
    """A trained pipeline of three classes; not to be changed."""
    out = tmp_path_factory.mktemp("base") / "run"
    recipe = transformer_recipe(digits, tokenizer_folder, out, steps=3, lr=1e-2)
    return train_transformer(recipe, quiet=True).model


def load(folder):
    return Pipeline.from_pretrained(folder, device="cpu", dtype="float32")


def fine_tuned(digits, base, out, **changes):
    """A recipe that starts from ``base``, with that model's tokenizer."""
    changes = {"model": TransformerConfig(), "init": str(base), "steps": 2, **changes}
    recipe = transformer_recipe(digits, "", out, **changes)
    return dataclasses.replace(recipe, tokenizer=None)


def test_the_same_classes_go_on(digits, base, tmp_path):
    recipe = fine_tuned(digits, base, tmp_path / "out", lr=1e-12, steps=1)
    tuned = load(train_transformer(recipe, quiet=True).model)
    before = load(base).transformer.state_dict()
    for name, tensor in tuned.transformer.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-9)


def test_other_classes_get_a_new_table(base, tmp_path):
    data = write_digits(tmp_path / "data")
    (data / "2").rename(data / "two")
    recipe = fine_tuned(data, base, tmp_path / "out", lr=1e-12, steps=1)
    tuned = load(train_transformer(recipe, quiet=True).model)
    assert tuned.labels.names == ("0", "1", "two")
    before, after = load(base).transformer.state_dict(), tuned.transformer.state_dict()
    table = "cls_embedding.embedding_table.weight"
    torch.testing.assert_close(after[table][-1], before[table][-1], rtol=0, atol=1e-9)
    assert not torch.allclose(after[table][:-1], before[table][:-1])
    torch.testing.assert_close(after["output.weight"], before["output.weight"], rtol=0, atol=1e-9)


def test_another_architecture_is_refused(digits, base, tmp_path):
    recipe = fine_tuned(digits, base, tmp_path / "out", model=TransformerConfig(dim=64, heads=2))
    with pytest.raises(InputError, match=r"model has dim 64, but .* has 32; leave it out"):
        train_transformer(recipe, quiet=True)


def test_lora_needs_a_model():
    with pytest.raises(InputError, match="lora_rank is given without a model to adapt"):
        transformer_recipe(None, "", "out", lora=LORA)


class TestLora:
    def test_run(self, digits, base, tmp_path):
        """Interrupted or not, the same; the base stays; adapter and merged model agree."""
        for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
            recipe = fine_tuned(
                digits, base, tmp_path / out, lora=LORA, steps=steps, ema_decay=0.5, lr=1e-2
            )
            result = train_transformer(recipe, quiet=True)
        assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))
        kept = state(tmp_path / "parts", 4)
        before = load(base).transformer.state_dict()
        weight = "layers.0.attention.wqkv"
        assert torch.equal(kept[f"model.{weight}.base_layer.weight"], before[f"{weight}.weight"])
        merged = load(result.model).transformer
        assert not torch.equal(merged.state_dict()[f"{weight}.weight"], before[f"{weight}.weight"])
        adapted = load(base)
        adapted.load_adapter(tmp_path / "parts" / "adapter")
        for name, tensor in adapted.transformer.state_dict().items():
            torch.testing.assert_close(tensor, merged.state_dict()[name])

    def test_peft_reads_the_adapter(self, digits, base, tmp_path):
        from peft import PeftModel

        recipe = fine_tuned(digits, base, tmp_path / "out", lora=LORA, lr=1e-2)
        merged = load(train_transformer(recipe, quiet=True).model).transformer
        transformer = load(base).transformer
        codes, labels = torch.randint(0, 64, (2, 15)), torch.tensor([0, 2])
        with torch.no_grad():
            expected = merged(codes, labels)
            found = PeftModel.from_pretrained(transformer, str(tmp_path / "out" / "adapter"))
            torch.testing.assert_close(found.eval()(codes, labels), expected, rtol=1e-4, atol=1e-5)

    def test_unknown_layers(self, digits, base, tmp_path):
        lora = LoraConfig(lora_rank=2, lora_targets=("query",))
        recipe = fine_tuned(digits, base, tmp_path / "out", lora=lora)
        with pytest.raises(InputError, match="lora_targets query are no layers"):
            train_transformer(recipe, quiet=True)


class TestMergeAdapter:
    @pytest.fixture
    def adapter(self, digits, base, tmp_path):
        recipe = fine_tuned(digits, base, tmp_path / "run", lora=LORA, steps=1)
        train_transformer(recipe, quiet=True)
        return tmp_path / "run" / "adapter"

    def test_another_model(self, adapter, base):
        config = load(base).transformer.config
        import dataclasses

        other = Transformer(dataclasses.replace(config, dim=64, heads=4))
        with pytest.raises(InputError, match="belongs to another model: it changes"):
            merge_adapter(other, adapter)

    def test_not_lora(self, adapter, base):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
        with pytest.raises(InputError, match="is no plain LoRA adapter"):
            merge_adapter(load(base).transformer, adapter)

    def test_missing_files(self, adapter, base):
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="copy the whole folder"):
            merge_adapter(load(base).transformer, adapter)
        with pytest.raises(FileNotFoundError):
            merge_adapter(load(base).transformer, adapter / "nowhere")


class TestExport:
    def test_tokenizer(self, digits, tmp_path):
        recipe = tokenizer_recipe(digits, tmp_path / "run", ema_decay=0.5)
        model = train_tokenizer(recipe, quiet=True).model
        mean = export_run(tmp_path / "run", tmp_path / "mean")
        trained = export_run(tmp_path / "run", tmp_path / "trained", weights="trained")
        early = export_run(tmp_path / "run", tmp_path / "early", step=2)
        a, b, c, d = (
            ImageTokenizer.from_pretrained(folder).state_dict()["decoder.conv_in.weight"]
            for folder in (model, mean, trained, early)
        )
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert not torch.equal(a, d)

    @pytest.mark.parametrize("lora", [False, True])
    def test_pipeline_without_its_data(self, base, tmp_path, lora):
        data = write_digits(tmp_path / "data")
        changes = {"lora": LORA} if lora else {}
        recipe = fine_tuned(data, base, tmp_path / "run", export=False, ema_decay=0.5, **changes)
        model = train_transformer(recipe, quiet=True).model
        expected = load(model)
        shutil.rmtree(data)
        shutil.rmtree(model)
        found = load(export_run(tmp_path / "run", tmp_path / "out"))
        assert found.labels.names == expected.labels.names
        assert found.sampling == expected.sampling
        for name, tensor in found.transformer.state_dict().items():
            torch.testing.assert_close(tensor, expected.transformer.state_dict()[name])

    def test_rejects_missing_run_mean_or_checkpoint(self, digits, tmp_path):
        with pytest.raises(FileNotFoundError, match="is no run"):
            export_run(tmp_path, tmp_path / "out")
        train_tokenizer(tokenizer_recipe(digits, tmp_path / "run", steps=2), quiet=True)
        with pytest.raises(InputError, match="has no running mean"):
            export_run(tmp_path / "run", tmp_path / "out", weights="mean")
        with pytest.raises(InputError, match="no checkpoint of step 7"):
            export_run(tmp_path / "run", tmp_path / "out", step=7)
        assert not (tmp_path / "out").exists()


def test_labels_of_an_adapter(digits, base, tmp_path):
    recipe = fine_tuned(digits, base, tmp_path / "run", lora=LORA, steps=1)
    train_transformer(recipe, quiet=True)
    saved = Labels.load(tmp_path / "run" / "adapter" / "labels.json")
    assert saved.names == ("0", "1", "2")
