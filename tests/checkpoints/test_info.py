import pytest
import torch

from llamagen.checkpoints import find_shipped
from llamagen.checkpoints.info import describe_model
from llamagen.config import SamplingConfig
from llamagen.models.transformer.quantization import quantize
from llamagen.support.errors import InputError
from tests.tiny_models import (
    tiny_pipeline,
    tiny_text_encoder,
    tiny_text_pipeline,
    tiny_tokenizer,
    tiny_transformer,
)

pytestmark = pytest.mark.usefixtures("nothing_downloaded")


def nbytes(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


class TestMemory:
    def test_matches_weights(self, tmp_path):
        changes = {"heads": 2, "dim": 64}
        tiny_transformer(**changes).save_pretrained(tmp_path)
        memory = describe_model(tmp_path).memory
        assert memory["float32"] == nbytes(tiny_transformer(**changes))
        assert memory["bfloat16"] == nbytes(tiny_transformer(**changes).to(torch.bfloat16))
        model = tiny_transformer(**changes).to(torch.bfloat16)
        quantize(model)
        assert memory["int8"] == nbytes(model)

    def test_matches_quantised_model(self, tmp_path):
        model = tiny_transformer().to(torch.bfloat16)
        quantize(model)
        model.save_pretrained(tmp_path)
        found = describe_model(tmp_path)
        assert found.memory == {"int8": nbytes(model)}
        assert found.parts[0].stored_as == "int8"
        assert found.parameters == tiny_transformer().parameter_count()

    def test_of_all_parts(self, tmp_path):
        pytest.importorskip("transformers")
        pipe = tiny_text_pipeline()
        pipe.save_pretrained(tmp_path / "model")
        found = describe_model(tmp_path / "model")
        _, tokenizer, text = found.parts
        assert text.parameters == sum(p.numel() for p in tiny_text_encoder().parameters())
        assert tokenizer.parameters == pipe.tokenizer.parameter_count()
        assert tokenizer.memory["int8"] == 2 * pipe.tokenizer.parameter_count()
        assert found.parameters == sum(part.parameters for part in found.parts)
        for precision in ("float32", "bfloat16", "int8"):
            assert found.memory[precision] == sum(p.memory[precision] for p in found.parts)

    def test_of_the_cache(self, tmp_path):
        model = tiny_transformer()
        model.save_pretrained(tmp_path)
        cache = model.new_cache(2, 17)
        found = describe_model(tmp_path).kv_cache
        assert found["float32"] == sum(t.nbytes for t in (*cache.keys, *cache.values))
        assert found["bfloat16"] * 2 == found["float32"]
        assert found["int8"] < found["bfloat16"]


class TestDescription:
    def test_of_a_pipeline(self, model_folder):
        found = describe_model(model_folder)
        assert found.name == "tiny"
        assert found.grid == (4, 4)
        assert found.codes == 16
        assert found.image_size == (16, 16)
        assert found.classes == 5
        assert found.class_names[:2] == ("cat", "dog")
        assert found.sampling == SamplingConfig()
        files = [path for path in model_folder.rglob("*.*") if path.name != "README.md"]
        assert found.disk_bytes == sum(path.stat().st_size for path in files)

    def test_of_shipped_models(self):
        found = describe_model("emoji")
        folder = find_shipped("emoji")
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert found.disk_bytes == sum(path.stat().st_size for path in files)
        assert found.condition == "text"
        assert found.image_size == (64, 64)
        assert found.sampling.guidance_scale == 2.25

    def test_of_a_text_encoder(self):
        found = describe_model(find_shipped("emoji") / "text_encoder")
        assert found.name == "text_encoder"
        assert [part.kind for part in found.parts] == ["text encoder"]
        assert found.parameters == 1_550_208
        assert list(found.memory) == ["float32", "bfloat16"]
        assert found.parts[0].config["layers"] == 4

    def test_counts_encoder_of_t5(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
        config = transformers.T5Config(num_layers=2, num_decoder_layers=2, **sizes)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        own = transformers.T5EncoderModel(config)
        assert describe_model(tmp_path).parameters == sum(p.numel() for p in own.parameters())

    def test_of_a_checkpoint_file(self, tmp_path):
        model = tiny_transformer()
        torch.save({"model": model.state_dict(), "args": {"n_head": 4}}, tmp_path / "a.pt")
        found = describe_model(tmp_path / "a.pt")
        assert found.parameters == model.parameter_count()
        assert found.disk_bytes == (tmp_path / "a.pt").stat().st_size
        assert found.image_size is None

    def test_of_an_image_tokenizer(self, model_folder):
        found = describe_model(model_folder / "tokenizer")
        assert found.parameters == tiny_tokenizer().parameter_count()
        assert found.codes is None
        assert found.sampling is None

    def test_of_published_model_without_download(self):
        found = describe_model("c2i-B-384")
        assert [part.parameters for part in found.parts] == [110_888_448, 71_883_403]
        assert [part.disk_bytes for part in found.parts] == [None, None]
        assert found.disk_bytes is None
        assert found.image_size == (384, 384)
        assert found.sampling.top_k == 2000
        assert describe_model("vq-8").parameters == 70_109_835

    def test_rejects_unknown_source(self, tmp_path):
        with pytest.raises(InputError, match="no known model"):
            describe_model("no-such-model")
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
        with pytest.raises(InputError, match="has no weights"):
            describe_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"not weights")
        with pytest.raises(InputError, match="truncated"):
            describe_model(tmp_path)
