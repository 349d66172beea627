"""The dataset on disk, version 1: names, types, files. `check` and `loader` read it, `write` writes it.

::

    OUT/dataset.json            schema version, format, splits, configuration, counts
    OUT/README.md               dataset card; makes datasets.load_dataset(OUT) find the splits
    OUT/manifest/SPLIT-00000-of-00001.parquet  (or .jsonl)
    OUT/images, masks, references              files named by content hash
    OUT/shards/SPLIT-000000.tar                instead of all these in the format "webdataset"
    OUT/dropped.jsonl           every file and face left out: path, stage, reason, detail
    OUT/report.html, report/    counts, histograms, contact sheets
    OUT/.build/                 cache of the stages

In a shard a record is KEY.jpg, KEY.masks.png, KEY.refs.jpg (its references side by side) and KEY.json (the manifest's fields, each
reference with ``strip_box``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.files import read_json

VERSION = 1
SPLITS = ("train", "test")

FIELDS = {
    "key": "content hash of the source photo, 32 hexadecimal digits",
    "image": "path of the picture, relative to the dataset",
    "masks": "path of a PNG of the picture's size; bit mask_bit of a pixel says whether it belongs to that subject",
    "width": "of the picture, pixels",
    "height": "of the picture, pixels",
    "caption": "a sentence",
    "caption_source": "metadata, model or template",
    "num_subjects": "length of subjects",
    "num_faces": "faces found on the photo, unused ones included",
    "subjects": "list, see SUBJECT",
    "sharpness": "standard deviation of the Laplacian",
    "aesthetics": "of the scorer named in dataset.json; may be null",
    "source_file": "path of the photo in the folder it came from",
    "source": "where it is from, as the metadata says",
    "licence": "as the metadata, or the file's copyright notice, says",
    "consent": "yes, no or unknown, of the people on it",
    "minor": "yes, no or unknown",
}
SUBJECT = {
    "identity": "the same for one person across photos",
    "mask_bit": "which bit of the mask file, 0 to 7",
    "face_box": "left, top, right, bottom in pixels of the picture",
    "body_box": "the same of the body",
    "mask_share": "share of the picture that the mask covers",
    "references": "list, see REFERENCE",
}
REFERENCE = {
    "image": "path of the reference, relative to the dataset",
    "width": "pixels",
    "height": "pixels",
    "augmented": "true: an altered crop of this very photo, the person is on no other",
    "from_key": "key of the photo it was cut from",
}


def arrow_schema() -> Any:
    """The Arrow schema of a manifest."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int32(), pa.float32()
    box = pa.list_(real, 4)
    reference = pa.struct(
        [("image", text), ("width", whole), ("height", whole), ("augmented", pa.bool_()), ("from_key", text)]
    )
    subject = pa.struct(
        [
            ("identity", text), ("mask_bit", whole), ("face_box", box), ("body_box", box), ("mask_share", real),
            ("references", pa.list_(reference)),
        ]
    )  # fmt: skip
    kinds = {
        "width": whole, "height": whole, "num_subjects": whole, "num_faces": whole,
        "sharpness": real, "aesthetics": real, "subjects": pa.list_(subject),
    }  # fmt: skip
    fields = [pa.field(name, kinds.get(name, text), metadata={"description": what}) for name, what in FIELDS.items()]
    return pa.schema(fields, metadata={"multicrafter_schema": str(VERSION)})


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a dataset this version can read.

    Raises:
        ValueError: The folder is no dataset, or of another version.
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise UserError(f"{folder} must be a dataset written by multicrafter data build, but it has no dataset.json")
    try:
        about = read_json(path)
        version = about["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be written by multicrafter data build, got {type(error).__name__}: {error}"
        ) from error
    if version != VERSION:
        raise UserError(f"{path} must have schema {VERSION}, got {version!r}")
    return dict(about)
