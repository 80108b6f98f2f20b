"""Where the bytes of a cache are: a local folder or an object store, with exclusive publishing and leases."""
