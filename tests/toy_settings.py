"""A program for ``test_declared_settings``: two more sampling settings, and where they show up.

Prints one line of JSON.
"""

import contextlib
import dataclasses
import io
import json
import tempfile

from llamagen import config

Toys = dataclasses.make_dataclass(
    "SamplingConfig",
    [
        (
            "toy_share",
            float,
            config._setting(0.5, "Of the toys.", minimum=0, exclusive_minimum=True, maximum=0.5),
        ),
        ("toy_kind", str, config._setting("soft", "Of a toy.", choices=("soft", "hard"))),
    ],
    bases=(config.SamplingConfig,),
    frozen=True,
    kw_only=True,
)
# Before any other module takes it from there: as if the rows stood in the file.
config.SamplingConfig = Toys
config.sampling_settings.cache_clear()


def run(words: list[str]) -> str:
    """Run a command; return what it prints."""
    from llamagen.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    return out.getvalue()


def main() -> None:
    import httpx

    from llamagen.cli.main import COMMANDS
    from llamagen.pipeline import Pipeline
    from llamagen.support.pictures import read_metadata
    from tests.serving.servers import running
    from tests.tiny_models import tiny_pipeline

    commands = [c for c in COMMANDS if c.split()[0] in ("generate", "edit", "evaluate")]
    pipe = tiny_pipeline()
    pipe.sampling = pipe.sampling.replace(toy_share=0.25, toy_kind="hard")
    found = {
        "help": {command: run([*command.split(), "--help"]) for command in commands},
        "metadata": pipe("dog", seed=0).metadata[0],
        "metadata_of_call": pipe("dog", seed=0, toy_share=0.125).metadata[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(f"{folder}/model")
        loaded = Pipeline.from_pretrained(f"{folder}/model").sampling
        found["loaded"] = {name: getattr(loaded, name) for name in ("toy_share", "toy_kind")}
        generate = ["generate", "--model", f"{folder}/model", "--dtype", "float32"]
        run([*generate, "-c", "dog", "--seed", "7", "--toy-share", "0.375", "-o", f"{folder}/a"])
        run([*generate, "--like", f"{folder}/a/dog-7.png", "-o", f"{folder}/b"])
        found["generated"] = [read_metadata(f"{folder}/{out}/dog-7.png") for out in "ab"]
    with running({"tiny": pipe}) as server, httpx.Client(base_url=server.url) as client:
        schemas = client.get("/openapi.json").json()
        forms = {
            path: schemas["paths"][f"/v1/images/{path}"]["post"]["requestBody"]["content"]
            for path in ("edits", "variations")
        }
        found["schemas"] = {
            "ImageRequest": schemas["components"]["schemas"]["ImageRequest"]["properties"],
            "EditRequest": forms["edits"]["multipart/form-data"]["schema"]["properties"],
            "VariationRequest": forms["variations"]["multipart/form-data"]["schema"]["properties"],
        }
        body = {"prompt": "dog", "seed": 1, "toy_share": 0.125}
        url = "/v1/images/generations"
        found["answer"] = client.post(url, json=body).json()
        found["refused"] = client.post(url, json={**body, "toy_share": 0.75}).json()["error"]
        found["card"] = client.get("/v1/models/tiny").json()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
