"""The logits processor between vLLM's two model runners and the draw."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import sample_codes, uniform_draws
from llamagen.generation.sampling import Filters
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

vllm = pytest.importorskip("vllm")

from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

from llamagen.config import config_to_dict  # noqa: E402
from llamagen.vllm_plugin import register  # noqa: E402
from llamagen.vllm_plugin.hf_config import LlamaGenConfig  # noqa: E402
from llamagen.vllm_plugin.processor import CodeSampler  # noqa: E402
from llamagen.vllm_plugin.sampling import refuse_unsupported, sampling_params  # noqa: E402


def config_of(**changes):
    model = tiny_transformer(**changes).config
    return LlamaGenConfig(transformer=config_to_dict(model), streams=1)


def vllm_config(config):
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=config))


def expected(config, logits, seed, index):
    uniform = uniform_draws([seed], 16)[0, index : index + 1]
    plain = SamplingConfig(guidance_scale=1.0)
    own = logits[None, : config.model.codebook_size]
    return sample_codes(own, Filters.of([plain]), uniform).item()


PLAIN = SamplingConfig(guidance_scale=1.0)


def test_rows_are_followed_through_a_batch():
    config = config_of()
    sampler = CodeSampler(vllm_config(config), torch.device("cpu"), False)
    assert not sampler.is_argmax_invariant()
    drawn = [[], [7] * 3, [7] * 5, [7] * 15]
    params = [sampling_params(config, PLAIN, seed) for seed in range(4)]
    added = [(row, params[row], [1], drawn[row]) for row in range(4)]
    sampler.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    moved = [(0, 2, swap), (3, 1, one_way)]
    sampler.update_state(BatchUpdate(batch_size=3, removed=[1], added=[], moved=moved))
    logits = torch.randn(3, config.vocab_size)
    ids = sampler.apply(logits.clone()).argmax(-1) - config.first_code
    assert ids.tolist() == [
        expected(config, logits[0], seed=2, index=5),
        expected(config, logits[1], seed=3, index=15),
        expected(config, logits[2], seed=0, index=0),
    ]
    # The lists are vLLM's, and grow.
    drawn[2].append(7)
    ids = sampler.apply(logits.clone()).argmax(-1) - config.first_code
    assert ids[0] == expected(config, logits[0], seed=2, index=6)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_slots_of_the_second_runner(kind):
    config = config_of(condition=kind)
    lengths = np.array([1, 1, 1] if kind == "class" else [5, 2, 6])
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=lengths))
    sampler = CodeSampler(vllm_config(config), states)
    for slot in range(3):
        assert sampler.add_request(slot, sampling_params(config, PLAIN, slot))
    logits = torch.randn(2, config.vocab_size)
    indices = [4, 0]
    seen = np.array([lengths[2] + indices[0], lengths[0] + indices[1]])
    ctx = SimpleNamespace(idx_mapping_np=np.array([2, 0]), seq_lens_upper_bound_np=seen)
    ids = sampler.apply(logits.clone(), ctx).argmax(-1) - config.first_code
    assert ids.tolist() == [
        expected(config, logits[0], seed=2, index=4),
        expected(config, logits[1], seed=0, index=0),
    ]


def test_other_models_are_left_alone():
    sampler = CodeSampler(vllm_config(SimpleNamespace()), torch.device("cpu"), False)
    assert sampler.is_argmax_invariant()
    params = vllm.SamplingParams(extra_args={"other": 1})
    CodeSampler.validate_params(params)
    sampler.update_state(
        BatchUpdate(batch_size=1, removed=[], added=[(0, params, [1], [])], moved=[])
    )
    logits = torch.randn(1, 9)
    assert sampler.apply(logits) is logits
    second = CodeSampler(vllm_config(SimpleNamespace()), SimpleNamespace(prompt_len=None))
    assert not second.add_request(0, params)


def test_vllm_finds_the_plugin_by_its_entry_points():
    from importlib.metadata import entry_points

    (general,) = entry_points(group="vllm.general_plugins", name="llamagen")
    assert general.load() is register
    (processor,) = entry_points(group="vllm.logits_processors", name="llamagen")
    assert processor.load() is CodeSampler
    register()
    register()
    from transformers import AutoConfig

    assert isinstance(AutoConfig.for_model("llamagen"), LlamaGenConfig)


def test_positions_do_not_depend_on_the_prompts_length():
    from llamagen.vllm_plugin.model import LlamaGenForImageCodes

    positions = LlamaGenForImageCodes.get_mrope_input_positions
    first = SimpleNamespace(_prefill_has_codes=False)
    found, offset = positions(first, [0, 1, 2, 3], [])
    assert found.tolist() == [[0, 0, 0, 0]] * 3
    assert offset + 4 == 1
    # The second runner puts the codes of a preempted request behind its prompt.
    second = SimpleNamespace(_prefill_has_codes=True)
    found, offset = positions(second, [0, 0, 9, 1, 4], [])
    assert found.tolist() == [[0, 0, 1, 2, 3]] * 3
    assert offset + 5 == 4


@pytest.mark.parametrize(
    ("speculative", "stages", "message"),
    [(object(), 1, "speculative decoding"), (None, 2, "pipeline_parallel_size")],
)
def test_rejects_unsupported_modes(speculative, stages, message):
    with pytest.raises(InputError, match=message):
        refuse_unsupported(speculative, stages)
