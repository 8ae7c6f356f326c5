"""The part of the config that says what the data is: source, filters, frozen encoders, splits, and its clusters. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Literal

from pydantic import Field, model_validator

from paris_ray.strict import ConfigError, Place, Strict


class OpenMojiSource(Strict):
    """The embedded corpus: OpenMoji pictures (CC BY-SA 4.0) on coloured grounds, captioned with their Unicode names."""

    kind: Literal["openmoji"] = "openmoji"
    # How many base emoji, taken in the order of a hash of their code point; null takes all.
    emoji: Annotated[int, Field(ge=8)] | None = None
    # Names of the grounds; the first one is not named in captions.
    grounds: tuple[str, ...] = ("white", "blue", "yellow")


class ScenesSource(Strict):
    """Scenes composed of OpenMoji pictures (CC BY-SA 4.0), too many to be learnt by heart, with combinations that are held out."""

    kind: Literal["scenes"] = "scenes"
    # Rows for training and validation, and rows that each have a combination which those never have.
    seen: Annotated[int, Field(ge=1)] = 210_000
    unseen: Annotated[int, Field(ge=0)] = 10_000
    # How many kinds of thing, taken in the order of a hash of their name; null takes all.
    objects: Annotated[int, Field(ge=8)] | None = None
    # At most so many in one scene; null: three.
    things: Literal[2, 3] | None = None
    # Which sizes, colours and textures of the ground; null takes all. What is held out follows from them.
    sizes: tuple[Literal["large", "small"], ...] | None = None
    colours: tuple[str, ...] | None = None
    textures: tuple[Literal["plain", "striped", "dotted", "checked"], ...] | None = None
    # Another seed: other scenes, and other combinations held out.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class FolderSource(Strict):
    """A folder of images: ``name.jpg`` with its caption in ``name.txt`` or ``name.json``, or all captions in ``captions.csv``/``captions.jsonl``."""

    kind: Literal["folder"] = "folder"
    uri: Place


class _Columns(Strict):
    """Which column of a table holds what."""

    # A folder with the files, or one of them.
    uri: Place
    caption: str = "caption"
    # Bytes of an image file, a struct with these bytes (as Hugging Face datasets have it), or a name below the folder `images`.
    image: str = "image"
    images: Place | None = None
    # What identifies a row; null: the image's bytes and the caption.
    key: str | None = None


class ParquetSource(_Columns):
    """Parquet files: a row is an image and its caption."""

    kind: Literal["parquet"] = "parquet"


class HfDatasetSource(_Columns):
    """A Hugging Face dataset as ``save_to_disk`` writes it, one split."""

    kind: Literal["hf_dataset"] = "hf_dataset"


class WebdatasetSource(Strict):
    """Webdataset tars as img2dataset writes them: ``KEY.jpg`` with its caption in ``KEY.txt``, or as ``caption`` in ``KEY.json``."""

    kind: Literal["webdataset"] = "webdataset"
    # A folder with the tars, or one of them.
    uri: Place
    # Field of KEY.json that identifies a row; null: the image's bytes and the caption.
    key: str | None = None


Source = Annotated[OpenMojiSource | ScenesSource | FolderSource | ParquetSource | WebdatasetSource | HfDatasetSource, Field(discriminator="kind")]


class FilterConfig(Strict):
    """Which rows are refused although they could be used; each is a reject with its reason."""

    # Short side of the image in pixels.
    min_side: Annotated[int, Field(ge=1)] = 1
    # Long side over short side; null leaves it free.
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    min_caption_chars: Annotated[int, Field(ge=1)] = 1
    max_caption_chars: Annotated[int, Field(ge=1)] = 4000
    # A column of numbers, or a field of an image's .json, such as an aesthetic score; rows below min_score are refused.
    score_column: str | None = None
    min_score: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FilterConfig:
        if (self.score_column is None) != (self.min_score is None):
            raise ValueError(f"score_column is {self.score_column!r} and min_score is {self.min_score}; give both, or neither")
        if self.min_caption_chars > self.max_caption_chars:
            raise ValueError(f"min_caption_chars {self.min_caption_chars} is above max_caption_chars {self.max_caption_chars}; no caption is both")
        return self


class TimmEmbedding(Strict):
    """A frozen timm backbone as semantic embedding; the paper's is DINOv2 ViT-L/14."""

    kind: Literal["timm"] = "timm"
    model: str = "vit_large_patch14_dinov2.lvd142m"
    # A local safetensors file, or null for timm's own weights from the hub.
    weights: Place | None = None
    # Side of the square the backbone sees, in pixels; the paper states none, 224 costs a sixth of timm's 518.
    image_size: Annotated[int, Field(ge=14)] = 224


class OpenClipEmbedding(Strict):
    """The image tower of a CLIP that open_clip can build, at its own image size; the embedding is that which it compares with captions."""

    kind: Literal["open_clip"] = "open_clip"
    # hf-hub:OWNER/NAME or local-dir:PATH with open_clip_config.json and safetensors, or an architecture's name with `weights`.
    model: str = "hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
    # A local safetensors file; null where the model brings its own.
    weights: Place | None = None


class PackagedEmbedding(Strict):
    """EfficientNet-Lite0 with the ImageNet weights of a Python package; needs no network."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    image_size: Annotated[int, Field(ge=32)] = 96


Embedding = Annotated[TimmEmbedding | OpenClipEmbedding | PackagedEmbedding, Field(discriminator="kind")]


class VaeCodec(Strict):
    """A diffusers ``AutoencoderKL``; latents are the posterior's mean times its scaling factor."""

    kind: Literal["vae"] = "vae"
    # Hub id or local folder.
    source: Place = "stabilityai/sd-vae-ft-mse"
    # null takes the factor in the VAE's own config.
    scaling_factor: float | None = None


