"""Several rows at once: what the wavefront is said to do; the exact image with whole rows."""

import copy

import pytest
import torch

from llamagen.backends.decoder import TorchDecoder
from llamagen.config import SamplingConfig
from llamagen.generation import generate_codes, guide, row_parallel, uniform_draws
from llamagen.generation.filters import next_codes
from llamagen.generation.row_parallel import generate_codes_row_parallel, most_codes_fed
from llamagen.models.transformer import rope_table
from llamagen.models.transformer.blocks import AttentionMask
from llamagen.support.errors import InputError, NotFiniteError
from tests.tiny_models import tiny_transformer

PLAIN = SamplingConfig(guidance_scale=1.0)
GUIDED = SamplingConfig(guidance_scale=2.5)
FILTERED = SamplingConfig(guidance_scale=1.8, temperature=1.3, top_k=20, top_p=0.9)
STOPPED = SamplingConfig(guidance_scale=3.0, guidance_stop=6)
WAYS = [PLAIN, GUIDED, FILTERED, STOPPED]
SIZES = {"torch": {}, "kernels": {"dim": 64, "heads": 2}}


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


def settings_of(count, sampling):
    return {"seeds": range(30, 30 + count), "sampling": sampling}


@pytest.mark.parametrize("sampling", WAYS)
@pytest.mark.parametrize("lag", [4, 5, 100])
@pytest.mark.parametrize("size", SIZES)
def test_a_lag_of_a_whole_row_gives_the_exact_image(size, lag, sampling):
    model, labels = tiny_transformer(**SIZES[size]), torch.arange(15) % 5
    settings = settings_of(15, sampling)
    drawn = generate_codes_row_parallel(model, labels, lag=lag, **settings)
    assert torch.equal(drawn.codes, generate_codes(model, labels, **settings))
    assert drawn.passes == 16


def cells_fed(time, rows, columns, lag):
    """What a pass is fed, written from what the wavefront is said to do."""
    cells = []
    for row in range(rows):
        if row * lag <= time <= row * lag + columns:
            cells.append(row * columns + time - row * lag - 1)
        # The row below begins in the next pass, and all it will see of this one is filled.
        if row + 1 < rows and (row + 1) * lag - 1 in (time, 0 if time == 1 else None):
            begin, end = row * columns + lag - 1, (row + 1) * columns - 1
            cells += [cell for cell in range(begin, end) if cell not in cells]
    return [cell for cell in cells if cell < rows * columns - 1]


def stand_in(cell, columns, codes):
    while cell >= 0 and cell not in codes:
        cell -= columns
    return codes[cell if cell >= 0 else max(key for key in codes if key < columns)]


@torch.inference_mode()
def draw_without_a_cache(model, label, seed, lag, sampling):
    """Codes (rows, columns) by a pass over everything that was ever fed, at every time anew.

    A mask lets each see what is the last to have been fed at the places before its own.
    """
    rows, columns = model.config.grid
    uniforms = uniform_draws([seed], rows * columns).squeeze(0)
    stop = rows * columns if sampling.guidance_stop is None else sampling.guidance_stop
    embedded = model.cls_embedding(torch.tensor([label, model.config.num_classes]))
    table = rope_table((rows, columns), 1, model.config.head_dim, 10000.0, torch.device("cpu"))
    codes, fed, values, seen = {}, [], [], []
    for time in range(columns + (rows - 1) * lag):
        new = cells_fed(time, rows, columns, lag) if time else []
        latest = {cell: index for index, cell in enumerate(fed + new)}
        seen += [[index for cell, index in latest.items() if cell <= own] for own in new]
        values += [stand_in(cell, columns, codes) for cell in new]
        fed += new
        allowed = torch.zeros(1 + len(fed), 1 + len(fed), dtype=torch.bool)
        allowed[:, 0] = True
        for query, keys in enumerate(seen):
            allowed[1 + query, [1 + key for key in keys]] = True
        x = torch.cat([embedded, model.tok_embeddings(torch.tensor([values] * 2).long())], dim=1)
        mask = AttentionMask(causal=False, allowed=allowed[None, None])
        logits = model.output(model._run(x, table[[0, *(1 + cell for cell in fed)]], mask, None))
        predicted = dict(zip(new, logits[:, len(logits[0]) - len(new) :].unbind(1), strict=True))
        for cell, (own, other) in predicted.items() if time else [(-1, logits[:, 0])]:
            # A row's last code predicts the next one's first only if that is not there already.
            if (cell + 1) % columns or cell + 1 not in codes:
                mixed = guide(own, other, sampling.guidance_scale) if cell + 1 < stop else own
                draw = next_codes(mixed[None], sampling, uniforms[cell + 1 : cell + 2])
                codes[cell + 1] = draw.item()
    return torch.tensor([codes[cell] for cell in range(rows * columns)]).view(rows, columns)


