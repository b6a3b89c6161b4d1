"""Start a server with a model that comes with the package, and generate through its API.

    python examples/serve_and_call.py                     (--quick: one image each)
    python examples/serve_and_call.py --model cifar10 --prompt horse

The client is OpenAI's (pip install openai) and does not need llamagen; each call is also shown
with curl. Needs the extras "serve" and "text". Writes the images to --out. The cells can be pasted
into a notebook.
"""

# %% Options
import argparse
import atexit
import base64
import io
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI
from PIL import Image, ImageDraw

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="emoji", help="a name or a pipeline folder")
parser.add_argument("--prompt", help="default: sunflower, or the model's first class")
parser.add_argument("--out", type=Path, default=Path("runs/serve-and-call"))
parser.add_argument("--quick", action="store_true", help="one image each")
# A notebook has a command line of its own.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
args.out.mkdir(parents=True, exist_ok=True)
COUNT = 1 if args.quick else 4


# %% The server: llamagen serve --model emoji
# Port 0 takes a free port, which is in the first line printed.
def start(model: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it and its URL once it is ready."""
    command = [sys.executable, "-m", "llamagen", "serve", "--model", model, "--port", "0"]
    with (args.out / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    # End the server with this program.
    atexit.register(server.terminate)
    assert server.stdout is not None
    # Printed once the models are loaded.
    lines = (line.split() for line in server.stdout)
    url = next((words[-1] for words in lines if "serves" in words), "")
    while url and server.poll() is None:
        if is_ready(url):
            return server, url
        time.sleep(0.1)
    sys.exit(f"the server has ended; {log.name} says why")


def is_ready(url: str) -> bool:
    """Return whether the server takes requests, as load balancers ask."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


server, url = start(args.model)
print(f"{args.model} is served at {url}")

# %% The models: curl $URL/v1/models
client = OpenAI(base_url=f"{url}/v1", api_key="none")
(model,) = client.models.list()
# It has fields beyond those of OpenAI's API: classes, rows, columns, settings, ...
print(f"{model.id}: {model.kind}-conditional, {model.size}, edits: {model.edits}")
prompt = args.prompt or ("sunflower" if model.kind == "text" else model.classes[0])


def save(encoded: str, name: str) -> Path:
    """Write an image of a response: a PNG with metadata."""
    path = args.out / name
    path.write_bytes(base64.b64decode(encoded))
    print(f"  {path}")
    return path


# %% Images
# curl $URL/v1/images/generations -H 'Content-Type: application/json' \
#     -d '{"prompt": "sunflower", "n": 4, "seed": 7, "guidance_scale": 3.0}'
print("generations:")
# Settings beyond those of OpenAI's API go into extra_body.
answer = client.images.generate(
    model=model.id, prompt=prompt, n=COUNT, extra_body={"seed": 7, "guidance_scale": 3.0}
)
drawn = [save(image.b64_json, f"image-{image.seed}.png") for image in answer.data]

# %% Streaming: events with partial images, then the image
# curl --no-buffer $URL/v1/images/generations -H 'Content-Type: application/json' \
#     -d '{"prompt": "sunflower", "seed": 8, "stream": true, "partial_images": 3}'
print("streaming:")
events = client.images.generate(
    model=model.id, prompt=prompt, stream=True, partial_images=3, extra_body={"seed": 8}
)
for event in events:
    if event.type == "image_generation.partial_image":
        save(event.b64_json, f"growing-{event.partial_image_index}.png")
    else:
        save(event.b64_json, "grown.png")

# %% Edits: the white or transparent part of the mask is generated
# curl $URL/v1/images/edits -F image=@image-7.png -F mask=@mask.png \
#     -F prompt=sunflower -F n=4 -F seed=0
print("an edit:")
with Image.open(drawn[0]) as image:
    mask = Image.new("L", image.size)
    width, height = image.size
ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
file = io.BytesIO()
mask.save(file, format="PNG")
answer = client.images.edit(
    model=model.id,
    image=("image.png", drawn[0].read_bytes()),
    mask=("mask.png", file.getvalue()),
    prompt=prompt,
    n=COUNT,
    extra_body={"seed": 0},
)
for index, image in enumerate(answer.data):
    save(image.b64_json, f"inpainted-{index}.png")

# %% Other edits need no mask: complete, vary, outpaint
# curl $URL/v1/images/edits -F image=@image-7.png -F prompt=sunflower -F edit=outpaint -F right=4
print("wider:")
answer = client.images.edit(
    model=model.id,
    image=("image.png", drawn[0].read_bytes()),
    prompt=prompt,
    extra_body={"edit": "outpaint", "right": model.columns // 2, "seed": 0},
)
save(answer.data[0].b64_json, "wider.png")

# %% Shutdown: on SIGTERM the server finishes its requests and exits with 0
server.terminate()
assert server.wait(timeout=90) == 0
print("the server has ended")
