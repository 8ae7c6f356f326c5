"""Where pictures and captions come from: a folder, Parquet files, tars, a Hugging Face dataset, or the embedded corpora."""

from __future__ import annotations

from paris_ray.config import DataConfig, FolderSource, HfDatasetSource, ParquetSource, ScenesSource, WebdatasetSource
from paris_ray.data.sources.base import Source


def open_source(data: DataConfig) -> Source:
    """The source that a config names; nothing is read yet."""
    source, score = data.source, data.filter.score_column
    if isinstance(source, FolderSource):
        from paris_ray.data.sources.folder import ImageFolder

        return ImageFolder(source.uri, score)
    if isinstance(source, ParquetSource):
        from paris_ray.data.sources.parquet import Parquet

        return Parquet(source, score)
    if isinstance(source, WebdatasetSource):
        from paris_ray.data.sources.webdataset import Webdataset

        return Webdataset(source.uri, source.key, score)
    if isinstance(source, HfDatasetSource):
        from paris_ray.data.sources.hf_dataset import HfDataset

        return HfDataset(source, score)
    if isinstance(source, ScenesSource):
        from paris_ray.data.scenes import Scenes

        return Scenes(source, data.image_size)
    from paris_ray.data.openmoji import OpenMoji

    return OpenMoji(source, data.image_size)