@pytest.mark.parametrize("sampling", WAYS)
@pytest.mark.parametrize(
    ("grid", "lag"), [((4, 5), 1), ((4, 5), 2), ((3, 5), 4), ((6, 3), 1), ((6, 3), 2), ((4, 2), 1)]
)
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_those_of_the_definition(size, grid, lag, sampling):
    model = tiny_transformer(grid=grid, **SIZES[size])
    drawn = generate_codes_row_parallel(
        model, torch.tensor([1, 3]), lag=lag, **settings_of(2, sampling)
    )
    assert drawn.passes == grid[1] + (grid[0] - 1) * lag
    for label, seed, codes in zip((1, 3), (30, 31), drawn.codes, strict=True):
        assert torch.equal(codes, draw_without_a_cache(model, label, seed, lag, sampling))


def test_the_passes_of_a_small_grid():
    condition, *steps = row_parallel._steps((3, 4), 2)
    assert (condition.cells, condition.drawn, condition.by) == ([], [0], [0])
    assert [step.drawn for step in steps] == [
        [1, 2, 3],  # 2 and 3 are drafts: the second row begins next, and is drawn behind them
        [2, 4],
        [3, 5, 6, 7],  # and so are 6 and 7
        [6, 8],
        [7, 9],
        [10],
        [11],
    ]
    assert [step.cells for step in steps] == [
        [0, 1, 2],
        [1, 3],
        [2, 4, 5, 6],
        [3, 5, 7],  # the first row's last code takes its draft's place
        [6, 8],
        [7, 9],
        [10],
    ]
    assert [step.sources for step in steps] == [
        [0, 0, 0],  # nothing else is there yet
        [1, 3],
        [2, 4, 1, 2],  # of the second row there is one code, of the first one two and two drafts
        [3, 5, 7],
        [6, 8],
        [7, 9],
        [10],
    ]
    assert [step.by for step in steps] == [
        *([0, 1, 2], [0, 1], [0, 1, 2, 3], [1, 2], [0, 1], [1], [0]),
    ]


@pytest.mark.parametrize("lag", range(1, 9))
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (5, 7), (9, 4), (4, 2)])
def test_every_code_is_drawn_at_last_and_fed_everywhere(grid, lag):
    rows, columns = grid
    steps = list(row_parallel._steps(grid, lag))
    lag = min(lag, columns)
    assert len(steps) == columns + (rows - 1) * lag
    codes, filled = {}, {}
    for time, step in enumerate(steps):
        assert set(step.sources) <= set(codes)
        assert len(set(step.cells)) == len(step.cells)
        assert len(set(step.drawn)) == len(step.drawn)
        filled |= dict(zip(step.cells, step.sources, strict=True))
        for cell, fed in zip(step.drawn, step.by, strict=True):
            # Something stands at all places before what is drawn.
            assert time == 0 or step.cells[fed] == cell - 1
            assert set(range(cell)) <= set(filled)
        codes |= dict.fromkeys(step.drawn, time)
    # Row r's column c in pass r lag + c, whatever stood there before.
    assert codes == {
        row * columns + column: row * lag + column
        for row in range(rows)
        for column in range(columns)
    }
    assert filled == {cell: cell for cell in range(rows * columns - 1)}
    assert max(len(step.cells) for step in steps) == most_codes_fed(grid, lag)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampling", WAYS)
def test_an_image_is_the_same_whatever_else_is_in_the_batch(size, sampling):
    model, labels, seeds = tiny_transformer(**SIZES[size]), torch.arange(15) % 5, range(100, 115)
    together = generate_codes_row_parallel(model, labels, lag=2, seeds=seeds, sampling=sampling)
    for i in (0, 7, 14):
        alone = generate_codes_row_parallel(
            model, labels[i : i + 1], lag=2, seeds=[seeds[i]], sampling=sampling
        )
        assert torch.equal(alone.codes[0], together.codes[i])
    assert len({tuple(image.flatten().tolist()) for image in together.codes}) == 15