class PatchPcaCodec(Strict):
    """PCA of square patches, fitted on the training split: a latent codec that needs no weights from elsewhere."""

    kind: Literal["patch_pca"] = "patch_pca"
    downsampling: Annotated[int, Field(ge=1)] = 4
    channels: Annotated[int, Field(ge=1)] = 12


Codec = Annotated[VaeCodec | PatchPcaCodec, Field(discriminator="kind")]


class ClipText(Strict):
    """A CLIP text tower: all states after the final norm, padded to ``max_length``, no mask."""

    kind: Literal["clip"] = "clip"
    # Hub id, or a local folder that holds text_encoder/ (a transformers CLIPTextModel) as the released checkpoint does.
    source: Place = "openai/clip-vit-large-patch14"
    max_length: Annotated[int, Field(ge=4, le=77)] = 77


class MiniLmText(Strict):
    """MiniLM-L6 (384 wide) with the weights of a Python package; needs no network."""

    kind: Literal["minilm"] = "minilm"
    max_length: Annotated[int, Field(ge=4, le=256)] = 16


Text = Annotated[ClipText | MiniLmText, Field(discriminator="kind")]


class SplitConfig(Strict):
    """Shares kept from training, drawn by hash of the near-duplicate group before anything is fitted."""

    # Share of groups (for OpenMoji: base emoji) that training never sees at all.
    held_out_groups: Annotated[float, Field(ge=0, lt=0.5)] = 0.04
    # Share of rows of the other groups kept out (for OpenMoji: emoji × ground combinations).
    held_out_rows: Annotated[float, Field(ge=0, lt=0.5)] = 0.06
    # Share of rows of the other groups on which losses are watched.
    validation_rows: Annotated[float, Field(ge=0, lt=0.5)] = 0.04


class DataConfig(Strict):
    """From images and captions to the corpus."""

    source: Source
    # Side of the square picture in pixels: short side resized, centre cropped.
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    # Refuse an image whose header claims more pixels than this.
    max_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    filter: FilterConfig = FilterConfig()
    split: SplitConfig = SplitConfig()
    embedding: Embedding = TimmEmbedding()
    codec: Codec = VaeCodec()
    text: Text = ClipText()
    # For 11 M captions of 77 tokens: states (77 × 768 in float16, 118 kB each) are 1.3 TB and ready to use, token ids (int32, 308 bytes each) are
    # 3.4 GB before compression and are encoded again in training, about 1.5 % of a step of the paper's expert.
    store_text: Literal["states", "token_ids"] = "token_ids"
    # Rows in one corpus file: the unit of work and of resumption. Of tars and Hugging Face datasets it is one of their files instead.
    rows_per_part: Annotated[int, Field(ge=1)] = 2048
    # Bounds of the encoder actor pool and what each actor takes.
    min_encoders: Annotated[int, Field(ge=1)] = 1
    max_encoders: Annotated[int, Field(ge=1)] = 4
    encoder_cpus: float = 1.0
    encoder_gpus: float = 0.0
    encoder_batch: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _scored(self) -> DataConfig:
        if self.filter.score_column is not None and self.of_openmoji:
            raise ValueError(f"filter.score_column is {self.filter.score_column!r}, but the {self.source.kind} source has no scores; leave it out")
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> DataConfig:
        if isinstance(self.source, ScenesSource):
            for key in ("held_out_groups", "held_out_rows"):
                value, default = getattr(self.split, key), SplitConfig.model_fields[key].default
                if value not in (0, default):
                    raise ValueError(f"split.{key} is {value}, but the scenes source says itself what is held out (source.unseen); leave it out")
        return self

    @property
    def of_openmoji(self) -> bool:
        """Whether the pictures are made of OpenMoji's, which must be credited."""
        return isinstance(self.source, OpenMojiSource | ScenesSource)


class PartitionConfig(Strict):
    """Two-level k-means over the semantic embeddings; the number of coarse clusters is the number of experts."""

    # random: experts by hash of a row's group, or of its id where the source gives the split: the control that papers compare with.
    # It uses none of the keys below.
    method: Literal["kmeans", "random"] = "kmeans"
    fine: Annotated[int, Field(ge=2)] = 1024
    metric: Literal["cosine", "euclidean"] = "cosine"
    # What multiplies matrices; the result is the same. torch uses GPUs where the cluster has them, faiss must be installed.
    backend: Literal["numpy", "torch", "faiss"] = "numpy"
    # Whether a fine centroid counts in the coarse level as often as it has rows; the papers count each once.
    weighted: bool = False
    max_iterations: Annotated[int, Field(ge=1)] = 100
    # Largest share of the corpus one expert may get, as a multiple of an equal share; null leaves sizes free.
    max_share: Annotated[float, Field(gt=1.0)] | None = None
    contact_sheet: Annotated[int, Field(ge=1, le=400)] = 48
    # The last so many experts were added later, each with the rows of a source of its own (jobs.append --new-expert); no cluster was fitted for them.
    added: Annotated[int, Field(ge=0)] = 0

    def check_backend(self) -> None:
        """Raise ConfigError when the backend is not installed here."""
        if importlib.util.find_spec(self.backend) is None:
            raise ConfigError(f"partition.backend: {self.backend} is not installed; install it on every node, or pass --set partition.backend=numpy")
