"""Requests and answers of the HTTP API: OpenAI's images endpoints, with our settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from llamagen.config import Setting, sampling_settings
from llamagen.pipeline.ranking import Ranking

OutputFormat = Literal["png", "jpeg", "webp"]

_Number = Annotated[float, Field(allow_inf_nan=False)]


def _optional(description: str, **limits: Any) -> Any:
    return Field(None, description=description, **limits)


def _setting_field(setting: Setting) -> Any:
    """Type and declaration of a request's field for a sampling setting, None by default."""
    lower = "gt" if setting.exclusive_minimum else "ge"
    finite = {"allow_inf_nan": False} if setting.type is float else {}
    limits = {lower: setting.minimum, "le": setting.maximum, **finite}
    annotation = setting.annotation | None
    return annotation, _optional(f"{setting.help} Default: the model's own.", **limits)


_Settings: Any = create_model(
    "Settings", **{each.name: _setting_field(each) for each in sampling_settings()}
)


class _Common(BaseModel):
    """Fields of all requests for images, beside the sampling settings."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(
        description="A text, or the name or number of a class.", min_length=1, examples=["llama"]
    )
    model: str | None = _optional("One of /v1/models. Default: the first of them.")
    n: int | None = Field(1, ge=1, le=1000, description="Images.")
    size: str | None = Field(
        "auto", max_length=20, description="Images have the model's own, whatever is asked for."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        "b64_json", description="The images themselves, or where to fetch them for a time."
    )
    output_format: OutputFormat | None = "png"
    output_compression: int | None = _optional("Quality of jpeg, webp. Default: 90.", ge=0, le=100)
    negative_prompt: str | None = _optional("What guidance leads away from.", min_length=1)
    blend: str | None = _optional("Second prompt or class: what suits both is drawn.", min_length=1)
    blend_share: _Number | None = _optional("How much of it. Default: 0.5.", ge=0, le=1)
    best_of: int | None = _optional(
        "Candidates for each image; the best is sent. Default: 1, inpainting 4.", ge=1, le=16
    )
    rank_by: Ranking | None = _optional(
        "The best: likelihood (default), or condition, what the prompt makes likelier."
    )
    seed: int | None = _optional(
        "Of the first image; the next count up. Default, and -1: random.", ge=-1, lt=2**64
    )
    user: str | None = _optional("Not kept.", max_length=1000)
    quality: str | None = _optional("No levels: use the settings above.", max_length=20)
    style: str | None = _optional("None to choose from.", max_length=20)
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = _optional("Nothing is moderated.", max_length=20)


class RequestBody(_Settings, _Common):  # type: ignore[misc]
    """Body of any request for images."""


class _StreamRequest(RequestBody):
    """A request that can be answered by a stream."""

    stream: bool | None = Field(
        False, description="Send events, with unfinished images if partial_images asks."
    )
    partial_images: int | None = Field(
        0, ge=0, le=64, description="Unfinished images of each; none of ranked or extended ones."
    )


class ImageRequest(_StreamRequest):
    """Body of ``POST /v1/images/generations``."""

    model_config = ConfigDict(strict=True)


class EditRequest(_StreamRequest):
    """Form of ``POST /v1/images/edits``, without its files."""

    edit: Literal["inpaint", "complete", "outpaint", "vary"] | None = _optional(
        "Default: inpaint with a mask, complete without one."
    )
    keep_rows: int | None = _optional("For complete: rows kept. Default: half.", ge=1, le=2**31)
    above: int | None = _optional("For outpaint in random order: rows above.", ge=0, le=2**31)
    below: int | None = _optional("For outpaint: rows of codes to draw below.", ge=0, le=2**31)
    left: int | None = _optional("For outpaint in random order: columns left.", ge=0, le=2**31)
    right: int | None = _optional("For outpaint: columns to draw on the right.", ge=0, le=2**31)
    keep: _Number | None = _optional("For vary: share kept. Default: 0.5.", gt=0, lt=1)


class VariationRequest(RequestBody):
    """Form of ``POST /v1/images/variations``, without its file."""

    keep: _Number | None = _optional("Share of the codes that is kept. Default: 0.5.", gt=0, lt=1)


class ImageData(BaseModel):
    """Image of a response."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="With the same model, prompt and settings, the same image.")


class TokenDetails(BaseModel):
    """Kinds of tokens."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Positions of the condition that were read, and codes of all candidates."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """Answer to a request for images without ``stream``."""

    created: int = Field(description="Seconds since 1970.")
    data: list[ImageData]
    model: str
    output_format: OutputFormat
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    usage: Usage
    settings: dict[str, Any] = Field(description="How the codes were drawn.")
    warnings: list[str] | None = _optional("What of the request was not taken at its word.")


class ImageEvent(BaseModel):
    """Event of a stream. With n above 1, the events of all images come as they are ready."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    index: int = Field(description="Which image of the request, from 0.")
    seed: int
    b64_json: str
    created_at: int
    output_format: OutputFormat
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    partial_image_index: int | None = _optional("Of partial images, from 0.")
    rows: int = Field(description="Finished rows of the grid, or as many codes in any order.")
    usage: Usage | None = _optional("Of completed images.")
    warnings: list[str] | None = _optional("Of completed images: as without a stream.")


class SettingCard(BaseModel):
    """A sampling setting, as requests may give it: a row of ``SamplingConfig``."""

    name: str
    help: str
    type: Literal["float", "int", "str"]
    default: float | int | str | None = Field(description="The model's own.")
    optional: bool = Field(description="Whether there may be none.")
    minimum: float | None
    exclusive_minimum: bool = Field(description="Whether the minimum itself is too small.")
    maximum: float | None
    choices: list[str] = Field(description="The values, if these are words.")


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["llamagen"] = "llamagen"
    kind: Literal["class", "text"] = Field(description="What its prompts are.")
    size: str
    rows: int = Field(description="Rows of the grid.")
    columns: int
    order: Literal["raster", "random"] = Field(description="Order in which codes are drawn.")
    codes: int = Field(description="Codes to choose from: the largest top_k that matters.")
    max_images: int = Field(description="Images that a request may ask for.")
    classes: list[str] | None = Field(description="Names of its classes.")
    edits: bool = Field(description="Whether it edits, blends, and chooses the best of several.")
    settings: dict[str, Any] = Field(description="For requests that give none.")
    declared_settings: list[SettingCard] = Field(description="Their meaning and ranges.")


class ModelList(BaseModel):
    """Answer to ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """Fault of a request or of the server."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is no success, as OpenAI's."""

    error: ErrorDetail


class Health(BaseModel):
    """Answer to ``/health`` and ``/ready``."""

    status: Literal["ok", "draining", "failed"]
