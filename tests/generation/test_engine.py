"""The engine draws for many at once what each would get alone."""

import asyncio

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import generate_codes
from llamagen.generation.engine import EngineError, NativeEngine
from llamagen.generation.request import UNKNOWN, GenerationRequest
from llamagen.support.errors import InputError, NotFiniteError
from tests.tiny_models import tiny_transformer

SETTINGS = SamplingConfig(guidance_scale=2.0, top_k=30)


@pytest.fixture
def model():
    return tiny_transformer()


async def stream(engine, label, seed, sampling=SETTINGS, request=None):
    """All updates of an image."""
    condition = torch.tensor(label)
    wanted = GenerationRequest(condition=condition, seed=seed, sampling=sampling)
    return [codes async for codes in engine.stream(wanted, client=request)]


def alone(model, label, seed, sampling=SETTINGS):
    codes = generate_codes(model, torch.tensor([label]), seeds=[seed], sampling=sampling)
    return codes.flatten().tolist()


def test_forty_images_through_a_batch_of_eight(model):
    async def run():
        engine = NativeEngine(model, max_images=8)
        told = await asyncio.gather(*[stream(engine, k % 5, k, request=k // 4) for k in range(40)])
        await engine.close()
        return told

    for k, told in enumerate(asyncio.run(run())):
        assert [len(codes) - codes.count(UNKNOWN) for codes in told] == [4, 8, 12, 16]
        assert told[-1] == alone(model, k % 5, k)
        for rows, codes in enumerate(told, 1):
            assert codes == told[-1][: 4 * rows] + [UNKNOWN] * (16 - 4 * rows)


def test_clients_take_turns(model):
    async def run():
        engine = NativeEngine(model, max_images=2)
        order = []

        async def one(name, seed):
            await stream(engine, 0, seed, request=name)
            order.append(name)

        many = [asyncio.create_task(one("many", k)) for k in range(12)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(one("few", k)) for k in range(2)]
        await asyncio.gather(*many, *few)
        await engine.close()
        return order

    order = asyncio.run(run())
    assert max(index for index, name in enumerate(order) if name == "few") <= 6


def test_cancelled_request_leaves_the_others_alone(model):
    async def run():
        engine = NativeEngine(model, max_images=4)

        async def given_up():
            request = GenerationRequest(condition=torch.tensor(1), seed=99, sampling=SETTINGS)
            updates = engine.stream(request)
            async for _ in updates:
                await updates.aclose()
                return

        gone = [given_up() for _ in range(3)]
        told, *_ = await asyncio.gather(stream(engine, 2, 7), *gone)
        for _ in range(200):
            if not engine._running:
                break
            await asyncio.sleep(0.01)
        left = len(engine._running) + engine._batch.sequences
        await engine.close()
        return told[-1], left

    codes, left = asyncio.run(run())
    assert codes == alone(model, 2, 7)
    assert left == 0


def test_recovers_after_a_failed_step(model):
    async def run():
        engine = NativeEngine(model, max_images=4)
        engine.start()
        step, faults = engine._batch.step, iter([True])

        def faulty():
            if next(faults, False):
                raise RuntimeError("a fault")
            step()

        engine._batch.step = faulty
        failed = await asyncio.gather(
            *[stream(engine, k, k) for k in range(3)], return_exceptions=True
        )
        told = await stream(engine, 1, 5)
        await engine.close()
        return failed, told[-1]

    failed, codes = asyncio.run(run())
    assert any(isinstance(result, EngineError) for result in failed)
    assert all(isinstance(result, EngineError | list) for result in failed)
    assert codes == alone(model, 1, 5)


def test_rejects_bad_input_before_queueing(model):
    async def run():
        engine = NativeEngine(model, max_images=4)
        try:
            with pytest.raises(InputError, match="class labels run from 17"):
                await stream(engine, 17, 0)
            with pytest.raises(InputError, match="seed is -3"):
                await stream(engine, 0, -3)
        finally:
            await engine.close()

    asyncio.run(run())


def test_not_finite_logits_fail_their_image_only(model):
    with torch.no_grad():
        model.cls_embedding.embedding_table.weight[3] = torch.nan

    async def run():
        engine = NativeEngine(model, max_images=4)
        good, bad = await asyncio.gather(
            stream(engine, 1, 0), stream(engine, 3, 0), return_exceptions=True
        )
        await engine.close()
        return good, bad

    good, bad = asyncio.run(run())
    assert good[-1] == alone(model, 1, 0)
    assert isinstance(bad, NotFiniteError)


def test_close_fails_waiting_requests(model):
    async def run():
        engine = NativeEngine(model, max_images=1)
        tasks = [asyncio.create_task(stream(engine, 0, k)) for k in range(5)]
        await asyncio.sleep(0)
        await engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineError, match="closed"):
            await stream(engine, 0, 0)
        return results

    results = asyncio.run(run())
    assert all(isinstance(result, EngineError | list) for result in results)
    assert any(isinstance(result, EngineError) for result in results)


def test_streams_of_a_model_in_training_mode(model):
    expected = alone(model, 0, 0)
    noisy = tiny_transformer(token_dropout=0.5, residual_dropout=0.5).train()

    async def run():
        engine = NativeEngine(noisy, max_images=2)
        codes = await stream(engine, 0, 0)
        await engine.close()
        return codes[-1]

    assert asyncio.run(run()) == expected
    assert all(part.training for part in noisy.modules())
