"""How pyarrow opens files of S3: by s3fs."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.fs as pafs


class ArrowFiles(pafs.FSSpecHandler):  # type: ignore[misc]
    """Opens files directly: pyarrow's handler first checks that a file exists, and takes any error to mean that it does not."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")
