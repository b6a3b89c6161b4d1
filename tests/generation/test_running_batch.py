"""Images of a running batch are those that are drawn alone."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import generate_codes
from llamagen.generation.running_batch import Drawing, RunningBatch
from llamagen.generation.sequences import Blend
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

SETTINGS = [
    SamplingConfig(guidance_scale=4.0),
    SamplingConfig(guidance_scale=1.0, top_k=5),
    SamplingConfig(guidance_scale=2.0, guidance_stop=3),
    SamplingConfig(guidance_scale=7.5, top_p=0.7, temperature=1.3),
    SamplingConfig(guidance_scale=3.0, temperature=0.0),
    SamplingConfig(guidance_scale=3.0, guidance_stop=0),
    SamplingConfig(guidance_scale=3.0, guidance_stop=1, top_k=20),
]


def alone(model, drawing: Drawing) -> torch.Tensor:
    other = drawing.unconditional
    mask = None
    condition = drawing.condition.unsqueeze(0)
    if other is not None and other.ndim == 2:
        # Both to one length, real features last.
        length = max(len(other), condition.shape[1])

        def pad(x):
            return torch.nn.functional.pad(x, (0, 0, length - x.shape[1], 0))

        def real(count):
            return (torch.arange(length) >= length - count).unsqueeze(0)

        mask = {
            "condition_mask": real(condition.shape[1]),
            "unconditional_mask": real(len(other)),
        }
        condition, other = pad(condition), pad(other.unsqueeze(0))
    elif other is not None:
        other = other.unsqueeze(0)
    codes = generate_codes(
        model,
        condition,
        unconditional=other,
        seeds=[drawing.seed],
        sampling=drawing.sampling,
        **(mask or {}),
    )
    return codes.flatten()


def run(batch: RunningBatch, arrivals: dict[int, list[Drawing]]) -> None:
    """Adds the drawings at their steps and runs until all are done."""
    step, left = 0, sum(map(len, arrivals.values()))
    while left:
        batch.add(arrivals.get(step, []))
        batch.step()
        left -= len(batch.finished())
        step += 1
    assert batch.drawings == []
    assert batch.sequences == 0


@pytest.mark.parametrize("kept", [None, torch.int8])
def test_mixed_settings_join_and_leave(kept):
    model = tiny_transformer(dim=64, heads=2)
    model.kv_cache_dtype = kept
    drawings = [
        Drawing(torch.tensor(index % 5), seed=index, sampling=SETTINGS[index % len(SETTINGS)])
        for index in range(21)
    ]
    run(RunningBatch(model, 21), {3 * k: drawings[3 * k : 3 * k + 3] for k in range(7)})
    for drawing in drawings:
        assert torch.equal(drawing.codes, alone(model, drawing))


def test_texts_of_different_lengths_and_negative_prompts():
    model = tiny_transformer(condition="text", grid=(3, 5))
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return torch.randn(length, 16, generator=generator)

    drawings = [
        Drawing(text(3), seed=1, sampling=SETTINGS[0]),
        Drawing(text(6), seed=2, sampling=SETTINGS[1], unconditional=text(2)),
        Drawing(text(1), seed=3, sampling=SETTINGS[2], unconditional=text(4)),
        Drawing(text(5), seed=4, sampling=SETTINGS[3], unconditional=text(5)),
    ]
    run(RunningBatch(model, 4), {0: drawings[:1], 2: drawings[1:3], 5: drawings[3:]})
    for drawing in drawings:
        assert torch.equal(drawing.codes, alone(model, drawing))


def test_one_that_is_taken_out_leaves_the_others_alone():
    model = tiny_transformer()
    drawings = [Drawing(torch.tensor(k), seed=k, sampling=SETTINGS[k]) for k in range(4)]
    batch = RunningBatch(model, 4)
    batch.add(drawings)
    batch.step()
    batch.remove(drawings[0])
    batch.step()
    batch.remove(drawings[2])
    while batch.drawings:
        batch.step()
        batch.finished()
    for drawing in (drawings[1], drawings[3]):
        assert torch.equal(drawing.codes, alone(model, drawing))


def test_bad_conditions_let_nothing_in():
    batch = RunningBatch(tiny_transformer(), 4)
    good = Drawing(torch.tensor(0), seed=0, sampling=SETTINGS[0])
    with pytest.raises(InputError, match="class labels run from 9 to 9"):
        batch.add([good, Drawing(torch.tensor(9), seed=0, sampling=SETTINGS[0])])
    with pytest.raises(InputError, match="seed is -1"):
        batch.add([good, Drawing(torch.tensor(1), seed=-1, sampling=SETTINGS[0])])
    assert batch.sequences == 0
    assert batch.drawings == []


def test_logits_that_are_not_finite_are_said_of_their_own_image():
    model = tiny_transformer()
    with torch.no_grad():
        model.cls_embedding.embedding_table.weight[2] = torch.nan
    drawings = [Drawing(torch.tensor(k), seed=k, sampling=SETTINGS[1]) for k in (1, 2)]
    run(RunningBatch(model, 2), {0: drawings})
    drawings[0].check()
    assert torch.equal(drawings[0].codes, alone(model, drawings[0]))
    with pytest.raises(InputError, match="logits are not finite"):
        drawings[1].check()


def test_edited_and_blended_images_among_others():
    model = tiny_transformer()
    known = torch.full((16,), -1)
    known[3:9] = torch.arange(6)
    drawings = [
        Drawing(torch.tensor(0), seed=1, sampling=SETTINGS[0], known=known),
        Drawing(torch.tensor(1), seed=2, sampling=SETTINGS[1]),
        Drawing(torch.tensor(2), seed=3, sampling=SETTINGS[2], blend=torch.tensor(4)),
        Drawing(
            torch.tensor(3),
            seed=4,
            sampling=SETTINGS[1],
            blend=torch.tensor(0),
            blend_share=0.2,
            known=known,
        ),
    ]
    run(RunningBatch(model, 4), {0: drawings[:2], 3: drawings[2:]})
    for drawing in drawings:
        blend = None
        if drawing.blend is not None:
            blend = Blend(drawing.blend.unsqueeze(0), share=drawing.blend_share)
        wanted = generate_codes(
            model,
            drawing.condition.unsqueeze(0),
            seeds=[drawing.seed],
            sampling=drawing.sampling,
            known=None if drawing.known is None else drawing.known.view(1, 4, 4),
            blend=blend,
        )
        assert torch.equal(drawing.codes, wanted.flatten())


def test_a_blend_with_guidance_takes_the_room_of_three_sequences():
    batch = RunningBatch(tiny_transformer(), 2)
    blend = Drawing(torch.tensor(0), seed=0, sampling=SETTINGS[0], blend=torch.tensor(1))
    plain = Drawing(torch.tensor(0), seed=0, sampling=SETTINGS[1])
    guided = Drawing(torch.tensor(0), seed=0, sampling=SETTINGS[0])
    assert batch.room([blend, guided]) == 1
    assert batch.room([blend, plain, plain]) == 2
    with pytest.raises(InputError, match="needs three sequences"):
        RunningBatch(tiny_transformer(), 1).check(blend)
