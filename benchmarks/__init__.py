"""Speed and memory of the library, measured beside its peers and recorded."""
