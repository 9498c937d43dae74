"""Write checkpoints: streaming, atomic, the same bytes each time."""