@pytest.mark.parametrize("lag", [2, 4])
def test_texts_of_different_lengths_and_negative_prompts(lag):
    model = tiny_transformer(condition="text", kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    features, against = torch.randn(2, 3, 6, 16, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    other = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
    sampling = SamplingConfig(guidance_scale=2.0, guidance_stop=7, temperature=0.0)

    def drawn(images, generate, **settings):
        found = generate(
            model,
            features[images],
            condition_mask=mask[images],
            unconditional=against[images],
            unconditional_mask=other[images],
            seeds=range(3)[images],
            sampling=sampling,
            **settings,
        )
        return found if isinstance(found, torch.Tensor) else found.codes

    together = drawn(slice(3), generate_codes_row_parallel, lag=lag)
    exact = drawn(slice(3), generate_codes)
    assert torch.equal(together, exact) == (lag == 4)
    for image in range(3):
        alone = drawn(slice(image, image + 1), generate_codes_row_parallel, lag=lag)
        assert torch.equal(alone[0], together[image])


@pytest.mark.parametrize(("stop", "guided_passes"), [(None, 10), (0, 0), (1, 1), (6, 4), (16, 10)])
def test_unconditional_sequences_leave_when_guidance_has_ended(
    model, monkeypatch, stop, guided_passes
):
    rows = []
    real = model.extend_at
    monkeypatch.setattr(row_parallel, "decoder_for", TorchDecoder)
    monkeypatch.setattr(
        model, "extend_at", lambda codes, *given: rows.append(len(codes)) or real(codes, *given)
    )
    sampling = SamplingConfig(guidance_scale=2.0, guidance_stop=stop)
    drawn = generate_codes_row_parallel(
        model, torch.arange(5), lag=2, seeds=range(5), sampling=sampling
    )
    assert drawn.passes == 10
    # Codes 0 to 5 are guided with a stop at 6: code 5 is drawn in the fourth pass. The first pass
    # of all is the condition's.
    assert rows == [10] * (guided_passes - 1) + [5] * (9 - max(guided_passes - 1, 0))


def test_rows_are_reported_as_they_finish(model):
    seen = []
    drawn = generate_codes_row_parallel(
        model,
        torch.arange(4),
        lag=1,
        seeds=range(4),
        sampling=GUIDED,
        on_row=lambda row, partial: seen.append((row, partial.clone())),
    )
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    for row, partial in seen:
        assert torch.equal(partial[:, :row], drawn.codes[:, :row])
        assert not partial[:, row:].any()


def test_another_grid_than_the_models(model):
    drawn = generate_codes_row_parallel(
        model, torch.tensor([2]), lag=3, seeds=[3], sampling=GUIDED, grid=(3, 6)
    )
    assert drawn.codes.shape == (1, 3, 6)
    assert drawn.passes == 12
    settings = {"seeds": [3], "sampling": GUIDED, "grid": (3, 6)}
    exact = generate_codes_row_parallel(model, torch.tensor([2]), lag=6, **settings)
    assert torch.equal(exact.codes, generate_codes(model, torch.tensor([2]), **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype):
    model = tiny_transformer().to(dtype)
    drawn = generate_codes_row_parallel(
        model, torch.tensor([0, 1]), lag=2, seeds=[0, 1], sampling=FILTERED
    )
    assert drawn.codes.shape == (2, 4, 4)


def test_what_cannot_be_drawn_is_refused(model):
    with pytest.raises(InputError, match="row_lag is 0, expected at least 1 column"):
        generate_codes_row_parallel(model, torch.tensor([0]), lag=0, seeds=[0])
    with pytest.raises(InputError, match="2 seeds for 1 images"):
        generate_codes_row_parallel(model, torch.tensor([0]), lag=2, seeds=[0, 1])
    with pytest.raises(InputError, match="seed is -1"):
        generate_codes_row_parallel(model, torch.tensor([0]), lag=2, seeds=[-1])


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_transformer()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        generate_codes_row_parallel(model, torch.tensor([0]), lag=2, seeds=[0])


@pytest.mark.gpu
def test_the_gpu_draws_the_same_codes(model):
    greedy = SamplingConfig(guidance_scale=2.0, guidance_stop=7, temperature=0.0)
    settings = {"seeds": range(5), "sampling": greedy, "lag": 2}
    on_cpu = generate_codes_row_parallel(model, torch.arange(5), **settings)
    on_gpu = generate_codes_row_parallel(copy.deepcopy(model).cuda(), torch.arange(5), **settings)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
