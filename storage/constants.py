"""Constants: the arrays that a codec needs once per layer, such as scales and a decoding matrix.

`constants.zip` holds one zarr array per name. The record `constants.json` is written last, and constants exist if and
only if it exists. The commit record of every unit holds the digest of the record of the constants that made it.
"""

from collections.abc import Mapping

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.atomic import digest_hex
from tinymim.storage.blocks import Array, decode_arrays, encode_arrays, unzipped
from tinymim.storage.commit import Digest, RecordBase, parse_record, signed
from tinymim.storage.layout import CONSTANTS, CONSTANTS_RECORD
from tinymim.storage.manifest import FORMAT_VERSION, Layer, Size
from tinymim.storage.store import Store


class _ConstantsRecord(RecordBase):
    layer: str
    size_bytes: Size
    blake2b: Digest


def constants_places(layer: str) -> tuple[str, str]:
    """The paths of a layer's constants and of their record."""
    folder = layout.layer_folder(layer)
    return f"{folder}/{CONSTANTS}", f"{folder}/{CONSTANTS_RECORD}"


def encode_constants(layer: Layer, arrays: Mapping[str, Array]) -> tuple[bytes, bytes]:
    """Encode constants, each with at least one axis.

    Returns:
        The zip, and the record that makes it visible.
    """
    data = encode_arrays(arrays)
    record = {
        "format_version": FORMAT_VERSION,
        "spec_id": layer.spec_id,
        "layer": layer.name,
        "size_bytes": len(data),
        "blake2b": digest_hex(data),
    }
    return data, signed(record)


def read_constants(store: Store, layer: Layer) -> dict[str, Array] | None:
    """The constants of a layer by name, every byte checked; None if there are none.

    Raises:
        CacheMismatch: the record has an unknown format version.
        CacheCorrupt: the record is damaged or belongs to another layer; the zip is missing or changed. Names the file.
    """
    data = constants_bytes(store, layer)
    if data is None:
        return None
    path, _ = constants_places(layer.name)
    try:
        return decode_arrays(unzipped(data))
    except (ValueError, RuntimeError) as error:  # RuntimeError comes from the decompressor
        raise _corrupt(f"{store.place}/{path} is damaged: {error}") from error


def constants_bytes(store: Store, layer: Layer) -> bytes | None:
    """The zip of the constants, checked; None if there are none. Errors of `read_constants`."""
    record, _ = read_record(store, layer)
    if record is None:
        return None
    path, _ = constants_places(layer.name)
    try:
        data = store.read(path, record.size_bytes)
        if digest_hex(data) != record.blake2b:
            raise ValueError("it does not have its recorded digest")
    except FileNotFoundError as error:
        raise _corrupt(f"{store.place}/{path} is missing") from error
    except (ValueError, OSError) as error:
        raise _corrupt(f"{store.place}/{path} is damaged: {error}") from error
    return data


def constants_digest(store: Store, layer: Layer) -> str | None:
    """The digest of a layer's constants, None if there are none; errors of `read_constants` about the record."""
    return read_record(store, layer)[1]


def digest_of_constants(layer: Layer, arrays: Mapping[str, Array]) -> str:
    """The `constants_digest` that a layer with these constants would have."""
    _, record = encode_constants(layer, arrays)
    return parse_record(record, _ConstantsRecord, layer.name)[1]


def read_record(store: Store, layer: Layer) -> tuple[_ConstantsRecord | None, str | None]:
    """The record of the constants and its digest, both None if there are none; errors of `constants_digest`."""
    _, path = constants_places(layer.name)
    try:
        data = store.read(path, layout.COMMIT_LIMIT_BYTES)
    except FileNotFoundError:
        return None, None
    try:
        record, digest = parse_record(data, _ConstantsRecord, f"{store.place}/{path}")
        if record.spec_id != layer.spec_id or record.layer != layer.name:
            raise ValueError("it does not belong to this layer")
    except ValueError as error:
        raise _corrupt(f"{store.place}/{path} is damaged: {error}") from error
    return record, digest


def _corrupt(what: str) -> CacheCorrupt:
    return CacheCorrupt(
        what,
        hint="`tinymim cache repair RECIPE` makes the constants again if the images are the same; or restore "
        f"{CONSTANTS} and {CONSTANTS_RECORD} from a copy",
    )
