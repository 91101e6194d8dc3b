"""Images inside Parquet files, as Hugging Face datasets store them: `{bytes, path}`, a list of those, or plain bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from voco.errors import Refused
from voco.ingest.media.source import MediaSource, check_size
from voco.ingest.source_row import BadRow
from voco.store import parquet, storage

PARQUET = ".parquet"
PLAIN = ("image", "image_bytes", "jpg", "jpeg", "png", "webp")  # columns of plain bytes that are images


def file_uris(uri: str) -> list[str]:
    """The file itself, or every .parquet directly in the folder, by name. Raises Refused when there is none."""
    listed = [] if uri.endswith(PARQUET) else storage.list_shards(uri, (PARQUET,))
    files = [uri] if uri.endswith(PARQUET) else [storage.join(uri, file["name"]) for file in listed]
    if not files:
        raise Refused(f"inputs.annotations: {uri}: expected a .parquet file or a folder with .parquet files in it")
    return files


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that hold images, in the order of the file."""
    return [column.name for column in schema if _holds_images(column.name, column.type)]


def _holds_images(name: str, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return name in PLAIN and bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def encoded_images(row: dict[str, Any], columns: list[str]) -> list[bytes]:
    """The encoded images of a row. Raises BadRow(missing_media) for a path without bytes."""
    images: list[bytes] = []
    for column in columns:
        value = row[column]
        for item in value if isinstance(value, list) else [value]:
            data = item["bytes"] if isinstance(item, dict) else item
            if data is None and isinstance(item, dict) and item.get("path"):
                raise BadRow("missing_media", f"{column}: the file has the path {str(item['path'])[:100]!r} and no bytes")
            if data is not None:
                images.append(data)
    return images


def image_path(data: bytes) -> str:
    """The path of an image in `samples/`: its content's hash, because files and rows may repeat an image under any name."""
    return hashlib.sha256(data).hexdigest()[:32]


class ParquetImages:
    """The images of the rows at locations `file:row group:row`. Keeps the image columns of one row group."""

    concurrent = False  # the rows of a row group are read together

    def __init__(self, uri: str) -> None:
        self.folder = uri.rsplit("/", 1)[0] if uri.endswith(PARQUET) else uri
        self.group: tuple[str, int] | None = None
        self.rows: list[dict[str, bytes]] = []

    def sources(self, locations: list[str]) -> Iterator[MediaSource]:
        """The source of each location, in order."""
        for location in locations:
            name, group, row = location.rsplit(":", 2)
            yield _ParquetRow(self, name, int(group), int(row))

    def read(self, name: str, group: int, row: int) -> dict[str, bytes]:
        """The images of a row by their paths."""
        if self.group != (name, group):
            with parquet.open_parquet(storage.join(self.folder, name)) as file:
                columns = image_columns(file.schema_arrow)
                table = file.read_row_group(group, columns=columns)
            self.rows = [{image_path(data): data for data in encoded_images(row, columns)} for row in table.to_pylist()]
            self.group = (name, group)
        return self.rows[row]


@dataclass(frozen=True)
class _ParquetRow:
    files: ParquetImages
    name: str
    group: int
    row: int

    def read(self, path: str, limit: int) -> bytes:
        """The image's bytes. Raises BadRow: media_too_large, missing_media (the file has changed)."""
        try:
            images = self.files.read(self.name, self.group, self.row)
        except (FileNotFoundError, IndexError, pa.ArrowInvalid) as error:
            raise BadRow("missing_media", f"{path}: {self.name} has changed or is gone") from error
        if path not in images:
            raise BadRow("missing_media", f"{path}: {self.name} has changed")
        check_size(path, len(images[path]), limit)
        return images[path]
