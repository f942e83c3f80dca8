"""Where the rows of a batch keep their keys and values: on the host, or on a device."""
