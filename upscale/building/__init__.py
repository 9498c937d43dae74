"""From a group of models to a checkpoint: what is upscaled, with what ranks, written how."""
