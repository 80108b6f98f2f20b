"""One unit of one array as the bytes of one object: chunks, indexes, Zarr shards and tars."""
