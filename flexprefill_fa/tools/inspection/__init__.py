"""What a sparse prefill keeps and what it misses, head by head: collected from a model, shown in one HTML page."""
